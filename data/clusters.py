"""Which documents repeat another one: exactly, or nearly. Over files of ids and keys, on Ray, for any number of documents.

    exact = exact_duplicates(parts, out / "exact")                           # parts: parquet files in input order with a column `id`
    near = near_duplicates(parts, out / "near", without=out / "exact")       # and `keys`, `sketch`, as data/minhash.py makes them
    dropped_rows(out / "near", 0)                                            # of part 0: row, id, kept, earlier, cluster

Of documents that are equal, or linked by pairs of near-duplicates, the first in input order stays, and the others name it. A row of a part
whose id (or keys) is null takes no part. `against` are parts of an earlier corpus, that is its index: they come before all others, nothing
is dropped from them, and what is dropped in their favour is marked `earlier`; exactly those new documents go that one run over both would
drop.

    keys -> buckets of documents that share one -> pairs that the sketches confirm -> connected components -> names -> one file per part

Every step is a shuffle (data/shuffle.py) over ranges of keys, of documents or of parts, so more nodes make each of them faster, and a
killed run goes on where it was. Components are found by alternating small stars and large stars (Kiveris et al., SOCC 2014): rounds about
the logarithm of the longest chain.

What a pair needs: the bands alone propose .56 of the pairs of similarity .7 and .92 of those of .8 (data/minhash.py); `threshold` of the
sketches' estimate decides. LEAST is below .8 by one standard error, for recall: see benchmarks/data_duplicates.py for what it reaches.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import xxhash

from data import minhash
from data.engine import gathered
from data.errors import DataError
from data.files import write_bytes, write_json
from data.shuffle import Stage, changes, distinct, of_range, shuffle

FORMAT = "roundhouse duplicates 1"
LEAST = 0.77
ROWS = 1 << 19  # documents of one job, if a part has no more: 117 MB of keys and their places
RECORDS = 1 << 23  # rows of one range: 128 MB of pairs of numbers, and as much again to sort them
CHUNK = 1 << 16  # documents that are compared with the first ones of their bucket together; larger buckets are cut
LEADERS = 64  # of a bucket that all are compared with: its first 32, then 32 more that are like none of those before
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: times it, neighbouring documents are in different ranges
ROUNDS = 100  # of stars; 2^50 documents in a row take 50
DROPPED = pa.schema([("row", pa.int64()), ("id", pa.binary(16)), ("kept", pa.binary(16)), ("earlier", pa.bool_()), ("cluster", pa.int64())])


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


def exact_duplicates(parts: Sequence[Path], out: Path, *, against: Sequence[Path] = ()) -> dict[str, Any]:
    """Documents whose id (binary `[16]`, null: left out) stood earlier. Writes `out`/00000.parquet and so on, one per part (DROPPED), and
    manifest.json last; returns that."""

    def find(corpus: Corpus, work: Path) -> Stage:
        ranges = 1 + corpus.rows // RECORDS
        ids = shuffle(work / "ids", _ids, [(corpus, job, ranges) for job in range(corpus.jobs)], ranges)
        return shuffle(work / "repeated", _repeated, [(corpus, ids, number) for number in range(ranges)], corpus.jobs)

    return _drop("exact", parts, against, out, {}, find)


def near_duplicates(
    parts: Sequence[Path], out: Path, *, against: Sequence[Path] = (), without: Path | None = None, threshold: float = LEAST
) -> dict[str, Any]:
    """Documents linked to an earlier one by pairs that share a key and whose sketches are similar by `threshold` at least. As
    `exact_duplicates`; parts also hold `keys` and `sketch` (`minhash.columns`). `without`: an `out` of `exact_duplicates`, whose dropped
    rows take no part."""

    def find(corpus: Corpus, work: Path) -> Stage:
        ranges = 1 + corpus.rows * minhash.BANDS // RECORDS
        bands = shuffle(work / "bands", _bands, [(corpus, job, ranges, without) for job in range(corpus.jobs)], ranges)
        shared = shuffle(work / "shared", _shared, [(corpus, bands, number) for number in range(ranges)], corpus.jobs)
        ranges = 1 + shared.rows * 16 // RECORDS
        met = shuffle(work / "met", _met, [(corpus, shared, job, ranges) for job in range(corpus.jobs)], ranges)
        pairs = shuffle(work / "pairs", _pairs, [(met, number, threshold) for number in range(ranges)], ranges)
        stars = connected(pairs, work)
        return shuffle(work / "repeated", _by_root, [(corpus, stars, number) for number in range(stars.ranges)], corpus.jobs)

    return _drop("near", parts, against, out, {"minhash": minhash.FORMAT, "threshold": threshold}, find, without)


def dropped_rows(out: Path, part: int) -> pa.Table:
    """What is dropped of one part, in order: `row` in its file, `id`, `kept` (id of the document that it repeats), `earlier` (that one is
    of the corpus that was compared `against`) and `cluster` (how many documents are linked, the kept one included)."""
    return pq.read_table(out / f"{part:05d}.parquet")


def connected(pairs: Stage, work: Path) -> Stage:
    """Rows (a, b) with a > b, ranged by a -> rows (node, least node of its component) for all nodes but those least ones, ranged by
    node."""
    for number in range(ROUNDS):
        jobs = range(pairs.ranges)
        small = shuffle(work / f"small-{number}", _small_star, [(pairs, job) for job in jobs], pairs.ranges)
        pairs = shuffle(work / f"large-{number}", _large_star, [(small, job) for job in jobs], pairs.ranges)
        if not small.note + pairs.note:
            return pairs
    raise DataError(
        f"{work}: near-duplicates are linked in chains that {ROUNDS} rounds did not shorten: a damaged file; remove this folder"
    )


def _drop(
    kind: str,
    parts: Sequence[Path],
    against: Sequence[Path],
    out: Path,
    options: dict[str, Any],
    find: Callable[[Corpus, Path], Stage],
    without: Path | None = None,
) -> dict[str, Any]:
    """Survey the parts, find what repeats what, name it. Files are kept when the same question was answered before, and work half done is
    gone on with."""
    counts = gathered("survey of documents", [_survey.remote(path) for path in (*against, *parts)])
    manifest = {"format": FORMAT, "kind": kind, **options, "against": len(against), "parts": len(parts)}
    asked = xxhash.xxh3_128(json.dumps([manifest, counts, _finished(without) if without else None]).encode()).hexdigest()
    if (done := _finished(out)) and done["asked"] == asked:
        return done
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    for stale in out.glob("work-*"):
        if stale.name != f"work-{asked}":
            shutil.rmtree(stale)
    work = out / f"work-{asked}"
    first, here = [0], 0
    for number, (rows, _) in enumerate(counts):
        if number and (here + rows > ROWS or number == len(against)):
            first.append(number)
            here = 0
        here += rows
    corpus = Corpus(
        tuple(path.absolute() for path in (*against, *parts)), len(against), (*first, len(counts)), sum(rows for rows, _ in counts)
    )
    repeated = find(corpus, work)
    named = shuffle(work / "named", _named, [(corpus, repeated, job) for job in range(corpus.jobs)], corpus.jobs)
    jobs = [job for job in range(corpus.jobs) if corpus.first[job] >= corpus.earlier]
    of_parts = gathered("names of duplicates", [_write.remote(corpus, named, job, out) for job in jobs])
    manifest |= {"documents": corpus.rows, "dropped": sum(of_parts), "clusters": named.note, "asked": asked}
    write_json(out / "manifest.json", manifest)
    shutil.rmtree(work)
    return manifest


def _finished(out: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((out / "manifest.json").read_bytes()))
    except FileNotFoundError:
        return None


@ray.remote
def _survey(path: Path) -> tuple[int, str]:
    """Rows of a part, and what its bytes are."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return pq.read_metadata(path).num_rows, digest.hexdigest()


