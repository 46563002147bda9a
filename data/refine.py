"""What happens to each part of a corpus, in a Ray worker. Nothing here looks at another part, so any number of them go at once.

    refine(part, steps, work)                        # pass 1: read -> clean -> id -> [signals, language, rules]; writes rows and texts
    tokenize(part, plan, work, out)                  # pass 2: what is kept -> tokens -> this part's own shards and final rows

A part is done in batches of a few MB, so a worker's memory depends on neither the part's nor the corpus's size. Both leave the same bytes
whenever they are called again.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from data.cleaning import id_array, normalise, shares, text_id
from data.engine import Result, fetched
from data.fates import BROKEN, HEAD, ROW, tally
from data.parts import Part, records
from data.reading import Broken
from data.shards import ShardWriter
from data.tokenizers import Tokenizer

BATCH = 4 << 20  # bytes of text that go through the steps together: few calls, and all in the processor's reach
BATCH_ROWS = 8192
TEXT = pa.schema([("row", pa.int64()), ("text", pa.large_string())])


@dataclass(frozen=True)
class Steps:
    """What is done to a document before documents are compared."""


def refine(part: Part, steps: Steps, work: Path) -> Result:
    """Write `work`/NNNNNN.rows.parquet (every row) and .texts.parquet (what may be kept), and count."""
    counts = {"rows": 0, "broken": 0}
    lowest, highest = 2**64, -1
    with _writer(_rows(work, part.number), ROW, "zstd") as rows, _writer(_texts(work, part.number), TEXT, "zstd") as texts:
        for batch in _batches(part):
            table, kept = _refined(batch, steps)
            rows.write_table(table)
            here = np.flatnonzero(kept)
            chosen = pa.array([batch.texts[i] for i in here], pa.large_string())
            texts.write_table(pa.table([pa.array(here + counts["rows"]), chosen], schema=TEXT))
            if len(here):
                share = shares(id_array(table["id"].take(pa.array(here))))
                lowest, highest = min(lowest, int(share.min())), max(highest, int(share.max()))
            counts["rows"] += len(table)
            counts["broken"] += len(table) - len(batch.texts) + batch.texts.count("")
    return {**counts, "lowest": lowest, "highest": highest}


@dataclass
class _Batch:
    file: list[int]
    at: list[int]
    texts: list[str]
    """"" where broken."""
    broken: list[str | None]
    heads: list[str]
    ids: list[bytes | None]


def _batches(part: Part) -> Iterator[_Batch]:
    batch, size = _Batch([], [], [], [], [], []), 0
    for record in records(part):
        text, broken, identity = "", record.broken, None
        if broken is None:
            try:
                text, identity = _clean(record.value or {})
            except Broken as error:
                broken = str(error)
        batch.file.append(record.file)
        batch.at.append(record.at)
        batch.texts.append(text)
        batch.broken.append(broken)
        batch.ids.append(identity)
        batch.heads.append(" ".join((text or record.head.decode("utf-8", "replace"))[:HEAD].split()))
        size += record.size
        if size >= BATCH or len(batch.at) >= BATCH_ROWS:
            yield batch
            batch, size = _Batch([], [], [], [], [], []), 0
    if batch.at:
        yield batch


def _clean(record: dict[str, Any]) -> tuple[str, bytes]:
    """A record's text in normal form, and its id; Broken when it has none."""
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Broken('no text: {"text": "..."} with something in it is needed')
    text = normalise(text)
    try:
        return text, text_id(text)
    except UnicodeEncodeError as error:
        raise Broken(f"no text: half a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start}") from None


def _refined(batch: _Batch, steps: Steps) -> tuple[pa.Table, np.ndarray]:
    """The batch's rows, and which of them may be kept (bool `[rows]`)."""
    usable = np.array([broken is None for broken in batch.broken])
    text = pa.array(batch.texts, pa.large_string())
    empty = pa.nulls(len(text), pa.string())
    columns = {
        "file": batch.file,
        "at": batch.at,
        "id": batch.ids,
        "bytes": pa.compute.binary_length(text),
        "head": batch.heads,
        "language": empty,
        "language_score": pa.nulls(len(text), pa.float32()),
        "fate": [None if ok else BROKEN for ok in usable],
        "reason": batch.broken,
        "of": pa.nulls(len(text), pa.binary(16)),
        "tokens": np.zeros(len(text), np.int32),
    }
    return pa.table(columns, schema=ROW), usable


@dataclass(frozen=True)
class Plan:
    """What is known once all documents have been compared."""

    tokenizer: ray.ObjectRef
    limit: int
    """Ids whose share is below it are held out."""
    source_of: tuple[int, ...]
    """Each file's source, by number."""
    shard_tokens: int


