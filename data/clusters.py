"""Which documents repeat another one: exactly, or nearly. Over files of ids and keys, on Ray, for any number of documents.

    exact = exact_duplicates(parts, out / "exact")                           # parts: parquet files in input order with a column `id`
    near = near_duplicates(parts, out / "near", texts=texts, without=out / "exact")    # and `keys`, `sketch` (minhash.columns)
    dropped_rows(out / "near", 0)                                            # of part 0: row, id, kept, earlier, cluster

Of documents that are equal, or linked by pairs of near-duplicates, the first in input order stays, and the others name it. A row of a part
whose id (or keys) is null takes no part. `against` are parts of an earlier corpus, that is its index: they come before all others, nothing
is dropped from them, and what is dropped in their favour is marked `earlier`. Those new documents go that one run over both would drop,
but for pairs of an old and a new document that only their texts could decide.

    similar pairs (data/pairs.py) -> connected components -> names -> one file per part

Every step is a shuffle (data/shuffle.py) over ranges of keys, of documents or of parts, so more nodes make each of them faster, and a
killed run goes on where it was. Components are found by alternating small stars and large stars (Kiveris et al., SOCC 2014): rounds about
the logarithm of the longest chain.

What a pair needs: a key in common, which .92 of the pairs of similarity .8 have and .56 of those of .7 (data/minhash.py), and that SIMILAR
of their different n-grams are in both texts. The sketches' estimate settles what is clear; the texts of the pairs in doubt are compared, so
of what is linked nothing is less similar. Where a text is not there any more, in an earlier corpus, the estimate decides.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import xxhash

from data import minhash
from data.engine import gathered
from data.errors import DataError
from data.files import write_bytes, write_json
from data.pairs import similar_pairs
from data.shuffle import DROPPED, RECORDS, SPREAD, Corpus, Stage, changes, distinct, dropped_rows, matrix, of_range, shuffle

__all__ = ["connected", "dropped_rows", "exact_duplicates", "near_duplicates"]

FORMAT = "roundhouse duplicates 1"
ROWS = 1 << 19  # documents of one job, if a part has no more: 117 MB of keys and their places
ROUNDS = 100  # of stars; 2^50 documents in a row take 50


def exact_duplicates(parts: Sequence[Path], out: Path, *, against: Sequence[Path] = ()) -> dict[str, Any]:
    """Documents whose id (binary `[16]`, null: left out) stood earlier. Writes `out`/00000.parquet and so on, one per part (DROPPED), and
    manifest.json last; returns that."""

    def find(corpus: Corpus, work: Path) -> Stage:
        ranges = 1 + corpus.rows // RECORDS
        ids = shuffle(work / "ids", _ids, [(corpus, job, ranges) for job in range(corpus.jobs)], ranges)
        return shuffle(work / "repeated", _repeated, [(corpus, ids, number) for number in range(ranges)], corpus.jobs)

    return _drop("exact", parts, against, out, {}, find)


def near_duplicates(
    parts: Sequence[Path], out: Path, *, texts: Sequence[Path] = (), against: Sequence[Path] = (), without: Path | None = None
) -> dict[str, Any]:
    """Documents linked to an earlier one by pairs that share a key and are similar by SIMILAR at least. As `exact_duplicates`; parts also
    hold `keys` and `sketch` (`minhash.columns`). `texts`: a parquet file for each part with columns `row` and `text`; without them the
    sketches' estimate decides. `without`: an `out` of `exact_duplicates`, whose dropped rows take no part."""

    def find(corpus: Corpus, work: Path) -> Stage:
        stars = connected(similar_pairs(corpus, texts, without, work), work)
        return shuffle(work / "repeated", _by_root, [(corpus, stars, number) for number in range(stars.ranges)], corpus.jobs)

    return _drop("near", parts, against, out, {"minhash": minhash.FORMAT, "texts": len(texts)}, find, without)


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


def _ids(corpus: Corpus, job: int, ranges: int) -> tuple[np.ndarray, np.ndarray, int]:
    places, table = corpus.read(job, ["id"])
    there = table["id"].is_valid().to_numpy()
    ids = matrix(table["id"].drop_null(), ">u8", 2).astype(np.uint64)
    return np.column_stack([ids, places[there]]), of_range(ids[:, 0], ranges), 0


def _repeated(corpus: Corpus, ids: Stage, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(first place of an id, each later one), for the job that holds the first."""
    rows = ids.read(number)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    new = changes(rows[:, :2])
    root = rows[new][np.cumsum(new) - 1, 2]
    found = np.column_stack([root, rows[:, 2]])[~new]
    return found, corpus.job_of(found[:, 0]), 0


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
    ids = matrix(table["id"].take(pa.array(np.searchsorted(places, roots))), ">u8", 2).astype(np.uint64)
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
