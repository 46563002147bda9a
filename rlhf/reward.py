"""Stage reward: learn which answers people prefer. The SFT model gets a scalar head instead of its vocabulary.

    roundhouse run recipes/quickstart.yaml --only reward

A ranking of K answers is one sample, their prompt computed once, one forward per answer; its loss is the mean over all its
pairs of different scores (Ouyang et al. 2022, arXiv:2203.02155, section 3.5), so a ranking counts 1 whatever its K.

`reward.heads` makes an ensemble of heads on one trunk (Osband et al. 2016, arXiv:1602.04621; Coste et al. 2023, arXiv:2310.02743):
each starts elsewhere and sees its own resampling of the rankings. The loss is the mean over the heads, so is the reward;
`disagreement` is the standard deviation over them, and `ppo.uncertainty_coef` takes it from the score.

Held-out figures: `pair_accuracy`; `pair_accuracy_narrow` and `_wide`, of pairs that people scored closer and farther apart than
their median; and how far the model's sigmoid(difference of rewards) can be taken as a probability, by bins of it.
"""

import hashlib
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

POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])  # P(draws <= k); 12 and more, once in a billion, are 12


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    train("reward", task, recipe, inputs, out, monitor)


def task(recipe: Recipe, inputs: dict[str, Path], report: Report) -> Task:
    rankings, held_out = (Examples(inputs["data"] / "preferences", split) for split in ("train", "validation"))
    heads = recipe.reward.heads
    return Task(
        model=lambda: ScalarModel(load_reward_model(inputs["sft"] / "model", heads, recipe.seed)),
        train=units(rankings, heads, recipe.seed),
        validation=units(held_out),
        loss=partial(ranking_loss, config=recipe.reward, wide=median_gap(held_out)),
        figures=figures,
        steps=math.ceil(recipe.reward.epochs * len(rankings) / recipe.reward.global_batch),
    )


def units(rankings: Examples, heads: int = 1, seed: int = 0) -> Units:
    """A ranking is one sample: the prompt, and the answers that continue it, best first. Each answer's last token counts 1/K,
    so that weights count rankings. With several heads it says there how often each of them has the ranking, `draws` [t, heads]."""

    def ranking(i: int) -> Unit:
        row = rankings[i]
        parts = [row["prompt"], *row["answers"]]
        lengths = [len(part) for part in parts]
        last = np.cumsum(lengths)[1:] - 1
        weights, scores = np.zeros((2, sum(lengths)), np.float32)
        weights[last], scores[last] = 1 / len(last), row["scores"]
        extras = {"scores": scores}
        if heads > 1:
            extras["draws"] = np.zeros((len(scores), heads), np.float32)
            extras["draws"][last] = draws(seed, rankings.manifest_hash, i, heads)
        return [Sample(np.concatenate(parts), weights, extras, lengths, prefix=True)]

    return Units((rankings.lengths("prompt") + rankings.lengths("answers")).tolist(), ranking, rankings.manifest_hash, rankings.source)


def draws(seed: int, manifest_hash: str, ranking: int, heads: int) -> np.ndarray:
    """How often each head's resampling of the data holds this ranking, float32 [heads]: Poisson(1), which is how often a bootstrap of many
    samples draws each of them. Arithmetic, as the sample order is: nothing to save, the same for any worker and in every epoch."""
    message = f"{seed}/{manifest_hash}/{ranking}/"
    hashes = [hashlib.blake2b(f"{message}{head}".encode(), digest_size=8).digest() for head in range(heads)]
    uniform = np.frombuffer(b"".join(hashes), dtype="<u8") / 2.0**64
    return np.searchsorted(POISSON, uniform, side="right").astype(np.float32)


def median_gap(rankings: Examples) -> float:
    """Half of the pairs with different scores are farther apart than this."""
    scores = (rankings[i]["scores"] for i in range(len(rankings)))
    return float(np.median([a - b for of_one in scores for a, b in combinations(of_one.tolist(), 2) if a > b]))


def ranking_loss(model: nn.Module, batch: Batch, config: Reward, wide: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean over each ranking's pairs and over the heads, each ranking as often as a head has drawn it, summed over rankings; further
    sums for `figures` when the model is evaluated."""
    better, worse, gaps, shares = pairs(batch)
    rewards = model(batch, each_head=True)[batch.last]
    won, lost = rewards[better], rewards[worse]  # [P, heads]
    losses = pairwise_ranking(won, lost, config.margin_coef * gaps[:, None]) + config.center_coef * (won + lost).square()
    if "draws" in batch.extras:
        losses = losses * batch.extras["draws"][batch.last][better]
    losses = losses.mean(1)
    difference = (won.mean(1) - lost.mean(1)).detach()
    agree = (difference > 0).float()
    sums = {"accuracy": (shares * agree).sum(), "margin": (shares * difference).sum()}
    if not model.training:
        sums |= (
            _by_confidence(difference, agree, shares) | _tally("wide", gaps > wide, shares, agree) | _tally("all", gaps > 0, shares, agree)
        )
        if config.heads > 1:
            sums["disagreement"] = (shares * (won.std(1, correction=0) + lost.std(1, correction=0)) / 2).sum().detach()
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
    pairs (expected calibration error, Naeini et al. 2015). `disagreement`: the standard deviation of an answer's reward over the heads."""
    found = {"val_loss": sums["loss"] / sums["count"], "pair_accuracy": sums["accuracy"] / sums["count"]}
    if "disagreement" in sums:
        found["disagreement"] = sums["disagreement"] / sums["count"]
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
