"""Files become rows, in file order, whatever the number of workers.

    rows = read([Path("a.jsonl"), "s3://bucket/b.parquet"], convert, schema)  # a Ray Dataset; convert(record) -> columns, or raises

`readers.py` says which formats there are. A row carries `file` and `at` (the byte where its line begins, or its number in a parquet or
WARC file: its identity and its place in the order) and, if it did not make it, why: `broken` (unreadable: the fault of the data)
or `dropped` (readable, but of no use here).

Ray Data's own readers would not tell which line is broken, so the reader is ours and Ray Data runs it: every task
reads a byte range of one file, or many small files.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset

from data.errors import DataError
from data.files import write_bytes
from data.parts import Part, plan_parts, records
from data.readers import Piece, format_of, opened
from data.stores import File, size_of
from data.unpacking import HEAD, Damaged

Convert = Callable[[dict[str, Any]], dict[str, Any]]
ROW = [
    ("file", pa.int32()),
    ("at", pa.int64()),
    ("broken", pa.large_string()),
    ("dropped", pa.large_string()),
    ("head", pa.large_binary()),
]
RANGE = 4 << 20  # bytes of one task's range: enough tasks for 2 cores from 8 MB on; nothing depends on where ranges are cut
MOST_TASKS = 10_000
BLOCK = 32 << 20  # a task yields a block when it has read this much: far below Arrow's 2 GiB


class Broken(Exception):
    """This record cannot be used; the message says why. It counts against `max_broken_fraction`."""


class Dropped(Exception):
    """This record is sound but of no use here; the message is the reason that it is counted under."""


@contextmanager
def ordered(order: bool = True) -> Iterator[None]:
    """Ray Data yields blocks in input order within this context (or as they get done), and reports nothing but warnings."""
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    before = context.execution_options.preserve_order, context.enable_progress_bars, logger.level
    context.execution_options.preserve_order, context.enable_progress_bars = order, False
    logger.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that bars are off, as we asked
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before[:2]
        logger.setLevel(before[2])


def read(files: Sequence[File], convert: Convert, schema: pa.Schema, fields: Mapping[str, str] | None = None) -> Dataset:
    """Rows of all files with the columns of `schema` (null where a row is broken or dropped) after those of ROW.

    Use within `ordered()`. Raises DataError as `plan_parts` does; `fields` as in `records`.
    """
    columns = pa.schema([*ROW, *schema])

    def read_block(block: pa.Table) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        size = 0
        for record in records(Part(0, tuple(Piece(**piece) for piece in block.to_pylist())), fields):
            row = {"file": record.file, "at": record.at, "broken": record.broken, "dropped": record.dropped, "head": record.head or None}
            try:
                if record.value is not None:
                    row |= convert(record.value)
            except Broken as error:
                row |= {"broken": _reason(error), "head": head_of(record.value)}
            except Dropped as error:
                row["dropped"] = _reason(error)
            rows.append(row)
            size += record.size
            if size >= BLOCK:
                yield pa.Table.from_pylist(rows, schema=columns)
                rows, size = [], 0
        yield pa.Table.from_pylist(rows, schema=columns)

    total = sum(size_of(file) for file in files)
    parts = plan_parts(files, max(RANGE, total // MOST_TASKS))
    tables = [pa.Table.from_pylist([vars(piece) for piece in part.pieces]) for part in parts]
    return ray.data.from_arrow(tables).map_batches(read_block, batch_format="pyarrow", batch_size=None)


def _reason(error: Exception) -> str:
    """A short text that can be stored: what a message quotes may be long, or hold half a surrogate pair."""
    return str(error)[:500].encode(errors="backslashreplace").decode()


def head_of(value: Any) -> bytes:
    """The first bytes of a record that was read but cannot be used, as JSON."""
    return json.dumps(value, default=str)[:HEAD].encode()


def check_broken(rows: Dataset, files: Sequence[File], out_dir: Path, max_broken_fraction: float) -> dict[str, int]:
    """Write `out_dir`/broken.jsonl (see `quarantine`; also when there is none) and count.

    Returns {"rows", "broken"} and, per reason, "dropped: reason". Raises DataError when more than `max_broken_fraction` of the rows
    are broken.
    """
    total, broken, dropped = 0, [], dict[str, int]()
    for batch in rows.select_columns([name for name, _ in ROW]).iter_batches(batch_size=None, batch_format="pyarrow"):
        total += len(batch)
        fates = pa.compute.or_(pa.compute.is_valid(batch["broken"]), pa.compute.is_valid(batch["dropped"]))
        for row in batch.filter(fates).to_pylist():
            if row["broken"]:
                head = (row["head"] or b"").decode(errors="backslashreplace")
                broken.append({"file": row["file"], "at": row["at"], "reason": row["broken"], "head": head})
            else:
                dropped[row["dropped"]] = dropped.get(row["dropped"], 0) + 1
    quarantine(files, broken, total, out_dir, max_broken_fraction)
    return {"rows": total, "broken": len(broken), **{f"dropped: {reason}": dropped[reason] for reason in sorted(dropped)}}


def quarantine(files: Sequence[File], rows: Iterable[Mapping[str, Any]], total: int, out_dir: Path, max_broken_fraction: float) -> None:
    """Write `out_dir`/broken.jsonl: file, line (or number of the record, from 1), reason and first bytes of `rows` (`file`, `at`,
    `reason`, `head`), of `total` in all.

    Raises DataError naming the first three when they are too many.
    """
    broken = list(rows)
    listed = [
        {"file": str(files[row["file"]]), "line": line, "reason": row["reason"], "begins": row.get("head", "")}
        for row, line in zip(broken, line_numbers(files, broken), strict=True)
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(out_dir / "broken.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed).encode())
    if len(broken) > max_broken_fraction * total:
        first = "; ".join(f"{row['file']}, line {row['line']}: {row['reason']}" for row in listed[:3])
        raise DataError(
            f"{len(broken)} of {total} rows are broken, more than data.max_broken_fraction = {max_broken_fraction:g} allows. "
            f"First: {first}. All: {out_dir / 'broken.jsonl'}"
        )


def line_numbers(files: Sequence[File], rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Line or record numbers, from 1, of rows that are known by where they begin. Only .jsonl with broken rows are read again."""
    numbers: dict[tuple[int, int], int] = {}
    for file in sorted({row["file"] for row in rows}):
        wanted = np.array(sorted({row["at"] for row in rows if row["file"] == file}), dtype=np.int64)
        newlines = _newlines_before(files[file], wanted) if format_of(files[file])[0] == "jsonl" else wanted
        numbers |= {(file, int(w)): int(n) + 1 for w, n in zip(wanted, newlines, strict=True)}
    return [numbers[row["file"], row["at"]] for row in rows]


def _newlines_before(file: File, places: np.ndarray) -> np.ndarray:
    """How many newlines stand before each of the places, ascending int64 `[n]`, in a file's (decompressed) bytes."""
    found = np.zeros(len(places), dtype=np.int64)
    at = 0
    with opened(file, size_of(file)) as stream:
        try:
            while at < places[-1] and (piece := stream.read(min(1 << 20, int(places[-1]) - at))):
                ends = at + 1 + np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == ord("\n"))
                found += np.searchsorted(ends, places, side="right")
                at += len(piece)
        except Damaged:  # no row begins behind it
            pass
    return found
