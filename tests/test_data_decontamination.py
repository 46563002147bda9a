"""Passages of evaluation texts in training texts, against plain Python."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.decontamination import COMMON, SHORTEST, index_of, spans
from data.errors import DataError

WORDS = st.lists(st.sampled_from("abcdef"), max_size=40)


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def letters(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(chr(97 + x) for x in row) for row in rng.integers(0, 26, (count, 7))]


def grams(of: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(of[i : i + size]) for i in range(len(of) - size + 1)}


@settings(max_examples=30)
@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, max_size=6), st.integers(2, 9))
def test_the_same_texts_are_found_as_by_sets_of_ngrams(
    tmp_path_factory: pytest.TempPathFactory, evaluation: list[list[str]], training: list[list[str]], ngram: int
) -> None:
    path = jsonl(tmp_path_factory.mktemp("eval") / "eval.jsonl", [{"q": " ".join(row)} for row in evaluation])
    found = spans([" ".join(row) for row in training], index_of([path], ngram))
    long = [row for row in evaluation if len(row) >= min(SHORTEST, ngram) and len(" ".join(row)) >= 2 * SHORTEST]
    known = [grams(row, min(ngram, len(row))) for row in long]
    expected = {i for i, row in enumerate(training) if any(grams(row, len(next(iter(some)))) & some for some in known)}
    assert set(found["text"].to_pylist()) == expected
    for row in found.to_pylist():
        passage = training[row["text"]]
        text = " ".join(passage).encode()[row["start"] : row["stop"]].decode()
        assert row["passage"] == text
        assert len(text.split()) == row["words"]
        assert any(grams(text.split(), len(next(iter(some)))) & some for some in known)


def test_what_matched_where(tmp_path: Path) -> None:
    passage, other = letters(20), letters(30, 1)
    rows = [
        {"messages": [{"role": "user", "content": "Too short to tell"}, {"role": "assistant", "content": " ".join(passage)}]},
        {"question": "Is it, or is it not, the short one?", "choices": ["yes", "no"]},
    ]
    one = jsonl(tmp_path / "one.jsonl", rows)
    two = tmp_path / "two.jsonl.gz"
    with gzip.open(two, "wt") as file:
        file.write(json.dumps({"text": "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。欲窮千里目，更上一層樓。"}) + "\n")
    index = index_of([one, two])
    texts = [
        "ß " + " ".join(other[:5] + passage[3:18] + other[5:]).upper() + ".",
        " ".join(other + passage[:12]),
        "Why? is it or is it not - the SHORT one; who knows",
        "詩云：「床前明月光疑是地上霜舉頭望明月低頭思故鄉欲窮」",
        "李白：舉頭望明月低頭思故鄉；王之渙：欲窮千里目更上一層樓。",  # 10 characters of one, 10 of the other
        "詩云：「光疑是地上霜舉頭望明月低頭思故鄉欲窮千里目更上一層樓」",
        "舉頭望明月低頭思故鄉",
    ]
    found = spans(texts, index).to_pylist()
    at = len(one.read_text().splitlines(keepends=True)[0])
    expected = [(0, str(one), 0, 15), (2, str(one), at, 9), (5, str(two), 0, 26)]
    assert [(row["text"], row["file"], row["at"], row["words"]) for row in found] == expected
    assert found[0]["overlap"] == pytest.approx(15 / 20)
    assert found[0]["passage"] == " ".join(passage[3:18]).upper()
    assert texts[2].encode()[found[1]["start"] : found[1]["stop"]] == b"is it or is it not - the SHORT one"
    assert found[2]["overlap"] == pytest.approx(26 / 30)
    assert index.too_short == 1


def test_numbers_tell_texts_apart_and_templates_do_not_count(tmp_path: Path) -> None:
    template = " ".join(letters(15))
    rows = [{"question": f"{template} {' '.join(letters(15, 100 + i))} {i} plus {i + 1}"} for i in range(COMMON + 1)]
    few = index_of([jsonl(tmp_path / "few.jsonl", rows[:COMMON])])
    many = index_of([jsonl(tmp_path / "many.jsonl", [*rows, *rows])])
    assert len(spans([template], few)) == 1
    assert len(spans([template], many)) == 0
    sums = [" ".join([*letters(15, 103)[-10:], str(i), "plus", str(i + 1)]) for i in (3, 4)]
    assert spans(sums, many)["text"].to_pylist() == [0]


def test_an_evaluation_file_must_be_whole(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text('{"question": "a"}\n{"question": "b\n')
    with pytest.raises(DataError, match=r"eval\.jsonl: row at 18.*nothing may be missing"):
        index_of([path])


def test_nothing_in_common_with_nothing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "eval.jsonl", [{"question": "short"}])
    assert len(spans([], index_of([path]))) == len(spans(["", "some text"], index_of([path]))) == 0
