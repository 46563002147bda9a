"""Reward functions: what is right, whose file is meant, and what is said when one of them fails."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_experience import rollout_of

from data import tokenizers
from data.chat import encode_prompt
from data.errors import DataError
from data.examples import Examples, prepare_prompts
from rlhf import rewards
from rlhf.errors import RecipeError, TrainingError
from rlhf.experience import align, merge, prompts
from rlhf.rewards import ask, exact_match, load, problem
from rlhf.verifier import Verifier, answers_of, success

OPTIONS = {"max_tokens": 64, "validation_fraction": 0.3, "max_broken_fraction": 0.0}


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("nus", "nus", True),
        ("It is this:\n\n nus. \n", "nus", True),
        ("nus", "Nus", False),
        ("nus\nsun", "nus", False),
        ("", "nus", False),
        ("", "", True),
        ("12", "12", True),
        ("3 + 9 = 12.", "12", True),
        ("so it is $1,250.0", "1250", True),
        ("12 or 13", "12", False),
        ("12 or 13", "13", True),
        ("minus -4", "-4", True),
        ("4", "-4", False),
        ("#### 42", "42", True),
        ("forty-two", "42", False),
        ("0.30", ".3", True),
        ("112", "12", False),
        ("12", None, False),
    ],
)
def test_the_last_line_or_its_last_number_is_compared(response: str, answer: str | None, right: bool) -> None:
    assert exact_match(["q"], [response], [answer]) == [float(right)]


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc \n", max_size=10))
def test_a_number_matches_itself_however_it_is_written(number: int, before: str) -> None:
    assert exact_match(["q"] * 3, [f"{before} {number}", f"{before} {number:,}.00", f"{before} {number + 1}"], [str(number)] * 3) == [
        1,
        1,
        0,
    ]


def test_a_function_is_found_in_its_file_without_running_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise SystemError\n\ndef length(prompts, responses, answers):\n    return []\n")
    assert problem("exact_match") is None
    assert problem(f"{file}:length") is None
    assert "did you mean exact_match?" in str(problem("exact_mach"))
    assert f"did you mean {file}:length?" in str(problem(f"{file}:lenght"))
    assert "No such file" in str(problem(f"{tmp_path}/nowhere.py:length"))
    with pytest.raises(RecipeError, match=r"mine.py cannot be imported: SystemError:  \(.*mine.py line 1\)"):
        load(f"{file}:length", file.read_text())
    file.write_text("def length(:\n")
    assert "is not Python" in str(problem(f"{file}:length"))


FAULTY = """\
from __future__ import annotations
import time
from dataclasses import dataclass

@dataclass
class Settings:  # a function sees its file's other names
    scale: float = 0.5

def half(prompts, responses, answers):
    return [Settings().scale * len(r) for r in responses]

def divides(prompts, responses, answers):
    return [1 / (len(r) - 3) for r in responses]

def together(prompts, responses, answers):
    assert len(responses) == 1
    return [1.0]

def short(prompts, responses, answers):
    return [1.0]

def none(prompts, responses, answers):
    return None

def nan(prompts, responses, answers):
    return [float("nan") if len(r) == 3 else 0.0 for r in responses]

def words(prompts, responses, answers):
    return ["good"] * len(responses)

def stuck(prompts, responses, answers):
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("divides", r"raised ZeroDivisionError: .*\(faulty.py line 13\) for prompt 'q2', response 'ccc', answer None"),
        ("together", r"raised AssertionError: .* for 3 responses at once, but for none alone; the first is of prompt 'q0'"),
        ("short", r"returned 1 rewards for 3 responses"),
        ("none", r"returned None for 3 responses, where a list of 3 numbers is needed"),
        ("nan", r"returned nan, where a finite number is needed, for prompt 'q2', response 'ccc'"),
        ("words", r"returned 'good', where a finite number is needed, for prompt 'q0'"),
        ("stuck", r"has not returned after 0.3 s, half of cluster.deadline_s, with 3 responses; the first is of prompt 'q0'"),
    ],
)
def test_what_fails_is_named_with_its_sample(function: str, said: str) -> None:
    name = f"faulty.py:{function}"
    began = time.monotonic()
    with pytest.raises(TrainingError, match=f"ppo.reward_function {name} {said}"):
        ask(load(name, FAULTY), name, ["q0", "q1", "q2"], ["a", "bb", "ccc"], ["x", None, None], 0.3)
    assert time.monotonic() - began < 5


