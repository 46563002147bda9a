"""Conversations, preferences and prompts to token ids on a real Ray, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_data_tokenizers import TRAINED

from data import catalog, reading
from data.decontamination import index_of
from data.errors import DataError
from data.examples import Examples, opening, prepare_chat, prepare_preferences, prepare_prompts, training_texts

pytestmark = pytest.mark.usefixtures("ray_session")
OPTIONS: dict[str, Any] = {"max_tokens": 120, "validation_fraction": 0.2, "max_broken_fraction": 0.5}


def say(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(folder: Path, split: str) -> list[list[str]]:
    examples = Examples(folder, split)
    return [[TRAINED.decode(a.tolist()) for a in examples[i]["answers"]] for i in range(len(examples))]


def texts(folder: Path, split: str, column: str) -> list[str]:
    return [TRAINED.decode(row[column].tolist()) for row in Examples(folder, split)]  # type: ignore[attr-defined]


def test_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"messages": say(f"Question {i}?", f"Answer {i}.")} for i in range(40)]
    rows += [{"messages": say(f"Question {i}?", "Another answer.")} for i in range(40)]
    rows.append({"messages": say("Fixed?", "Yes."), "split": "validation"})
    rows.append({"messages": say("One", "two", "three " * 100, "four")})  # its second turn does not fit
    rows.append({"messages": say("long " * 200, "answer")})
    rows.append({"messages": say("No answer")})
    rows += [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}, *say("a", "b")]},
        {"messages": say("a", "b"), "split": "test"},
    ]
    path = jsonl(tmp_path / "chat.jsonl", rows)
    manifest = prepare_chat([path], TRAINED, tmp_path / "out", **OPTIONS)
    assert manifest["rows"] == 87
    assert manifest["broken"] == 3
    assert manifest["dropped: first turn longer than 120 tokens"] == manifest["dropped: no message of the assistant"] == 1
    train, validation = (texts(tmp_path / "out", split, "tokens") for split in ("train", "validation"))
    assert (len(train), len(validation)) == (manifest["train"]["rows"], manifest["validation"]["rows"])
    assert len(train) + len(validation) == 82
    assert "<|user|>Fixed?<|end|><|assistant|>Yes.<|end|>" in validation
    assert "<|user|>One<|end|><|assistant|>two<|end|>" in train + validation
    # the same question is never on both sides, and rows keep their order
    questions = [[t.split("<|end|>")[0] for t in side if "Question" in t] for side in (train, validation)]
    assert not set(questions[0]) & set(questions[1])
    assert all(len(set(q)) * 2 == len(q) for q in questions)
    row = Examples(tmp_path / "out", "train")[0]
    assert TRAINED.decode(row["tokens"][row["mask"]].tolist()).startswith("Answer")

    monkeypatch.setattr(reading, "RANGE", 500)
    assert prepare_chat([path], TRAINED, tmp_path / "again", **OPTIONS) == manifest  # its sha256 included


def test_preferences_and_prompts(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": say(f"Q{i}"), "chosen": "Good.", "rejected": "Bad."} for i in range(30)]
    rows += [{"messages": say("same"), "chosen": "x", "rejected": "x"}, {"messages": say("long"), "chosen": "y " * 200, "rejected": "x"}]
    rows += [{"messages": say("no"), "chosen": "y"}]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    manifest = prepare_preferences([path], TRAINED, tmp_path / "pairs", **OPTIONS)
    assert manifest["broken"] == manifest["dropped: two answers are equal"] == 1
    assert manifest["dropped: prompt + answer longer than 120 tokens"] == 1
    assert manifest["train"]["rows"] + manifest["validation"]["rows"] == 30
    assert {tuple(ranked) for ranked in answers(tmp_path / "pairs", "train")} == {("Good.<|end|>", "Bad.<|end|>")}

    manifest = prepare_prompts([path], TRAINED, tmp_path / "prompts", **OPTIONS)
    assert manifest["train"]["rows"] + manifest["validation"]["rows"] == 33
    assert "<|user|>Q7<|end|><|assistant|>" in texts(tmp_path / "prompts", "train", "prompt") + texts(
        tmp_path / "prompts", "validation", "prompt"
    )


@pytest.mark.parametrize(
    ("system", "questions", "told"),
    [
        ("Answer in one word, and in English.", [f"{i} of them?" for i in range(10, 90)], "<|user|>"),
        (
            "Answer in one word, and in English.",
            ["", "And so", *(f"And so {i}?" for i in range(10, 90))],
            "<|user|>",
        ),  # the shortest goes on
        ("Hm.", [f"{i} of them?" for i in range(10, 90)], None),  # too little
    ],
)
def test_what_all_prompts_begin_with(tmp_path: Path, system: str, questions: list[str], told: str | None) -> None:
    """Those held out as well, and none ends there."""
    rows = [{"messages": [{"role": "system", "content": system}, *say(question)]} for question in questions]
    prepare_prompts([jsonl(tmp_path / "prompts.jsonl", rows)], TRAINED, tmp_path / "out", **OPTIONS)
    n = opening(tmp_path / "out")
    prompts = [
        examples[i]["prompt"].tolist()
        for split in ("train", "validation")
        for examples in [Examples(tmp_path / "out", split)]
        for i in range(len(examples))
    ]
    if told is None:
        assert n == 0
    else:
        assert TRAINED.decode(prompts[0][:n]).endswith(told)
        assert {tuple(prompt[:n]) for prompt in prompts} == {tuple(prompts[0][:n])}
        assert min(map(len, prompts)) > n


def test_right_answers_stay_beside_their_prompts(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i} + 1?", "answer": i + 1} for i in range(20)]
    rows += [{"messages": say(f"Say {i}")} for i in range(20)] + [{"prompt": "x", "answer": "\ud800"}, {"prompt": "x", "answer": []}]
    manifest = prepare_prompts([jsonl(tmp_path / "sums.jsonl", rows)], TRAINED, tmp_path / "out", **OPTIONS)
    assert manifest["broken"] == 2
    found = {}
    for split in ("train", "validation"):
        examples = Examples(tmp_path / "out", split)
        found |= {TRAINED.decode(row["prompt"].tolist()): row["answer"] for row in (examples[i] for i in range(len(examples)))}
    assert found == {f"<|user|>{i} + 1?<|end|><|assistant|>": str(i + 1) for i in range(20)} | {
        f"<|user|>Say {i}<|end|><|assistant|>": None for i in range(20)
    }
    prepare_prompts([jsonl(tmp_path / "plain.jsonl", rows[20:40])], TRAINED, tmp_path / "plain", **OPTIONS)
    assert Examples(tmp_path / "plain", "train").table.column_names == ["prompt"]  # as before there were answers


@pytest.mark.parametrize("prepare", [prepare_chat, prepare_preferences, prepare_prompts])
def test_what_an_evaluation_holds_is_left_out_and_listed(tmp_path: Path, prepare: Any) -> None:
    asked = "A farmer has seven fields and sows two of them with wheat each year; when has he sown them all?"
    evaluation = jsonl(tmp_path / "test.jsonl", [{"question": "Another one"}, {"question": asked, "answer": "In the 4th."}])
    rows: list[dict[str, Any]] = [{"messages": say(f"Question {i}?", f"Answer {i}.")} for i in range(20)]
    rows[7] = {"messages": say("Please: a FARMER has seven fields and sows two of them, with wheat, each year. True?", "Yes.")}
    rows[9] = {"messages": say("A farmer has seven fields and sows two of them", "with wheat each year")}  # not in a row
    if prepare is not prepare_chat:
        rows = [{"messages": row["messages"][:1], "chosen": row["messages"][1]["content"], "rejected": "No."} for row in rows]
    rows.append({**rows[0], **({"chosen": asked} if "chosen" in rows[0] else {"messages": say("Which?", asked)})})
    path = jsonl(tmp_path / "rows.jsonl", rows)
    clean = jsonl(tmp_path / "clean.jsonl", [row for i, row in enumerate(rows) if i not in (7, 20)])
    manifest = prepare([path], TRAINED, tmp_path / "out", evaluations=index_of([evaluation]), **OPTIONS)
    expected = prepare([clean], TRAINED, tmp_path / "clean", **OPTIONS)
    assert manifest.pop("dropped: contaminated") == 2
    assert manifest == {**expected, "rows": 21}
    listed = [json.loads(line) for line in (tmp_path / "out/contaminated.jsonl").read_text().splitlines()]
    assert [
        (Path(row["file"]).name, row["line"], Path(row["evaluation"]).name, row["evaluation_line"], row["words"]) for row in listed
    ] == [
        ("rows.jsonl", 8, "test.jsonl", 2, 14),
        ("rows.jsonl", 21, "test.jsonl", 2, 20),
    ]
    assert listed[0]["passage"] == "a FARMER has seven fields and sows two of them, with wheat, each year"
    assert listed[1]["overlap"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": say("only a question")}] * 3, "nothing to learn from is left"),
        ([{"messages": say("a", "b")}] * 3, "two different questions"),
    ],
)
def test_nothing_left_is_an_error(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_chat([jsonl(tmp_path / "a.jsonl", rows)], TRAINED, tmp_path / "out", **OPTIONS)
    with pytest.raises(DataError, match="half-written"):
        Examples(tmp_path / "out", "train")


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": say(f"{i}")} for i in range(30)])
    prepare_prompts([path], TRAINED, tmp_path / "out", **OPTIONS)
    data = bytearray((tmp_path / "out/train.parquet").read_bytes())
    data[20] ^= 1
    (tmp_path / "out/train.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.parquet.*sha256"):
        Examples(tmp_path / "out", "train")


def test_rankings_with_scores_margins_and_ties(tmp_path: Path) -> None:
    q = say("Which?")
    good = [
        {"messages": q, "ranked": ["A.", "B.", "C."], "split": "train"},
        {"messages": q, "ranked": ["A.", "B.", "C."], "scores": [2.5, 2.5, -1], "split": "train"},
        {"messages": q, "chosen": "A.", "rejected": "B.", "margin": 0.5, "split": "train"},
        {"messages": q, "chosen": "A.", "rejected": "B.", "split": "validation"},
    ]
    tied = {"messages": q, "ranked": ["A.", "B."], "scores": [1, 1]}
    broken = [
        {"messages": q, "ranked": ["A."]},
        {"messages": q, "ranked": ["A.", 7]},
        {"messages": q, "ranked": ["A.", "B."], "scores": [1, 2]},
        {"messages": q, "ranked": ["A.", "B."], "scores": [1]},
        {"messages": q, "ranked": ["A.", "B."], "scores": ["1", "0"]},
        {"messages": q, "chosen": "A.", "rejected": "B.", "margin": -1},
    ]
    path = jsonl(tmp_path / "pairs.jsonl", [*good, tied, *broken])
    manifest = prepare_preferences([path], TRAINED, tmp_path / "pairs", **OPTIONS | {"max_broken_fraction": 1})
    assert manifest["broken"] == len(broken)
    assert manifest["dropped: no answer is better than another"] == 1
    train = Examples(tmp_path / "pairs", "train")
    assert [train[i]["scores"].tolist() for i in range(len(train))] == [[2, 1, 0], [2.5, 2.5, -1], [0.5, 0]]
    sizes = [sum(map(len, train[i]["answers"])) for i in range(len(train))]
    assert train.lengths("answers").tolist() == sizes
    assert manifest["train"]["tokens"]["answers"] == sum(sizes)


def test_the_quickstarts_examples(cache_dir: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"max_tokens": 256}
    files = [*catalog.resolve("chatterbot:chat", cache_dir), *catalog.resolve("rated-snippets:chat", cache_dir)]
    assert prepare_chat(files, TRAINED, tmp_path / "chat", **options)["broken"] == 0
    pairs = prepare_preferences(catalog.resolve("rated-snippets:preferences", cache_dir), TRAINED, tmp_path / "pairs", **options)
    assert pairs["train"]["rows"] > 3000
    assert 600 <= pairs["validation"]["rows"] <= 900
    prompts = prepare_prompts(catalog.resolve("rated-snippets:prompts", cache_dir), TRAINED, tmp_path / "prompts", **options)
    assert prompts["validation"]["rows"] >= 300
    held_out, learned = ({t for ranked in answers(tmp_path / "pairs", split) for t in ranked} for split in ("validation", "train"))
    said = {t.split("<|assistant|>")[1] for t in texts(tmp_path / "chat", "train", "tokens")}
    assert not held_out & (learned | said)


def test_texts_for_a_vocabulary_are_those_that_are_not_held_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": say(f"Question {i}?", f"Answer {i}.")} for i in range(40)]
    rows += [{"messages": say("Fixed?", "No."), "split": "validation"}, {"messages": []}, {"messages": say("half \ud800", "x")}]
    path = jsonl(tmp_path / "chat.jsonl", rows)
    found = list(training_texts([path], 0.2))
    assert 20 < len(found) < 40
    assert set(found) < {f"Question {i}?\nAnswer {i}." for i in range(40)}
