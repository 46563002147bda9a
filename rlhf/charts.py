"""The curves of a run: inline SVG that follows the page's light or dark colours, and one PNG picture.

    draw(CHARTS["pretrain"][1], rows, summary)     # '<svg ...>', or None when the run has no such numbers
    picture(rows_of_all_stages, summary, path)     # the four key curves
    timeline(trace)                                # '<svg ...>', who worked when in one step

`rows` are the lines of a stage's metrics.jsonl: {"step": 10, "time": ..., "sft/loss": 2.3, ...}.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = Sequence[Mapping[str, Any]]
Floats = npt.NDArray[np.float64]

POINTS = 300  # per curve: longer runs are averaged down to it, so that the page stays small


@dataclass(frozen=True)
class Curve:
    metric: str
    label: str = ""
    strong: bool = True  # the one to look at; others are thin
    band: str = ""  # a metric to shade on both sides


@dataclass(frozen=True)
class Level:
    """A line to compare with: a figure of summary.json, or a number."""

    label: str
    value: str | float


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    curves: tuple[Curve, ...]
    levels: tuple[Level, ...] = ()
    log: bool = False


_COMPRESSORS = (Level("gzip −9", "evaluate/gzip_bits_per_byte"), Level("xz −9", "evaluate/xz_bits_per_byte"))


def _engine_against_policy(stage: str) -> Chart:
    curves = (Curve(f"{stage}/log_prob_gap", "rollouts", False), Curve("sync/log_prob_gap", "after each sync"))
    return Chart("Engine against policy", "largest difference, nats", curves, log=True)


CHARTS: dict[str, tuple[Chart, ...]] = {
    "pretrain": (
        Chart("Loss", "nats per token", (Curve("pretrain/loss", "training", False), Curve("pretrain/val_loss", "held out"))),
        Chart("Held-out text", "bits per byte", (Curve("pretrain/val_bits_per_byte", "model"),), _COMPRESSORS),
    ),
    "sft": (Chart("Loss", "nats per token", (Curve("sft/loss", "training", False), Curve("sft/val_loss", "held out"))),),
    "reward": (
        Chart("Loss", "nats per pair", (Curve("reward/loss", "training", False), Curve("reward/val_loss", "held out"))),
        Chart(
            "Pairs ordered as people did",
            "fraction",
            (Curve("reward/accuracy", "training", False), Curve("reward/pair_accuracy", "held out")),
            (Level("a coin", 0.5),),
        ),
    ),
    "preference": (
        Chart("Loss", "per ranking", (Curve("preference/loss", "training", False), Curve("preference/val_loss", "held out"))),
        Chart(
            "Pairs ordered as people did",
            "fraction",
            (Curve("preference/accuracy", "training", False), Curve("preference/pair_accuracy", "held out")),
            (Level("a coin", 0.5),),
        ),
        Chart(
            "How far held-out answers moved",
            "log-ratio to the SFT model, nats",
            (Curve("preference/better_log_ratio", "better"), Curve("preference/worse_log_ratio", "worse", False)),
        ),
    ),
    "distill": (
        Chart("Distance from the teacher", "nats per token of its own answers", (Curve("distill/divergence"),)),
        _engine_against_policy("distill"),
        Chart("Length of the responses", "tokens", (Curve("distill/response_tokens"),)),
    ),
    "ppo": (
        Chart("Reward of the rollouts", "reward, mean and spread", (Curve("ppo/reward", band="ppo/reward_sd"),)),
        Chart(
            "Reward on held-out prompts",
            "mean reward",
            (Curve("ppo/held_out_reward", "aligned"),),
            (Level("SFT model", "evaluate/sft_reward"),),
        ),
        Chart("Distance from the SFT model", "KL, nats per response", (Curve("ppo/kl"),)),
        _engine_against_policy("ppo"),
        Chart("Length of the responses", "tokens", (Curve("ppo/response_tokens"),)),
    ),
}

KEY_CURVES = (
    ("pretrain", Chart("Pretraining: held-out text", "bits per byte", (Curve("pretrain/val_bits_per_byte", "model"),), _COMPRESSORS)),
    ("reward", Chart("Reward model: held-out pairs", "ordered as people did", (Curve("reward/pair_accuracy"),), (Level("a coin", 0.5),))),
    ("ppo", Chart("PPO: reward", "mean and spread", (Curve("ppo/reward", band="ppo/reward_sd"),))),
    ("ppo", Chart("PPO: distance from the SFT model", "KL, nats per response", (Curve("ppo/kl"),))),
)

# Colours no chart would choose by itself; in SVG they become the page's CSS variables.
_INK, _FAINT, _GRID, _FIRST, _SECOND, _LEVEL, _CARD = (f"#01010{i}" for i in range(1, 8))
_VARIABLES = {_INK: "--ink", _FAINT: "--faint", _GRID: "--grid", _FIRST: "--first", _SECOND: "--second", _LEVEL: "--level", _CARD: "--card"}
_ON_WHITE = {
    _INK: "#1c2024",
    _FAINT: "#5d6670",
    _GRID: "#e4e7eb",
    _FIRST: "#1f6feb",
    _SECOND: "#b9770e",
    _LEVEL: "#7a828c",
    _CARD: "#ffffff",
}


def draw(chart: Chart, rows: Rows, summary: Mapping[str, Any]) -> str | None:
    """The chart as an `<svg>` element for a page that defines the colours; None when its metrics were never logged."""
    if not _drawable(chart, rows):
        return None
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.7, 2.75), layout="constrained")
        _plot(figure.add_subplot(), chart, rows, summary, dict(zip(_VARIABLES, _VARIABLES, strict=True)))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(file.getvalue(), f"{chart.title}, {chart.unit}")


def timeline(trace: Mapping[str, Any]) -> str:
    """A step's Chrome trace (`rlhf.timeline`) as an `<svg>` element: a row for every actor, a bar for every call, and in every wait that
    has room for it, whom it waited for."""
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    end = max((event["ts"] + event["dur"] for event in events), default=1) / 1e6
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.6, 0.75 + 0.34 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        for event in events:
            start, length, works = event["ts"] / 1e6, event["dur"] / 1e6, event["cat"] == "work"
            text = event["name"] if works else f"waits for {event['args']['for']}"
            if works:
                axes.barh(event["tid"], length, left=start, height=0.62, color=_FIRST, alpha=0.85, lw=0)
            if len(text) * 0.0092 * end < length:  # of the width, by the size of the letters
                colour, size = (_CARD, 8) if works else (_FAINT, 7)
                axes.text(start + length / 2, event["tid"], text, ha="center", va="center", color=colour, fontsize=size)
        axes.set_yticks(list(names), list(names.values()))
        axes.set_xlim(0, end)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x", color=_GRID, lw=0.8)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(which="both", colors=_FAINT, length=0, labelsize=9)
        axes.set_xlabel("seconds", color=_FAINT, fontsize=9, loc="right", labelpad=1)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(file.getvalue(), "Who worked when in one step")


def bars(labels: Sequence[str], values: Mapping[str, Sequence[float]], unit: str) -> str:
    """Bars as an `<svg>` element: one for each label, of the values of each name on top of each other, the first at the bottom."""
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        below = np.zeros(len(labels))
        for (name, heights), colour in zip(values.items(), (_FIRST, _LEVEL), strict=False):
            axes.bar(range(len(labels)), heights, bottom=below, width=0.8, color=colour, alpha=0.85, lw=0, label=name)
            below = below + np.array(heights, np.float64)
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(axis="y", color=_GRID, lw=0.8)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(which="both", colors=_FAINT, length=0, labelsize=8)
        axes.annotate(unit, (0, 1), xycoords="axes fraction", xytext=(0, 7), textcoords="offset points", color=_FAINT, fontsize=9)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.985), ncols=3, frameon=False, fontsize=9, labelcolor=_FAINT)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(file.getvalue(), unit)


def picture(rows: Mapping[str, Rows], summary: Mapping[str, Any], path: Path) -> Path:
    """The four key curves as one PNG; a curve that the run does not have is left empty and says so."""
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        figure = Figure(figsize=(9.6, 5.4), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1))
        for axes, (stage, chart) in zip(figure.subplots(2, 2).flat, KEY_CURVES, strict=True):
            if _drawable(chart, rows.get(stage, ())):
                _plot(axes, chart, rows[stage], summary, _ON_WHITE)
            else:
                axes.text(0.5, 0.5, "not there yet", ha="center", va="center", color=_ON_WHITE[_FAINT], transform=axes.transAxes)
                axes.set_axis_off()
            axes.set_title(chart.title, loc="left", color=_ON_WHITE[_INK], fontsize=11, fontweight="bold", pad=18)
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
    return path


def spelling(rows: Sequence[tuple[str, Mapping[str, float]]], path: Path) -> Path:
    """Bytes per token as one PNG: a group of bars for each row (its label, and a value per vocabulary)."""
    with _style():
        from matplotlib.figure import Figure

        names = list(rows[0][1])
        figure = Figure(figsize=(9.6, 0.9 + len(rows) * (0.2 + 0.2 * len(names))), dpi=150, layout="constrained")
        axes, height = figure.add_subplot(), 0.8 / len(names)
        shades = [_ON_WHITE[c] for c in (_FIRST, _LEVEL, _SECOND)]
        for number, name in enumerate(names):
            places = [row + (number + 0.5) * height - 0.4 for row in range(len(rows))]
            values = [of[name] for _, of in rows]
            axes.barh(places, values, height=0.9 * height, color=shades[number % 3], alpha=1 / (1 + number // 3), lw=0, label=name)
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, f" {value:.2f}", va="center", color=_ON_WHITE[_INK], fontsize=7)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.06 * max(value for _, of in rows for value in of.values()))
        axes.set_xlabel("bytes per token")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
    return path


def series(rows: Rows, metric: str) -> tuple[Floats, Floats]:
    """(steps, values) of the rows that have the metric as a finite number, averaged down to POINTS points."""
    found = [(row["step"], row[metric]) for row in rows if isinstance(row.get(metric), (int, float))]
    both = np.array(found, dtype=np.float64).reshape(-1, 2)
    both = both[np.isfinite(both).all(axis=1)]
    if len(both) > POINTS:
        both = np.array([part.mean(axis=0) for part in np.array_split(both, POINTS)])
    return both[:, 0], both[:, 1]


def _drawable(chart: Chart, rows: Rows) -> bool:
    return any(len(series(rows, curve.metric)[0]) for curve in chart.curves)


def _plot(axes: Any, chart: Chart, rows: Rows, summary: Mapping[str, Any], colour: Mapping[str, str]) -> None:
    several = len([c for c in chart.curves if len(series(rows, c.metric)[0])]) > 1
    for curve in chart.curves:
        x, y = series(rows, curve.metric)
        if not len(x):
            continue
        if chart.log:
            y = np.maximum(y, 1e-9)  # exact agreement happens
        shade = colour[_FIRST] if curve.strong else colour[_SECOND]
        marker = "o" if len(x) <= 20 and curve.strong else None
        label = curve.label if several or chart.levels else None
        axes.plot(x, y, color=shade, lw=1.9 if curve.strong else 0.9, marker=marker, ms=3.5, label=label, zorder=3 + curve.strong)
        if curve.band:
            xs, sd = series(rows, curve.band)
            if len(xs) == len(x):
                axes.fill_between(x, y - sd, y + sd, color=shade, alpha=0.14, lw=0)
    for level in chart.levels:
        value = summary.get(level.value) if isinstance(level.value, str) else level.value
        if isinstance(value, (int, float)):
            axes.axhline(value, color=colour[_LEVEL], lw=1, ls=(0, (4, 3)), zorder=2)
            text = f"{level.label}  {value:.2f}" if isinstance(level.value, str) else level.label
            axes.annotate(
                text, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right", va="bottom",
                color=colour[_LEVEL], fontsize=9, bbox={"facecolor": colour[_CARD], "edgecolor": "none", "pad": 0.8}, zorder=2,
            )  # fmt: skip
    if chart.log:
        axes.set_yscale("log")
    axes.margins(x=0.02, y=0.12)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=colour[_GRID], lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour[_GRID])
    axes.tick_params(which="both", colors=colour[_FAINT], length=0, labelsize=9)
    axes.set_xlabel("step", color=colour[_FAINT], fontsize=9, loc="right", labelpad=1)
    if not chart.log:
        axes.locator_params(axis="y", nbins=5)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    # What is measured stands over the axis, horizontally, where one reads it; the legend on the same line.
    axes.annotate(chart.unit, (0, 1), xycoords="axes fraction", xytext=(0, 7), textcoords="offset points", color=colour[_FAINT], fontsize=9)
    if several:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 0.985), ncols=3, frameon=False, fontsize=9, labelcolor=colour[_FAINT],
            handlelength=1.2, columnspacing=2.0, borderaxespad=0.1,
        )  # fmt: skip


@contextmanager
def _style() -> Iterator[None]:
    """Text stays text (small, selectable, in the page's font); the same numbers give the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "roundhouse", "font.family": "DejaVu Sans"}):
        yield


def _inline(svg: str, label: str) -> str:
    """matplotlib's document as an element: no fixed size, the page's colours and font, no ids that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    start = re.search(r'viewBox="[^"]*"', svg)
    assert start is not None, "matplotlib always writes a viewBox"
    body = svg[svg.index(">") + 1 :]
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} {start[0]} role="img" aria-label="{label}">{body}'
