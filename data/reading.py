"""Files become a Ray Dataset of rows, in file order, whatever the number of workers.

    rows = read([Path("a.jsonl"), Path("b.txt")], convert, schema)       # convert(record) -> columns, or raises Broken / Dropped

`.jsonl` and `.jsonl.gz` hold one JSON object per line; a `.txt` file is one record {"text": ...}. A row carries `file` and
`at` (the byte where its line begins: its identity and its place in the order) and, if it did not make it, why: `broken`
(unreadable: the fault of the data) or `dropped` (readable, but of no use here).

Ray Data's own `read_json` would not tell which line is broken, so the reader is ours and Ray Data runs it: every task
reads a byte range of one file, or many small files.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset

from data.errors import DataError
from data.files import write_bytes

Convert = Callable[[dict[str, Any]], dict[str, Any]]
ROW = [("file", pa.int32()), ("at", pa.int64()), ("broken", pa.large_string()), ("dropped", pa.large_string())]
RANGE = 4 << 20  # bytes of one task's range: enough tasks for 2 cores from 8 MB on; nothing depends on where ranges are cut
MOST_TASKS = 10_000
BLOCK = 32 << 20  # a task yields a block when it has read this much: far below Arrow's 2 GiB


class Broken(Exception):
    """This record cannot be used; the message says why. It counts against `max_broken_fraction`."""


class Dropped(Exception):
    """This record is sound but of no use here; the message is the reason that it is counted under."""


@contextmanager
def ordered() -> Iterator[None]:
    """Ray Data yields blocks in input order within this context, and reports nothing but warnings."""
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    before = context.execution_options.preserve_order, context.enable_progress_bars, logger.level
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    logger.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that bars are off, as we asked
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before[:2]
        logger.setLevel(before[2])


def read(files: list[Path], convert: Convert, schema: pa.Schema) -> Dataset:
    """Rows of all files with the columns of `schema` (null where a row is broken or dropped) after those of ROW.

    Use within `ordered()`. Raises DataError for missing files, other endings, and when all files are empty.
    """
    columns = pa.schema([*ROW, *schema])

    def read_block(block: pa.Table) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        size = 0
        for part in block.to_pylist():
            for at, raw, broken in _records(Path(part["path"]), part["start"], part["stop"]):
                row: dict[str, Any] = {"file": part["file"], "at": at}
                try:
                    if broken:
                        raise Broken(broken)
                    row |= convert(_parse(raw, part["path"]))
                except Broken as error:
                    row["broken"] = str(error)
                except Dropped as error:
                    row["dropped"] = str(error)
                rows.append(row)
                size += len(raw)
                if size >= BLOCK:
                    yield pa.Table.from_pylist(rows, schema=columns)
                    rows, size = [], 0
        yield pa.Table.from_pylist(rows, schema=columns)

    tables = [pa.Table.from_pylist(task) for task in _tasks(files)]
    return ray.data.from_arrow(tables).map_batches(read_block, batch_format="pyarrow", batch_size=None)


def _tasks(files: list[Path]) -> list[list[dict[str, Any]]]:
    """What each task reads: neighbouring byte ranges, together about RANGE bytes, for a task per small file costs more than reading it."""
    sizes = [_size(path) for path in files]
    if not sum(sizes):
        raise DataError(f"no data: {', '.join(map(str, files)) or 'no file was given'} hold no byte")
    step = max(RANGE, sum(sizes) // MOST_TASKS)
    tasks: list[list[dict[str, Any]]] = [[]]
    for number, (path, size) in enumerate(zip(files, sizes, strict=True)):
        cuts = range(0, size, step) if path.suffix == ".jsonl" else range(1)
        for start in cuts:
            stop = size if start == cuts[-1] else start + step
            if sum(part["stop"] - part["start"] for part in tasks[-1]) + stop - start > step and tasks[-1]:
                tasks.append([])
            tasks[-1].append({"file": number, "path": str(path.absolute()), "start": start, "stop": stop})
    return tasks


def _size(path: Path) -> int:
    if path.suffix not in (".txt", ".jsonl") and path.suffixes[-2:] != [".jsonl", ".gz"]:
        raise DataError(f"{path}: cannot read this kind of file; give .txt, .jsonl or .jsonl.gz")
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _records(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes, str]]:
    """(where it begins, its bytes, why it is broken or "") of each record that begins in [start, stop)."""
    if path.suffix == ".txt":
        yield 0, path.read_bytes(), ""
        return
    compressed = path.suffix == ".gz"
    with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
        at = start
        if start:
            file.seek(start - 1)
            at += len(file.readline()) - 1  # the line across the border belongs to the range before
        while compressed or at < stop:
            try:
                line = file.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                yield at, b"", f"damaged gzip, the rest of the file is lost: {error}"
                return
            if not line:
                return
            if line.strip():
                yield at, line, ""
            at += len(line)


def _parse(raw: bytes, path: str) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        whole = "file" if path.endswith(".txt") else "line"
        raise Broken(f"not UTF-8: 0x{raw[error.start]:02x} at byte {error.start} of the {whole}") from None
    if path.endswith(".txt"):
        return {"text": text}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Broken(f"broken JSON: {error}") from None
    if not isinstance(record, dict):
        raise Broken(f"broken JSON: an object {{...}} is needed, this is a {type(record).__name__}")
    return record


def check_broken(rows: Dataset, files: list[Path], out_dir: Path, max_broken_fraction: float) -> dict[str, int]:
    """Write `out_dir`/broken.jsonl (file, line, reason of every broken row; also when there is none) and count.

    Returns {"rows", "broken"} and, per reason, "dropped: reason". Raises DataError naming the first three when more than
    `max_broken_fraction` of the rows are broken.
    """
    total, broken, dropped = 0, [], dict[str, int]()
    for batch in rows.select_columns([name for name, _ in ROW]).iter_batches(batch_size=None, batch_format="pyarrow"):
        total += len(batch)
        fates = pa.compute.or_(pa.compute.is_valid(batch["broken"]), pa.compute.is_valid(batch["dropped"]))
        for row in batch.filter(fates).to_pylist():
            if row["broken"]:
                broken.append({"file": row["file"], "at": row["at"], "reason": row["broken"]})
            else:
                dropped[row["dropped"]] = dropped.get(row["dropped"], 0) + 1
    quarantine(files, broken, total, out_dir, max_broken_fraction)
    return {"rows": total, "broken": len(broken), **{f"dropped: {reason}": dropped[reason] for reason in sorted(dropped)}}


def quarantine(files: list[Path], rows: Iterable[dict[str, Any]], total: int, out_dir: Path, max_broken_fraction: float) -> None:
    """Write `out_dir`/broken.jsonl: file, line, reason and first bytes of `rows` (`file`, `at`, `reason`, `head`), of `total` in all.

    Raises DataError naming the first three when they are too many.
    """
    broken = list(rows)
    listed = [
        {"file": str(files[row["file"]]), "line": line, "reason": row["reason"], "begins": row.get("head", "")}
        for row, line in zip(broken, _line_numbers(files, broken), strict=True)
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(out_dir / "broken.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed).encode())
    if len(broken) > max_broken_fraction * total:
        first = "; ".join(f"{row['file']}, line {row['line']}: {row['reason']}" for row in listed[:3])
        raise DataError(
            f"{len(broken)} of {total} rows are broken, more than data.max_broken_fraction = {max_broken_fraction:g} allows. "
            f"First: {first}. All: {out_dir / 'broken.jsonl'}"
        )


def _line_numbers(files: list[Path], rows: list[dict[str, Any]]) -> list[int]:
    """Line numbers, from 1, of rows that are known by their byte. Only files with broken rows are read again."""
    numbers: dict[tuple[int, int], int] = {}
    for file in sorted({row["file"] for row in rows}):
        wanted = np.array(sorted({row["at"] for row in rows if row["file"] == file}), dtype=np.int64)
        newlines = np.zeros(len(wanted), dtype=np.int64)
        at = 0
        with gzip.open(files[file], "rb") if files[file].suffix == ".gz" else open(files[file], "rb") as stream:
            while at < wanted[-1] and (piece := stream.read(min(1 << 20, int(wanted[-1]) - at))):
                ends = at + 1 + np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == ord("\n"))
                newlines += np.searchsorted(ends, wanted, side="right")
                at += len(piece)
        numbers |= {(file, int(w)): int(n) + 1 for w, n in zip(wanted, newlines, strict=True)}
    return [numbers[row["file"], row["at"]] for row in rows]
