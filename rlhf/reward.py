"""Stage reward: learn which of two answers people prefer. The SFT model gets a scalar head instead of its vocabulary.

roundhouse run recipes/quickstart.yaml --only reward
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from data.examples import Examples
from data.packing import Sample
from rlhf.losses import pairwise_ranking
from rlhf.models import Batch, ScalarModel, load_reward_model
from rlhf.monitoring import Monitor
from rlhf.recipe import Recipe
from rlhf.training import Task, Unit, Units, train


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    train("reward", task, recipe, inputs, out, monitor)


def task(recipe: Recipe, inputs: dict[str, Path]) -> Task:
    comparisons = Examples(inputs["data"] / "preferences", "train")
    return Task(
        model=lambda: ScalarModel(load_reward_model(inputs["sft"] / "model")),
        train=units(comparisons),
        validation=units(Examples(inputs["data"] / "preferences", "validation")),
        loss=ranking_loss,
        figures=lambda sums: {"val_loss": sums["loss"] / sums["count"], "pair_accuracy": sums["accuracy"] / sums["count"]},
        steps=math.ceil(recipe.reward.epochs * len(comparisons) / recipe.reward.global_batch),
    )


def units(comparisons: Examples) -> Units:
    """A comparison is one sample: the prompt, and the two answers that continue it, chosen first. Each answer's last token
    counts half, so that weights count comparisons."""

    def comparison(i: int) -> Unit:
        row = comparisons[i]
        parts = [row["prompt"], row["chosen"], row["rejected"]]
        lengths = [len(part) for part in parts]
        weights = np.zeros(sum(lengths), np.float32)
        weights[np.cumsum(lengths)[1:] - 1] = 0.5
        return [Sample(np.concatenate(parts), weights, lengths=lengths, prefix=True)]

    lengths = comparisons.lengths("prompt") + comparisons.lengths("chosen") + comparisons.lengths("rejected")
    return Units(lengths.tolist(), comparison, comparisons.manifest_hash)


def ranking_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rewards = model(batch)[batch.last]
    chosen, rejected = rewards[1::3], rewards[2::3]
    counts = float(len(batch.rows) > 0)  # an idle rank's comparison is computed, for the others' sake, and counts nothing
    return counts * pairwise_ranking(chosen, rejected), {
        "accuracy": counts * (chosen > rejected).float().sum(),
        "margin": counts * (chosen - rejected).detach().sum(),
    }
