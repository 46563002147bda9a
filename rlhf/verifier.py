"""Who judges the answers: a reward model, or a reward function of the recipe in its place.

    roles["reward"] = judge(recipe, inputs, opening)          # (worker, its arguments), with the same `load` and `scores`
    success(rewards)                                 # the share of answers that are right

A reward function reads texts, so its workers decode what the engines wrote, and look up the answer that the data gives for a prompt.
"""

from hashlib import blake2b
from pathlib import Path

import numpy as np

from cluster.groups import Worker
from data.errors import DataError
from data.examples import Examples
from data.tokenizers import load as load_tokenizer
from rlhf import rewards
from rlhf.experience import Floats, Rollout, Scores, merge, prompts, responses
from rlhf.graph import Prompts, Role
from rlhf.recipe import Recipe
from rlhf.roles import RewardWorker

SPLITS = ("train", "validation")


def judge(recipe: Recipe, inputs: dict[str, Path], opening: int) -> Role:
    """The role `reward`. A user's file is read here, and travels with the arguments; `opening`: as for every other role."""
    name = recipe.ppo.reward_function
    if name is None:
        return RewardWorker, (recipe, inputs["reward"].resolve() / "model", opening)
    return Verifier, (name, rewards.source(name), inputs["data"].resolve(), recipe.cluster.deadline_s / 2)


def held_out(data: Path, most: int) -> Prompts:
    """The first of the data stage's held-out prompts."""
    examples = Examples(data / "prompts", "validation")
    return [examples[i]["prompt"].tolist() for i in range(min(most, len(examples)))]


def success(values: Floats) -> float:
    """The share of rewards that are 1 or more, which is what a reward function gives for a right answer."""
    return float((values >= 1).mean())


class Verifier(Worker):
    """A reward function's score of every response."""

    def __init__(self, rank: int, world: int, threads: int, name: str, text: str, data: Path, seconds: float) -> None:
        """text: of the function's file; data: the data stage's folder; seconds: how long the function may take for a call."""
        super().__init__(rank, world, threads)
        self.name, self.text, self.data, self.seconds = name, text, data, seconds

    def load(self) -> None:
        self.function = rewards.load(self.name, self.text)
        self.tokenizer = load_tokenizer(self.data / "tokenizer")
        self.answers = answers_of(self.data / "prompts", self.name)

    def scores(self, *rollouts: Rollout) -> Scores:
        """Of every `world`th sample: a function's cost does not depend on its tokens."""
        rollout = merge(rollouts)
        mine = range(self.rank, len(rollout.index), self.world)
        asked, written = prompts(rollout), responses(rollout)
        questions, texts = ([self.tokenizer.decode(of[i], skip_special=True) for i in mine] for of in (asked, written))
        known = [self.answers.get(key(asked[i])) for i in mine]
        values = rewards.ask(self.function, self.name, questions, texts, known, self.seconds)
        return rollout.index[self.rank :: self.world], np.array(values, np.float32)


def answers_of(folder: Path, function: str) -> dict[bytes, str]:
    """Prompt -> answer, of both splits.

    Raises DataError when a prompt stands there with two answers, or without one that the reward function needs.
    """
    found: dict[bytes, str] = {}
    for split in SPLITS:
        examples = Examples(folder, split)
        for i in range(len(examples)):
            row = examples[i]
            answer = row.get("answer")
            if answer is None:
                if function in rewards.NEED_ANSWERS:
                    raise DataError(
                        f'{examples.source(i)[0]}: this prompt has no answer to compare with; the lines of data.prompts need "answer" '
                        "beside their messages, or ppo.reward_function should be one that needs none"
                    )
                continue
            if found.setdefault(key(row["prompt"]), answer) != answer:
                raise DataError(f"{examples.source(i)[0]}: the same prompt stands there with two answers, one of them {answer!r}")
    return found


def key(prompt: "list[int] | np.ndarray") -> bytes:
    """16 bytes that stand for a prompt's ids."""
    return blake2b(np.asarray(prompt, np.int64).tobytes(), digest_size=16).digest()
