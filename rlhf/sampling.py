"""What is asked of the engines: which answers, by which seeds, how hot.

asked = wanted(prompts, recipe.seed, step, each=8)        # eight answers to every prompt
seed = sample_seed(recipe.seed, number)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.recipe import Ppo


@dataclass(frozen=True)
class Sampling:
    """How all answers of one rollout are sampled."""

    max_tokens: int  # of one answer
    temperature: float  # 0: the likeliest token each time
    piece_tokens: int  # an engine gives its answers in pieces of about so many tokens, prompts included

    @classmethod
    def of(cls, config: Ppo, temperature: float | None = None) -> "Sampling":
        """In pieces of a quarter of a micro-batch, so that a scorer's calls are nearly full and the last answers wait for few others."""
        return cls(config.max_response_tokens, config.temperature if temperature is None else temperature, config.micro_batch // 4)


@dataclass(frozen=True)
class Wanted:
    """Answers to one prompt: samples `first`, `first` + 1, ... of the step. They stay together, so that their prompt is computed once."""

    first: int
    prompt: list[int]
    seeds: list[int]  # one for each answer

    def outstanding(self, sampling: Sampling) -> int:
        """Tokens that an engine may still have to compute for them."""
        return len(self.prompt) + len(self.seeds) * sampling.max_tokens


@dataclass(frozen=True)
class Piece:
    """What the controller is told about some of an engine's answers."""

    samples: int
    tokens: int  # to be computed: each prompt once, and the answers
    outstanding: int  # by how much less the engine now has to do, in the units of `Wanted.outstanding`


def wanted(prompts: Sequence[list[int]], seed: int, step: int, each: int = 1) -> list[Wanted]:
    """`each` answers to every prompt; samples p * each ... of the step are those to prompt p. A sample's seed is arithmetic, so it does
    not matter which engine writes it, or when."""
    before = step * len(prompts) * each
    return [Wanted(p * each, prompt, [sample_seed(seed, before + p * each + k) for k in range(each)]) for p, prompt in enumerate(prompts)]


def sample_seed(seed: int, number: int) -> int:
    """The sampling seed of the run's sample `number`; runs with neighbouring seeds share none."""
    return (seed * 1_000_000_007 + number) % 2**31
