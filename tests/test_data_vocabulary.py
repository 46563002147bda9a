"""A longer vocabulary spells less and loses nothing: old ids stay, new tokens can be reached, every export agrees."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_data_tokenizers import SAMPLE, TEXT, TRAINED, exported
from tokenizers import Tokenizer as HFTokenizer

from data import fast_tokens, pipeline, tokenizers, vocabulary
from data.encodings import SPECIAL_TOKENS
from data.errors import DataError
from data.pipeline import prepare_text
from data.shards import TokenShards
from data.tokenizers import BytePairTokenizer
from data.vocabulary import Growth, batches, counted, grown, joins, words

CHINESE = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "明月几时有？把酒问青天。不知天上宫阙，今夕是何年。",
    "海上生明月，天涯共此时。明月出天山，苍茫云海间。",
] * 3
PIECES = ["明月", "蒸汽机车", "locomotive", " locomotive", "éclairé", "明月光", "12", "👍🏽", "\n\n"]
LONGER = TRAINED.extended(PIECES)
GROWN = grown(TRAINED, words(CHINESE, TRAINED.pattern), 60)


@pytest.fixture(scope="module", params=["pieces", "corpus"])
def longer(request: pytest.FixtureRequest) -> BytePairTokenizer:
    return LONGER if request.param == "pieces" else GROWN


@pytest.fixture(scope="module")
def longer_hf(longer: BytePairTokenizer, tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    return exported(longer, tmp_path_factory.mktemp("longer"))


@given(TEXT | st.text(st.sampled_from("".join(CHINESE[:5]) + "loc omotive蒸汽机车éclairé12")))
@example("".join(SPECIAL_TOKENS))
@example("12明月光 locomotives蒸汽机车éclairée")
def test_text_survives_and_all_that_runs_it_agrees(longer: BytePairTokenizer, longer_hf: HFTokenizer, text: str) -> None:
    ids = longer.encode(text)
    assert longer.decode(ids) == text
    assert not longer.special_ids & set(ids)
    assert b"".join(map(longer.token_bytes, ids)) == text.encode()
    assert len(ids) <= len(TRAINED.encode(text))
    assert longer_hf.encode(text, add_special_tokens=False).ids == ids


def test_new_tokens_follow_the_old_ones_and_tell_what_spelled_them(longer: BytePairTokenizer) -> None:
    new = range(TRAINED.vocab_size, longer.vocab_size)
    assert {token: rank for token, rank in longer.ranks.items() if rank < TRAINED.vocab_size} == TRAINED.ranks
    assert (longer.specials, longer.end_of_text) == (TRAINED.specials, TRAINED.end_of_text)
    assert list(longer.starts) == list(new)
    for token in new:
        assert longer.encoding._core_bpe.encode_single_piece(longer.token_bytes(token)) == [token], "it can be reached"
        assert b"".join(map(TRAINED.token_bytes, longer.starts[token])) == longer.token_bytes(token)
        assert TRAINED.encoding._core_bpe.encode_single_piece(longer.token_bytes(token)) == longer.starts[token]


def test_every_piece_is_one_token_wherever_it_stands() -> None:
    for piece in PIECES:
        assert len(LONGER.encode(piece)) == 1, piece
    assert LONGER.encode("，明月光。") == [*TRAINED.encode("，"), *LONGER.encode("明月光"), *TRAINED.encode("。")]
    assert LONGER.extended(PIECES).fingerprint == LONGER.fingerprint
    assert LONGER.fingerprint != TRAINED.fingerprint
    again = TRAINED.extended(PIECES[:3]).extended(PIECES[3:])
    assert (again.fingerprint, again.vocab_size) == (LONGER.fingerprint, LONGER.vocab_size)


def test_pieces_that_the_pattern_cuts_are_told() -> None:
    with pytest.raises(DataError, match=r"2 of 3 pieces can be no token, for the pattern of trained cuts them: 'two words', '明月，'"):
        TRAINED.extended(["fine", "two words", "明月，"])


def test_saved_and_loaded_is_the_same(tmp_path: Path, longer: BytePairTokenizer) -> None:
    longer.save(tmp_path / "a")
    loaded = tokenizers.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert (loaded.fingerprint, loaded.starts) == (longer.fingerprint, longer.starts)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    theirs = tokenizers.from_model(tmp_path / "a")
    assert theirs.starts == longer.starts
    assert theirs.encode("".join(CHINESE)) == longer.encode("".join(CHINESE))


def test_the_fast_way_runs_it(longer: BytePairTokenizer) -> None:
    pytest.importorskip("gigatoken", reason="the extra fast-tokens is not installed")
    fast = fast_tokens.opened(longer, CHINESE)
    assert fast is not None
    for text in [*CHINESE, *SAMPLE, " ".join(PIECES)]:
        ids = fast.encode(text)
        assert ids is not None
        assert ids.tolist() == longer.encode(text)


def tokens_of(tokenizer: BytePairTokenizer, counts: Counter[str]) -> int:
    return sum(count * len(tokenizer.encode(word)) for word, count in counts.items())


def one_by_one(tokenizer: BytePairTokenizer, counts: Counter[str], pieces: int) -> int:
    """Tokens of the words after textbook byte-pair encoding: the most frequent neighbours are joined, and all is counted again."""
    spelled = {word: [tokenizer.token_bytes(i) for i in tokenizer.encode(word)] for word in counts}
    for _ in range(pieces):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, tokens in spelled.items():
            for pair in pairwise(tokens):
                pairs[pair] += counts[word]
        (left, right), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        for tokens in spelled.values():
            i = 0
            while i + 1 < len(tokens):
                if tokens[i] == left and tokens[i + 1] == right:
                    tokens[i : i + 2] = [left + right]
                i += 1
    return sum(counts[word] * len(tokens) for word, tokens in spelled.items())


def test_growth_saves_as_much_as_one_join_after_the_other() -> None:
    for texts, pieces in ((CHINESE, 60), (SAMPLE, 100)):
        counts = words(texts, TRAINED.pattern)
        before, reference = tokens_of(TRAINED, counts), one_by_one(TRAINED, counts, pieces)
        longer = grown(TRAINED, counts, pieces)
        assert longer.vocab_size == TRAINED.vocab_size + pieces
        assert before - tokens_of(longer, counts) >= 0.99 * (before - reference)


def test_what_can_be_joined_ends_and_words_are_borders() -> None:
    tokens = np.array([1, 1, 1, 1, 1, 0, 1, 2, 0, 2, 1, 0])
    ends = tokens == 0
    assert list(joins(tokens, ends, np.full(len(tokens), 3), 10)) == [(1, 1, 10), (1, 2, 11), (10, 10, 12), (2, 1, 13), (12, 1, 14)]
    assert list(joins(tokens[:1], ends[:1], np.ones(1, int), 10)) == []
    few = grown(TRAINED, Counter({"明月": 2, "a": 9, "qzx": 1}), 50)
    assert few.encode("明月") == [few.vocab_size - 1]
    assert few.vocab_size - TRAINED.vocab_size == len(TRAINED.encode("明月")) - 1


@pytest.mark.usefixtures("ray_session")
def test_words_are_counted_on_ray_and_their_order_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "TASK_CHARACTERS", 5000)
    texts = [*SAMPLE, *CHINESE]
    found = counted(batches(texts), TRAINED.pattern)
    assert counted([texts[:3], lambda: iter(texts[3:])], TRAINED.pattern) == found
    assert found == words(texts, TRAINED.pattern)
    assert sum(len(word) * count for word, count in found.items()) == sum(map(len, texts))
    assert Growth(TRAINED, 40).learned(batches(reversed(texts))).fingerprint == grown(TRAINED, found, 40).fingerprint


@pytest.mark.usefixtures("ray_session")
def test_of_too_much_text_an_even_part_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def learn(texts: Iterable[str], size: int) -> BytePairTokenizer:
        seen[:] = texts
        return TRAINED

    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(1000)))
    of = {"validation_fraction": 0.2, "max_broken_fraction": 0, "shard_tokens": 2000}
    monkeypatch.setattr(pipeline, "train", learn)
    prepare_text([path], 600, tmp_path / "all", more_texts=["more"], **of)
    everything = [*seen]
    monkeypatch.setattr(pipeline, "VOCABULARY_BYTES", 17 * 200)
    prepare_text([path], 600, tmp_path / "some", more_texts=["more"], **of)
    assert len(everything) == TokenShards(tmp_path / "all/train").documents + 1
    assert 150 < len(seen) < 250
    assert set(seen) <= set(everything)
    places = [everything.index(text) / len(everything) for text in seen]
    assert abs(np.mean(places) - 0.5) < 0.08


@pytest.mark.usefixtures("ray_session")
def test_a_corpus_is_prepared_with_the_vocabulary_that_it_grew(tmp_path: Path) -> None:
    path = tmp_path / "poems.jsonl"
    path.write_text("".join(json.dumps({"text": text[i:]}) + "\n" for text in CHINESE[:5] for i in range(8)))
    of = {"validation_fraction": 0.2, "max_broken_fraction": 0, "shard_tokens": 2000}
    prepare_text([path], TRAINED, tmp_path / "plain", **of)
    longer = prepare_text([path], Growth(TRAINED, 50), tmp_path / "longer", more_texts=["蒸汽机车"] * 60, **of)
    assert (longer.vocab_size, len(longer.encode("蒸汽机车"))) == (TRAINED.vocab_size + 50, 1)
    plain, short = TokenShards(tmp_path / "plain/train"), TokenShards(tmp_path / "longer/train")
    assert (short.vocab_size, short.fingerprint) == (longer.vocab_size, longer.fingerprint)
    assert short.tokens < 0.7 * plain.tokens
    assert longer.decode(short.window(0, short.tokens)[0].tolist()) == TRAINED.decode(plain.window(0, plain.tokens)[0].tolist())