def tokenize(part: Part, plan: Plan, work: Path, out: Path) -> Result:
    """Write `out`/{train,validation}/NNNNNN-*.{bin,idx} and `out`/documents/NNNNNN.parquet, and count."""
    tokenizer: Tokenizer = fetched(plan.tokenizer)
    rows = with_drops(work, part.number)
    fate, tokens = np.array(rows["fate"].to_pylist(), object), np.zeros(len(rows), np.int32)
    open_rows = np.flatnonzero(fate == None)  # noqa: E711 (elementwise)
    ids = np.zeros(len(rows), "V16")
    ids[open_rows] = id_array(rows["id"].take(pa.array(open_rows)))
    held_out = np.zeros(len(rows), bool)
    held_out[open_rows] = shares(ids[open_rows]) < plan.limit
    size, source = rows["bytes"].to_numpy(), np.array(plan.source_of)[rows["file"].to_numpy()]
    fate[open_rows] = np.where(held_out[open_rows], "validation", "train")
    writers = {
        split: ShardWriter(
            out / split,
            vocab_size=tokenizer.vocab_size,
            fingerprint=tokenizer.fingerprint,
            shard_tokens=plan.shard_tokens,
            prefix=f"{part.number:05d}-",
        )
        for split in ("train", "validation")
    }
    chosen = np.zeros(len(rows), bool)
    chosen[open_rows] = True
    for row, texts in kept_texts(work, part.number, chosen):
        flat, lengths = encode_flat(tokenizer, texts)
        tokens[row] = lengths
        for split, side in (("train", ~held_out[row]), ("validation", held_out[row])):
            if side.any():
                mine = flat if side.all() else flat[np.repeat(side, lengths)]
                writers[split].extend(mine, lengths[side], ids[row[side]], int(size[row[side]].sum()))
    rows = rows.set_column(rows.schema.get_field_index("fate"), "fate", pa.array(fate, pa.string()))
    rows = rows.set_column(rows.schema.get_field_index("tokens"), "tokens", pa.array(tokens))
    path = out / "documents" / f"{part.number:06d}.parquet"
    with _writer(path, rows.schema, "zstd") as file:
        file.write_table(rows)
    sizes = {}
    for split in writers:
        mine = np.flatnonzero(fate == split)
        for number in np.unique(source[mine]):
            here = mine[source[mine] == number]
            sizes[f"{number} {split}"] = [len(here), int(tokens[here].sum()), int(size[here].sum())]
    return {"rows": len(rows), "sizes": sizes, "shards": {split: w.close() for split, w in writers.items()}, **tally(rows)}


def encode_flat(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All texts' ids, each text's followed by end_of_text, uint32 `[t]`, and how many each has, int64 `[n]`."""
    encoded = [[*ids, tokenizer.end_of_text] for ids in tokenizer.encode_batch(texts)]
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    return np.fromiter((token for ids in encoded for token in ids), np.uint32, lengths.sum()), lengths


def read_rows(work: Path, number: int, columns: list[str] | None = None) -> pa.Table:
    """What pass 1 found of a part."""
    return pq.read_table(_rows(work, number), columns=columns)


def write_drops(work: Path, number: int, drops: pa.Table) -> None:
    """Note which rows of a part the comparison of documents dropped: columns `row`, `fate`, `reason`, `of`."""
    with _writer(_drops(work, number), drops.schema, "none") as file:
        file.write_table(drops)


def with_drops(work: Path, number: int) -> pa.Table:
    """A part's rows with the fates that comparison with other documents gave them."""
    rows = read_rows(work, number)
    if not _drops(work, number).exists():
        return rows
    drops = pq.read_table(_drops(work, number))
    at = drops["row"].to_numpy()
    for name in ("fate", "reason", "of"):
        values = np.array(rows[name].to_pylist(), object)
        values[at] = drops[name].to_pylist()
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values, ROW.field(name).type))
    return rows


def kept_texts(work: Path, number: int, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Batches of (row numbers int64 `[n]`, texts) of a part's rows that are `chosen` (bool `[rows]`)."""
    with pq.ParquetFile(_texts(work, number)) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            row = table["row"].to_numpy()
            here = chosen[row]
            if here.any():
                yield row[here], table["text"].filter(pa.array(here)).to_pylist()


def _rows(work: Path, number: int) -> Path:
    return work / f"{number:06d}.rows.parquet"


def _texts(work: Path, number: int) -> Path:
    return work / f"{number:06d}.texts.parquet"


def _drops(work: Path, number: int) -> Path:
    return work / f"{number:06d}.drops.parquet"


@contextmanager
def _writer(path: Path, schema: pa.Schema, compression: str) -> Iterator[pq.ParquetWriter]:
    """A parquet file that has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    level = (
        1 if compression == "zstd" else None
    )  # of text: 6.5 ms of a core per MB to write and read, a quarter of the space; none 1.2, lz4 4.3
    with pq.ParquetWriter(partial, schema, compression=compression, compression_level=level, use_dictionary=False) as file:
        yield file
    os.replace(partial, path)
