"""One page that tells what became of the pretraining text: RUN/data/report.html, self-contained, without scripts.

    write(Path("runs/quickstart/data"), recipe)         # after the data stage; everything is read from its manifest

How much went into and came out of each step, what was dropped and why, with examples; languages, lengths, the mixture beside what the
recipe asks for, clusters of documents that repeat each other, and what a dry run had predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from data.fates import BROKEN, CONTAMINATED, DUPLICATE, EXCLUDED, KEPT, NEAR, QUALITY, REMOVED, UNUSABLE
from rlhf import charts
from rlhf.artefacts import read_json
from rlhf.recipe import Recipe

STEPS = (
    (BROKEN, "readable", "rows that cannot be read, listed in broken.jsonl"),
    (UNUSABLE, "with text", "rows that are sound and hold no text"),
    (EXCLUDED, "wanted", "documents that the recipe leaves out by their id"),
    (QUALITY, "good enough", "documents that a quality rule or the language drops"),
    (CONTAMINATED, "unknown to evaluations", "documents that share long passages with evaluation texts"),
    (DUPLICATE, "each once", "documents whose text stood earlier"),
    (NEAR, "nearly each once", "documents that repeat most of an earlier one"),
    (REMOVED, "after removals", "documents taken out with `roundhouse data drop`"),
)
SHOWN = 30  # reasons, languages and sources in a table


@dataclass(frozen=True)
class Step:
    """What a step left over, and what it dropped."""

    title: str
    about: str
    documents: int
    bytes: int
    dropped: int
    share: float  # of all documents, 0..1


def write(stage_dir: Path, recipe: Recipe, predicted: Sequence[dict[str, Any]] = ()) -> Path:
    """Write `stage_dir`/report.html and return its path. `predicted`: {"name", "predicted", "found"} of what a dry run had said."""
    manifest = read_json(stage_dir / "pretrain" / "manifest.json")
    assert manifest is not None, f"{stage_dir} has no finished corpus"
    environment = Environment(
        loader=PackageLoader("rlhf", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["size"] = size
    page = environment.get_template("data_report.html.jinja").render(
        name=stage_dir.resolve().parent.name,
        steps=funnel(manifest),
        kept={split: manifest[split] for split in KEPT},
        reasons=reasons(manifest)[:SHOWN],
        languages=list(manifest["languages"].items())[:SHOWN],
        lengths=Markup(_lengths(manifest)),  # safe: drawn from numbers
        sources=mixture(manifest, recipe),
        clusters=clusters(manifest),
        samples=samples(manifest),
        predicted=predicted,
    )
    path = stage_dir / "report.html"
    fresh = stage_dir / ".report.html"
    fresh.write_text(page, encoding="utf-8")
    fresh.replace(path)
    return path


def funnel(manifest: dict[str, Any]) -> list[Step]:
    """What is left after each step that dropped something, from all rows to what is kept."""
    counts: dict[str, tuple[int, int]] = {}
    for fate, _, documents, text_bytes, _ in manifest["fates"]:
        before = counts.get(fate, (0, 0))
        counts[fate] = (before[0] + documents, before[1] + text_bytes)
    rows, left = max(manifest["rows"], 1), sum(text_bytes for _, text_bytes in counts.values())
    steps = [Step("rows", "of all files", manifest["rows"], left, 0, 1.0)]
    documents = manifest["rows"]
    for fate, title, about in STEPS:
        dropped, text_bytes = counts.get(fate, (0, 0))
        documents, left = documents - dropped, left - text_bytes
        if dropped:
            steps.append(Step(title, about, documents, left, dropped, documents / rows))
    return steps


def reasons(manifest: dict[str, Any]) -> list[tuple[str, int, int, float]]:
    """(why, documents, bytes of text, share of all rows) of everything that was dropped, most first."""
    found = [
        (f"{fate}: {reason}" if reason else fate, documents, text_bytes, documents / max(manifest["rows"], 1))
        for fate, reason, documents, text_bytes, _ in manifest["fates"]
        if fate not in KEPT
    ]
    return sorted(found, key=lambda entry: -entry[1])


def mixture(manifest: dict[str, Any], recipe: Recipe) -> list[dict[str, Any]]:
    """Each source's size, its share of the training tokens, and what share each phase of the recipe gives it (where it begins)."""
    total = max(manifest["train"]["tokens"], 1)
    phases = [phase.weights for phase in recipe.pretrain.phases or [] if phase.weights and recipe.pretrain.mix_by == "source"]
    found = []
    for entry in manifest["sources"][:SHOWN]:
        name, train = entry["source"], entry["train"]
        targets = [weights.get(name, 0) / sum(weights.values()) for weights in phases]
        found.append({"name": name, **train, "share": train["tokens"] / total, "targets": targets})
    return found


def clusters(manifest: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(documents of a cluster, such clusters, documents that they lost); a cluster keeps one."""
    return [(int(size), count // (int(size) - 1), count) for size, count in manifest["clusters"].items() if int(size) > 1]


def samples(manifest: dict[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """A few dropped documents of every reason: where they are and how they begin."""
    return [
        (reason, [{"id": i, "where": f"{manifest['files'][file]}:{at}", "head": head, "of": of or ""} for i, file, at, head, of in found])
        for reason, found in manifest["samples"].items()
    ]


def size(count: int) -> str:
    """12.2 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{count:,} B" if unit == "B" else f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _lengths(manifest: dict[str, Any]) -> str:
    """Documents by length, dropped and kept: keys of `lengths` are 2 log2(bytes) + whether they are kept."""
    known = {int(place): count for place, count in manifest["lengths"].items()}
    bins = range(min((place // 2 for place in known), default=0), max((place // 2 for place in known), default=0) + 1)
    bars = {what: [known.get(2 * place + kept, 0) for place in bins] for what, kept in (("kept", 1), ("dropped", 0))}
    return charts.bars([size(2**place) for place in bins], bars, "documents, by bytes of text (up to twice as many)")
