"""The fast tokenizer gives tiktoken's ids or none, and never outgrows its memory."""

import logging
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_data_tokenizers import SAMPLE, TEXT, TRAINED

from data import fast_tokens, tokenizers
from data.encodings import PATTERNS, SPECIAL_TOKENS
from data.tokenizers import BytePairTokenizer

pytest.importorskip("gigatoken", reason="the extra fast-tokens is not installed")


def cuts_shown(pattern: str) -> BytePairTokenizer:
    """Tokens of two bytes, one of them a letter, digit, sign or space: whether they are merged tells where words are cut."""
    plain, tokens = b"aA1! '\ns", [bytes([i]) for i in range(256)]
    for x in plain:
        for y in [*range(128, 256), *plain]:
            tokens += [bytes([x, y]), bytes([y, x])]
    ranks = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return BytePairTokenizer(pattern, ranks, pattern, {s: len(ranks) + i for i, s in enumerate(SPECIAL_TOKENS)})


TOKENIZERS = {**{pattern: cuts_shown(pattern) for pattern in PATTERNS}, "trained": TRAINED}
FAST = {name: fast_tokens.opened(tokenizer, SAMPLE) for name, tokenizer in TOKENIZERS.items()}
SCRIPTS = st.text(st.characters(exclude_categories=["Cs"]) | st.characters(max_codepoint=0x250), max_size=60)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(TEXT | SCRIPTS)
@example("<|endoftext|><|user|>")
@example("123\U00010947's")
def test_ids_are_tiktokens(name: str, text: str) -> None:
    fast = FAST[name]
    assert fast is not None, "it agrees on its proof"
    ids = fast.encode(text)
    assert ids is None or ids.tolist() == TOKENIZERS[name].encode(text)
    assert not text.isascii() or ids is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_characters_are_cut_as_tiktoken_cuts_them_or_left_to_it(pattern: str) -> None:
    fast, tokenizer = FAST[pattern], TOKENIZERS[pattern]
    assert fast is not None
    around = ["{}a", "a{}", "{}A", "A{}a", "{}1", "1{}", "{}!", "! {}a", "{}\n", " {} ", "'{}a", "{}'s"]
    context = "\n".join(around) + "\n"
    known = [c for c in map(chr, range(0x80, 0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    known = [c for c in known if c < "\u3400" or unicodedata.category(c) != "Lo" or not ord(c) % 8]  # not all ideographs
    for start in range(0, len(known), 500):
        text = "".join(context.replace("{}", c) for c in known[start : start + 500])
        np.testing.assert_array_equal(fast.encode(text), tokenizer._encode_array(text))
    assert all(fast.encode(c) is None for c in ["\ud800", "\u0378", "\U00010947"])


@given(st.lists(TEXT))
@example(["".join(SPECIAL_TOKENS), "", "half a pair \ud800"])
def test_documents_stand_as_in_the_stream(texts: list[str]) -> None:
    tokens, lengths = TRAINED.encode_flat(texts)
    assert (tokens.dtype, lengths.dtype) == (np.uint32, np.int64)
    assert tokens.tolist() == [i for text in texts for i in [*TRAINED.encode(text), TRAINED.end_of_text]]
    assert lengths.tolist() == [len(TRAINED.encode(text)) + 1 for text in texts]


def test_both_ways_give_the_same_and_only_work_enough_opens_the_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tokens, "_opened", {})
    slow = tokenizers.train(SAMPLE, 600)
    slow.fast = False
    texts = [*SAMPLE, "half a pair \ud800", "new letters \U00010947's"] * (fast_tokens.WORTH // sum(map(len, SAMPLE)) + 1)
    expected = slow.encode_flat(texts)
    assert fast_tokens.of(TRAINED, SAMPLE[:1]) is None
    assert not fast_tokens._opened
    found = TRAINED.encode_flat(texts)
    assert fast_tokens.of(TRAINED, []) is not None
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_holes_in_the_ranks_are_bridged() -> None:
    ranks = {token: rank + 7 * (rank > 300) for token, rank in TRAINED.ranks.items()}
    specials = {f"<|s{i}|>": 301 + i for i in range(7)} | {s: 7 + i for s, i in TRAINED.specials.items()}
    holed = BytePairTokenizer("holed", ranks, TRAINED.pattern, specials)
    fast = fast_tokens.opened(holed, [])
    assert fast is not None
    for text in SAMPLE:
        ids = fast.encode(text)
        assert ids is not None
        assert ids.tolist() == holed.encode(text)


def test_one_that_disagrees_is_not_used_and_that_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fast_tokens, "PATTERNS", {"cl100k_base": "gpt2"})
    with caplog.at_level(logging.WARNING):
        assert fast_tokens.opened(TRAINED, SAMPLE) is None
    assert "ids are not tiktoken's, for instance for" in caplog.text
    assert fast_tokens.opened(TOKENIZERS["o200k_base"], []) is None, "a pattern it does not know"
    monkeypatch.setattr(fast_tokens, "PATTERNS", {"cl100k_base": "no such"})
    assert fast_tokens.opened(TRAINED, SAMPLE) is None
    assert "cannot run the vocabulary 'trained'" in caplog.text


def test_it_forgets_when_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_tokens.Fast(TRAINED.ranks, TRAINED.pattern)
    first = fast.backend
    fast.forget()
    assert fast.backend is first
    monkeypatch.setattr(fast_tokens, "GROWTH", -(1 << 40))
    fast.forget()
    assert fast.backend is not first
