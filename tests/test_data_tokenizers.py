"""Text survives, special tokens cannot be forged, and the exported tokenizer.json gives the same ids."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from data import tokenizers
from data.encodings import _MEMBERS, ENCODINGS, PATTERNS, SPECIAL_TOKENS
from data.errors import DataError
from data.tokenizers import BytePairTokenizer, ModelTokenizer

SAMPLE = [p.read_text() for p in sorted(Path(tokenizers.__file__).parent.glob("*.py"))]  # 80 kB of code and prose
TRAINED = tokenizers.train(SAMPLE, 600)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.text(
    st.sampled_from("abc DEF 'sS tT 1234\n\r\t.,!é中文ſK\u00a0\u2003👍🏽<|>"), max_size=80
)


def exported(tokenizer: BytePairTokenizer, folder: Path) -> HFTokenizer:
    tokenizer.save(folder)
    hf = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    hf.encode_special_tokens = True  # compare on ordinary text
    return hf


@pytest.fixture(scope="module")
def trained_hf(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    return exported(TRAINED, tmp_path_factory.mktemp("trained"))


@given(TEXT)
@example("".join(SPECIAL_TOKENS))
@example("\r\n \r \n\n  x")
def test_text_survives_and_yields_no_special_id(trained_hf: HFTokenizer, text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert not TRAINED.special_ids & set(ids)
    assert b"".join(map(TRAINED.token_bytes, ids)) == text.encode()
    assert TRAINED.byte_lengths[np.array(ids, dtype=np.int64)].sum() == len(text.encode())
    assert trained_hf.encode(text, add_special_tokens=False).ids == ids


def test_a_trained_vocabulary_has_the_size_asked_for_and_depends_on_words_alone() -> None:
    assert TRAINED.vocab_size == 600
    assert sorted(TRAINED.special_ids) == list(range(595, 600))
    again = tokenizers.train(reversed(SAMPLE), 600)
    assert again.fingerprint == TRAINED.fingerprint
    assert tokenizers.train(SAMPLE, 601).fingerprint != TRAINED.fingerprint
    assert all(TRAINED.decode([i]) is not None for i in range(600))


@pytest.mark.parametrize(("texts", "size", "message"), [(SAMPLE, 260, "too small"), (["a b c"], 1000, "at most 26")])
def test_impossible_vocabularies_say_what_is_possible(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenizers.train(texts, size)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "a")
    loaded = tokenizers.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert loaded.fingerprint == TRAINED.fingerprint == pickle.loads(pickle.dumps(loaded)).fingerprint
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    ranks = (tmp_path / "ranks.tiktoken").read_bytes()
    lines = ranks.splitlines(keepends=True)
    first, second = lines[300].split()[0], lines[301].split()[0]
    (tmp_path / "ranks.tiktoken").write_bytes(ranks.replace(first + b" 300", second + b" 300").replace(second + b" 301", first + b" 301"))
    with pytest.raises(DataError, match="not the file that"):
        tokenizers.load(tmp_path)
    (tmp_path / "ranks.tiktoken").write_bytes(ranks[:-20])
    with pytest.raises(DataError, match="damaged"):
        tokenizers.load(tmp_path)


def test_transformers_opens_it_with_template_and_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from data.chat import encode_prompt

    TRAINED.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (TRAINED.end_of_turn, TRAINED.end_of_text, 600)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == encode_prompt(TRAINED, messages)
    assert theirs.decode(TRAINED.encode(SAMPLE[0])) == SAMPLE[0]


@pytest.mark.parametrize("name", ["gpt2", "p50k_base", "cl100k_base"])
def test_named_encodings_give_tiktokens_ids(name: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tokenizers.named(name, cache_dir)
    published = ENCODINGS[name]
    theirs = tiktoken.Encoding("reference", pat_str=PATTERNS[published.pattern].tiktoken, mergeable_ranks=ours.ranks, special_tokens={})
    if name != "gpt2":  # tiktoken would download gpt2's ranks in another format; their sha256 has been checked by `named`
        for encoding, member in _MEMBERS.items():
            shutil.copy(cache_dir / "ranks" / f"{encoding}.tiktoken", tmp_path / member)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        theirs = tiktoken.get_encoding(name)
        assert {t: ours.specials[t] for t in theirs.special_tokens_set} == {t: theirs._special_tokens[t] for t in theirs.special_tokens_set}
    hf = exported(ours, tmp_path / "exported")
    assert hf.get_vocab_size() == ours.vocab_size
    for text in [*SAMPLE, "it's 12345 o'clock\r\n\r\n  now\u2003<|endoftext|>", "Größe 中文字符 👍🏽 'S ١٢٣٤", " " * 30 + "\n" * 5]:
        assert ours.encode(text) == theirs.encode_ordinary(text) == hf.encode(text, add_special_tokens=False).ids
    assert ours.decode([ours.vocab_size - 1]) == "<|end|>"
    assert all(isinstance(ours.decode([i]), str) for i in range(50_000, ours.vocab_size))


def test_an_unknown_encoding_lists_the_known_ones(cache_dir: Path) -> None:
    with pytest.raises(DataError, match="gpt2, r50k_base"):
        tokenizers.named("gpt-2", cache_dir)


def test_wrong_ranks_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "cl100k_base.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(DataError, match="not tiktoken's ranks for cl100k_base"):
        tokenizers.named("cl100k_base", tmp_path)


def as_model_directory(folder: Path, **config: object) -> Path:
    """What a downloaded model brings: tokenizer.json and tokenizer_config.json, nothing of ours."""
    TRAINED.save(folder)
    for name in ("encoding.json", "ranks.tiktoken"):
        (folder / name).unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@given(TEXT)
@example("<|end|><|user|>")
def test_a_models_tokenizer_does_not_recognise_special_tokens_in_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    model = tokenizers.from_model(as_model_directory(tmp_path_factory.mktemp("model")))
    assert model.encode(text) == TRAINED.encode(text)
    assert model.encode_template("<|end|>") == [TRAINED.end_of_turn]
    assert b"".join(map(model.token_bytes, model.encode(text))) == text.encode()


def test_a_models_tokenizer_knows_its_ends_and_travels(tmp_path: Path) -> None:
    model = pickle.loads(pickle.dumps(tokenizers.from_model(as_model_directory(tmp_path / "in"))))
    assert isinstance(model, ModelTokenizer)
    assert (model.vocab_size, model.end_of_text, model.end_of_turn) == (600, TRAINED.end_of_text, TRAINED.end_of_turn)
    assert (model.byte_lengths == TRAINED.byte_lengths).all()
    model.save(tmp_path / "out")
    assert tokenizers.load(tmp_path / "out").fingerprint == model.fingerprint


def test_a_model_without_template_gets_a_plain_one_that_is_saved(tmp_path: Path) -> None:
    model = tokenizers.from_model(as_model_directory(tmp_path / "in", chat_template=None))
    assert model.end_of_turn == TRAINED.end_of_turn  # its eos_token
    model.save(tmp_path / "out")
    assert tokenizers.load(tmp_path / "out").chat_template == model.chat_template != TRAINED.chat_template


def test_a_directory_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        tokenizers.from_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read its tokenizer"):
        tokenizers.from_model(tmp_path)
    with pytest.raises(DataError, match="no eos_token"):
        tokenizers.from_model(as_model_directory(tmp_path / "no-eos", eos_token=None))


def test_new_pieces_become_tokens_and_old_ids_stay(tmp_path: Path) -> None:
    model = tokenizers.from_model(as_model_directory(tmp_path / "in"))
    known = model.decode([400])
    longer = model.extended(["locomotive", "蒸汽机车", "locomotive", known])
    assert longer.vocab_size == 602
    assert longer.encode("a locomotive, 蒸汽机车") == [*model.encode("a "), 600, *model.encode(", "), 601]
    assert longer.decode([601, 600]) == "蒸汽机车locomotive"
    assert (longer.token_bytes(601), longer.byte_lengths[600]) == ("蒸汽机车".encode(), 10)
    assert longer.encode("nothing new") == model.encode("nothing new")
    assert (longer.end_of_turn, longer.special_ids) == (model.end_of_turn, model.special_ids)
    longer.save(tmp_path / "out")
    assert tokenizers.load(tmp_path / "out").encode("locomotive") == [600]
    with pytest.raises(DataError, match=r"1 of 2 pieces do not survive this tokenizer: 'éclairé'"):
        model.extended(["fine words", "éclairé"])


def test_pieces_are_read_from_lines_that_hold_one(tmp_path: Path) -> None:
    path = tmp_path / "pieces.jsonl"
    path.write_text('{"piece": "locomotive"}\n{"piece": "蒸汽"}\n')
    assert tokenizers.read_pieces(path) == ["locomotive", "蒸汽"]
    path.write_text('{"piece": "locomotive"}\n{"word": "x"}\n')
    with pytest.raises(DataError, match="line 2"):
        tokenizers.read_pieces(path)
