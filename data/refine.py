"""The first pass over a part, in a Ray worker: everything that asks nothing but a document itself.

    refine(part, steps, work)         # read -> clean -> id -> [signals, language, rules] -> [keys]; writes rows, texts and keys (parts.py)

A part goes through in batches of a few MB, so a worker's memory depends on neither the part's nor the corpus's size. It leaves the same
bytes whenever it is called again.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from data import minhash
from data.cleaning import OFF, Cleaning, cleaned, id_array, shares, text_id
from data.decontamination import Index, spans
from data.engine import Result, fetched
from data.fates import BROKEN, CONTAMINATED, EXCLUDED, HEAD, QUALITY, ROW, UNUSABLE
from data.formats import document
from data.language import identify
from data.parts import Part, records
from data.quality import edited, reasons
from data.reading import Broken, Dropped, head_of
from data.rules import Quality
from data.shingles import in_characters
from data.signals import measure
from data.work import KEYS, PASSAGES, ROWS, TEXTS, path_of, written

BATCH = 4 << 20  # bytes of input that go through the steps together: few calls, and little memory
BATCH_ROWS = 8192
COMMONEST = 20  # reasons that a part's result tells; its rows tell all
NOBODY = (2**64, -1)  # lowest and highest share of no document
TEXT = pa.schema([("row", pa.int64()), ("text", pa.large_string()), ("source", pa.int32())])


@dataclass(frozen=True)
class Steps:
    """What is done to documents, beyond normal form and an id."""

    fields: tuple[tuple[str, str], ...] = ()
    """Our name of a field, and a file's name for it."""
    cleaning: Cleaning = OFF
    quality: Quality | None = None
    near_duplicates: bool = False
    exclude: frozenset[bytes] = frozenset()
    """Ids of documents that nobody wants."""


def refine(part: Part, steps: Steps, work: Path, evaluations: Index | ray.ObjectRef | None = None) -> Result:
    """Write a part's rows, texts and keys, and count. `evaluations`: a `decontamination.Index`; what holds a passage of it is dropped."""
    counts = {"rows": 0, "broken": 0}
    dropped: Counter[str] = Counter()
    lowest, highest = NOBODY
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for batch in _batches(part, steps):
            tables = _refined(batch, counts["rows"], steps, evaluations)
            for what, table in tables.items():
                if what not in files:
                    files[what] = stack.enter_context(written(path_of(work, part.number, what), table.schema))
                files[what].write_table(table)
            counts["rows"] += len(batch)
            counts["broken"] += sum(row.fate == BROKEN for row in batch)
            dropped.update(f"{row.fate}: {row.reason}" if row.reason else row.fate for row in batch if row.fate not in (None, BROKEN))
            share = shares(id_array(tables[KEYS]["id"].drop_null()))
            if len(share):
                lowest, highest = min(lowest, int(share.min())), max(highest, int(share.max()))
    return {**counts, "dropped": dict(dropped.most_common(COMMONEST)), "lowest": lowest, "highest": highest}


@dataclass
class _Row:
    file: int
    at: int
    text: str = ""
    source: int = 0
    """Characters at its beginning that are read only, not learned."""
    id: bytes | None = None
    head: str = ""
    fate: str | None = None
    reason: str | None = None
    category: str | None = None
    language: str | None = None
    language_score: float | None = None


def _batches(part: Part, steps: Steps) -> Iterator[list[_Row]]:
    """All rows of a part; at least one batch, even if it is empty."""
    batch: list[_Row] = []
    size = 0
    for record in records(part, dict(steps.fields)):
        row = _Row(record.file, record.at)
        if record.value is None:
            row.fate, row.reason = (BROKEN, record.broken) if record.broken else (UNUSABLE, record.dropped)
            row.head = record.head.decode(errors="backslashreplace")
        else:
            try:
                row.source, row.text, row.id = clean(record.value, steps.cleaning)
                row.head = " ".join(row.text[:HEAD].split())
                category = record.value.get("category")
                if isinstance(category, str) and category:
                    row.category = category[:HEAD].encode(errors="backslashreplace").decode()  # half a surrogate pair cannot be stored
            except Broken as error:
                row.fate, row.reason, row.head = BROKEN, str(error), head_of(record.value).decode(errors="backslashreplace")
            except Dropped as error:
                row.fate, row.reason = UNUSABLE, str(error)
        batch.append(row)
        size += record.size
        if size >= BATCH or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    yield batch


def clean(record: dict[str, Any], cleaning: Cleaning) -> tuple[int, str, bytes]:
    """A record's clean text, after how many of its characters are read only, and its id; Broken when it has none, Dropped when there is
    nothing left of it."""
    source, text = document(record)
    if not isinstance(text, str) or not text.strip():
        if cleaning.drop_missing and (text is None or text == ""):
            raise Dropped("no text")
        raise Broken('no text: {"text": "..."} with something in it is needed')
    try:
        source, text = cleaned(source, cleaning) if source else "", cleaned(text, cleaning)
        if not text.strip():
            raise Dropped("nothing is left of it after cleaning")
        return len(source), source + text, text_id(source + text)
    except UnicodeEncodeError as error:
        raise Broken(f"no text: half a surrogate pair, \\u{ord(error.object[error.start]):04x}, at character {error.start}") from None


