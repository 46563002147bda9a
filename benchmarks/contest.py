"""Contests between us and our peers: processes that take turns, medians, a table, JSON.

    asked = arguments(__doc__, CONTESTS).parse_args()
    run(CONTESTS, asked, prepare, compare)

Rows are {"work", "ours", "peer", "theirs", "unit", "ratio"}; a ratio above 1 means that we are faster, or need less memory. Every figure is
the median of `--rounds` processes, which take turns: ours, peer, peer, ours, ... All have 2 threads and one allocator, but for peers that
a contest wants as they come.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import ROOT
from cluster.connect import WORKER_ENV

PEERS = ROOT / ".venv-peers" / "bin" / "python"
THREADS = 2
Figures = dict[str, float]  # "rate": units per second, "memory_gib": the peak


@dataclass(frozen=True)
class Contest:
    """One kind of work, who does it, and what is counted."""

    work: str
    runners: dict[str, list[str]]  # who -> arguments of its runner
    unit: str
    steps: int
    scripts: tuple[str, str] = ("ours.py", "peers.py")  # of this folder: WORK WHO FOLDER OUT STEPS [more], one line of JSON at the end
    peers: Path = PEERS  # the Python that runs the second script
    as_they_come: Sequence[str] = ()  # runners whose allocator is left as glibc has it


def arguments(about: str | None, works: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=works, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser


def needs_peers(python: Path = PEERS) -> None:
    if not python.exists():
        raise SystemExit(f"`make {python.parts[-3].removeprefix('.venv-')}` makes the environment that the peers run in")


def peer(script: str, folder: Path, python_path: str = "") -> None:
    """Run a script of this folder by the peers' environment, on one thread. Raises RuntimeError with what it said when it fails."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path}
    command = [str(PEERS), str(ROOT / "benchmarks" / script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, cwd=ROOT, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-3000:]}")


def compete(contests: Sequence[Contest], rounds: int, folder: Path) -> list[tuple[Contest, dict[str, list[Figures]]]]:
    """What every runner of every contest found, round by round."""
    results = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=sum(len(c.runners) for c in contests) * rounds)
        for contest in contests:
            found: dict[str, list[Figures]] = {who: [] for who in contest.runners}
            for turn in range(rounds):
                for who in list(contest.runners)[:: 1 if turn % 2 == 0 else -1]:
                    progress.update(bar, description=f"{contest.work}: {who}")
                    found[who].append(measure(contest, contest.runners[who], folder, who not in contest.as_they_come))
                    progress.advance(bar)
            results.append((contest, found))
    return results


def measure(contest: Contest, runner: list[str], folder: Path, keep_blocks: bool = True) -> Figures:
    """Run one process to its end. keep_blocks: its allocator is told to keep freed blocks, as our workers are."""
    who, *rest = runner
    python, script = (sys.executable, contest.scripts[0]) if who == "ours" else (str(contest.peers), contest.scripts[1])
    plain = {name: value for name, value in os.environ.items() if name not in WORKER_ENV}
    quiet = {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env = plain | (WORKER_ENV if keep_blocks else {}) | quiet
    with tempfile.TemporaryDirectory() as out:
        command = [python, str(ROOT / "benchmarks" / script), contest.work, who, str(folder), out, str(contest.steps), *rest]
        done = subprocess.run(command, text=True, capture_output=True, env=env, cwd=ROOT, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def middle(found: dict[str, list[Figures]], who: str, what: str) -> float:
    return statistics.median(run[what] for run in found[who])


def rates(contest: Contest, found: dict[str, list[Figures]]) -> list[dict[str, Any]]:
    """A row for each peer: units per second."""
    ours = middle(found, "ours", "rate")
    rows = []
    for peer in (who for who in found if who != "ours"):
        theirs = middle(found, peer, "rate")
        rows.append({"work": contest.work, "ours": ours, "peer": peer, "theirs": theirs, "unit": contest.unit, "ratio": ours / theirs})
    return rows


def show(rows: list[dict[str, Any]], out: Path | None) -> None:
    table = Table("work", "ours", "peer", "theirs", "unit", "ratio")
    for row in rows:
        table.add_row(row["work"], f"{row['ours']:,.2f}", row["peer"], f"{row['theirs']:,.2f}", row["unit"], f"{row['ratio']:.2f}")
    Console().print(table)
    if out:
        out.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def run(
    contests: Sequence[Contest],
    asked: argparse.Namespace,
    prepare: Callable[[Path], None],
    compare: Callable[[Contest, dict[str, list[Figures]]], list[dict[str, Any]]] = rates,
) -> list[dict[str, Any]]:
    """`prepare` the folder that all runners read, let them compete, and return the rows."""
    chosen = [contest for contest in contests if not asked.work or contest.work in asked.work]
    if not chosen:
        return []
    for contest in chosen:
        needs_peers(contest.peers)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        results = compete(chosen, asked.rounds, Path(name))
    return [row for contest, found in results for row in compare(contest, found)]
