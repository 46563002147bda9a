"""What the quality rules look at, counted in one pass: a row of integers per text.

    table = measure(["First text ...", "Second text ..."])      # pa.Table, columns as in SIGNALS, all int32
    table["words"], table["duplicate_5_gram_characters"]

Counts, not shares: the rules (rules.py) divide them, so that thresholds can be changed without reading a text again. Definitions are those
of datatrove 0.10.1's filters, with which FineWeb was made. A text's row depends on nothing but the text.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from data.characters import ALPHABETIC, DIGIT, HAN, LIMIT, LINE, MARK, SPACE, STOP, Texts, classes
from data.kernels import kernel
from data.words import split, word_hash

SIGNALS = {
    "characters": "Code points of the text.",
    "words": "Words as words.py splits them, punctuation marks included.",
    "full_words": "Words with a character that is no punctuation mark.",
    "full_word_characters": "Their characters.",
    "alphabetic_words": "Words with a letter.",
    "stop_words": "How many of {the be to of and that have with} occur.",
    "hashes": "Number signs.",
    "ellipses": "Of three dots, or one character.",
    "lines": "Lines, by any line break.",
    "bullet_lines": "Lines that begin with • or -.",
    "ellipsis_lines": "Lines that end with an ellipsis.",
    "longest_line": "Characters of the longest line between newlines.",
    "newlines": "Newline characters.",
    "line_characters": "Characters that are no newlines.",
    "parts": "Lines as Gopher's repetition counts them: what stands between runs of newlines.",
    "duplicate_parts": "Of them, those that stood before.",
    "duplicate_part_characters": "Their characters.",
    "paragraphs": "What stands between empty lines.",
    "duplicate_paragraphs": "Of them, those that stood before.",
    "duplicate_paragraph_characters": "Their characters.",
    **{f"top_{n}_gram_characters": f"Characters of the most frequent {n} words in a row, all occurrences." for n in (2, 3, 4)},
    **{f"duplicate_{n}_gram_characters": f"Characters of {n} words in a row that stood before, none counted twice." for n in range(5, 11)},
    "filled_lines": "Lines between newlines with something else than whitespace.",
    "punctuated_lines": "Of them, those that end with a sentence's mark.",
    "short_lines": "Of them, those of at most 30 characters.",
    "duplicate_line_characters": "Characters of those that stood before.",
    "sentences": "Sentences, line by line.",
    "lorem_ipsum": 'Occurrences of "lorem ipsum", in any case.',
    "curly_brackets": "Opening curly brackets.",
    "letters": "Letters and digits of any script.",
    "han": "Chinese characters.",
    "grams_of_13": "Stretches of 13 characters, whitespace left out; 0 where less than 3 of 10 characters are Chinese.",
    "repeated_grams_of_13": "Of them, those that occur more than once.",
}
STOP_WORDS = "the be to of and that have with".split()
SHORT_LINE = 30
SLICE = 4_000_000  # characters at a time: 100 MB of scratch memory whatever the batch


def measure(texts: Sequence[str]) -> pa.Table:
    """The signals of `texts`: int32 columns named as in SIGNALS, a row per text."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in SIGNALS}
    start = size = 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= SLICE or i + 1 == len(texts):
            for name, values in _measure(texts[start : i + 1]).items():
                columns[name].append(values)
            start, size = i + 1, 0
    return pa.table({name: np.concatenate(values) if values else np.zeros(0, np.int32) for name, values in columns.items()})


def _measure(texts: Sequence[str]) -> dict[str, np.ndarray]:
    run = Texts.of(texts)
    words = split(run)
    stop_words = np.array([word_hash(word) for word in STOP_WORDS], dtype=np.uint64)
    columns = {
        "characters": np.diff(run.offsets),
        "words": np.diff(words.offsets),
        "sentences": words.sentences,
        **dict(zip(_OF_LINES, _lines(run.points, run.offsets, classes()).T, strict=True)),
        **dict(zip(_OF_WORDS, _words(words.hashes, words.lengths, words.kinds, words.offsets, stop_words).T, strict=True)),
    }
    columns["line_characters"] = columns["characters"] - columns["newlines"]
    return {name: np.minimum(columns[name], 2**31 - 1).astype(np.int32) for name in SIGNALS}