def _refined(batch: list[_Row], first: int, steps: Steps, evaluations: Index | ray.ObjectRef | None) -> dict[str, pa.Table]:
    """The tables of a batch whose first row is number `first` of the part."""
    judged = _judged([row for row in batch if row.fate is None], steps.quality)
    for row in batch:
        if row.id in steps.exclude:
            row.fate, row.reason = EXCLUDED, None
    passages = _decontaminated([row for row in batch if row.fate is None], evaluations)
    fate = np.array([row.fate for row in batch], object)
    text = pa.array([row.text for row in batch], pa.large_string())
    columns = {
        "file": [row.file for row in batch],
        "at": [row.at for row in batch],
        "id": [row.id for row in batch],
        "bytes": pa.compute.cast(pa.compute.binary_length(text), pa.int64()),
        "head": [row.head for row in batch],
        "category": [row.category for row in batch],
        "language": [row.language for row in batch],
        "language_score": pa.array([row.language_score for row in batch], pa.float32()),
        "fate": fate,
        "reason": [row.reason for row in batch],
        "of": pa.nulls(len(batch), pa.binary(16)),
        "cluster": np.zeros(len(batch), np.int32),
        "tokens": np.zeros(len(batch), np.int32),
    }
    rows = pa.table(columns, schema=ROW)
    if judged is not None:
        for name, column in zip(judged.column_names, _spread(judged, rows["id"].is_valid()).columns, strict=True):
            rows = rows.append_column(name, column)
    here = pa.array(np.array([kind is None for kind in fate], bool))
    sources = pa.array([row.source for row in batch], pa.int32())
    texts = pa.table([pa.array(np.flatnonzero(here) + first), text.filter(here), sources.filter(here)], schema=TEXT)
    tables = {ROWS: rows, TEXTS: texts, KEYS: _keys(rows["id"], texts["text"], here, steps)}
    return tables if passages is None else {**tables, PASSAGES: passages}


def _keys(ids: pa.ChunkedArray, texts: pa.ChunkedArray, here: pa.Array, steps: Steps) -> pa.Table:
    """What documents are compared by, for all rows: null where they are not `here`."""
    keys = {"id": ids.filter(here)}
    if steps.near_duplicates:
        keys |= minhash.columns(texts.combine_chunks(), in_characters(texts.combine_chunks()))
    return _spread(pa.table(keys), here)


def _spread(table: pa.Table, here: pa.Array) -> pa.Table:
    """The rows of `table` where `here` (bool `[n]`) is true, nulls elsewhere."""
    place = pa.compute.subtract(pa.compute.cumulative_sum(pa.compute.cast(here, pa.int64())), 1)
    return table.take(pa.compute.if_else(here, place, None))


def _decontaminated(rows: list[_Row], evaluations: Index | ray.ObjectRef | None) -> pa.Table | None:
    """What these rows' texts share with evaluations: `decontamination.SPAN`, and where the text is (`in_file`, `in_at`, `id`); fates go
    into the rows."""
    if evaluations is None:
        return None
    index = fetched(evaluations) if isinstance(evaluations, ray.ObjectRef) else evaluations
    found = spans([row.text for row in rows], index)
    of = [rows[number] for number in found["text"].to_pylist()]
    for row, file in zip(of, found["file"].to_pylist(), strict=True):
        row.fate, row.reason = CONTAMINATED, file
    places = {
        "in_file": pa.array([row.file for row in of], pa.int32()),
        "in_at": pa.array([row.at for row in of], pa.int64()),
        "id": pa.array([row.id.hex() for row in of if row.id is not None], pa.string()),
    }
    return pa.table({**dict(zip(found.column_names, found.columns, strict=True)), **places})


def _judged(rows: list[_Row], quality: Quality | None) -> pa.Table | None:
    """The signals of these rows' texts, after the rules' edits; languages and fates go into the rows."""
    if quality is None:
        return None
    codes, scores = identify([row.text for row in rows])
    texts = edited([row.text for row in rows], codes, quality)
    signals = measure(texts)
    for row, text, code, score, why in zip(rows, texts, codes, scores, reasons(signals, codes, quality, scores).to_pylist(), strict=True):
        if text != row.text:
            if text[: row.source] != row.text[: row.source]:
                row.source = 0  # the rules took something out of it, and where it ends is not known
            row.text, row.id = text, text_id(text)
        row.language, row.language_score = code, float(score)
        if why is not None:
            row.fate, row.reason = QUALITY, why
    return signals
