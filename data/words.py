"""Texts become words as spaCy's blank English pipeline splits them: what the published rules count with.

    texts = Texts.of(["Dr. Smith didn't go.", "10km (or so)"])
    words = split(texts)
    words.offsets            # [0, 6, 11]: Dr. Smith did n't go . | 10 km ( or so )   (never across two texts)
    words.hashes[0]          # a 64-bit hash of the word's characters

datatrove counts the words of its Gopher and FineWeb rules with `spacy.blank("en")`, hence a fast equivalent: what stands between whitespace
loses marks and units at its ends, is cut at hyphens, slashes and the like inside, and left whole if it is an abbreviation or an address;
short forms become `did n't`. Left out are emoticons of more than brackets, and three
rare currency signs (`US$`). Characters are code points throughout:
one array of uint32 for all texts, one table of what each character is, and no Python per word.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.characters import (
    ALPHABETIC,
    BEFORE_DOT,
    CURRENCY,
    DIGIT,
    FACE,
    ICON,
    LETTER,
    LIMIT,
    LINE,
    LOWER,
    MARK,
    PREFIX,
    PUNCTUATION,
    QUOTE,
    SPACE,
    STOP,
    SUFFIX,
    UPPER,
    Texts,
    classes,
)
from data.kernels import kernel
from data.special_words import ABBREVIATIONS, MOST_SPECIAL, UNITS, emoticons, short_forms


@dataclass(frozen=True)
class Words:
    """The words of texts, one after another."""

    hashes: np.ndarray
    """uint64 `[words]`"""
    lengths: np.ndarray
    """int32 `[words]`, in characters"""
    kinds: np.ndarray
    """uint32 `[words]`: what its characters are, or-ed; MARK only if all of them are, PUNCTUATION likewise"""
    offsets: np.ndarray
    """int64 `[texts + 1]`"""
    sentences: np.ndarray
    """int32 `[texts]`: sentences, counted line by line as spaCy's sentencizer does"""


def split(texts: Texts) -> Words:
    """The words of all texts."""
    keys, pieces = _specials()
    return Words(*_split(texts.points, texts.offsets, classes(), keys, pieces))


def word_hash(word: str) -> int:
    """The hash that `split` gives to this word."""
    points = np.frombuffer(word.encode("utf-32-le"), dtype=np.uint32)
    return int(_hash(points, 0, len(points)))


@lru_cache(maxsize=1)
def _specials() -> tuple[np.ndarray, np.ndarray]:
    """An open-addressing table of words that are split as a whole: hashes uint64 `[4096]` (0: empty) and int8 `[4096, 4]`: the lengths of
    up to three pieces, and 1 if it is a unit."""
    whole = {word: [word] for word in ABBREVIATIONS.split()} | {f"{letter}.": [f"{letter}."] for letter in "abcdefghijklmnopqrstuvwxyzäöü"}
    whole |= {face: [face] for face in emoticons()}
    whole |= {word.replace("'", "’"): [word.replace("'", "’")] for word in whole}
    whole |= short_forms()
    keys, pieces = np.zeros(4096, np.uint64), np.zeros((4096, 4), np.int8)

    def slot(word: str) -> int:
        at = word_hash(word) & 4095
        while keys[at] not in (0, word_hash(word)):
            at = (at + 1) & 4095
        keys[at] = word_hash(word)
        return at

    for word, parts in whole.items():
        pieces[slot(word), : len(parts)] = [len(part) for part in parts]
    for unit in UNITS.split():
        pieces[slot(unit), 3] = 1
    return keys, pieces


# --------------------------------------------------------------------------------- kernels


@kernel
def _hashed(h, point):  # type: ignore[no-untyped-def]
    h = (h ^ np.uint64(point)) * np.uint64(0x9E3779B97F4A7C15)
    return h ^ (h >> np.uint64(29))


@kernel
def _hash(points, a, b):  # type: ignore[no-untyped-def]
    h = np.uint64(0)
    for i in range(a, b):
        h = _hashed(h, points[i])
    return h | np.uint64(1)


@kernel
def _find(h, keys):  # type: ignore[no-untyped-def]
    """The place of this hash in the table of special words, or -1."""
    at = np.int64(h & np.uint64(4095))
    while keys[at]:
        if keys[at] == h:
            return at
        at = (at + 1) & 4095
    return -1


@kernel
def _special(points, a, b, keys):  # type: ignore[no-untyped-def]
    return _find(_hash(points, a, b), keys) if b - a <= MOST_SPECIAL else -1


@kernel
def _is(points, i, table):  # type: ignore[no-untyped-def]
    return table[points[i]] if points[i] < LIMIT else np.uint32(0)


@kernel
def _prefix(points, a, b, table):  # type: ignore[no-untyped-def]
    """How many characters to take off the front."""
    if _is(points, a, table) & PREFIX:
        return 1
    if points[a] == 46:
        n = 1
        while a + n < b and points[a + n] == 46:
            n += 1
        return n if n > 1 else 0
    if points[a] == 43:
        return 0 if a + 1 < b and _is(points, a + 1, table) & DIGIT else 1
    return 0


