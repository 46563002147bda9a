"""Who worked when in a PPO step, who waited, and for whom.

    spans = collect(graph, seconds)                     # {"policy[0]": [("log_probs", began, ended), ...], ...}
    shares = idle_shares(spans, began, ended)           # {"policy": 0.62, ...}
    write_trace(spans, began, out / "timeline" / "step-7.json")      # opens in chrome://tracing and ui.perfetto.dev

Every actor notes its own calls (`cluster.groups.Worker`), by its node's clock: between nodes the picture is as exact as their clocks
agree. A wait is put down to whoever worked meanwhile; where nobody did, to the controller.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.deadlines import wait
from cluster.groups import Span
from rlhf.graph import Graph, ask_all

Spans = Mapping[str, Sequence[Span]]  # actor -> what it did, ascending

CONTROLLER = "the controller"
KEPT = 20  # traces of the newest steps; one is some 100 kB
SHORTEST = 1e-3  # seconds; shorter waits are no waits


def collect(graph: Graph, seconds: float) -> dict[str, list[Span]]:
    """What every actor of the graph did since the last call."""
    return wait(ask_all(graph, "work_done"), seconds, "timeline")


def idle_shares(spans: Spans, began: float, ended: float) -> dict[str, float]:
    """Of each role, the share of [began, ended] in which its actors did nothing, their mean."""
    shares = defaultdict(list)
    for actor, done in spans.items():
        busy = sum(max(0.0, min(end, ended) - max(start, began)) for _, start, end in done)
        shares[role_of(actor)].append(max(0.0, 1 - busy / (ended - began)))
    return {role: sum(of) / len(of) for role, of in shares.items()}


def waits(spans: Spans, began: float, ended: float) -> Iterator[tuple[str, float, float, str]]:
    """(actor, from, to, for whom) of every wait within [began, ended], split where somebody else takes over.

    For whom: the role and the call, as "rollout: generate", that filled most of the time.
    """
    for actor, done in spans.items():
        edges = [began, *(edge for _, start, end in done for edge in (start, end)), ended]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if end - start >= SHORTEST:
                yield actor, start, end, _reason(spans, role_of(actor), start, end)


def _reason(spans: Spans, role: str, start: float, end: float) -> str:
    longest: dict[str, float] = {}
    for actor, done in spans.items():
        if role_of(actor) == role:
            continue
        meanwhile: dict[str, float] = defaultdict(float)
        for what, a, b in done:
            meanwhile[f"{role_of(actor)}: {what}"] += max(0.0, min(b, end) - max(a, start))
        longest |= {reason: max(seconds, longest.get(reason, 0.0)) for reason, seconds in meanwhile.items()}
    most = max(longest, key=lambda reason: longest[reason], default=CONTROLLER)
    return most if longest.get(most, 0.0) > 0 else CONTROLLER


def role_of(actor: str) -> str:
    return actor.partition("[")[0]


def trace(spans: Spans, began: float, ended: float) -> dict[str, Any]:
    """The Chrome trace of one step: a row for every actor, its calls, and its waits with their reasons. Times in microseconds."""
    rows = {actor: row for row, actor in enumerate(spans)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": actor}} for actor, row in rows.items()
    ]

    def event(actor: str, name: str, kind: str, start: float, end: float, args: dict[str, str]) -> None:
        time = {"ts": round((start - began) * 1e6), "dur": round((end - start) * 1e6)}
        events.append({"ph": "X", "name": name, "cat": kind, "pid": 0, "tid": rows[actor], **time, "args": args})

    for actor, done in spans.items():
        for what, start, end in done:
            event(actor, what, "work", start, end, {})
    for actor, start, end, reason in waits(spans, began, ended):
        event(actor, "waits", "wait", start, end, {"for": reason})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(spans: Spans, began: float, ended: float, folder: Path, step: int) -> None:
    """Write folder/step-N.json; the newest `KEPT` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step-{step}.json").write_text(json.dumps(trace(spans, began, ended)), encoding="utf-8")
    (folder / f"step-{step - KEPT}.json").unlink(missing_ok=True)
