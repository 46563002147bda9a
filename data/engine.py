"""A function over all parts of a corpus, on Ray Data: in parallel, watched, and resumed part by part.

    results = each_part("reading", work, parts, folder, key, watch)    # work(part) -> a JSON object, for every part, in order

A task is a few parts, one after another, each with all its steps fused: text never goes through Ray's object store or the driver, only
each part's few counts do.
`folder`/NNNNNN.json is written when a part is whole and says what it was made of (`key`): whoever comes again with the same key
skips it, so a run killed at any moment loses the parts in flight. A part whose worker died is tried again, by Ray; one that keeps
killing its workers is named with its files.
"""

import json
import math
import queue
import resource
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray.data
from ray.data._internal.execution.resource_manager import ResourceManager

from data.errors import DataError
from data.files import write_bytes
from data.reading import ordered

Result = dict[str, Any]
DEADLINE_S = 3600.0  # until the next part is done; one of 64 MB takes half a minute
TRIES = 4  # of a part whose worker dies
LUMPS = 16 << 20, 64 << 20  # bytes of the parts of one task, at least and at most: see `lumps`; more makes progress coarse

# `max_retries` goes through `ray_remote_args`, whose named successors (ray 2.60) leave it out.
warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
# Ray Data (2.60) asks once a second how many CPUs there are, and until it knows runs one task at a time.
ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.02  # type: ignore[assignment]  # an int there


class Sized(Protocol):
    """What a part must tell of itself: its bytes, for progress, and a name for messages."""

    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str: ...


Watch = Callable[[int, int, str], None]
"""Called with (parts done, parts, "what") at the start, and with how fast it goes and how long still whenever a part is done."""


