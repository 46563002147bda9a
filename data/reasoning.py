"""Questions with one right answer, drawn by reasoning-gym: data for reward functions, in any number and difficulty.

    rows = draw(wheel, "spell_backward", {"min_word_len": 3, "max_word_len": 4, "size": 5000})
    rows["prompts"][0]      # {"messages": [{"role": "user", "content": "Spell this word ..."}], "answer": "nus", "split": "train"}

In a recipe: `spell_backward?min_word_len=3&max_word_len=4:prompts`. Equal questions are asked once. Which side of the split a question is
on follows from its text, so it is the same in all kinds; texts have no split of their own, and hold the training side alone. The wheel is
read as it comes, by a process of its own (`python -m data.reasoning`).
"""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from data.cleaning import in_validation
from data.errors import DataError

HELD_OUT = 0.1
"""Share of the questions."""
DRAWN = {"size": 10_000, "seed": 0}
"""Draws, before repeated ones are left out, and their seed: options of every task."""
TASKS = {
    "spell_backward": "algorithmic",
    "letter_counting": "algorithmic",
    "chain_sum": "arithmetic",
}
"""Task -> the part of reasoning_gym that it is in."""
OPTIONS = {
    "spell_backward": ("min_word_len", "max_word_len"),
    "letter_counting": ("min_words", "max_words"),
    "chain_sum": ("min_terms", "max_terms", "min_digits", "max_digits"),
}
"""What makes a task harder; defaults are reasoning-gym's."""
SECONDS = 600


def count_aloud(question: str) -> str:
    """An answer to a question of letter_counting: its text with the count so far behind every letter that is counted, `me1e2t`, then the
    number in a line of its own."""
    found = re.fullmatch(r'.*the letter "(.)" appear in the text: "(.*)"\?', question, re.DOTALL)
    assert found, question  # the wheel's sha256 is pinned, so questions are worded like this
    letter, text = found.groups()
    counted, said = 0, ""
    for character in text:
        said += character
        if character.lower() == letter:
            counted += 1
            said += str(counted)
    return f"{said}\n{counted}"


WORKINGS: dict[str, Callable[[str], str]] = {"letter_counting": count_aloud}
"""Task -> an answer that shows the way to it, from the question."""


def kinds(task: str) -> tuple[str, ...]:
    """What `draw` makes of a task."""
    return ("text", "chat", "prompts", *(("worked",) if task in WORKINGS else ()))


def draw(wheel: Path, task: str, options: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Rows by kind. Raises DataError with reasoning-gym's words when it refuses the options."""
    command = [sys.executable, "-m", "data.reasoning", str(wheel), task, json.dumps(DRAWN | options)]
    try:
        process = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"{task} with {options} did not draw its questions within {SECONDS} s: ask for fewer (size)") from None
    if process.returncode:
        raise DataError(f"{task} cannot be drawn with {options}: {process.stderr.strip().splitlines()[-1]}")
    return rows(task, json.loads(process.stdout))


def rows(task: str, questions: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The rows by kind, from answers by question."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds(task)}
    for question, answer in questions.items():
        split = "validation" if in_validation(question, HELD_OUT) else "train"
        asked = [{"role": "user", "content": question}]
        said = {"chat": answer} | ({"worked": WORKINGS[task](question)} if task in WORKINGS else {})
        if split == "train":
            found["text"].append({"text": f"{question}\n{answer}"})
        for kind, content in said.items():
            found[kind].append({"messages": [*asked, {"role": "assistant", "content": content}], "split": split})
        found["prompts"].append({"messages": asked, "answer": answer, "split": split})
    return found


def _ask(wheel: Path, task: str, options: dict[str, int]) -> dict[str, str]:
    """Question -> answer, in the order drawn. Runs in a process of its own.

    What the package imports by itself needs a dozen others and a compiler; its tasks, one by one, need none of them. So its folders are
    opened here without their `__init__`.
    """
    sys.path.insert(0, str(wheel))
    for name in ("reasoning_gym", f"reasoning_gym.{TASKS[task]}"):
        folder = ModuleType(name)
        folder.__path__ = [str(wheel / name.replace(".", "/"))]
        sys.modules[name] = folder
    importlib.import_module(f"reasoning_gym.{TASKS[task]}.{task}")  # registers itself
    drawn = importlib.import_module("reasoning_gym.factory").create_dataset(task, **options)
    return {entry["question"]: entry["answer"] for entry in drawn}


if __name__ == "__main__":
    print(json.dumps(_ask(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))))
