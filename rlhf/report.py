"""One page that tells how a run went: RUN/report.html, self-contained, without scripts, readable on a phone.

    write(Path("runs/quickstart"))                                   # after every run, also after a part of one
    curves(Path("runs/quickstart"), Path("docs/curves.png"))         # the four key curves as one picture

Everything is read from the files that the stages leave; a stage that is not there leaves a gap and no error.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf import charts
from rlhf.artefacts import read_json, stages_in
from rlhf.monitoring import duration, read_metrics

Summary = dict[str, Any]

ABOUT = {
    "data": "Texts cleaned, split and turned into tokens",
    "pretrain": "Learn to predict text",
    "sft": "Learn to answer",
    "reward": "Learn which answers people prefer",
    "ppo": "Learn to give such answers",
    "preference": "Learn to give such answers, from the rankings alone",
    "distill": "Learn to answer like the teacher, from one's own answers",
    "evaluate": "Did it work?",
}

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Headline:
    """A figure that matters, and how to read it."""

    title: str
    value: str
    unit: str
    meaning: str


@dataclass(frozen=True)
class Stage:
    name: str
    about: str
    state: str  # made | resumed | kept | half made | not made
    made_at: str
    took: str
    share: float  # of the time of all stages, 0..1
    hash: str
    page: str  # a page of its own, beside the run's; "" for none
    charts: list[tuple[str, Markup]]  # title, svg
    wide: list[tuple[str, Markup]]  # the same, over the whole width


def write(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what is in `run_dir`, and return its path."""
    run_dir = Path(run_dir)
    summary = read_summary(run_dir)
    samples = read_samples(run_dir)
    environment = Environment(
        loader=PackageLoader("rlhf", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "−")
    page = environment.get_template("report.html.jinja").render(
        name=run_dir.resolve().name,
        written=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        took=duration(summary["wall_seconds"]) if summary.get("wall_seconds") else None,
        parameters=summary.get("pretrain/parameters"),
        headlines=headlines(summary),
        bars=bits_per_byte(summary),
        stages=stages(run_dir, summary),
        samples=samples,
        scorer=summary.get("evaluate/independent_scorer", "independent"),
        figures=[(name, _plain(value)) for name, value in summary.items()],
    )
    path = run_dir / "report.html"
    fresh = run_dir / ".report.html"
    fresh.write_text(page, encoding="utf-8")
    fresh.replace(path)
    return path


def curves(run_dir: Path, path_png: Path) -> Path:
    """Draw the four key curves of a run as one PNG picture."""
    run_dir = Path(run_dir)
    return charts.picture({s: read_rows(run_dir / s) for s in stages_in(run_dir)}, read_summary(run_dir), Path(path_png))


# ------------------------------------------------------------------------------------------------ what is read


def read_summary(run_dir: Path) -> Summary:
    """summary.json; while a run is under way, the figures that its stages have so far."""
    so_far: Summary = {}
    for stage in stages_in(run_dir):
        so_far |= read_metrics(run_dir / stage)
    return so_far | (read_json(run_dir / "summary.json") or {})


def read_rows(stage_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. The last one may be half written: the stage may be running, or have been killed."""
    path = stage_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """evaluate/samples.json, with prompts shown as their words: markers like <|user|> only say what the page says anyway."""
    path = run_dir / "evaluate" / "samples.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [{**sample, "prompt": re.sub(r"<\|\w+\|>", " ", sample["prompt"]).strip()} for sample in found]


# ------------------------------------------------------------------------------------------------ what is shown


def headlines(summary: Summary) -> list[Headline]:
    """The figures of the run that answer "did it work?", those that it has."""
    found = []

    def add(name: str, title: str, value: str, unit: str, meaning: str) -> None:
        if isinstance(summary.get(name), (int, float)):
            found.append(Headline(title, value.format(summary[name]).replace("-", "−"), unit, meaning))

    def beside(*names: str) -> list[float] | None:
        values = [summary.get(f"evaluate/{name}") for name in names]
        return [float(v) for v in values if v is not None] if None not in values else None

    packed = beside("gzip_bits_per_byte", "xz_bits_per_byte")
    compared = f" gzip −9 needs {packed[0]:.2f} and xz −9 {packed[1]:.2f} on the same text." if packed else ""
    add(
        "pretrain/val_bits_per_byte", "Held-out text", "{:.3f}", "bits per byte",
        f"What the pretrained model needs to write down text it has never seen. Lower is better.{compared}",
    )  # fmt: skip
    if isinstance(summary.get("reward/pair_accuracy"), (int, float)):
        percent = 100 * summary["reward/pair_accuracy"]
        found.append(
            Headline(
                "Pair accuracy",
                f"{percent:.1f}",
                "%",
                "How often the reward model prefers the held-out answer that people preferred. A coin gets 50 %.",
            )
        )
    means = beside("sft_reward", "aligned_reward")
    change = f" The mean went from {means[0]:.2f} to {means[1]:.2f}.".replace("-", "−") if means else ""
    add(
        "evaluate/reward_gain_sd", "Reward gained", "{:+.2f}", "SD",
        f"Mean reward of the aligned model's answers to held-out prompts over the SFT model's, in its standard deviations.{change}",
    )  # fmt: skip
    before = beside("sft_success")
    change = f" The SFT model: {100 * before[0]:.1f} %." if before else ""
    if isinstance(right := summary.get("evaluate/aligned_success"), (int, float)):
        meaning = f"Held-out prompts that the aligned model answers right, by the recipe's reward function.{change}"
        found.append(Headline("Right answers", f"{100 * right:.1f}", "%", meaning))
    scorer = summary.get("evaluate/independent_scorer", "independent")
    means = beside("sft_independent", "aligned_independent")
    change = f" The mean went from {means[0]:.2f} to {means[1]:.2f}.".replace("-", "−") if means else ""
    add(
        "evaluate/independent_gain", "A second opinion", "{:+.2f}", f"{scorer} points",
        f"The same comparison by {scorer}, a scorer that no stage was trained on: a gain that only the reward model sees is none.{change}",
    )  # fmt: skip
    add(
        "evaluate/kl_nats", "Distance moved", "{:.2f}", "nats per response",
        "KL divergence of the aligned model from the SFT model. Small: still the same language. Far above 10: it has found a trick.",
    )  # fmt: skip
    first = summary.get("distill/divergence_first")
    change = f" It began at {first:.3f}." if isinstance(first, (int, float)) else ""
    add(
        "distill/divergence_last", "Distance from the teacher", "{:.3f}", "nats per token",
        f"Divergence between the student's and the teacher's distributions, over answers that the student wrote.{change}",
    )  # fmt: skip
    gap = summary.get("ppo/log_prob_gap_max", summary.get("distill/log_prob_gap_max"))
    if isinstance(gap, (int, float)):
        found.append(
            Headline(
                "Engine against policy", _scientific(gap), "nats",
                "Largest difference between the log-probabilities of vLLM and of the trained policy, over every token of every step. "
                "Near 0: the samples were the policy's own.",
            )
        )  # fmt: skip
    return found


def bits_per_byte(summary: Summary) -> list[tuple[str, float, float]]:
    """(who, bits per byte, share of the largest) of the compressors and of every stage's model, on the same held-out text."""
    names = {
        "gzip −9": "gzip_bits_per_byte",
        "xz −9": "xz_bits_per_byte",
        "pretrain": "pretrain_bits_per_byte",
        "sft": "sft_bits_per_byte",
        "aligned": "aligned_bits_per_byte",
    }
    found = {who: float(summary[f"evaluate/{name}"]) for who, name in names.items() if f"evaluate/{name}" in summary}
    return [(who, bits, bits / max(found.values())) for who, bits in found.items()]


def stages(run_dir: Path, summary: Summary) -> list[Stage]:
    """Every stage in order: what became of it and its curves."""
    total = max(sum(summary.get(f"{s}/wall_seconds", 0.0) for s in stages_in(run_dir)), 1e-9)
    recipe = run_dir / "recipe.yaml"
    began = recipe.stat().st_mtime if recipe.exists() else 0.0  # written anew whenever a run starts
    found = []
    for name in stages_in(run_dir):
        out = run_dir / name
        manifest = read_json(out / "manifest.json")
        started = read_json(out / "started.json")
        made_at = datetime.fromisoformat(manifest["made_at"]) if manifest else None
        state = _state(out, made_at, began) if made_at else "half made" if started else "not made"
        rows = read_rows(out)
        drawn = [(chart.title, charts.draw(chart, rows, summary)) for chart in charts.CHARTS.get(name, ())]
        wide = [(f"Who worked when, in step {step}", charts.timeline(trace)) for step, trace in _newest_trace(out)]
        seconds = manifest["wall_seconds"] if manifest else 0.0
        found.append(
            Stage(
                name,
                ABOUT[name],
                state,
                made_at.strftime("%d %b %H:%M") if made_at else "",
                duration(seconds) if manifest else "",
                seconds / total,
                ((manifest or started or {}).get("hash") or "")[:12],
                f"{name}/report.html" if (out / "report.html").exists() else "",
                [(title, Markup(svg)) for title, svg in drawn if svg],  # safe: drawn from constants and numbers
                [(title, Markup(svg)) for title, svg in wide],
            )
        )
    return found


def _newest_trace(out: Path) -> list[tuple[int, dict[str, Any]]]:
    """The newest step that has a trace, and the trace; nothing where there is none."""
    traces = {int(path.stem.partition("-")[2]): path for path in (out / "timeline").glob("step-*.json")}
    found = read_json(traces[max(traces)]) if traces else None
    return [(max(traces), found)] if found else []


def _state(out: Path, made_at: datetime, began: float) -> str:
    """Of a finished stage. Every try opens an event file of its own, so two of them mean that it was resumed."""
    if made_at.timestamp() < began:
        return "kept"
    return "resumed" if len(list((out / "tb").glob("events.*"))) > 1 else "made"


def _plain(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _scientific(value: float) -> str:
    """2.1e-06 as people write it."""
    if value == 0 or value >= 0.01:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_RAISED)}"