def each_part(
    what: str,
    work: Callable[[Any], Result],
    parts: Sequence[Sized],
    folder: Path,
    key: str,
    watch: Watch = lambda done, of, text: None,
    deadline_s: float = DEADLINE_S,
) -> list[Result]:
    """The results of all parts in order, those of earlier runs with the same `key` included. Needs a connected Ray.

    `work` runs in Ray's workers and must leave the same bytes whenever it is called again. Raises DataError when no part gets done within
    `deadline_s`, or when a part's workers keep dying, and what `work` raised, with the part's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[int, Result] = {}
    for number in range(len(parts)):
        marker = read_marker(folder, number)
        if marker is not None and marker["key"] == key:
            results[number] = marker["result"]
    todo = [number for number in range(len(parts)) if number not in results]
    meter = Meter(what, parts, results)
    watch(len(results), len(parts), what)
    shared = ray.put(list(parts))
    for number, result in _run(todo, _task(what, work, shared, folder, key), parts, folder, what, deadline_s):
        results[number] = result
        watch(len(results), len(parts), meter.text(number, result))
    return [results[number] for number in range(len(parts))]


@dataclass(frozen=True)
class _Failed:
    error: BaseException


def _task(what: str, work: Callable[[Any], Result], shared: ray.ObjectRef, folder: Path, key: str) -> Callable[[pa.Table], pa.Table]:
    def done(number: int) -> Result:
        if (marker := read_marker(folder, number)) is not None and marker["key"] == key:
            return marker["result"]  # by a worker that died at a later part of this task
        part, tries, since = fetched(shared)[number], _tries(folder, number), time.process_time()
        with open(tries, "ab") as file:  # stays behind when this process dies
            if file.tell() >= TRIES:
                raise DataError(
                    f"{what}: the worker died {TRIES} times on {part.name}: out of memory, or a fault of a library on this file; leave it "
                    "out, or give a worker less at once (data.part_bytes)"
                )
            file.write(b".")
        try:
            result = work(part)
        except DataError:
            raise
        except Exception as error:
            raise RuntimeError(f"{part.name}: {error!r}") from error
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        write_bytes(folder / f"{number:06d}.cost", json.dumps([time.process_time() - since, peak]).encode())
        write_marker(folder, number, key, result)
        tries.unlink(missing_ok=True)
        return result

    def run(block: pa.Table) -> pa.Table:
        numbers: list[int] = block["part"].to_pylist()
        answers: list[dict[str, Any]] = []
        for number in numbers:
            try:
                answers.append({"result": done(number)})
            except DataError as error:  # as an answer: what Ray Data makes of exceptions is no message for people
                answers.append({"wrong": str(error)})
        return pa.table({"part": pa.array(numbers, pa.int64()), "answer": pa.array(map(json.dumps, answers), pa.large_string())})

    return run


def _run(
    todo: list[int], task: Callable[[pa.Table], pa.Table], parts: Sequence[Sized], folder: Path, what: str, deadline_s: float
) -> Iterator[tuple[int, Result]]:
    """(number, result) of every part to do, as they get done."""
    if not todo:
        return
    for number in todo:
        _tries(folder, number).unlink(missing_ok=True)
    found: queue.Queue[tuple[int, Result] | _Failed | None] = queue.Queue()
    over = threading.Event()

    def drive() -> None:  # in a thread of its own, since Ray Data's iterators wait without end
        try:
            with ordered(False):
                tasks = lumps([parts[number].size for number in todo], int(ray.cluster_resources().get("CPU", 1)))
                blocks = ray.data.from_arrow([pa.table({"part": pa.array(todo[a:b], pa.int64())}) for a, b in pairwise([0, *tasks])])
                done = blocks.map_batches(task, batch_format="pyarrow", batch_size=None, max_retries=TRIES)
                for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                    if over.is_set():
                        return
                    for number, answer in zip(batch["part"].to_pylist(), map(json.loads, batch["answer"].to_pylist()), strict=True):
                        found.put((number, answer["result"]) if "result" in answer else _Failed(DataError(answer["wrong"])))
            found.put(None)
        except BaseException as error:  # noqa: BLE001 (it is raised in the thread that waits)
            found.put(_Failed(error))

    threading.Thread(target=drive, daemon=True, name=f"{what} parts").start()
    try:
        while True:
            try:
                next_one = found.get(timeout=deadline_s)
            except queue.Empty:
                raise DataError(f"{what}: no part was done within {deadline_s:g} s; in work: {_in_work(todo, parts, folder)}") from None
            if next_one is None:
                return
            if isinstance(next_one, _Failed):
                raise next_one.error
            yield next_one
    finally:
        over.set()


def lumps(sizes: Sequence[int], workers: int) -> list[int]:
    """Where tasks end that are made of parts of these sizes, in bytes: many parts at the beginning, few at the end, so that all workers
    end together (guided self-scheduling, Polychronopoulos and Kuck 1987).

    Ray Data takes 0.1 s to give a worker its next task, as long as gigatoken takes for a part of 8 MB: hence tasks of two of them.
    """
    least, most = LUMPS
    ends: list[int] = []
    while (start := ends[-1] if ends else 0) < len(sizes):
        left, end = len(sizes) - start, start + 1
        while end < len(sizes) and (size := sum(sizes[start : end + 1])) <= most:
            if end - start >= math.ceil(left / workers / (1 if size <= least else 2)):
                break
            end += 1
        ends.append(end)
    return ends


def write_marker(folder: Path, number: int, key: str, result: Result) -> None:
    """Say that a part is whole."""
    write_bytes(folder / f"{number:06d}.json", json.dumps({"key": key, "result": result}).encode())


def read_marker(folder: Path, number: int) -> dict[str, Any] | None:
    """What a finished part left; None where there is none, or none that can be read."""
    try:
        marker = json.loads((folder / f"{number:06d}.json").read_bytes())
        return marker if {"key", "result"} <= marker.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def costs(folders: Iterable[Path]) -> dict[str, float]:
    """What all parts took: `core_seconds`, and `worker_mb`, the most memory that a worker has had."""
    found = [json.loads(path.read_bytes()) for folder in folders for path in folder.glob("*.cost")]
    return {"core_seconds": round(sum(one for one, _ in found), 3), "worker_mb": round(max((most for _, most in found), default=0), 1)}


def _tries(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.tries"


def _in_work(numbers: Sequence[int], parts: Sequence[Sized], folder: Path) -> str:
    begun = [parts[number].name for number in numbers if _tries(folder, number).exists()]
    return ", ".join(begun[:3]) + (f" and {len(begun) - 3} more" if len(begun) > 3 else "") or "none"


class Meter:
    """How fast it goes, and how long still, in bytes of input: parts differ in size."""

    def __init__(self, what: str, parts: Sequence[Sized], done: dict[int, Result]) -> None:
        self.what, self.parts, self.since = what, parts, time.monotonic()
        self.left = sum(part.size for number, part in enumerate(parts) if number not in done)
        self.bytes = self.rows = 0

    def text(self, number: int, result: Result) -> str:
        self.bytes += self.parts[number].size
        self.left -= self.parts[number].size
        self.rows += result.get("rows", 0)
        seconds = max(time.monotonic() - self.since, 1e-3)
        left = round(self.left * seconds / max(self.bytes, 1))
        rows = f", {self.rows / seconds:,.0f} rows/s" if self.rows else ""
        return f"{self.what} {self.bytes / seconds / 1e6:.1f} MB/s{rows}, {left // 60}:{left % 60:02d} left"


def gathered(what: str, tasks: Sequence[ray.ObjectRef]) -> list[Any]:
    """What plain Ray tasks return, in order. Raises DataError when they are not done within DEADLINE_S."""
    try:
        return list(ray.get(list(tasks), timeout=DEADLINE_S))
    except ray.exceptions.GetTimeoutError:
        raise DataError(
            f"{what}: {len(tasks)} tasks were not done within {DEADLINE_S:g} s; `ray stack` on a node shows where they stand"
        ) from None


@lru_cache(maxsize=4)
def fetched(reference: ray.ObjectRef) -> Any:
    """What was put into the object store, once per process: rebuilding a tokenizer of 200,000 tokens for every part would cost as much
    as its work."""
    return ray.get(reference)
