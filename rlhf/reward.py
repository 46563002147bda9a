"""Stage reward: learn which answers people prefer. The SFT model gets a scalar head instead of its vocabulary.

    roundhouse run recipes/quickstart.yaml --only reward

A ranking of K answers is one sample, their prompt computed once, one forward per answer; its loss is the mean over all its
pairs of different scores (Ouyang et al. 2022, arXiv:2203.02155, section 3.5), so a ranking counts 1 whatever its K.

Held-out figures: `pair_accuracy`; `pair_accuracy_narrow` and `_wide`, of pairs that people scored closer and farther apart than
their median; and how far the model's sigmoid(difference of rewards) can be taken as a probability, by bins of it.
"""

import math
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from cluster.training import Report
from data.examples import Examples
from data.packing import Sample
from rlhf.losses import pairwise_ranking
from rlhf.models import Batch, ScalarModel, load_reward_model
from rlhf.monitoring import Monitor
from rlhf.recipe import Recipe, Reward
from rlhf.training import Task, Unit, Units, train

BINS = (50, 60, 70, 80, 90)
"""Lower ends of the bins of confidence, in percent: sigmoid(|difference of rewards|) is never below a half."""


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    train("reward", task, recipe, inputs, out, monitor)


def task(recipe: Recipe, inputs: dict[str, Path], report: Report) -> Task:
    rankings, held_out = (Examples(inputs["data"] / "preferences", split) for split in ("train", "validation"))
    return Task(
        model=lambda: ScalarModel(load_reward_model(inputs["sft"] / "model")),
        train=units(rankings),
        validation=units(held_out),
        loss=partial(ranking_loss, config=recipe.reward, wide=median_gap(held_out)),
        figures=figures,
        steps=math.ceil(recipe.reward.epochs * len(rankings) / recipe.reward.global_batch),
    )


def units(rankings: Examples) -> Units:
    """A ranking is one sample: the prompt, and the answers that continue it, best first. Each answer's last token counts 1/K,
    so that weights count rankings."""

    def ranking(i: int) -> Unit:
        row = rankings[i]
        parts = [row["prompt"], *row["answers"]]
        lengths = [len(part) for part in parts]
        last = np.cumsum(lengths)[1:] - 1
        weights, scores = np.zeros((2, sum(lengths)), np.float32)
        weights[last], scores[last] = 1 / len(last), row["scores"]
        return [Sample(np.concatenate(parts), weights, {"scores": scores}, lengths, prefix=True)]

    return Units((rankings.lengths("prompt") + rankings.lengths("answers")).tolist(), ranking, rankings.manifest_hash, rankings.source)


def median_gap(rankings: Examples) -> float:
    """Half of the pairs with different scores are farther apart than this."""
    scores = (rankings[i]["scores"] for i in range(len(rankings)))
    return float(np.median([a - b for of_one in scores for a, b in combinations(of_one.tolist(), 2) if a > b]))


def ranking_loss(model: nn.Module, batch: Batch, config: Reward, wide: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean over each ranking's pairs, summed over rankings; further sums for `figures` when the model is evaluated."""
    better, worse, gaps, shares = pairs(batch)
    rewards = model(batch)[batch.last]
    won, lost = rewards[better], rewards[worse]
    losses = pairwise_ranking(won, lost, config.margin_coef * gaps) + config.center_coef * (won + lost).square()
    difference = (won - lost).detach()
    agree = (difference > 0).float()
    sums = {"accuracy": (shares * agree).sum(), "margin": (shares * difference).sum()}
    if not model.training:
        sums |= (
            _by_confidence(difference, agree, shares) | _tally("wide", gaps > wide, shares, agree) | _tally("all", gaps > 0, shares, agree)
        )
    return (shares * losses).sum(), sums


def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All pairs of answers to one prompt: (the better's segment, the worse's, difference of scores, share), [P] each.

    The shares of a ranking's pairs sum to 1; ties, and answers without a score, have none. An idle rank's ranking is computed,
    for the others' sake, and all its shares are 0.
    """
    groups: dict[int, list[int]] = {}
    for segment, prompt in enumerate(batch.segments.prefixes):
        if prompt >= 0:
            groups.setdefault(prompt, []).append(segment)
    found = [(a, b, number) for number, answers in enumerate(groups.values()) for a, b in combinations(answers, 2)]
    better, worse, number = torch.tensor(found, device=batch.tokens.device).unbind(1)
    scores = batch.extras["scores"][batch.last]
    gaps = scores[better] - scores[worse]
    counted = (gaps > 0).float() * float(len(batch.rows) > 0)
    in_ranking = torch.zeros(len(groups), device=gaps.device).index_add(0, number, counted)
    return better, worse, gaps, counted / in_ranking.clamp(min=1)[number]


def _by_confidence(difference: torch.Tensor, agree: torch.Tensor, shares: torch.Tensor) -> dict[str, torch.Tensor]:
    confidence = difference.abs().sigmoid()
    bins = ((confidence - 0.5) * 10).long().clamp(max=len(BINS) - 1)
    sums: dict[str, torch.Tensor] = {}
    for i, low in enumerate(BINS):
        inside = shares * (bins == i)
        sums |= {f"pairs_{low}": inside.sum(), f"agree_{low}": (inside * agree).sum(), f"confidence_{low}": (inside * confidence).sum()}
    return sums


def _tally(name: str, chosen: torch.Tensor, shares: torch.Tensor, agree: torch.Tensor) -> dict[str, torch.Tensor]:
    inside = shares * chosen
    return {f"pairs_{name}": inside.sum(), f"agree_{name}": (inside * agree).sum()}


def figures(sums: dict[str, float]) -> dict[str, float]:
    """Sums over the held-out rankings -> what is reported. `calibration_error`: mean |accuracy - confidence| over the bins, by their
    pairs (expected calibration error, Naeini et al. 2015)."""
    found = {"val_loss": sums["loss"] / sums["count"], "pair_accuracy": sums["accuracy"] / sums["count"]}
    wide, narrow = sums["pairs_wide"], sums["pairs_all"] - sums["pairs_wide"]
    if wide and narrow:
        found["pair_accuracy_wide"] = sums["agree_wide"] / wide
        found["pair_accuracy_narrow"] = (sums["agree_all"] - sums["agree_wide"]) / narrow
    found["calibration_error"] = sum(abs(sums[f"agree_{low}"] - sums[f"confidence_{low}"]) for low in BINS) / sums["pairs_all"]
    for low in BINS:
        if sums[f"pairs_{low}"]:
            found[f"accuracy_at_{low}"] = sums[f"agree_{low}"] / sums[f"pairs_{low}"]
            found[f"pairs_at_{low}"] = sums[f"pairs_{low}"]
    return found
