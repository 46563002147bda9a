"""The line of stages: data -> pretrain -> sft -> reward -> ppo (or preference, or distill) -> evaluate.

    run(recipe)                       # make what is not made, resume what is half made, skip the rest
    run(recipe, only="sft")           # this stage alone; what it needs must be there
    run(recipe, start="reward")       # this stage and all after it
    run(recipe, until="sft")          # this stage and all before it

A stage is a function `run(recipe, inputs, out, monitor)`: it reads its parents' directories, writes into `out`, which may hold
its own checkpoints from an earlier try, and reports figures to the monitor. Hashes, markers and the order are kept here.
"""

import importlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.connect import connect
from data.files import write_json
from rlhf import artefacts, preflight, recipe_file
from rlhf.artefacts import ALIGNING, STAGES, Identity, stages_in, stages_of
from rlhf.errors import RecipeError
from rlhf.inputs import outside_inputs
from rlhf.monitoring import Monitor, console, duration, read_metrics, say
from rlhf.recipe import Recipe

StageFunction = Callable[[Recipe, dict[str, Path], Path, Monitor], None]

# The figures that tell how a stage went, on its one line; names as in summary.json.
TELLING = (
    "data/train_tokens",
    "data/bytes_per_token",
    "pretrain/val_bits_per_byte",
    "sft/val_loss",
    "reward/pair_accuracy",
    "preference/pair_accuracy",
    "ppo/reward_last",
    "ppo/log_prob_gap_max",
    "distill/divergence_last",
    "distill/log_prob_gap_max",
    "evaluate/sft_success",
    "evaluate/aligned_success",
    "evaluate/reward_gain_sd",
    "evaluate/kl_nats",
    "evaluate/independent_gain",
)


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated like ctrl-C: by Ray, by the stages, and by whoever waits for us."""


def stage_function(stage: str) -> StageFunction:
    """The stage's `run`. Imported only when it has to run: torch and vLLM take seconds."""
    module = importlib.import_module("rlhf.stage_data" if stage == "data" else f"rlhf.{stage}")
    function: StageFunction = module.run
    return function


def run(
    recipe: Recipe,
    only: str | None = None,
    start: str | None = None,
    until: str | None = None,
    function_of: Callable[[str], StageFunction] = stage_function,
) -> Path:
    """Carry out the recipe's stages and return the run's directory.

    Raises RecipeError before anything starts when the recipe cannot work, when another driver holds this run, or when
    `only` / `start` need an earlier stage that is not up to date; DataError and ClusterError as the stages find them.
    """
    chosen = choose(stages_of(recipe), only, start, until)
    preflight.check(recipe, chosen)
    run_dir = artefacts.run_directory(recipe)
    with artefacts.lock(run_dir), _raising_on_sigterm():
        identities = artefacts.identities(recipe, outside_inputs(recipe))
        _require_made(run_dir, identities, chosen)
        (run_dir / "recipe.yaml").write_text(recipe_file.resolved(recipe), encoding="utf-8")
        say(f"{recipe.name}  ->  {_shown(run_dir)}", style="bold")

        def carry_out() -> list[str]:
            return [stage for stage in chosen if _bring_up(stage, recipe, run_dir, identities[stage], function_of)]

        if all(artefacts.state(run_dir / s, identities[s]) == "made" for s in chosen):
            ran = carry_out()  # nothing to run: no need to wait for Ray
        else:
            with connect(recipe.cluster.address), _raising_on_sigterm():  # Ray sets a handler of its own when it starts
                _check_room(recipe, chosen)
                ran = carry_out()
        write_summary(run_dir)
        _finish(run_dir, ran)
    return run_dir


def choose(stages: tuple[str, ...], only: str | None = None, start: str | None = None, until: str | None = None) -> tuple[str, ...]:
    """Those of `stages` to bring up to date, in order."""
    for name in (only, start, until):
        if name is not None and name not in stages:
            hint = f"; align={name} puts it into the line" if name in STAGES else ""
            raise RecipeError(f"there is no stage {name!r}; the stages are {', '.join(stages)}{hint}")
    if only is not None and (start is not None or until is not None):
        raise RecipeError("--only is one stage, --from and --until are a part of the line: give one or the other")
    first = stages.index(only or start or stages[0])
    last = stages.index(only or until or stages[-1])
    if last < first:
        raise RecipeError(f"--from {start} --until {until}: {until} comes before {start}")
    return stages[first : last + 1]