@kernel
def _suffix(points, a, b, table, keys, pieces):  # type: ignore[no-untyped-def]
    """How many characters to take off the end."""
    if b <= a:
        return 0
    last = points[b - 1]
    kind = _is(points, b - 1, table)
    before = _is(points, b - 2, table) if b - 2 >= a else np.uint32(0)
    if last == 46:
        n = 1
        while b - n - 1 >= a and points[b - n - 1] == 46:
            n += 1
        if n > 1:
            return n
        if before & BEFORE_DOT:
            return 1
        return 1 if before & UPPER and b - 3 >= a and _is(points, b - 3, table) & UPPER else 0
    if last == 0x2026:
        return 2 if b - 2 >= a and points[b - 2] == 0x2026 else 1
    if kind & SUFFIX:
        return 1
    if (last == 115 or last == 83) and b - 2 >= a and (points[b - 2] == 39 or points[b - 2] == 0x2019):
        return 2
    if (last == 43 or kind & CURRENCY) and before & DIGIT:
        return 1
    n = 0
    while n < 4 and b - n - 1 >= a and not _is(points, b - n - 1, table) & DIGIT:
        n += 1
    if n and b - n - 1 >= a and _is(points, b - n - 1, table) & DIGIT:
        at = _special(points, b - n, b, keys)
        if at >= 0 and pieces[at, 3]:
            return n
    return 0


@kernel
def _infix(points, i, a, b, table):  # type: ignore[no-untyped-def]
    """How many characters from i on separate two words; 0 if none."""
    c, kind = points[i], _is(points, i, table)
    if c == 46 and i + 1 < b and points[i + 1] == 46:
        n = 2
        while i + n < b and points[i + n] == 46:
            n += 1
        return n
    if c == 0x2026 or kind & ICON:
        return 1
    if i == a or i + 1 >= b:
        return 0
    before, after = _is(points, i - 1, table), _is(points, i + 1, table)
    if (c == 43 or c == 45 or c == 42 or c == 94) and before & DIGIT and (after & DIGIT or points[i + 1] == 45):
        return 1
    if c == 46:
        return 1 if before & (LOWER | QUOTE) and after & (UPPER | QUOTE) else 0
    if c == 44:
        return 1 if before & LETTER and after & LETTER else 0
    if not before & (LETTER | DIGIT):
        return 0
    if c == 45 or c == 0x2013 or c == 0x2014 or c == 126 or c == 58 or c == 60 or c == 62 or c == 61 or c == 47:
        if after & LETTER:
            return 1
        if c == 45 or c == 0x2014:
            n = 1
            while i + n < b and points[i + n] == c:
                n += 1
            longest = 3 if c == 45 else 2
            if 1 < n <= longest and i + n < b and _is(points, i + n, table) & LETTER:
                return n
    return 0


@kernel
def _host(c):  # type: ignore[no-untyped-def]
    return 97 <= c <= 122 or 65 <= c <= 90 or 48 <= c <= 57 or 0xA1 <= c <= 0xFFFF


@kernel
def _address(points, a, b, table):  # type: ignore[no-untyped-def]
    """Whether [a, b) is an address: [scheme://][user@]host.tld[:port][/path]."""
    start = a
    for i in range(a, b - 2):
        c = points[i]
        if i >= a + 2 and c == 58 and points[i + 1] == 47 and points[i + 2] == 47:
            start = i + 3
            break
        if not (_is(points, i, table) & (ALPHABETIC | DIGIT) or c == 43 or c == 45 or c == 46 or c == 95):
            break
    end = b
    for i in range(start, b):
        if points[i] == 64:
            start = i + 1
        elif points[i] == 47 or points[i] == 63 or points[i] == 35:
            end = i
            break
    colon = end
    while colon > start and _is(points, colon - 1, table) & DIGIT:
        colon -= 1
    if 2 <= end - colon <= 5 and colon > start and points[colon - 1] == 58:
        end = colon - 1
    label, dots, digits = start, 0, True
    for i in range(start, end):
        c = points[i]
        if c == 46:
            if i == label or not _host(points[i - 1]) or not _host(points[label]):
                return False
            dots += 1
            label = i + 1
        elif not (_host(c) or c == 95 or c == 45):
            return False
        elif not 48 <= c <= 57:
            digits = False
    if digits:
        return dots == 3
    if not dots or end - label < 2:
        return False
    while label < end and _is(points, label, table) & LOWER:
        label += 1
    return label == end


