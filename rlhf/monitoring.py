"""Numbers out: the live line, TensorBoard, metrics.jsonl and metrics.json, always under the same names.

    monitor = Monitor("sft", out)
    monitor.log(step, {"loss": 2.31})               # sft/loss in out/tb and one line of out/metrics.jsonl
    monitor.progress(step, steps, "loss 2.31")      # the live line; without a terminal about ten plain lines a stage
    monitor.result("val_loss", 2.2)                 # a final figure: out/metrics.json and, as sft/val_loss, summary.json
    monitor.close()                                 # the pipeline calls this

A name that already holds a slash (`sync/log_prob_gap`) is kept as it is. Who computes a step logs it: the driver in PPO, rank 0 in
training. The driver shows progress and keeps results.
"""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data.files import write_json

console = Console(highlight=False)
errors = Console(highlight=False, stderr=True)
PLAIN_LINES = 10  # lines of progress per stage when nobody watches a terminal
PLAIN_SECONDS = 5.0  # and never faster than this


class Monitor:
    """Where a stage's numbers go. Cheap to make: TensorBoard is opened by the first `log`."""

    def __init__(self, stage: str, out: Path, total_steps: int | None = None) -> None:
        self.stage = stage
        self.out = Path(out)
        self.results: dict[str, float | int | str] = {}
        self._lines: Any = None
        self._tensorboard: Any = None
        self._live: Live | None = None
        self._bar, self._task = _bar(stage, total_steps)
        self._said_at, self._said_tenth = time.monotonic(), 0
        if console.is_terminal:
            self._live = Live(self._bar, console=console, transient=True, refresh_per_second=4)
            self._live.start()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def name(self, short: str) -> str:
        """`stage/short`, or `short` itself when it names its own stage."""
        return short if "/" in short else f"{self.stage}/{short}"

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars of one step. Steps ascend within a try; the first call decides where a resumed try takes over:
        what an earlier try wrote at that step or later is dropped, in metrics.jsonl and in TensorBoard, so curves never fold back."""
        if self._lines is None:
            self._open(step)
        named = {self.name(k): float(v) for k, v in values.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in named.items()}  # JSON knows no NaN
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        for k, v in named.items():
            self._tensorboard.add_scalar(k, v, step)

    def progress(self, step: int, total: int, text: str = "") -> None:
        """`step` of `total` is done; `text` says how it goes, for example "loss 2.31, 4,100 tok/s"."""
        self._bar.update(self._task, completed=step, total=total, text=text, count=f"{step:,}/{total:,}")
        if self._live is None:
            now, tenth = time.monotonic(), step * PLAIN_LINES // max(total, 1)
            self._said_tenth = min(self._said_tenth, tenth)  # another count has begun
            if tenth > self._said_tenth and now - self._said_at >= PLAIN_SECONDS:
                self._said_at, self._said_tenth = now, tenth
                say(f"  {self.stage:<9} {step}/{total}" + (f"  {text}" if text else ""))

    def say(self, text: str) -> None:
        """One line worth keeping on the screen, above the live line."""
        say(f"  {self.stage:<9} {text}")

    def result(self, name: str, value: float | int | str) -> None:
        """A final figure of the stage. It is kept at once, so that a figure of an early phase survives a restart."""
        self.results[name] = value
        path = self.out / "metrics.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**before, self.name(name): value})

    def close(self) -> None:
        """Flush everything and take the live line away. Calling it twice is fine."""
        if self._live is not None:
            self._live.stop()
        if self._lines is not None:
            self._lines.close()
            self._tensorboard.close()
            self._lines = self._tensorboard = None

    def _open(self, first_step: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and not every stage logs

        path = self.out / "metrics.jsonl"
        if path.exists():
            _drop_from(path, first_step)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._tensorboard = SummaryWriter(str(self.out / "tb"), purge_step=first_step, flush_secs=5)  # type: ignore[no-untyped-call]


def say(text: str, style: str | None = None) -> None:
    """Print one line; long ones are not wrapped, so that logs stay greppable."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`8.1 s`, `2 min 41 s`, `3 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def read_metrics(out: Path) -> dict[str, float | int | str]:
    """The final figures of a stage directory under their full names; empty when it has none yet."""
    path = out / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _drop_from(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl before `step`; a last line that a kill cut short goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            continue
        kept.append(line)
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)


def _bar(stage: str, total: int | None) -> tuple[Progress, TaskID]:
    bar = Progress(
        SpinnerColumn(style="yellow"),
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=24, complete_style="yellow", finished_style="green", pulse_style="yellow"),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
    )
    return bar, bar.add_task(stage, total=total, text="", count="")