def _matrix(column: pa.ChunkedArray, dtype: str, width: int) -> np.ndarray:
    """A column of bytes of one width, without nulls, as `[n, width]`."""
    return np.frombuffer(b"".join(_bytes(chunk) for chunk in column.chunks), dtype).reshape(-1, width)


def _bytes(array: pa.Array) -> bytes:
    width = array.type.byte_width
    return bytes(memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width])


def _ids(corpus: Corpus, job: int, ranges: int) -> tuple[np.ndarray, np.ndarray, int]:
    places, table = corpus.read(job, ["id"])
    there = table["id"].is_valid().to_numpy()
    ids = _matrix(table["id"].drop_null(), ">u8", 2).astype(np.uint64)
    return np.column_stack([ids, places[there]]), of_range(ids[:, 0], ranges), 0


def _repeated(corpus: Corpus, ids: Stage, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(first place of an id, each later one), for the job that holds the first."""
    rows = ids.read(number)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    new = changes(rows[:, :2])
    root = rows[new][np.cumsum(new) - 1, 2]
    found = np.column_stack([root, rows[:, 2]])[~new]
    return found, corpus.job_of(found[:, 0]), 0


def _bands(corpus: Corpus, job: int, ranges: int, without: Path | None) -> tuple[np.ndarray, np.ndarray, int]:
    places, table = corpus.read(job, ["keys"])
    there = table["keys"].is_valid().to_numpy().copy()
    if without is not None and corpus.first[job] >= corpus.earlier:
        for number in range(corpus.first[job], corpus.first[job + 1]):
            gone = dropped_rows(without, number - corpus.earlier)["row"].to_numpy()
            there[np.searchsorted(places, np.uint64(number << 32)) + gone] = False
    keys = _matrix(table["keys"].filter(pa.array(there)), "u8", minhash.BANDS)
    rows = np.column_stack([keys.reshape(-1), np.repeat(places[there], minhash.BANDS)])
    return rows, of_range(rows[:, 0], ranges), 0


def _shared(corpus: Corpus, bands: Stage, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(document, key) of keys that more than one document has, for the job that holds the document's sketch. A bucket of more than CHUNK
    becomes several, each with the first document in it, so that no task meets a whole one."""
    rows = bands.read(number)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]  # documents came in order and stay so
    starts = np.flatnonzero(changes(rows[:, :1]))
    sizes = np.diff(np.append(starts, len(rows)))
    rank = np.arange(len(rows)) - np.repeat(starts, sizes)
    several = np.repeat(sizes, sizes) > 1
    chunk = (rank // CHUNK).astype(np.uint64)
    found = np.column_stack([rows[:, 1], rows[:, 0] ^ chunk << np.uint64(40)])[several]
    again = rank[several] % CHUNK == 0
    leaders = np.column_stack([np.repeat(rows[starts, 1], sizes)[several][again], found[again, 1]])
    found = np.concatenate([found, leaders[rank[several][again] > 0]])
    return found, corpus.job_of(found[:, 0]), 0


def _met(corpus: Corpus, shared: Stage, job: int, ranges: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(key, document, its sketch in 14 numbers), for the range of the key."""
    wanted = shared.read(job)
    places, table = corpus.read(job, ["sketch"])
    which = np.searchsorted(places, wanted[:, 0])
    needed, position = np.unique(which, return_inverse=True)
    sketches = _matrix(table["sketch"].take(pa.array(needed)), "u8", minhash.PERMUTATIONS // 8)
    return np.column_stack([wanted[:, 1], wanted[:, 0], sketches[position]]), of_range(wanted[:, 1], ranges), 0


def _pairs(met: Stage, number: int, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """(later document, earlier one) of pairs that are similar, for the range of the later."""
    rows = met.read(number)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    sketches = np.ascontiguousarray(rows[:, 2:]).view(np.uint8).reshape(len(rows), minhash.PERMUTATIONS)
    equal = int(np.ceil(minhash.PERMUTATIONS * (threshold * (1 - 1 / 256) + 1 / 256)))
    found = distinct(_confirmed(np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1]), sketches, equal))
    return found, of_range(found[:, 0] * SPREAD, met.ranges), 0


@numba.njit(cache=True)
def _confirmed(keys, places, sketches, equal):  # type: ignore[no-untyped-def]
    """Pairs that link what is similar among documents with the same key (sorted), that is whose sketches have `equal` bytes in common at
    least. Of a bucket of up to LEADERS / 2 all are held against all; of a larger one each against LEADERS, so that a million copies cost a
    million times that. What is linked already is not linked again: fewer than two pairs for a document."""
    found = np.empty((2 * len(keys), 2), np.uint64)
    pairs, count = 0, 0
    leaders, label = np.empty(LEADERS, np.int64), np.empty(LEADERS, np.int64)
    for i in range(len(keys)):
        if i == 0 or keys[i] != keys[i - 1]:
            count = 0
        mine = i
        for j in range(count):
            if label[j] == mine:
                continue
            same = 0
            for k in range(sketches.shape[1]):
                same += sketches[i, k] == sketches[leaders[j], k]
            if same >= equal:
                found[pairs, 0], found[pairs, 1] = places[i], places[leaders[j]]
                pairs += 1
                before, mine = mine, label[j]
                for other in range(count):
                    label[other] = mine if label[other] == before else label[other]
        if count < LEADERS // 2 or (mine == i and count < LEADERS):
            leaders[count], label[count] = i, mine
            count += 1
    return found[:pairs]


def _groups(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows (a, b), sorted, and for each the least b of its a."""
    rows = distinct(rows)
    new = changes(rows[:, :1])
    return rows, rows[new, 1][np.cumsum(new) - 1]


def _small_star(pairs: Stage, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Every node and its smaller neighbours are linked to the least of those. Both directions, ranged by the first; notes how many links
    moved."""
    rows, least = _groups(pairs.read(number))
    moved = rows[:, 1] != least
    links = np.concatenate([np.column_stack([rows[:, 0], least]), np.column_stack([rows[:, 1], least])[moved]])
    links = distinct(np.concatenate([links, links[:, ::-1]]))
    return links, of_range(links[:, 0] * SPREAD, pairs.ranges), int(moved.sum())


def _large_star(links: Stage, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Every node's larger neighbours are linked to its least neighbour, or to itself. Ranged by the larger; notes how many links moved."""
    rows, least = _groups(links.read(number))
    larger = rows[:, 1] > rows[:, 0]
    rows, least = rows[larger], np.minimum(least, rows[:, 0])[larger]
    pairs = np.column_stack([rows[:, 1], least])
    return pairs, of_range(pairs[:, 0] * SPREAD, links.ranges), int((least != rows[:, 0]).sum())


def _by_root(corpus: Corpus, stars: Stage, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    found = stars.read(number)[:, ::-1]
    return found, corpus.job_of(found[:, 0]), 0


def _named(corpus: Corpus, repeated: Stage, job: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(document, the one it repeats, that one's id in two numbers, documents of the cluster), for the job that holds the first; notes the
    clusters."""
    rows = repeated.read(job)
    places, table = corpus.read(job, ["id"])
    roots, position, sizes = np.unique(rows[:, 0], return_inverse=True, return_counts=True)
    ids = _matrix(table["id"].take(pa.array(np.searchsorted(places, roots))), ">u8", 2).astype(np.uint64)
    found = np.column_stack([rows[:, 1], rows[:, 0], ids[position], (sizes + 1).astype(np.uint64)[position]])
    return found, corpus.job_of(rows[:, 1]), len(roots)


@ray.remote
def _write(corpus: Corpus, named: Stage, job: int, out: Path) -> int:
    """The files of one job's parts; returns how many rows they drop."""
    rows = named.read(job)
    rows = rows[np.argsort(rows[:, 0])]
    of_part = (rows[:, 0] >> np.uint64(32)).astype(np.int64)
    for number in range(corpus.first[job], corpus.first[job + 1]):
        here = rows[of_part == number]
        row = (here[:, 0] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        kept = np.ascontiguousarray(here[:, 2:4]).astype(">u8").tobytes()
        columns = [
            pa.array(row),
            pq.read_table(corpus.parts[number], columns=["id"])["id"].take(pa.array(row)).combine_chunks(),
            pa.array([kept[i : i + 16] for i in range(0, len(kept), 16)], pa.binary(16)),
            pa.array((here[:, 1] >> np.uint64(32)).astype(np.int64) < corpus.earlier),
            pa.array(here[:, 4].astype(np.int64)),
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(columns, schema=DROPPED), sink, compression="zstd")
        write_bytes(out / f"{number - corpus.earlier:05d}.parquet", sink.getvalue().to_pybytes())
    return len(rows)
