"""Hashed words and MinHash against plain Python: the same words, the same sets, estimates as good as theory says."""

import hashlib
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import minhash
from data.shingles import WHITE, in_characters, utf8, words

OLD = unicodedata.ucd_3_2_0
ALPHABET = st.sampled_from(
    [*"abcXYZ  \n\t.,;'-–—!19٣ÄéßÑıÇ的一國かがカガー한국어เด็ฟёЖΣ①²½ﬁ\u0301\u200b\u3000\x00\x85\x1c😀𠀀𝒜\ue000\u2fff"]
)
TEXTS = st.lists(st.text(ALPHABET, max_size=60) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=6)


def letter(char: str) -> str:
    """What one character counts as: "" for nothing, " ", "0" or a letter."""
    code, kind = ord(char), OLD.category(char)
    if code in WHITE:
        return " "
    if code > 0xFFFF:
        return "" if 0x1F000 <= code < 0x20000 else char
    if kind == "Nd":
        return "0"
    if kind[0] in "PSZ" or kind in ("Mn", "Me", "Cc", "Cf", "Co", "Cs"):
        return ""
    if kind == "Cn" or 0xAC00 <= code <= 0xD7A3:
        return char
    base = "".join(c for c in OLD.normalize("NFD", char) if OLD.category(c) != "Mn")
    return base.lower()[0] if len(base) == 1 else char


def alone(char: str) -> bool:
    return 0x3041 <= ord(char) <= 0x30FF or 0x3400 <= ord(char) <= 0x9FFF or 0x20000 <= ord(char) < 0x40000


def plain_words(text: str, characters: bool) -> list[str]:
    """The same words, one character after another."""
    found: list[str] = []
    joins = False
    for what in map(letter, text):
        if not what:
            continue
        single = alone(what) or (characters and what != " ")
        if joins and what == "0" and found[-1][-1] == "0":
            continue
        if what == " ":
            joins = False
        elif single or not joins:
            found.append(what)
            joins = not alone(what)
        else:
            found[-1] += what
    return found


@given(TEXTS, st.booleans())
def test_words_are_those_of_plain_python(texts: list[str], characters: bool) -> None:
    data, ends = utf8(texts)
    found = words(data, ends, np.full(len(texts), characters))
    expected = [plain_words(text, characters) for text in texts]
    assert np.diff(found.ends, prepend=0).tolist() == list(map(len, expected))
    names = [word for of_text in expected for word in of_text]
    by_hash = dict(zip(found.hashes.tolist(), names, strict=True))
    assert [by_hash[value] for value in found.hashes.tolist()] == names
    assert len(by_hash) == len(set(names))
    for start, stop, name in zip(found.start, found.stop, names, strict=True):
        assert plain_words(data[start:stop].tobytes().decode(), characters) == [name]


def test_spelling_that_is_no_difference() -> None:
    texts = ["Don't PANIC,\r\nit is  the year 2,024!", "dont panic it is the year 1999", "DO\u0301N'T panic it is the year 7"]
    keys = minhash.band_keys(texts, np.zeros(3, bool))
    assert (keys == keys[0]).all()


def strangers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Words that no two texts share."""
    return np.ascontiguousarray(rng.integers(97, 123, (*shape, 9), dtype=np.uint8)).view("S9")[..., 0].astype(str)


def pairs_of(rng: np.random.Generator, pairs: int, length: int, kept: int) -> tuple[list[str], float]:
    """Pairs of texts of `length` words that share the first `kept`, and the Jaccard similarity of their 5-grams."""
    texts = []
    for row, others in zip(strangers(rng, (pairs, length)), strangers(rng, (pairs, length - kept)), strict=True):
        texts += [" ".join(row), " ".join([*row[:kept], *others])]
    return texts, (kept - 4) / (2 * (length - 4) - (kept - 4))


@pytest.mark.parametrize("kept", [60, 90])
def test_estimates_are_those_of_jaccards_similarity(kept: int) -> None:
    """Unbiased to 3 standard errors of the mean, and spread as 112 independent draws are."""
    texts, s = pairs_of(np.random.default_rng(kept), 1000, 100, kept)
    sketches = minhash.fingerprints(texts, np.zeros(len(texts), bool))[1]
    estimates = (sketches[::2] == sketches[1::2]).mean(axis=1)
    error = np.sqrt(s * (1 - s) / minhash.PERMUTATIONS)
    assert abs(estimates.mean() - (s + (1 - s) / 256)) < 3 * error / np.sqrt(1000)
    assert estimates.std() == pytest.approx(error, rel=0.1)
    assert minhash.similarity(sketches[::2], sketches[1::2]).mean() == pytest.approx(s, abs=0.01)


def test_pairs_share_a_key_as_often_as_the_formula_says() -> None:
    texts, s = pairs_of(np.random.default_rng(1), 2000, 100, 90)
    keys = minhash.band_keys(texts, np.zeros(len(texts), bool))
    assert 0.8 < s < 0.85
    assert (keys[::2] == keys[1::2]).any(axis=1).mean() == pytest.approx(1 - (1 - s**8) ** 14, abs=0.02)
    equal = (keys[::2] == keys[1::2]).sum()
    assert len(np.unique(keys)) == keys.size - equal  # strangers share none, neither do bands


def test_short_texts_match_what_is_equal_only() -> None:
    texts = ["one two", "one two three", "One, two.", "", "?", "?!", "", "你好", "你 好"]
    keys = minhash.band_keys(texts, np.zeros(len(texts), bool))
    same = (keys[:, None] == keys[None]).any(axis=2)
    assert (same == (keys[:, None] == keys[None]).all(axis=2)).all()
    assert np.argwhere(np.triu(same, 1)).tolist() == [[0, 2], [3, 6], [7, 8]]


def test_characters_are_asked_for_text_by_text() -> None:
    texts = ["床前明月光疑是地上霜", "The moon shines before my bed", "한국어 문장입니다", "明月光 is the moonlight", "", "123"]
    assert in_characters(texts).tolist() == [True, False, True, False, False, False]
    both = minhash.band_keys(texts, np.array([True, False] * 3))
    assert (both[::2] == minhash.band_keys(texts[::2], np.ones(3, bool))).all()
    assert (both[1::2] == minhash.band_keys(texts[1::2], np.zeros(3, bool))).all()


def test_the_neighbours_in_a_batch_change_nothing_and_neither_does_the_next_version() -> None:
    texts = [
        "alpha beta gamma delta epsilon zeta eta",
        "Ça va? 42 fois, naïve Grüße aus Köln",
        "床前明月光，疑是地上霜。舉頭望明月",
        "",
        "x",
    ]
    characters = in_characters(texts)
    keys, sketches = minhash.fingerprints(texts, characters)
    alone = [minhash.fingerprints([text], characters[i : i + 1]) for i, text in enumerate(texts)]
    assert (keys == np.concatenate([k for k, _ in alone])).all()
    assert (sketches == np.concatenate([s for _, s in alone])).all()
    columns = minhash.columns(texts, characters)
    assert columns["keys"][1].as_py() == keys[1].astype("<u8").tobytes()
    assert columns["sketch"][2].as_py() == sketches[2].tobytes()
    digest = hashlib.sha256(keys.astype("<u8").tobytes() + sketches.tobytes()).hexdigest()
    assert (minhash.FORMAT, digest[:16]) == ("roundhouse minhash 1", "d61a6db96b5db522")  # a new digest needs a new format
