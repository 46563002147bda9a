"""Evaluation texts that training texts hold: found by long n-grams, reported by place.

    index = index_of([Path("gsm8k-test.jsonl.gz")], ngram=13)
    found = spans(texts, index)        # a table, one row per passage: text, file, at, words, overlap, start, stop, passage
    found["text"]                      # numbers of the texts that are contaminated
    write_report(out / "contaminated.jsonl", files, rows, index)       # rows: found, with the file and place of the training text

A text is contaminated when it shares 13 words in a row with one of an evaluation (Brown et al. 2020, appendix C), words as in
data/shingles.py but with their numbers: neither case, accents nor punctuation tells texts apart. Chinese and Japanese have twice as many
characters in their n-grams. Every string of an evaluation's record is a text of its own: questions, choices, answers. One that is shorter
counts as a whole from 8 words on; below that it proves nothing and is left out. n-grams that more than 10 different evaluation texts hold
are their template ("Answer the following question ..."), and left out.

The index is 14 bytes or less per n-gram and goes to every worker; the texts are read once, at the speed of hashing their words.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.errors import DataError
from data.files import write_bytes
from data.kernels import kernel
from data.minhash import ngrams
from data.parts import plan_parts, records
from data.reading import line_numbers
from data.shingles import in_characters, utf8, words
from data.stores import File

NGRAM = 13
SHORTEST = 8  # words of a text that counts as a whole; GPT-3's n-grams were of 8 to 13 words, by dataset
PER_CHARACTER = 2  # characters of Chinese or Japanese for a word of English
COMMON = 10
SHOWN = 300  # characters of a passage in the report
BATCH = 1 << 24  # bytes of evaluation texts that are hashed at once
SPAN = pa.schema(
    [
        ("text", pa.int32()),
        ("file", pa.string()),
        ("at", pa.int64()),
        ("words", pa.int32()),
        ("overlap", pa.float32()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("passage", pa.string()),
    ]
)


@dataclass(frozen=True)
class Index:
    """n-grams of evaluation texts, by hash."""

    files: tuple[str, ...]
    sizes: np.ndarray
    """Words of an n-gram, int64: all lengths that there are."""
    hashes: np.ndarray
    """uint64 `[n]`, ascending."""
    owner: np.ndarray
    """int32 `[n]`: which evaluation text; the first one that has it."""
    seen: np.ndarray
    """A bit for every value of some leading bits of the hashes, uint8: most n-grams of other texts are told apart by it alone."""
    place: np.ndarray
    """int64 `[texts, 3]`: file, at (as in readers.Record) and words of an evaluation text."""
    too_short: int
    """How many different evaluation texts of 16 letters or more are not in it."""


def index_of(files: Sequence[File], ngram: int = NGRAM) -> Index:
    """The index of the texts in evaluation files of any format that data/readers.py reads. Raises DataError for what is broken in them."""
    hashes, owners, place = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], [np.zeros((0, 3), np.int64)]
    sizes: set[int] = set()
    known, texts = 0, 0
    for batch in _batches(files):
        texts += len(batch)
        strings = [text for _, _, text in batch]
        data, ends = utf8(strings)
        of = words(data, ends, np.zeros(len(strings), bool), numbers=True)
        begins = np.append(0, of.ends)[:-1]
        for (file, at, _), wide, begin, end in zip(batch, in_characters(strings), begins.tolist(), of.ends.tolist(), strict=True):
            times = PER_CHARACTER if wide else 1
            size = min(ngram * times, end - begin)
            if size < min(SHORTEST, ngram) * times:
                continue
            grams = np.empty(end - begin, np.uint64)
            count = ngrams(of.hashes[begin:end], size, grams)
            hashes.append(grams[:count])
            owners.append(np.full(count, known, np.int32))
            place.append(np.array([[file, at, end - begin]]))
            sizes.add(size)
            known += 1
    all_hashes, owner = _without_templates(np.concatenate(hashes), np.concatenate(owners))
    seen = np.zeros(1 << max(3, len(all_hashes).bit_length()), np.uint8)  # 8 bits or more for each
    _mark(all_hashes, seen, _shift(seen))
    ascending = np.array(sorted(sizes), np.int64)
    return Index(tuple(map(str, files)), ascending, all_hashes, owner, seen, np.concatenate(place), texts - known)


def spans(texts: Sequence[str] | pa.Array, index: Index) -> pa.Table:
    """Passages that texts share with evaluation texts, as rows of SPAN, in order.

    `text` is a number in `texts`, `start` and `stop` are bytes of it, `passage` is its beginning; `file` and `at` tell the evaluation's
    record, `words` how many words are shared, `overlap` which part of the evaluation's text they are.
    """
    data, ends = utf8(texts)
    of = words(data, ends, np.zeros(len(ends), bool), numbers=True)
    found = _find(of.hashes, of.ends, index.sizes, index.hashes, index.owner, index.seen, _shift(index.seen))
    number, owner, first, last = found[np.lexsort((found[:, 3], found[:, 2], found[:, 0]))].T
    begins, start, stop = np.append(0, ends)[number], of.start[first], of.stop[last]
    shared, place = last - first + 1, index.place[owner]
    columns = [
        number,
        [index.files[file] for file in place[:, 0]],
        place[:, 1],
        shared,
        np.minimum(1, shared / place[:, 2]),
        start - begins,
        stop - begins,
        [data[a:b].tobytes().decode()[:SHOWN] for a, b in zip(start, stop, strict=True)],
    ]
    return pa.table([pa.array(column).cast(field.type) for column, field in zip(columns, SPAN, strict=True)], schema=SPAN)


def write_report(path: Path, files: Sequence[File], rows: Iterable[Mapping[str, Any]], index: Index) -> None:
    """One line of JSON per passage: where it stands (file, line, and the document's id where there is one), in which line of which
    evaluation, how many words are shared, which part of the evaluation's text they are, and how it begins.

    `rows` are rows of SPAN that also hold `in_file` (number in `files`) and `in_at` of the training text, and may hold its `id` (hex).
    """
    rows = list(rows)
    lines = line_numbers(files, [{"file": row["in_file"], "at": row["in_at"]} for row in rows])
    numbers = {name: number for number, name in enumerate(index.files)}
    evaluation_lines = line_numbers(index.files, [{"file": numbers[row["file"]], "at": row["at"]} for row in rows])
    told = [
        {
            "file": str(files[row["in_file"]]),
            "line": line,
            **({"id": row["id"]} if "id" in row else {}),
            "evaluation": row["file"],
            "evaluation_line": evaluation_line,
            **{name: row[name] for name in ("words", "overlap", "passage")},
        }
        for row, line, evaluation_line in zip(rows, lines, evaluation_lines, strict=True)
    ]
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told).encode())


def strings_of(value: Any) -> Iterator[str]:
    """All texts in a record, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_of(inner)


def _batches(files: Sequence[File]) -> Iterator[list[tuple[int, int, str]]]:
    """(file, at, text) of all different texts, BATCH at a time."""
    batch: list[tuple[int, int, str]] = []
    held = 0
    known: set[str] = set()
    for record in (record for part in plan_parts(files, BATCH) for record in records(part)):
        if record.value is None:
            what = f"{files[record.file]}: row at {record.at}: {record.broken or record.dropped}"
            raise DataError(f"{what}. Of an evaluation file nothing may be missing: repair it or take it out of `against`")
        for text in strings_of(record.value):
            if len(text) < 2 * SHORTEST or text in known:
                continue
            known.add(text)
            batch.append((record.file, record.at, text))
            held += len(text)
        if held > BATCH:
            yield batch
            batch, held = [], 0
    yield batch


def _without_templates(hashes: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each hash once, ascending, with its first owner, unless more than COMMON texts have it."""
    order = np.lexsort((owner, hashes))
    hashes, owner = hashes[order], owner[order]
    other = np.ones(len(hashes), bool)
    other[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])  # within one text it counts once
    hashes, first, owners = np.unique(hashes[other], return_index=True, return_counts=True)
    rare = owners <= COMMON
    return hashes[rare], owner[other][first][rare]


def _shift(seen: np.ndarray) -> np.uint64:
    """By how many bits a hash goes down to be the number of its bit."""
    return np.uint64(64 - (8 * len(seen) - 1).bit_length())


@kernel
def _mark(hashes, seen, shift):  # type: ignore[no-untyped-def]
    for value in hashes:
        bit = value >> shift
        seen[bit >> np.uint64(3)] |= np.uint8(1) << np.uint8(bit & np.uint64(7))


@kernel
def _find(hashes, ends, sizes, known, owner, seen, shift):  # type: ignore[no-untyped-def]
    """int64 `[spans, 4]`: text, evaluation text, first and last word of runs of shared n-grams."""
    found = np.empty((64, 4), np.int64)
    count, begin, longest = 0, 0, 1
    for end in ends:
        longest = max(longest, end - begin)
        begin = end
    grams = np.empty(longest, np.uint64)
    begin = 0
    for text in range(len(ends)):
        for size in sizes:
            if ends[text] - begin < size:
                continue
            total = ngrams(hashes[begin : ends[text]], size, grams)
            before = -2
            for i in range(total):
                bit = grams[i] >> shift
                if not (seen[bit >> np.uint64(3)] >> np.uint8(bit & np.uint64(7))) & 1:
                    continue
                at, end = 0, len(known)
                while at < end:
                    middle = (at + end) // 2
                    if known[middle] < grams[i]:
                        at = middle + 1
                    else:
                        end = middle
                if at == len(known) or known[at] != grams[i]:
                    continue
                if before == i - 1 and found[count - 1, 1] == owner[at]:
                    found[count - 1, 3] = begin + i + size - 1
                else:
                    if count == len(found):
                        more = np.empty((2 * count, 4), np.int64)
                        more[:count] = found
                        found = more
                    found[count, 0], found[count, 1] = text, owner[at]
                    found[count, 2], found[count, 3] = begin + i, begin + i + size - 1
                    count += 1
                before = i
        begin = ends[text]
    return found[:count]
