"""Pairs of documents that are alike: keys propose, sketches settle what is clear, texts the rest.

    links = similar_pairs(corpus, texts, without, work)      # a stage of rows (later document, earlier one), ranged by the later

One after another, each a shuffle:

    bands     parts -> (key, document)                             ranges of keys
    shared    keys that several documents have -> (document, key)  parts
    met       sketches to their keys                               ranges of keys
    pairs     what is similar for sure, and what may be            ranges of documents
    doubts    documents whose texts must decide                    parts
    grams     their n-grams, for each of their pairs               ranges of documents
    judged    pairs that have enough of them in common             ranges of documents
    links     all pairs                                            ranges of documents

How large ranges are, and how many pairs a document can have, is bounded whatever the documents are: see CHUNK, LEADERS and DOUBTS.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import minhash
from data.kernels import kernel
from data.shingles import in_characters
from data.shuffle import RECORDS, SPREAD, Corpus, Stage, changes, distinct, dropped_rows, matrix, of_range, shuffle

SIMILAR = 0.8
SURE, DOUBTFUL = 0.95, 0.68  # four standard errors of an estimate above it, three below
LEAST = 0.77  # of the estimate, where it must do: one standard error below, for recall
DOUBTS = 8  # pairs of one document in one bucket whose texts are compared
CHUNK = 1 << 16  # documents that are compared with the first ones of their bucket together; larger buckets are cut
LEADERS = 64  # of a bucket that all are compared with: its first 32, then 32 more that are like none of those before
USUAL = 600  # different n-grams of a document, to tell how many ranges they take


def similar_pairs(corpus: Corpus, texts: Sequence[Path], without: Path | None, work: Path) -> Stage:
    """Pairs that share a key and have SIMILAR of their different n-grams in common; where there are no `texts` (none, or one for each part
    that is not of an earlier corpus), by the estimate. `without`: folder of `clusters.exact_duplicates`, whose dropped rows take no
    part."""
    ranges = 1 + corpus.rows * minhash.BANDS // RECORDS
    bands = shuffle(work / "bands", _bands, [(corpus, job, ranges, without) for job in range(corpus.jobs)], ranges)
    shared = shuffle(work / "shared", _shared, [(corpus, bands, number) for number in range(ranges)], corpus.jobs)
    ranges = 1 + shared.rows * 16 // RECORDS
    met = shuffle(work / "met", _met, [(corpus, shared, job, ranges) for job in range(corpus.jobs)], ranges)
    pairs = shuffle(work / "pairs", _pairs, [(corpus, met, number, bool(texts)) for number in range(ranges)], ranges)
    doubts = shuffle(work / "doubts", _doubts, [(corpus, pairs, number) for number in range(ranges)], corpus.jobs)
    ranges = 1 + doubts.rows * USUAL // RECORDS
    paths = [None] * corpus.earlier + [path.absolute() for path in texts]
    grams = shuffle(work / "grams", _grams, [(corpus, doubts, paths, job, ranges) for job in range(corpus.jobs)], ranges)
    judged = shuffle(work / "judged", _judged, [(grams, number, pairs.ranges) for number in range(ranges)], pairs.ranges)
    links = shuffle(work / "links", _links, [(pairs, judged, number) for number in range(pairs.ranges)], pairs.ranges)
    return links


def _bands(corpus: Corpus, job: int, ranges: int, without: Path | None) -> tuple[np.ndarray, np.ndarray, int]:
    places, table = corpus.read(job, ["keys"])
    there = table["keys"].is_valid().to_numpy().copy()
    if without is not None and corpus.first[job] >= corpus.earlier:
        for number in range(corpus.first[job], corpus.first[job + 1]):
            gone = dropped_rows(without, number - corpus.earlier)["row"].to_numpy()
            there[np.searchsorted(places, np.uint64(number << 32)) + gone] = False
    keys = matrix(table["keys"].filter(pa.array(there)), "u8", minhash.BANDS)
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
    sketches = matrix(table["sketch"].take(pa.array(needed)), "u8", minhash.PERMUTATIONS // 8)
    return np.column_stack([wanted[:, 1], wanted[:, 0], sketches[position]]), of_range(wanted[:, 1], ranges), 0


def _pairs(corpus: Corpus, met: Stage, number: int, texts: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """(later document, earlier one, whether their texts must decide) of pairs that may be similar, for the range of the later."""
    rows = met.read(number)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    sketches = np.ascontiguousarray(rows[:, 2:]).view(np.uint8).reshape(len(rows), minhash.PERMUTATIONS)
    sure, doubtful, least = (math.ceil(minhash.PERMUTATIONS * (s * (1 - 1 / 256) + 1 / 256)) for s in (SURE, DOUBTFUL, LEAST))
    limits = np.array([sure, doubtful] if texts else [least, least])
    ours = rows[:, 1] >= np.uint64(corpus.earlier << 32)
    found = _similar(np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1]), ours, sketches, limits, least)
    return found, of_range(found[:, 0] * SPREAD, met.ranges), 0


@kernel
def _similar(keys, places, ours, sketches, limits, least):  # type: ignore[no-untyped-def]
    """Rows (later, earlier, 0) that link what is surely similar among documents with the same key (sorted): whose sketches have limits[0]
    bytes in common at least, or `least` where one is not `ours`; and (later, earlier, 1) of pairs with limits[1], of which the texts
    decide. Of a bucket of up to LEADERS / 2 all are held against all; of a larger one each against LEADERS, so that a million copies cost a
    million times that. What is linked already is not linked again: fewer than two links for a document."""
    found = np.empty(((2 + DOUBTS) * len(keys), 3), np.uint64)
    pairs, count = 0, 0
    leaders, label = np.empty(LEADERS, np.int64), np.empty(LEADERS, np.int64)
    for i in range(len(keys)):
        if i == 0 or keys[i] != keys[i - 1]:
            count = 0
        mine, doubts = i, 0
        for j in range(count):
            if label[j] == mine:
                continue
            same = 0
            for k in range(sketches.shape[1]):
                same += sketches[i, k] == sketches[leaders[j], k]
            sure = limits[0] if ours[i] and ours[leaders[j]] else least
            doubtful = same < sure and same >= limits[1] and ours[i] and ours[leaders[j]] and doubts < DOUBTS
            if same >= sure or doubtful:
                found[pairs, 0], found[pairs, 1], found[pairs, 2] = places[i], places[leaders[j]], doubtful
                pairs += 1
                doubts += doubtful
            if same >= sure:
                before, mine = mine, label[j]
                for other in range(count):
                    label[other] = mine if label[other] == before else label[other]
        if count < LEADERS // 2 or (mine == i and count < LEADERS):
            leaders[count], label[count] = i, mine
            count += 1
    return found[:pairs]


def _doubts(corpus: Corpus, pairs: Stage, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(document, later of a pair, earlier of it) for both documents of a pair that the texts must decide, for the job that holds the
    text."""
    rows = pairs.read(number)
    asked = distinct(rows[rows[:, 2] == 1, :2])
    found = np.concatenate([asked[:, [0, 0, 1]], asked[:, [1, 0, 1]]])
    return found, corpus.job_of(found[:, 0]), 0


