"""Which texts are good enough to learn from, and which rule says no.

    codes, scores = identify(texts)                                   # language.py
    texts = edited(texts, codes, quality)                             # C4 drops lines before anything is measured
    signals = measure(texts)                                          # signals.py
    why = reasons(signals, codes, quality, scores)                    # null: kept; else "gopher@1: min_words" or "language: fr"
    count(["signals.parquet"], quality)                               # {"kept": (documents, tokens), "gopher@1: min_words": ...}

Rules are data (rules.py). A reason names the first rule that a text breaks, in the order of its language's rule sets; how far it was off
stands in the signals.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from data.errors import DataError
from data.rules import RULE_SETS, Quality, Rule

LANGUAGE = "language"


def edited(texts: Sequence[str], languages: Sequence[str], quality: Quality) -> list[str]:
    """The texts after what their rule sets edit: only c4@1 does."""
    from data.c4 import c4_lines

    texts = list(texts)
    sets = {code: quality.sets_of(code) for code in set(languages)}
    chosen = [i for i, code in enumerate(languages) if "c4@1" in (sets[code] or ())]
    for i, text in zip(chosen, c4_lines([texts[i] for i in chosen], quality.c4_lines), strict=True):
        texts[i] = text
    return texts


def reasons(
    signals: pa.Table | pa.RecordBatch,
    languages: Sequence[str] | pa.Array | pa.ChunkedArray,
    quality: Quality,
    scores: np.ndarray | None = None,
) -> pa.Array:
    """Why each text is dropped, string `[texts]`: "SET@VERSION: RULE", "language: CODE" or "language: uncertain"; null if it is kept.

    `scores` float32 `[texts]` are how certain the languages are (default: certain).
    """
    codes = languages if isinstance(languages, (pa.Array, pa.ChunkedArray)) else pa.array(languages, pa.string())
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    encoded = codes.dictionary_encode()
    of_text = encoded.indices.to_numpy(zero_copy_only=False)
    names = encoded.dictionary.to_pylist()
    sets = [quality.sets_of(name) for name in names]
    said: list[str] = []
    found = np.full(len(codes), -1, np.int32)

    def drop(which: np.ndarray, reason: str) -> None:
        found[which & (found < 0)] = len(said)
        said.append(reason)

    if scores is not None and quality.min_language_score:
        drop(np.asarray(scores) < np.float32(quality.min_language_score), f"{LANGUAGE}: uncertain")
    for number, name in enumerate(names):
        if sets[number] is None:
            drop(of_text == number, f"{LANGUAGE}: {name}")
    for order in sorted({chosen for chosen in sets if chosen}):
        concerned = np.array([chosen == order for chosen in sets])[of_text]
        for set_name in order:
            rules = RULE_SETS[set_name]
            for rule in rules.rules:
                threshold = quality.thresholds[rules.section][rule.name]
                if threshold is not None:
                    drop(concerned & breaks(signals, rule, threshold), f"{set_name}: {rule.name}")
    return pa.array(np.array([*said, ""], dtype=object)[found], pa.string(), mask=found < 0)


def breaks(signals: pa.Table | pa.RecordBatch, rule: Rule, threshold: float) -> np.ndarray:
    """bool `[texts]`: which break the rule."""
    value = signals[rule.signal].to_numpy().astype(np.float64)
    if rule.of is not None:
        total = signals[rule.of].to_numpy()
        value = np.divide(value, total, out=np.zeros(len(value)), where=total != 0)
    return value < threshold if rule.name.startswith("min_") else value > threshold


def needed(quality: Quality) -> list[str]:
    """The signals that `quality` looks at, each once."""
    rules = [rule for name in {n for sets in quality.by_language.values() for n in sets} for rule in RULE_SETS[name].rules]
    return sorted({s for rule in rules for s in (rule.signal, rule.of) if s})


def count(files: Iterable[Path | str], quality: Quality) -> dict[str, tuple[int, int]]:
    """Reason -> (documents, tokens) that it drops, and "kept", most tokens first. Seconds for a million documents: no text is read.

    `files` are parquet of what `measure` gave, beside language, language_score and tokens; rows without signals, which no rule was asked
    about, do not count. Raises DataError when the files hold no signals.
    """
    source = ds.dataset([str(file) for file in files], format="parquet")
    columns = ["language", "language_score", "tokens", *sorted({"characters", *needed(quality)})]
    missing = [name for name in columns if name not in source.schema.names]
    if missing:
        raise DataError(f"{next(iter(source.files), 'no file')} holds no {missing[0]}: the corpus was prepared without data.quality")
    totals: dict[str, list[int]] = {"kept": [0, 0]}
    for batch in source.to_batches(columns=columns, filter=ds.field("characters").is_valid(), batch_size=1 << 17):
        why = reasons(batch, batch["language"], quality, batch["language_score"].to_numpy(zero_copy_only=False))
        dropped = pa.table({"why": why.fill_null("kept"), "tokens": batch["tokens"]}).group_by("why")
        for row in dropped.aggregate([("tokens", "count"), ("tokens", "sum")]).to_pylist():
            total = totals.setdefault(row["why"], [0, 0])
            total[0] += row["tokens_count"]
            total[1] += row["tokens_sum"]
    return {reason: (total[0], total[1]) for reason, total in sorted(totals.items(), key=lambda item: -item[1][1])}