def _check_room(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """The cluster is known now and nothing of ours runs on it yet: can it hold each stage, and can the groups of actors meet?

    Raises ClusterError with a table, or naming a node without free ports.
    """
    from cluster import placement, ports
    from rlhf.graph import EVALUATED, demands
    from rlhf.training import layout
    from rlhf.weight_sender import BROADCASTS, transport

    if {"pretrain", "sft", "reward", "preference"} & set(stages):
        placement.check({"training": layout(recipe).demand})
    opened = []
    if {"ppo", "distill"} & set(stages):
        opened.append(demands(recipe, ("policy", "rollout") if recipe.align == "distill" else None))
    if "evaluate" in stages:
        opened.append(demands(recipe, EVALUATED))
    for groups in opened:
        placement.check(groups, recipe.ppo.colocate)
        meeting = [role for role, demand in groups.items() if demand.meets and role != "rollout"]  # engines work each for itself
        needed = len(meeting) + (transport(recipe) in BROADCASTS)  # the policy meets them once more to send its weights
        if needed:
            ports.check(recipe.cluster.ports, needed, recipe.cluster.placement_timeout_s)


def write_summary(run_dir: Path) -> None:
    """summary.json: every stage's figures under `stage/name`, its `stage/wall_seconds`, and their sum `wall_seconds`."""
    summary: dict[str, Any] = {}
    total = 0.0
    for stage in stages_in(run_dir):
        manifest = artefacts.read_json(run_dir / stage / "manifest.json")
        if manifest is not None:
            summary |= read_metrics(run_dir / stage)
            summary[f"{stage}/wall_seconds"] = manifest["wall_seconds"]
            total += manifest["wall_seconds"]
    summary["wall_seconds"] = round(total, 3)
    write_json(run_dir / "summary.json", summary)


# ------------------------------------------------------------------------------------------------ one stage


def _bring_up(stage: str, recipe: Recipe, run_dir: Path, identity: Identity, function_of: Callable[[str], StageFunction]) -> bool:
    """Make one stage unless it is made; whether it had to run."""
    out = run_dir / stage
    before = artefacts.read_json(out / "manifest.json")
    found = artefacts.prepare(out, identity)
    if found == "made":
        manifest = artefacts.read_json(out / "manifest.json") or {}
        made = datetime.fromisoformat(manifest["made_at"]).strftime("%d %b %H:%M")
        _line("green", "=", stage, "up to date", f"made {made} of {identity.hash[:8]}", figures(run_dir, stage))
        return False
    if found == "half":
        _line("yellow", ">", stage, "resuming", "from its last checkpoint")
    elif before is not None:
        reasons = artefacts.difference(before, identity)
        _line("yellow", ">", stage, "again", ", ".join(reasons[:3]) + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""))
    elif not console.is_terminal:  # on a terminal the live line says so
        _line("yellow", ">", stage, "running")

    inputs = {parent: run_dir / parent for parent in identity.parents}
    since = time.monotonic()
    monitor = Monitor(stage, out)
    try:
        function_of(stage)(recipe, inputs, out, monitor)
    except KeyboardInterrupt:
        monitor.close()
        _line("yellow", "x", stage, "stopped", f"after {duration(time.monotonic() - since)}")
        raise
    finally:
        monitor.close()
    seconds = time.monotonic() - since
    artefacts.commit(out, identity, seconds)
    _line("green", "+", stage, duration(seconds), figures(run_dir, stage))
    return True


def _require_made(run_dir: Path, identities: dict[str, Identity], chosen: tuple[str, ...]) -> None:
    """Stages that the chosen ones read but that are not chosen themselves must be whole and up to date."""
    needed = [s for s in identities if s not in chosen and any(s in identities[c].parents for c in chosen)]
    wrong = []
    for stage in needed:
        found = artefacts.state(run_dir / stage, identities[stage])
        if found == "other":
            before = artefacts.read_json(run_dir / stage / "manifest.json") or {}
            wrong.append(f"{stage} is out of date ({', '.join(artefacts.difference(before, identities[stage])[:3])})")
        elif found != "made":
            wrong.append(f"{stage} is {'only half made' if found == 'half' else 'not made yet'}")
    if wrong:
        raise RecipeError(f"{chosen[0]} needs what is not there: {'; '.join(wrong)}. Run without --only and --from to make it.")


def figures(run_dir: Path, stage: str) -> str:
    """The telling figures of a made stage as `name value, name value`; when it has none of those, its first three."""
    metrics = read_metrics(run_dir / stage)
    names = [n for n in TELLING if n in metrics] or list(metrics)[:3]
    return ", ".join(f"{n.removeprefix(stage + '/')} {_number(metrics[n])}" for n in names)


# ------------------------------------------------------------------------------------------------ the console


def _finish(run_dir: Path, ran: list[str]) -> None:
    """The report of a whole run, and where to go from here."""
    manifests = {s: artefacts.read_json(run_dir / s / "manifest.json") or {} for s in stages_in(run_dir)}
    report = run_dir / "report.html"
    if all(manifests.values()) and (ran or not report.exists()):
        from rlhf.report import write

        report = write(run_dir)
    now = artefacts.code_version()["packages"]
    stale = [s for s, m in manifests.items() if m and m["code"]["packages"] != now]
    if stale:
        first = _shown(run_dir / stale[0])
        say(f"  note: the code has changed since {', '.join(stale)} ran; remove {first} to make it, and what follows, anew")
    total = sum(m.get("wall_seconds", 0.0) for m in manifests.values())
    done = f"done, {duration(total)} of work" if ran else "nothing to do: all of it is up to date"
    say(f"{done}  ->  {_shown(report if report.exists() else run_dir)}", style="bold")
    if any(manifests.get(s) for s in ALIGNING):
        say(f"  talk to it    roundhouse chat {_shown(run_dir)}\n  curves        tensorboard --logdir {_shown(run_dir)}")


def _line(colour: str, sign: str, stage: str, head: str, *rest: str) -> None:
    """`+ pretrain   2 min 41 s    val_bits_per_byte 1.74`; the sign is for eyes without colours."""
    marks = {"+": "✓", "=": "✓", ">": "▸", "x": "✗"}
    tail = "   ".join(r for r in rest if r)
    if console.is_terminal:
        console.print(f"[{colour}]{marks[sign]}[/] [bold]{stage:<9}[/] {head:<11} ", end="")
        console.print(tail, style="dim", markup=False, soft_wrap=True)
    else:
        say(f"{marks[sign]} {stage:<9} {head:<11} {tail}".rstrip())


def _number(value: float | int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value


def _shown(path: Path) -> str:
    """Relative when it lies below the working directory, as one would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread, so that `with` and `finally` blocks run as they do for ctrl-C.

    Whatever a library makes of the interruption on its way up (Ray's C++ turns it into a plain KeyboardInterrupt), it leaves
    here as Terminated.
    """
    if threading.current_thread() is not threading.main_thread():  # a trial of `roundhouse tune`; its process is ended from outside
        yield
        return
    received = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except BaseException as error:
        if received and not isinstance(error, Terminated):
            raise Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
