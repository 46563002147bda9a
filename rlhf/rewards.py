"""Reward functions: plain Python that says what an answer is worth, in the place of a reward model.

    ppo: {reward_function: exact_match}              # one of ours
    ppo: {reward_function: my_rewards.py:length}     # one of yours

A function takes texts and returns one number for each response, as in TRL:

    def length(prompts: list[str], responses: list[str], answers: list[str | None]) -> list[float]:
        return [-len(response) / 100 for response in responses]

`prompts` and `responses` are without the template's own words, `answers` are those beside the prompts, {"messages", "answer"} in the
data, or None. A reward of 1 or more counts as a success where successes are counted. Your file is sent to the workers as text: nodes need
no copy of it, only what it imports.
"""

import ast
import math
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from rlhf.errors import RecipeError, TrainingError

RewardFunction = Callable[[list[str], list[str], list[str | None]], list[float]]
SHOWN = 200  # characters of a text in a message

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def exact_match(prompts: list[str], responses: list[str], answers: list[str | None]) -> list[float]:
    """1.0 where a response ends with its prompt's answer, else 0.0.

    Compared is the last line that is not empty, without blanks and a full stop at its ends. If the answer is a number, the last number of
    that line counts, by its value: "so it is 1,250.0" matches "1250".
    """
    return [float(answer is not None and _same(response, answer)) for response, answer in zip(responses, answers, strict=True)]


def _same(response: str, answer: str) -> bool:
    lines = [line for line in response.splitlines() if line.strip()]
    last = _trimmed(lines[-1]) if lines else ""
    wanted = _value(_trimmed(answer))
    if wanted is None:
        return last == _trimmed(answer)
    numbers = _NUMBER.findall(last)
    return bool(numbers) and _value(numbers[-1]) == wanted


def _trimmed(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def _value(text: str) -> Decimal | None:
    """The number that `text` is; None when it is something else."""
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


REWARDS: dict[str, RewardFunction] = {"exact_match": exact_match}
NEED_ANSWERS = ("exact_match",)


def problem(name: str) -> str | None:
    """Why `name` is no reward function, with the nearest that is one; None when it is. A file is read, not run."""
    path, colon, function = name.rpartition(":")
    if not colon:
        if name in REWARDS:
            return None
        near = get_close_matches(name, REWARDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"no reward function {name!r}: there is {', '.join(REWARDS)}, or write FILE.py:FUNCTION{hint}"
    try:
        tree = ast.parse(Path(path).expanduser().read_text(encoding="utf-8"), path)
    except OSError as error:
        return f"no reward function {name!r}: {path}: {error.strerror or error}"
    except (SyntaxError, ValueError) as error:
        return f"no reward function {name!r}: {path} is not Python: {error}"
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function in found:
        return None
    near = get_close_matches(function, found, n=1)
    hint = f"; did you mean {path}:{near[0]}?" if near else f"; it has {', '.join(found) or 'none'}"
    return f"no reward function {name!r}: {path} defines no function {function!r}{hint}"


def source(name: str) -> str:
    """The text of the file that `name` leads to, for `load` on another machine; nothing for one of ours."""
    path, colon, _ = name.rpartition(":")
    return Path(path).expanduser().read_text(encoding="utf-8") if colon else ""


def load(name: str, text: str) -> RewardFunction:
    """The function `name` of the file with this `text`, which is run as Python does when it imports a module.

    Raises RecipeError when that fails.
    """
    path, colon, function = name.rpartition(":")
    if not colon:
        return REWARDS[name]
    module = ModuleType(f"reward_function_{Path(path).stem}")  # no other module has this name
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses, for one, look for themselves there
    try:
        exec(compile(text, path, "exec"), module.__dict__)
    except Exception as error:  # noqa: BLE001  # whatever a user's file does
        raise RecipeError(f"ppo.reward_function {name}: {path} cannot be imported: {_said(error, path)}") from None
    found: RewardFunction = getattr(module, function)
    return found


def ask(
    function: RewardFunction, name: str, prompts: list[str], responses: list[str], answers: list[str | None], seconds: float
) -> list[float]:
    """What `function` says of every response.

    Raises TrainingError that names the function and a sample when it raises, when it does not give one finite number for each response, or
    when it has not returned after `seconds`.
    """
    if not responses:
        return []

    def sample(i: int) -> str:
        return f"prompt {_short(prompts[i])}, response {_short(responses[i])}, answer {_short(answers[i])}"

    who = f"ppo.reward_function {name}"
    many = len(responses)
    found = _within(seconds, function, prompts, responses, answers)
    if found is None:
        raise TrainingError(
            f"{who} has not returned after {seconds:g} s, half of cluster.deadline_s, with {many} responses; the first is of {sample(0)}"
        )
    values, error = found
    if error is not None:
        i = _culprit(function, prompts, responses, answers, seconds / 2)
        which = f"for {sample(i)}" if i is not None else f"for {many} responses at once, but for none alone; the first is of {sample(0)}"
        raise TrainingError(f"{who} raised {_said(error, name.rpartition(':')[0])} {which}")
    if not isinstance(values, Iterable):
        raise TrainingError(f"{who} returned {_short(values)} for {many} responses, where a list of {many} numbers is needed")
    values = list(values)
    if len(values) != many:
        raise TrainingError(f"{who} returned {len(values)} rewards for {many} responses; the first is of {sample(0)}")
    for i, value in enumerate(values):
        if not _is_number(value):
            raise TrainingError(f"{who} returned {_short(value)}, where a finite number is needed, for {sample(i)}")
    return [float(value) for value in values]


def _within(seconds: float, function: RewardFunction, *texts: list) -> tuple[object, Exception | None] | None:
    """What the call returned or raised; None when it has done neither in time. A thread that hangs ends with its actor."""
    found: list[tuple[object, Exception | None]] = []

    def call() -> None:
        try:
            found.append((function(*(list(of) for of in texts)), None))
        except Exception as error:  # noqa: BLE001  # whatever a user's function does
            found.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    return found[0] if found else None


def _culprit(function: RewardFunction, prompts: list[str], responses: list[str], answers: list[str | None], seconds: float) -> int | None:
    """The first sample for which, given alone, the function raises. None when there is none, or none is found within `seconds`."""
    end = time.monotonic() + seconds
    for i in range(len(responses)):
        found = _within(end - time.monotonic(), function, prompts[i : i + 1], responses[i : i + 1], answers[i : i + 1])
        if found is None:
            return None
        if found[1] is not None:
            return i
    return None


def _is_number(value: object) -> bool:
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _said(error: Exception, path: str) -> str:
    """`ZeroDivisionError: division by zero (rewards.py line 7)`: the deepest line of the user's own file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if path and frame.filename == path]
    where = f" ({path} line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
