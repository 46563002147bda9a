"""How large the steps of `benchmarks.ppo` are: `SIZES["cpu"]` for two cores, `SIZES["gpu"]` for one GPU, on which they have never run.

Read by both sides, so nothing but Python is imported.
"""

from dataclasses import dataclass
from typing import Any

TEMPERATURE = 0.7
FIXED, NATURAL, GRPO = WORKS = ("ppo step, fixed length", "ppo step, natural lengths", "grpo step")


@dataclass(frozen=True)
class Sizes:
    model: dict[str, Any]  # keys of a recipe's section `model`
    samples: int  # of a step
    group: int  # answers to a prompt in the GRPO step
    short: int  # tokens of a prompt in the PPO steps
    long: int  # and in the GRPO step
    fixed: int  # tokens of every answer
    longest: int  # of answers that end by themselves
    mean: int  # tokens of one that nothing cuts off
    rows: int  # that TRL computes at a time

    def unit(self, work: str) -> str:
        if work == GRPO:
            return f"samples/s ({self.samples // self.group} prompts of {self.long} tokens, {self.group} answers of {self.fixed} each)"
        ends = 1 - (1 - 1 / self.mean) ** self.longest
        new = f"{self.mean * ends:.0f} new tokens in the mean, {self.longest} at most" if work == NATURAL else f"{self.fixed} new tokens"
        return f"samples/s ({self.samples} prompts of {self.short} tokens, {new}, 4 epochs)"


SIZES = {
    "cpu": Sizes(
        {"hidden_size": 256, "layers": 8, "heads": 4, "kv_heads": 4, "intermediate_size": 688, "tie_embeddings": False},
        samples=64,
        group=8,
        short=22,
        long=128,
        fixed=64,
        longest=192,
        mean=64,
        rows=16,
    ),
    # 330 M parameters with our vocabulary: policy and critic with their optimizer states 5 GB each, and those that wait are in host memory.
    "gpu": Sizes(
        {"preset": "360m", "max_positions": 4096, "tie_embeddings": False},
        samples=256,
        group=16,
        short=128,
        long=512,
        fixed=512,
        longest=1536,
        mean=512,
        rows=32,
    ),
}
