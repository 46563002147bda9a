"""Rows of numbers that change hands between tasks: sorted by whom they are for, on disk, one file per task.

    stage = shuffle(work / "bands", keys_of_parts, jobs, ranges=8)     # each job's rows, and which of 8 ranges each row is for
    stage.read(3)                                                      # uint64 [n, columns]: what all tasks wrote for range 3

A step is one Ray task per job, and a job's file is whole or not there: a stopped run goes on with the jobs that have none. How many jobs
and ranges there are follows from the data alone, never from the machine, so neither does anything that is written. Memory: one job's rows,
or one range's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from data.engine import gathered
from data.files import write_bytes

Work = Callable[..., tuple[np.ndarray, np.ndarray, int]]
"""A job's arguments -> its rows, uint64 `[n, columns]`; the range of each, int64 `[n]`; and a number for whoever waits for it."""


RECORDS = 1 << 23  # rows of one range: 128 MB of pairs of numbers, and as much again to sort them
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: times it, neighbouring documents are in different ranges
HEAD = 3  # int64 before a file's range ends: rows, columns, note


@dataclass(frozen=True)
class Corpus:
    """Parts in input order, the first `earlier` of them another corpus's, and where their rows are in the one numbering."""

    parts: tuple[Path, ...]
    earlier: int
    first: tuple[int, ...]
    """Number of each job's first part, and the number of parts at the end."""
    rows: int

    @property
    def jobs(self) -> int:
        return len(self.first) - 1

    def job_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.array(self.first[1:]), (places >> np.uint64(32)).astype(np.int64), side="right")

    def read(self, job: int, columns: list[str]) -> tuple[np.ndarray, pa.Table]:
        """(place of every row, uint64 `[n]`: part << 32 | row of it; those columns)."""
        numbers = range(self.first[job], self.first[job + 1])
        tables = [pq.read_table(self.parts[number], columns=columns) for number in numbers]
        places = [np.uint64(number << 32) + np.arange(len(table), dtype=np.uint64) for number, table in zip(numbers, tables, strict=True)]
        return np.concatenate(places), pa.concat_tables(tables)


@dataclass(frozen=True)
class Stage:
    folder: Path
    jobs: int
    ranges: int
    rows: int
    note: int
    """The sum of what the jobs had to tell."""

    def read(self, number: int) -> np.ndarray:
        """All rows for one range, in the order of the jobs, uint64 `[n, columns]`."""
        found = []
        for job in range(self.jobs):
            with open(_file(self.folder, job), "rb") as file:
                _, columns, _ = np.fromfile(file, np.int64, HEAD)
                file.seek(8 * (HEAD + number))
                begin, end = np.fromfile(file, np.int64, 2)
                file.seek(8 * (HEAD + self.ranges + 1 + begin * columns))
                found.append(np.fromfile(file, np.uint64, (end - begin) * columns).reshape(-1, columns))
        return np.concatenate(found)


def shuffle(folder: Path, work: Work, jobs: Sequence[tuple[Any, ...]], ranges: int) -> Stage:
    """`work(*job)` for every job, on all cores of all nodes, into `folder`, which every node sees. Needs a connected Ray."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [_job.remote(folder, number, work, job, ranges) for number, job in enumerate(jobs)]
    told = gathered(folder.name, tasks)
    return Stage(folder, len(jobs), ranges, sum(rows for rows, _ in told), sum(note for _, note in told))


def distinct(rows: np.ndarray) -> np.ndarray:
    """Rows of numbers `[n, 2]` in ascending order, each once."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    return rows[changes(rows)]


def changes(rows: np.ndarray) -> np.ndarray:
    """bool `[n]`: rows `[n, columns]` that are not as the one before."""
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return new


def of_range(values: np.ndarray, ranges: int) -> np.ndarray:
    """Which of `ranges` even ranges of 0 .. 2^64 each value (uint64 `[n]`) lies in, int64 `[n]`."""
    return ((values >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32)).astype(np.int64)


@ray.remote
def _job(folder: Path, number: int, work: Work, job: tuple[Any, ...], ranges: int) -> tuple[int, int]:
    path = _file(folder, number)
    if not path.exists():
        rows, where, note = work(*job)
        assert rows.dtype == np.uint64, rows.dtype  # beside a signed column numpy would make floats of them
        order = np.argsort(where, kind="stable")
        ends = np.concatenate([[0], np.cumsum(np.bincount(where, minlength=ranges))])
        head = np.array([len(rows), rows.shape[1], note, *ends], np.int64)
        write_bytes(path, head.tobytes() + rows[order].tobytes())
    count, _, note = np.fromfile(path, np.int64, HEAD)
    return int(count), int(note)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.rows"


def matrix(column: pa.ChunkedArray, dtype: str, width: int) -> np.ndarray:
    """A column of bytes of one width, without nulls, as `[n, width]`."""
    return np.frombuffer(b"".join(_bytes(chunk) for chunk in column.chunks), dtype).reshape(-1, width)


def _bytes(array: pa.Array) -> bytes:
    width = array.type.byte_width
    return bytes(memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width])


DROPPED = pa.schema([("row", pa.int64()), ("id", pa.binary(16)), ("kept", pa.binary(16)), ("earlier", pa.bool_()), ("cluster", pa.int64())])


def dropped_rows(out: Path, part: int) -> pa.Table:
    """What is dropped of one part, in order: `row` in its file, `id`, `kept` (id of the document that it repeats), `earlier` (that one is
    of the corpus that was compared `against`) and `cluster` (how many documents are linked, the kept one included)."""
    return pq.read_table(out / f"{part:05d}.parquet")
