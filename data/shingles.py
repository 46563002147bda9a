"""Texts as rows of hashed words: what near-duplicates and contamination are looked for in.

    data, ends = utf8(["Don't panic: 42!", "你好"])
    of = words(data, ends, characters=np.array([False, False]))
    of.hashes, of.ends       # uint64 of dont, panic, 0 and of 你, 好; [3, 5]
    data[of.start[1] : of.stop[1]].tobytes()                               # b"panic": where word 1 stands

Words are those of FineWeb's normalisation (arXiv:2406.17557): lower case, without accents, punctuation left out, every run of digits one 0,
cut at white space. Chinese characters and kana are a word each, since nothing stands between the words they make; with `characters` every
letter is. The tables are those of Unicode 3.2, which every Python carries beside its own, so that hashes do not depend on a version; later
letters stand for themselves.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data.kernels import kernel, table

ALONE = np.uint32(1 << 31)
"""Flag in `folding`: this character is a word by itself."""
SPACE, NOTHING, DIGIT = (np.uint32(code) for code in (ord(" "), 0, ord("0")))
FNV = np.uint64(0x100000001B3)
FNV_START = np.uint64(0xCBF29CE484222325)
WHITE = [*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]


class Words(NamedTuple):
    """Words of n texts one after another: `hashes` uint64 `[words]`, the bytes `[start, stop)` of each (int64), `ends` int64 `[n]` in
    words."""

    hashes: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    ends: np.ndarray


def utf8(texts: Sequence[str] | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The texts' bytes in one row, uint8 `[bytes]`, and where each ends, int64 `[n]`."""
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    array = array.cast(pa.large_string())
    offsets = (
        np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1] if len(array) else np.zeros(1, np.int64)
    )
    held = array.buffers()[2] if len(array) else None
    data = np.frombuffer(held, np.uint8)[: offsets[-1]] if held is not None else np.zeros(0, np.uint8)
    return data[offsets[0] :], offsets[1:] - offsets[0]


def words(data: np.ndarray, ends: np.ndarray, characters: np.ndarray, numbers: bool = False) -> Words:
    """The words of all texts; of those with `characters` (bool `[n]`) every letter is one. With `numbers` digits count as letters."""
    room = len(data)
    hashes, start, stop = np.empty(room, np.uint64), np.empty(room, np.int64), np.empty(room, np.int64)
    of_text = np.empty(len(ends), np.int64)
    count = _split_all(data, ends, characters, numbers, folding(), hashes, start, stop, of_text)
    return Words(hashes[:count], start[:count], stop[:count], of_text)


def in_characters(texts: Sequence[str] | pa.Array) -> np.ndarray:
    """bool `[n]`: texts more than half of whose letters are Chinese, kana or Hangul: for them n-grams are of characters."""
    return _mostly_cjk(*utf8(texts), folding())


@table
def folding() -> np.ndarray:
    """uint32 `[65536]`: what a character of the basic plane counts as: NOTHING, SPACE, DIGIT or a letter, ALONE or not."""
    old = unicodedata.ucd_3_2_0
    found = np.zeros(1 << 16, np.uint32)
    for code in range(1 << 16):
        char, kind = chr(code), old.category(chr(code))
        if code in _WHITE:
            found[code] = SPACE
        elif kind == "Nd":
            found[code] = DIGIT
        elif kind[0] in "LN" or kind in ("Mc", "Cn"):
            if 0xAC00 <= code <= 0xD7A3:  # a syllable of Hangul stays whole
                found[code] = code
                continue
            base = [c for c in old.normalize("NFD", char) if old.category(c) != "Mn"]
            letter = ord(base[0].lower()[0]) if len(base) == 1 and kind != "Cn" else code
            found[code] = letter | (ALONE if 0x3041 <= letter <= 0x30FF or 0x3400 <= letter <= 0x9FFF else 0)
    return found


_WHITE = frozenset(WHITE)


@kernel
def mix(x):  # type: ignore[no-untyped-def]
    """SplitMix64's last step: every bit of a uint64 moves every other (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def character(data, at, table):  # type: ignore[no-untyped-def]
    """(what the character at byte `at` of valid UTF-8 counts as, as in `folding`; its bytes)."""
    first = np.uint32(data[at])
    if first < 0x80:
        return table[first], 1
    if first < 0xE0:
        return table[((first & np.uint32(0x1F)) << np.uint32(6)) | (np.uint32(data[at + 1]) & np.uint32(0x3F))], 2
    low = ((np.uint32(data[at + 1]) & np.uint32(0x3F)) << np.uint32(6)) | (np.uint32(data[at + 2]) & np.uint32(0x3F))
    if first < 0xF0:
        return table[((first & np.uint32(0x0F)) << np.uint32(12)) | low], 3
    code = ((first & np.uint32(0x07)) << np.uint32(18)) | (low << np.uint32(6)) | (np.uint32(data[at + 3]) & np.uint32(0x3F))
    if np.uint32(0x1F000) <= code < np.uint32(0x20000):  # pictures
        return NOTHING, 4
    return (code | ALONE if np.uint32(0x20000) <= code < np.uint32(0x40000) else code), 4


@kernel
def _split_all(data, ends, characters, numbers, table, hashes, start, stop, of_text):  # type: ignore[no-untyped-def]
    count, at = 0, 0
    for text in range(len(ends)):
        alone = characters[text]
        inside, digits = False, False
        value = FNV_START
        while at < ends[text]:
            what, size = character(data, at, table)
            if what == NOTHING:
                at += size
                continue
            if numbers and what == DIGIT:
                what = np.uint32(0x110000) | np.uint32(data[at + size - 1])
            single = (what & ALONE) != 0 or (alone and what != SPACE)
            if inside and (what == SPACE or (single and not (digits and what == DIGIT))):
                hashes[count] = mix(value)
                count += 1
                inside = False
            if what != SPACE and not (inside and digits and what == DIGIT):
                if not inside:
                    inside = True
                    value = FNV_START
                    start[count] = at
                value = (value ^ np.uint64(what)) * FNV
            if inside:
                stop[count] = at + size
                digits = what == DIGIT
                if (what & ALONE) != 0:
                    hashes[count] = mix(value)
                    count += 1
                    inside = False
            at += size
        if inside:
            hashes[count] = mix(value)
            count += 1
        of_text[text] = count
    return count


@kernel
def _mostly_cjk(data, ends, table):  # type: ignore[no-untyped-def]
    found = np.zeros(len(ends), np.bool_)
    at = 0
    for text in range(len(ends)):
        cjk, letters = 0, 0
        while at < ends[text]:
            what, size = character(data, at, table)
            at += size
            if what != NOTHING and what != SPACE and what != DIGIT:
                letters += 1
                cjk += (what & ALONE) != 0 or 0xAC00 <= what <= 0xD7A3
        found[text] = 2 * cjk > letters
    return found
