"""MinHash: a few numbers per text, equal for texts that share most of their n-grams.

    keys = band_keys(texts, in_characters(texts))      # uint64 [n, 14]; texts that share a key in any column may be near-duplicates
    keys, sketches = fingerprints(texts, characters)   # and uint8 [n, 112]
    similarity(sketches[0], sketches[1])               # estimated Jaccard similarity of their sets of 5-grams

14 bands of 8 as FineWeb (arXiv:2406.17557): two texts of similarity s share a key with odds 1 - (1 - s^8)^14, that is .56 at .7, .92 at .8
and .999 at .9. A set's signature is the least value of each of 112 permutations of its hashed 5-grams of words (Broder 1997), x -> a x + b
mod 2^32 with odd a. A band's 8 values make its key; of every value 8 bits are kept as the sketch (b-bit minwise hashing, Li & Koenig 2010),
which estimates s with a standard error of sqrt(s (1 - s) / 112), .038 at s = .8, for 112 bytes. All is integer arithmetic on tables of a
fixed version: the same on every machine.

A text shorter than 5 words is one n-gram of all its words, and one without any word is one n-gram of its bytes: they match what is equal
only.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from data.kernels import kernel
from data.shingles import Words, mix, utf8, words

FORMAT = "roundhouse minhash 1"
"""Changes whenever the same text would get other keys: indices of different formats cannot be held against each other."""
BANDS, ROWS, NGRAM = 14, 8, 5
PERMUTATIONS = BANDS * ROWS
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd; n-grams are polynomials in it, mod 2^64


def _splitmix(seed: int, count: int) -> list[int]:
    """The first uint64 of SplitMix64: the permutations' coefficients, from no library's generator."""
    state, found = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        x = state
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        found.append(x ^ x >> 31)
    return found


_COEFFICIENTS = np.array(_splitmix(1, 2 * PERMUTATIONS), np.uint64)
FACTORS = (_COEFFICIENTS[:PERMUTATIONS] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
TERMS = (_COEFFICIENTS[PERMUTATIONS:] >> np.uint64(32)).astype(np.uint32)


def band_keys(texts: Sequence[str] | pa.Array, character_ngrams: np.ndarray) -> np.ndarray:
    """uint64 `[n, 14]`: one key per band; keys of different bands never mean the same. `character_ngrams` is bool `[n]`."""
    return fingerprints(texts, character_ngrams)[0]


def fingerprints(texts: Sequence[str] | pa.Array, character_ngrams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys of `band_keys`, and sketches uint8 `[n, 112]` that tell how similar two texts are."""
    found = signatures(texts, character_ngrams)
    keys = np.empty((len(found), BANDS), np.uint64)
    _keys(found, keys)
    return keys, (found * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)


def columns(texts: Sequence[str] | pa.Array, character_ngrams: np.ndarray) -> dict[str, pa.Array]:
    """The same as columns of a part for data/clusters.py: `keys` and `sketch`, binary `[112]` both."""
    keys, sketches = fingerprints(texts, character_ngrams)
    return {
        name: pa.FixedSizeBinaryArray.from_buffers(pa.binary(PERMUTATIONS), len(keys), [None, pa.py_buffer(bytes(values.astype(kind)))])
        for name, values, kind in (("keys", keys, "<u8"), ("sketch", sketches, "u1"))
    }


def signatures(texts: Sequence[str] | pa.Array, character_ngrams: np.ndarray) -> np.ndarray:
    """uint32 `[n, 112]`: the least value of each permutation over a text's n-grams."""
    data, ends = utf8(texts)
    found = np.empty((len(ends), PERMUTATIONS), np.uint32)
    of: Words = words(data, ends, np.ascontiguousarray(character_ngrams, dtype=bool))
    _minima(data, ends, of.hashes, of.ends, FACTORS, TERMS, found)
    return found


def sets(texts: Sequence[str] | pa.Array, character_ngrams: np.ndarray) -> list[np.ndarray]:
    """The different n-grams of each text by hash, ascending uint64 `[n-grams]`: what the signatures are drawn from."""
    data, ends = utf8(texts)
    of = words(data, ends, np.ascontiguousarray(character_ngrams, dtype=bool))
    room = np.empty(len(of.hashes) + 1, np.uint64)
    return [np.unique(room[: ngrams(of.hashes[a:b], NGRAM, room)]) for a, b in zip(np.append(0, of.ends)[:-1], of.ends, strict=True)]


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of texts by their sketches, uint8 `[..., 112]`: equal bytes, less the 1 in 256 that are so by chance."""
    return np.maximum(0, ((one == other).mean(axis=-1) - 1 / 256) / (1 - 1 / 256))


@kernel
def ngrams(hashes, size, out):  # type: ignore[no-untyped-def]
    """Hashes of all n-grams of `size` words into `out`, returns how many; a shorter text is one n-gram, none is none."""
    count = len(hashes)
    if count == 0:
        return 0
    size = min(size, count)
    power = np.uint64(1)
    value = np.uint64(0)
    for i in range(size):
        power *= BASE
        value = value * BASE + hashes[i]
    out[0] = mix(value)
    for i in range(size, count):
        value = value * BASE + hashes[i] - hashes[i - size] * power
        out[i - size + 1] = mix(value)
    return count - size + 1


@kernel
def _minima(data, ends, hashes, of_text, factors, terms, found):  # type: ignore[no-untyped-def]
    longest, begin = 1, 0
    for end in of_text:
        longest = max(longest, end - begin)
        begin = end
    grams = np.empty(longest, np.uint64)
    begin, first = 0, 0
    for text in range(len(ends)):
        count = ngrams(hashes[begin : of_text[text]], NGRAM, grams)
        if count == 0:
            value = np.uint64(ends[text] - first)
            for byte in data[first : ends[text]]:
                value = value * BASE + np.uint64(byte)
            grams[0] = mix(value)
            count = 1
        least = found[text]
        least[:] = np.uint32(0xFFFFFFFF)
        for gram in grams[:count]:
            x = np.uint32(gram >> np.uint64(32))
            for i in range(PERMUTATIONS):
                least[i] = min(least[i], np.uint32(factors[i] * x + terms[i]))
        begin, first = of_text[text], ends[text]


@kernel
def _keys(found, keys):  # type: ignore[no-untyped-def]
    for text in range(len(found)):
        for band in range(BANDS):
            value = mix(np.uint64(band + 1))
            for row in range(ROWS):
                value = mix(value ^ np.uint64(found[text, band * ROWS + row]))
            keys[text, band] = value