def _grams(corpus: Corpus, doubts: Stage, texts: list[Path | None], job: int, ranges: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(later of a pair, earlier of it, n-gram): each different one of a document once for each of its pairs."""
    asked = doubts.read(job)
    found = [np.zeros((0, 3), np.uint64)]
    for number in np.unique(asked[:, 0] >> np.uint64(32)).tolist():
        here = asked[asked[:, 0] >> np.uint64(32) == number]
        wanted, position = np.unique(here[:, 0] & np.uint64(0xFFFFFFFF), return_inverse=True)
        table = pq.read_table(texts[number], columns=["row", "text"])
        table = table.take(pa.array(np.searchsorted(table["row"].to_numpy(), wanted)))
        sets = minhash.sets(table["text"].combine_chunks(), in_characters(table["text"].combine_chunks()))
        for pair, which in zip(here[:, 1:], position, strict=True):
            found.append(np.column_stack([np.broadcast_to(pair, (len(sets[which]), 2)), sets[which]]))
    rows = np.concatenate(found)
    return rows, of_range(rows[:, 0] * SPREAD, ranges), 0


def _judged(grams: Stage, number: int, ranges: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(later, earlier) of pairs whose texts have SIMILAR of their n-grams in common: those that stand there twice, of those that stand
    there."""
    rows = grams.read(number)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    starts = np.flatnonzero(changes(rows[:, :2]))
    different = np.add.reduceat(changes(rows).astype(np.int64), starts) if len(rows) else np.zeros(0, np.int64)
    both = np.diff(np.append(starts, len(rows))) - different
    found = rows[starts[both >= SIMILAR * different], :2]
    return found, of_range(found[:, 0] * SPREAD, ranges), 0


def _links(pairs: Stage, judged: Stage, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    rows = pairs.read(number)
    found = distinct(np.concatenate([rows[rows[:, 2] == 0, :2], judged.read(number)]))
    return found, of_range(found[:, 0] * SPREAD, pairs.ranges), 0