_OF_LINES = (
    "hashes ellipses lines bullet_lines ellipsis_lines newlines lorem_ipsum curly_brackets letters han longest_line parts duplicate_parts "
    "duplicate_part_characters paragraphs duplicate_paragraphs duplicate_paragraph_characters filled_lines punctuated_lines short_lines "
    "duplicate_line_characters grams_of_13 repeated_grams_of_13"
).split()
(
    HASHES, ELLIPSES, LINES, BULLET_LINES, ELLIPSIS_LINES, NEWLINES, LOREM_IPSUM, CURLY_BRACKETS, LETTERS, CHINESE, LONGEST_LINE, PARTS,
    DUPLICATE_PARTS, DUPLICATE_PART_CHARACTERS, PARAGRAPHS, DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS, FILLED_LINES,
    PUNCTUATED_LINES, SHORT_LINES, DUPLICATE_LINE_CHARACTERS, GRAMS, REPEATED_GRAMS,
) = range(OF_LINES := len(_OF_LINES))  # fmt: skip
_OF_WORDS = [
    *"full_words full_word_characters alphabetic_words stop_words".split(),
    *(f"top_{n}_gram_characters" for n in (2, 3, 4)),
    *(f"duplicate_{n}_gram_characters" for n in range(5, 11)),
]
FULL, FULL_CHARACTERS, ALPHABETIC_WORDS, STOP_WORDS_FOUND = range(4)
OF_WORDS, OF_GRAM = len(_OF_WORDS), 2  # the latter: row of the signal of n words in a row: OF_GRAM + n

_LOREM = np.array([ord(c) for c in "lorem ipsum"], np.uint32)

# --------------------------------------------------------------------------------- kernels
# Hash tables are open addressing in scratch arrays of a power of two, at most half full; 0 is an empty slot.


