"""What became of every row of the input: one table per part, and the counts that all parts' tables add up to.

    documents(out)                          # pyarrow dataset over out/documents/*.parquet, a row for each row of the input
    counts = merged([tally(table) ...])     # rows in = kept + dropped by reason + quarantined, asserted

A row's `fate` is `train` or `validation` (kept), `broken` (quarantined) or what dropped it; `reason` says why in a few words that
many rows share, `of` names the document that it repeats.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

KEPT = ("train", "validation")
BROKEN, UNUSABLE, EXCLUDED = "broken", "unusable", "excluded"
QUALITY, CONTAMINATED, DUPLICATE, NEAR, REMOVED = "quality", "contaminated", "duplicate", "near-duplicate", "removed"
FATES = (*KEPT, BROKEN, UNUSABLE, EXCLUDED, QUALITY, CONTAMINATED, DUPLICATE, NEAR, REMOVED)
"""In the order of the steps that decide them."""

ROW = pa.schema(
    [
        ("file", pa.int32()),
        ("at", pa.int64()),  # the byte where its line begins: with the file, its place in the order
        ("id", pa.binary(16)),  # null where broken
        ("bytes", pa.int64()),  # of the cleaned text in UTF-8
        ("head", pa.string()),
        ("category", pa.string()),  # as its row says; null where it says none
        ("language", pa.string()),
        ("language_score", pa.float32()),
        ("fate", pa.string()),  # null until it is known
        ("reason", pa.string()),
        ("of", pa.binary(16)),  # the document that it repeats
        ("cluster", pa.int32()),  # how many documents are linked by repeating each other, if it was dropped for that; else 0
        ("tokens", pa.int32()),  # an estimate where dropped
    ]
)
HEAD = 160  # characters of a text that are kept for people
SAMPLES = 3  # dropped documents shown per reason

Tally = dict[str, Any]


def documents(out: Path) -> ds.Dataset:
    """All rows of a prepared corpus, in order, columns of ROW and one for each signal."""
    return ds.dataset(sorted((out / "documents").glob("*.parquet")), format="parquet")


def tally(rows: pa.Table) -> Tally:
    """Counts of one part's final table, as JSON values."""
    # What is broken is told with its place; here the kind of fault counts.
    kind = pc.replace_substring_regex(pc.replace_substring_regex(rows["reason"], "[:;].*", ""), "[0-9][0-9,]*", "N")
    reason = pc.if_else(pc.equal(pc.fill_null(rows["fate"], ""), BROKEN), kind, rows["reason"])
    fates = rows.select(["fate", "bytes", "tokens"]).append_column("reason", reason).group_by(["fate", "reason"], use_threads=False)
    counted = fates.aggregate([([], "count_all"), ("bytes", "sum"), ("tokens", "sum")]).to_pylist()
    kept = pc.is_in(rows["fate"], pa.array(KEPT)).to_numpy()
    size = np.maximum(rows["bytes"].to_numpy(), 1)
    bins = np.bincount(np.log2(size).astype(np.int64) * 2 + kept, minlength=2)
    languages = pa.table({"language": rows["language"], "bytes": rows["bytes"], "kept": pa.array(kept.astype(np.int64))})
    by_language = languages.group_by("language", use_threads=False).aggregate([([], "count_all"), ("bytes", "sum"), ("kept", "sum")])
    return {
        "fates": [[r["fate"], r["reason"], r["count_all"], r["bytes_sum"], r["tokens_sum"]] for r in counted],
        "lengths": {str(i): int(n) for i, n in enumerate(bins) if n},
        "languages": {
            r["language"]: [r["count_all"], r["bytes_sum"], r["kept_sum"]] for r in by_language.to_pylist() if r["language"] is not None
        },
        "clusters": _clusters(rows),
        "samples": _samples(rows.filter(pa.array(~kept))),
    }


def merged(tallies: Iterable[Tally]) -> Tally:
    """The sum of all parts; equal for any cut into parts but for `samples`, which are the first by id."""
    fates: dict[tuple[str, str | None], list[int]] = {}
    lengths: dict[str, int] = {}
    languages: dict[str, list[int]] = {}
    clusters: dict[str, int] = {}
    samples: dict[str, list[list[Any]]] = {}
    for one in tallies:
        for fate, reason, *counts in one["fates"]:
            fates[fate, reason] = [a + b for a, b in zip(fates.get((fate, reason), [0, 0, 0]), counts, strict=True)]
        for known, found_here in ((lengths, one["lengths"]), (clusters, one["clusters"])):
            for size, count in found_here.items():
                known[size] = known.get(size, 0) + count
        for language, counts in one["languages"].items():
            languages[language] = [a + b for a, b in zip(languages.get(language, [0, 0, 0]), counts, strict=True)]
        for reason, found in one["samples"].items():
            samples[reason] = sorted([*samples.get(reason, []), *found])[:SAMPLES]
    ordered = sorted(fates.items(), key=lambda item: (FATES.index(item[0][0]), -item[1][0], item[0][1] or ""))
    return {
        "fates": [[fate, reason, *counts] for (fate, reason), counts in ordered],
        "lengths": {size: lengths[size] for size in sorted(lengths, key=int)},
        "languages": {name: languages[name] for name in sorted(languages, key=lambda name: (-languages[name][1], name))},
        "clusters": {size: clusters[size] for size in sorted(clusters, key=int)},
        "samples": {reason: samples[reason] for reason in sorted(samples)},
    }


def of_fate(counts: Tally, *fates: str) -> int:
    """Documents with one of these fates."""
    return sum(documents for fate, _, documents, *_ in counts["fates"] if fate in fates)


def _clusters(rows: pa.Table) -> dict[str, int]:
    """Size of a cluster of repeating documents -> how many of its documents were dropped here."""
    sizes, counts = np.unique(rows["cluster"].to_numpy(), return_counts=True)
    return {str(size): int(count) for size, count in zip(sizes, counts, strict=True) if size}


def _samples(dropped: pa.Table) -> dict[str, list[list[Any]]]:
    """Reason -> the first few documents it dropped, by id: [id, file, at, head, of]."""
    found: dict[str, list[list[Any]]] = {}
    if not len(dropped):
        return found
    names = [
        f"{fate}: {reason}" if reason else fate for fate, reason in zip(*(dropped[c].to_pylist() for c in ("fate", "reason")), strict=True)
    ]
    known = dropped.select(["id", "file", "at", "head", "of"]).append_column("name", pa.array(names, pa.string()))
    known = known.filter(pc.is_valid(known["id"])).sort_by("id")
    for name in pc.unique(known["name"]).to_pylist():
        for row in known.filter(pc.equal(known["name"], name)).slice(0, SAMPLES).to_pylist():
            of = row["of"].hex() if row["of"] is not None else None
            found.setdefault(name, []).append([row["id"].hex(), row["file"], row["at"], row["head"], of])
    return found