def test_numbers_of_any_kind_are_taken() -> None:
    name = "faulty.py:half"
    assert ask(load(name, FAULTY), name, ["q"] * 2, ["a", "bb"], [None] * 2, 5) == [0.5, 1.0]
    assert ask(lambda p, r, a: np.array([1, 2]), "n", ["q"] * 2, ["a", "bb"], [None] * 2, 5) == [1.0, 2.0]
    assert ask(lambda p, r, a: (True, 0), "n", ["q"] * 2, ["a", "bb"], [None] * 2, 5) == [1.0, 0.0]
    assert ask(load(name, FAULTY), name, [], [], [], 5) == []
    assert success(np.array([1.0, 0.5, 2.0, 0.0], np.float32)) == 0.5


def test_prompts_of_a_rollout() -> None:
    rollout = merge([rollout_of([1, 0], [(2, 3), (3, 0)])])
    assert prompts(rollout) == [[0, 1], [1000, 1001, 1002]]


def prepared(folder: Path, lines: list[dict]) -> Path:
    tokenizer = tokenizers.train(["Spell sun, cat, dog and fox backward. " * 20], 280)
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer.save(folder / "tokenizer")
    prepare_prompts([folder / "lines.jsonl"], tokenizer, folder / "prompts", **OPTIONS)
    return folder


def line(word: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": f"Spell {word}"}], **more}


def test_two_ranks_score_what_one_does(ray_session: None, tmp_path: Path) -> None:
    words = ["sun", "cat", "dog", "fox", "cod"]
    data = prepared(tmp_path, [line(word, answer=word[::-1]) for word in words])
    tokenizer = tokenizers.load(data / "tokenizer")
    asked = [encode_prompt(tokenizer, line(word)["messages"]) for word in words]
    said = [tokenizer.encode(text) for text in ("nus", "cat", "god", "", "doc")]
    lengths = [(len(p), len(r)) for p, r in zip(asked, said, strict=True)]
    blank = rollout_of(list(range(5)), lengths)
    tokens = np.concatenate([np.array(p + r, np.int32) for p, r in zip(asked, said, strict=True)])
    rollout = type(blank)(**{**vars(blank), "tokens": tokens})

    def scores(world: int) -> list[float]:
        parts = []
        for rank in range(world):
            worker = Verifier(rank, world, 1, "exact_match", "", data, 5.0)
            worker.load()
            parts.append(worker.scores(rollout))
        return align(parts, np.ones(5, np.int64)).tolist()

    assert scores(1) == scores(2) == scores(7) == [1, 0, 1, 0, 1]


def test_answers_stand_beside_the_prompts(ray_session: None, tmp_path: Path) -> None:
    data = prepared(tmp_path, [line("sun", answer="nus"), line("cat"), line("dog", answer="god"), line("dog", answer="god")])
    rows = [
        Examples(data / "prompts", split)[i] for split in ("train", "validation") for i in range(len(Examples(data / "prompts", split)))
    ]
    assert sorted(str(row["answer"]) for row in rows) == ["None", "god", "god", "nus"]
    assert len(answers_of(data / "prompts", "mine.py:half")) == 2
    with pytest.raises(DataError, match=r"row \d of .*parquet: this prompt has no answer to compare with"):
        answers_of(data / "prompts", "exact_match")
    with pytest.raises(DataError, match='"answer" must be a text'):
        prepared(tmp_path, [line("sun", answer=[7]), line("cat")])
    prepared(tmp_path, [line("sun", answer="nus"), line("cat"), line("sun", answer="sun")])
    with pytest.raises(DataError, match="the same prompt stands there with two answers"):
        answers_of(data / "prompts", "mine.py:half")


def test_ours_are_all_known() -> None:
    assert set(rewards.NEED_ANSWERS) <= set(rewards.REWARDS)
