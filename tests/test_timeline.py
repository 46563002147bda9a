"""Who worked, who waited and for whom: arithmetic on spans."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import charts
from rlhf.timeline import CONTROLLER, KEPT, idle_shares, trace, waits, write_trace

SPANS = {
    "rollout[0]": [("generate", 10.0, 14.0)],
    "policy[0]": [("log_probs", 13.0, 14.5), ("update", 15.0, 18.0)],
    "policy[1]": [("log_probs", 13.0, 14.0), ("update", 15.0, 18.0)],
    "critic[0]": [("update", 15.0, 19.0)],
}


def test_idle_shares() -> None:
    found = idle_shares(SPANS, 10.0, 20.0)
    assert found == pytest.approx({"rollout": 0.6, "policy": (0.55 + 0.6) / 2, "critic": 0.6})


def test_a_wait_is_put_down_to_whoever_worked() -> None:
    found = [(actor, start, end, reason) for actor, start, end, reason in waits(SPANS, 10.0, 20.0)]
    assert ("policy[0]", 10.0, 13.0, "rollout: generate") in found
    assert ("policy[0]", 18.0, 20.0, "critic: update") in found
    assert ("policy[0]", 14.5, 15.0, CONTROLLER) in found, "its own other rank is no reason"
    assert ("rollout[0]", 14.0, 20.0, "critic: update") in found


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 5)), max_size=6), st.floats(0, 3))
def test_work_and_waits_fill_the_step(pieces: list[tuple[float, float]], rest: float) -> None:
    now, done = 100.0, []
    for gap, length in pieces:
        done.append(("update", now + gap, now + gap + length))
        now += gap + length
    spans = {"policy[0]": done, "critic[0]": [("update", 100.0, 101.0)]}
    waited = sum(end - start for actor, start, end, _ in waits(spans, 100.0, now + rest + 1) if actor == "policy[0]")
    worked = sum(end - start for _, start, end in done)
    assert waited + worked == pytest.approx(now + rest + 1 - 100.0, abs=1e-3 * (len(pieces) + 1))


def test_the_trace_is_chromes_and_can_be_drawn(tmp_path: Path) -> None:
    for step in range(1, KEPT + 3):
        write_trace(SPANS, 10.0, 20.0, tmp_path, step)
    assert len(list(tmp_path.iterdir())) == KEPT
    found = json.loads((tmp_path / f"step-{KEPT}.json").read_text())
    assert found == trace(SPANS, 10.0, 20.0)
    update = next(e for e in found["traceEvents"] if e["name"] == "update" and e["tid"] == 3)
    assert (update["ph"], update["ts"], update["dur"]) == ("X", 5_000_000, 4_000_000)
    svg = charts.timeline(found)
    assert all(actor in svg for actor in SPANS)
    assert "waits for critic: update" in svg