@kernel
def _mix(a, b):  # type: ignore[no-untyped-def]
    h = (a ^ (a >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15) + b
    h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return h ^ (h >> np.uint64(32)) | np.uint64(1)


@kernel
def _power_of_two(n):  # type: ignore[no-untyped-def]
    size = 16
    while size < n:
        size *= 2
    return size


@kernel
def _slot(h, keys, size):  # type: ignore[no-untyped-def]
    """Where h stands in keys[:size], or the empty slot where it belongs."""
    at = h & np.uint64(size - 1)
    while keys[at] != 0 and keys[at] != h:
        at = (at + np.uint64(1)) & np.uint64(size - 1)
    return at


@kernel
def _seen(h, keys, size):  # type: ignore[no-untyped-def]
    """Whether h was there before; it is afterwards."""
    at = _slot(h, keys, size)
    before = keys[at] == h
    keys[at] = h
    return before


@kernel
def _hashed(h, point):  # type: ignore[no-untyped-def]
    h = (h ^ np.uint64(point)) * np.uint64(0x9E3779B97F4A7C15)
    return h ^ (h >> np.uint64(32))


@kernel
def _is(points, i, table):  # type: ignore[no-untyped-def]
    return table[points[i]] if points[i] < LIMIT else np.uint32(0)


@kernel
def _lines(points, offsets, table):  # type: ignore[no-untyped-def]
    """int64 `[texts, _OF_LINES]`"""
    out = np.zeros((len(offsets) - 1, OF_LINES), np.int64)
    keys = np.zeros(64, np.uint64)
    for text in range(len(offsets) - 1):
        a, b, found = offsets[text], offsets[text + 1], out[text]
        first, length, dots, trailing = np.uint32(0), 0, 0, 0  # of the line; trailing: dots before its last whitespace
        letters, han = 0, 0
        for i in range(a, b):
            c, kind = points[i], _is(points, i, table)
            letters += kind & (ALPHABETIC | DIGIT) != 0
            han += kind & HAN != 0
            if c == 35:
                found[HASHES] += 1
            elif c == 123:
                found[CURLY_BRACKETS] += 1
            elif c == 10:
                found[NEWLINES] += 1
            elif c == 0x2026:
                found[ELLIPSES] += 1
            elif c == 108 or c == 76:
                found[LOREM_IPSUM] += _stands(points, i, b, _LOREM)
            dots = dots + 1 if c == 46 else 0
            found[ELLIPSES] += dots > 0 and dots % 3 == 0
            if kind & LINE:
                if c != 10 or i == a or points[i - 1] != 13:  # \r\n is one break
                    _end_line(found, first, trailing)
                first, length, trailing = np.uint32(0), 0, 0
                continue
            length += 1
            if not kind & SPACE:
                first = first if first else c
                trailing = 3 if c == 0x2026 else dots
        if length:
            _end_line(found, first, trailing)
        found[LETTERS], found[CHINESE] = letters, han
        size = _power_of_two(2 * found[NEWLINES] + 4)
        if 2 * size > len(keys):
            keys = np.zeros(4 * size, np.uint64)
        keys[: 2 * size] = 0
        _parts(points, a, b, table, keys[:size], keys[size : 2 * size], found)
        if han and 10 * han >= 3 * (b - a):
            size = _power_of_two(2 * (b - a))
            if size > len(keys):
                keys = np.zeros(2 * size, np.uint64)
            found[GRAMS], found[REPEATED_GRAMS] = _repeated_grams(points, a, b, table, keys, size)
    return out


@kernel
def _end_line(found, first, trailing):  # type: ignore[no-untyped-def]
    found[LINES] += 1
    found[BULLET_LINES] += first == 45 or first == 0x2022
    found[ELLIPSIS_LINES] += trailing >= 3


@kernel
def _stands(points, i, end, small):  # type: ignore[no-untyped-def]
    """Whether these letters and spaces stand at i, large or small."""
    same = 0
    while same < len(small) and i + same < end:
        if points[i + same] != small[same] and (small[same] == 32 or points[i + same] != small[same] - 32):
            break
        same += 1
    return same == len(small)


@kernel
def _parts(points, a, b, table, keys, paragraph_keys, found):  # type: ignore[no-untyped-def]
    """What is to say of the lines between newlines, and of paragraphs."""
    size = len(keys)
    begin, stop = a, b  # of the stripped text, which has the paragraphs
    while begin < stop and _is(points, begin, table) & SPACE:
        begin += 1
    while stop > begin and _is(points, stop - 1, table) & SPACE:
        stop -= 1
    if a < b and points[a] == 10:
        found[PARTS] += 1  # splitting leaves an empty part before a leading newline, and one after a last one
    if a < b and points[b - 1] == 10:
        found[DUPLICATE_PARTS] += found[PARTS]
        found[PARTS] += 1
    paragraph, h = -1, np.uint64(0)
    at = a
    while at <= b:
        end, blank, line = at, True, np.uint64(0)
        while end < b and points[end] != 10:
            blank &= _is(points, end, table) & SPACE != 0
            line = _hashed(line, points[end])
            end += 1
        length = end - at
        if length:
            found[LONGEST_LINE] = max(found[LONGEST_LINE], length)
            found[PARTS] += 1
            again = _seen(line | np.uint64(1), keys, size)
            if again:
                found[DUPLICATE_PARTS] += 1
                found[DUPLICATE_PART_CHARACTERS] += length
            if not blank:
                found[FILLED_LINES] += 1
                found[PUNCTUATED_LINES] += _is(points, end - 1, table) & STOP != 0
                found[SHORT_LINES] += length <= SHORT_LINE
                found[DUPLICATE_LINE_CHARACTERS] += length if again else 0
            if end > begin and at < stop:
                if at < begin or end > stop:
                    line = np.uint64(0)
                    for i in range(max(at, begin), min(end, stop)):
                        line = _hashed(line, points[i])
                h = _mix(h, line) if paragraph >= 0 else line
                paragraph = paragraph if paragraph >= 0 else max(at, begin)
        if paragraph >= 0 and (length == 0 or end >= stop):
            found[PARAGRAPHS] += 1
            if _seen(h | np.uint64(1), paragraph_keys, size):
                found[DUPLICATE_PARAGRAPHS] += 1
                found[DUPLICATE_PARAGRAPH_CHARACTERS] += (min(end, stop) if length else at - 1) - paragraph
            paragraph = -1
        at = end + 1


@kernel
def _repeated_grams(points, a, b, table, keys, size):  # type: ignore[no-untyped-def]
    """How many stretches of 13 characters there are, and how many occur more than once."""
    keys[:size] = 0
    twice = np.zeros(size, np.bool_)
    window = np.zeros(13, np.uint64)
    base, power = np.uint64(0xD6E8FEB86659FD93), np.uint64(1)
    for _ in range(13):
        power *= base
    h, n, repeated = np.uint64(0), 0, 0
    for i in range(a, b):
        if _is(points, i, table) & SPACE:
            continue
        c = np.uint64(points[i]) + np.uint64(1)
        h = h * base + c - window[n % 13] * power
        window[n % 13] = c
        n += 1
        if n >= 13:
            key = _mix(h, np.uint64(0))
            at = _slot(key, keys, size)
            if keys[at] == key:
                repeated += 1 if twice[at] else 2
                twice[at] = True
            keys[at] = key
    return max(n - 12, 0), repeated


@kernel
def _words(hashes, lengths, kinds, offsets, stop_words):  # type: ignore[no-untyped-def]
    """int64 `[texts, _OF_WORDS]`"""
    out = np.zeros((len(offsets) - 1, OF_WORDS), np.int64)
    longest = 0
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    size = _power_of_two(2 * longest)
    keys, counts, firsts, done = np.zeros(size, np.uint64), np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.bool_)
    grams, places, slots = np.zeros(longest, np.uint64), np.zeros(longest, np.int64), np.zeros(longest, np.uint64)
    for text in range(len(offsets) - 1):
        a, b, found, stops = offsets[text], offsets[text + 1], out[text], 0
        for i in range(a, b):
            if not kinds[i] & MARK:
                found[FULL] += 1
                found[FULL_CHARACTERS] += lengths[i]
            found[ALPHABETIC_WORDS] += kinds[i] & ALPHABETIC != 0
            if 2 <= lengths[i] <= 4:
                for k in range(8):
                    if hashes[i] == stop_words[k]:
                        stops |= 1 << k
        while stops:
            found[STOP_WORDS_FOUND] += stops & 1
            stops >>= 1
        # Only where both (n-1)-grams of an n-gram are repeated can it be: after pairs, a few percent of English are left.
        m = b - a
        for i in range(m):
            places[i] = i
            grams[i] = hashes[a + i]
        for n in range(2, 11):
            kept = 0
            for k in range(m - 1):
                i = places[k]
                if places[k + 1] == i + 1 and a + i + n <= b:
                    places[kept] = i
                    grams[kept] = _mix(grams[k], hashes[a + i + n - 1])
                    kept += 1
            m = kept
            used = _power_of_two(2 * m)
            keys[:used] = 0
            counts[:used] = 0
            best, best_first = 0, 0
            for k in range(m):
                at = _slot(grams[k], keys, used)
                if counts[at] == 0:
                    keys[at] = grams[k]
                    firsts[at] = places[k]
                counts[at] += 1
                slots[k] = at
                if counts[at] > best or (counts[at] == best and firsts[at] < best_first):
                    best, best_first = counts[at], firsts[at]
            if n <= 4 and a + n <= b:
                best, best_first = (best, best_first) if best > 1 else (1, 0)
                characters = n - 1
                for i in range(a + best_first, a + best_first + n):
                    characters += lengths[i]
                found[OF_GRAM + n] = characters * best
            kept, beyond = 0, 0
            if n > 4:
                done[:used] = False
            for k in range(m):
                at, i = slots[k], places[k]
                if counts[at] == 1:
                    continue
                if n > 4 and i >= beyond:
                    if done[at]:
                        for j in range(a + i, a + i + n):
                            found[OF_GRAM + n] += lengths[j]
                        beyond = i + n
                    done[at] = True
                places[kept], grams[kept] = i, grams[k]
                kept += 1
            m = kept
            if not m and n >= 4:
                break
    return out
