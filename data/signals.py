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
        **dict(zip(_OF_LINES, _lines(run.points, run.offsets, classes()), strict=True)),
        **dict(zip(_OF_WORDS, _words(words.hashes, words.lengths, words.kinds, words.offsets, stop_words), strict=True)),
    }
    columns["line_characters"] = columns["characters"] - columns["newlines"]
    return {name: np.minimum(columns[name], 2**31 - 1).astype(np.int32) for name in SIGNALS}


_OF_LINES = (
    "hashes ellipses lines bullet_lines ellipsis_lines longest_line newlines parts duplicate_parts duplicate_part_characters paragraphs "
    "duplicate_paragraphs duplicate_paragraph_characters filled_lines punctuated_lines short_lines duplicate_line_characters lorem_ipsum "
    "curly_brackets letters han grams_of_13 repeated_grams_of_13"
).split()
_OF_WORDS = [
    *"full_words full_word_characters alphabetic_words stop_words".split(),
    *(f"top_{n}_gram_characters" for n in (2, 3, 4)),
    *(f"duplicate_{n}_gram_characters" for n in range(5, 11)),
]

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
def _hash(points, a, b):  # type: ignore[no-untyped-def]
    h = np.uint64(b - a)
    for i in range(a, b):
        h = (h ^ np.uint64(points[i])) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(32)
    return h | np.uint64(1)


@kernel
def _is(points, i, table):  # type: ignore[no-untyped-def]
    return table[points[i]] if points[i] < LIMIT else np.uint32(0)


@kernel
def _lines(points, offsets, table):  # type: ignore[no-untyped-def]
    """int64 `[_OF_LINES, texts]`"""
    out = np.zeros((23, len(offsets) - 1), np.int64)
    keys = np.zeros(16, np.uint64)
    for text in range(len(offsets) - 1):
        a, b = offsets[text], offsets[text + 1]
        dots, first, last, before_last, third_last, length = 0, np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0), 0
        hashes, ellipses, lines, bullets, ending, newlines, curly, letters, han, lorems = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
        for i in range(a, b):
            c, kind = points[i], _is(points, i, table)
            newlines += c == 10
            hashes += c == 35
            curly += c == 123
            letters += kind & (ALPHABETIC | DIGIT) != 0
            han += kind & HAN != 0
            dots = dots + 1 if c == 46 else 0
            ellipses += c == 0x2026
            if dots == 3:
                ellipses += 1
                dots = 0
            if (c == 108 or c == 76) and i + 11 <= b:
                same = 0
                while same < 11 and (points[i + same] == _LOREM[same] or (_LOREM[same] != 32 and points[i + same] == _LOREM[same] - 32)):
                    same += 1
                lorems += same == 11
            if kind & LINE:
                if c != 10 or i == a or points[i - 1] != 13:  # \r\n is one break
                    lines += 1
                    bullets += first == 45 or first == 0x2022
                    ending += last == 0x2026 or (last == 46 and before_last == 46 and third_last == 46)
                first, last, before_last, third_last, length = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0), 0
            else:
                length += 1
                if not kind & SPACE:
                    first = first if first else c
                    third_last, before_last, last = before_last, last, c
                elif length and i + 1 < b and not _is(points, i + 1, table) & SPACE:
                    third_last, before_last, last = before_last, last, np.uint32(32)
        if length:
            lines += 1
            bullets += first == 45 or first == 0x2022
            ending += last == 0x2026 or (last == 46 and before_last == 46 and third_last == 46)
        size = _power_of_two(2 * newlines + 4)
        if 2 * size > len(keys):
            keys = np.zeros(4 * size, np.uint64)
        keys[: 2 * size] = 0
        stats = _parts(points, a, b, table, keys[:size], keys[size : 2 * size])
        counts = (hashes, ellipses, lines, bullets, ending, stats[0], newlines)
        for k in range(7):
            out[k, text] = counts[k]
        for k in range(10):
            out[7 + k, text] = stats[1 + k]
        out[17, text], out[18, text], out[19, text], out[20, text] = lorems, curly, letters, han
        if 10 * han >= 3 * (b - a) and han:
            size = _power_of_two(2 * (b - a))
            if size > len(keys):
                keys = np.zeros(2 * size, np.uint64)
            out[21, text], out[22, text] = _repeated_grams(points, a, b, table, keys, size)
    return out


@kernel
def _parts(points, a, b, table, keys, paragraph_keys):  # type: ignore[no-untyped-def]
    """Of the lines between newlines: longest | parts, duplicates, their characters | the same of paragraphs | filled, punctuated, short,
    characters of duplicates."""
    size = len(keys)
    begin, stop = a, b  # of the stripped text, which has the paragraphs
    while begin < stop and _is(points, begin, table) & SPACE:
        begin += 1
    while stop > begin and _is(points, stop - 1, table) & SPACE:
        stop -= 1
    out = np.zeros(11, np.int64)
    if a < b and points[a] == 10:
        out[1] += 1  # splitting leaves an empty part before a leading newline, and one after a last one
    if a < b and points[b - 1] == 10:
        out[2] += out[1]
        out[1] += 1
    paragraph, h = -1, np.uint64(0)
    at = a
    while at <= b:
        end = at
        blank = True
        while end < b and points[end] != 10:
            blank &= _is(points, end, table) & SPACE != 0
            end += 1
        length = end - at
        line = _hash(points, at, end)
        if length:
            out[0] = max(out[0], length)
            out[1] += 1
            again = _seen(line, keys, size)
            if again:
                out[2] += 1
                out[3] += length
            if not blank:
                out[7] += 1
                out[8] += _is(points, end - 1, table) & STOP != 0
                out[9] += length <= SHORT_LINE
                out[10] += length if again else 0
            if end > begin and at < stop:
                if at < begin or end > stop:
                    line = _hash(points, max(at, begin), min(end, stop))
                h = _mix(h, line) if paragraph >= 0 else line
                paragraph = paragraph if paragraph >= 0 else max(at, begin)
        if paragraph >= 0 and (length == 0 or end >= stop):
            out[4] += 1
            if _seen(h, paragraph_keys, size):
                out[5] += 1
                out[6] += (min(end, stop) if length else at - 1) - paragraph
            paragraph = -1
        at = end + 1
    return out


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
    """int64 `[_OF_WORDS, texts]`"""
    out = np.zeros((13, len(offsets) - 1), np.int64)
    longest = 0
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    size = _power_of_two(2 * longest)
    keys, counts, firsts, done = np.zeros(size, np.uint64), np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.bool_)
    grams, places, slots = np.zeros(longest, np.uint64), np.zeros(longest, np.int64), np.zeros(longest, np.uint64)
    for text in range(len(offsets) - 1):
        a, b = offsets[text], offsets[text + 1]
        found = 0
        for i in range(a, b):
            if not kinds[i] & MARK:
                out[0, text] += 1
                out[1, text] += lengths[i]
            out[2, text] += kinds[i] & ALPHABETIC != 0
            if 2 <= lengths[i] <= 4:
                for k in range(8):
                    if hashes[i] == stop_words[k]:
                        found |= 1 << k
        while found:
            out[3, text] += found & 1
            found >>= 1
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
                out[2 + n, text] = characters * best
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
                            out[2 + n, text] += lengths[j]
                        beyond = i + n
                    done[at] = True
                places[kept], grams[kept] = i, grams[k]
                kept += 1
            m = kept
            if not m and n >= 4:
                break
    return out