@kernel
def _cut(points, a, b, table, keys, pieces, cuts):  # type: ignore[no-untyped-def]
    """Write where the words of [a, b), which holds no whitespace, end; returns how many there are. cuts: int64 `[>= 2 * (b - a)]`."""
    n, back, size, special = 0, len(cuts), -1, -1  # what comes off the end is written from the back
    while a < b and b - a != size:
        size = b - a
        special = _special(points, a, b, keys)
        if special >= 0 and pieces[special, 0]:
            break
        special = -1
        front = _prefix(points, a, b, table)
        rear = _suffix(points, a + front, b, table, keys, pieces)
        for only_rear in range(2):  # what is special without one of its ends keeps the other
            from_, to = (a, b - rear) if only_rear else (a + front, b)
            if from_ < to < from_ + size:
                special = _special(points, from_, to, keys)
                if special >= 0 and pieces[special, 0]:
                    front, rear = (0, rear) if only_rear else (front, 0)
                    break
            special = -1
        if front:
            a += front
            cuts[n] = a
            n += 1
        if rear:
            back -= 1
            cuts[back] = b
            b -= rear
        if special >= 0:
            break
    if special >= 0:
        for k in range(3):
            if pieces[special, k]:
                a += pieces[special, k]
                cuts[n] = a
                n += 1
    elif a < b:
        start, i, asked = a, a, False
        while i < b:
            between = _infix(points, i, a, b, table)
            if between and not asked:
                asked = True
                if _address(points, a, b, table):
                    break
            if between and i > a:
                if i > start:
                    cuts[n] = i
                    n += 1
                start = i + between
                cuts[n] = start
                n += 1
            i += max(between, 1)
        if start < b:
            cuts[n] = b
            n += 1
    for k in range(back, len(cuts)):
        cuts[n] = cuts[k]
        n += 1
    return n


@kernel
def _joined(points, begin, cuts, k, parts, table, keys, pieces):  # type: ignore[no-untyped-def]
    """The last of the pieces from k on that are special together, as `:` and `)` or `Co` and a dot; k if none are."""
    if k + 1 < parts and (_is(points, begin, table) & FACE or (points[cuts[k]] == 46 and cuts[k + 1] == cuts[k] + 1)):
        for last in range(min(k + 3, parts - 1), k, -1):
            at = _special(points, begin, cuts[last], keys)
            if at >= 0 and pieces[at, 0] == cuts[last] - begin:
                return last
    return k


@kernel
def _split(points, offsets, table, keys, pieces):  # type: ignore[no-untyped-def]
    texts, n = len(offsets) - 1, 0
    hashes, lengths, kinds = np.empty(len(points), np.uint64), np.empty(len(points), np.int32), np.empty(len(points), np.uint32)
    word_offsets, sentences = np.zeros(texts + 1, np.int64), np.zeros(texts, np.int32)
    cuts = np.empty(1024, np.int64)
    shared = np.uint32(MARK | PUNCTUATION)
    for text in range(texts):
        i, stop = offsets[text], offsets[text + 1]
        fresh, ended = True, False  # no word in this line yet; its sentence has ended
        while True:
            begin, line = i, np.uint32(0)
            while i < stop and _is(points, i, table) & SPACE:
                line |= _is(points, i, table)
                i += 1
            if i == stop:
                break
            if line & LINE:
                fresh, ended = True, False
            elif ended and (i - begin > 1 or (i > begin and points[begin] != 32)):
                sentences[text] += 1  # more than one space is a word to spaCy, which then begins the next sentence
                ended = False
            begin, either, both, h = i, np.uint32(0), np.uint32(0xFFFFFFFF), np.uint64(0)
            while i < stop:
                kind = _is(points, i, table)
                if kind & SPACE:
                    break
                either |= kind
                both &= kind
                h = _hashed(h, points[i])
                i += 1
            if both & ALPHABETIC and (i - begin > MOST_SPECIAL or _find(h | np.uint64(1), keys) < 0):  # most words: one pass is enough
                hashes[n], lengths[n], kinds[n] = h | np.uint64(1), i - begin, (either & ~shared) | (both & shared)
                n += 1
                if fresh or ended:
                    sentences[text] += 1
                    fresh, ended = False, False
                continue
            if 2 * (i - begin) > len(cuts):
                cuts = np.empty(4 * (i - begin), np.int64)
            parts = _cut(points, begin, i, table, keys, pieces, cuts)
            k = 0
            while k < parts:
                k = _joined(points, begin, cuts, k, parts, table, keys, pieces)
                end = cuts[k]
                k += 1
                either, both, h = np.uint32(0), np.uint32(0xFFFFFFFF), np.uint64(0)
                for j in range(begin, end):
                    kind = _is(points, j, table)
                    either |= kind
                    both &= kind
                    h = _hashed(h, points[j])
                hashes[n], lengths[n], kinds[n] = h | np.uint64(1), end - begin, (either & ~shared) | (both & shared)
                n += 1
                stops = end - begin == 1 and either & STOP != 0
                if fresh or (ended and not stops and not both & PUNCTUATION):
                    sentences[text] += 1
                    fresh, ended = False, False
                ended |= stops
                begin = end
        word_offsets[text + 1] = n
    return hashes[:n].copy(), lengths[:n].copy(), kinds[:n].copy(), word_offsets, sentences
