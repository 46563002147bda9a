"""Stage preference: learn to give the answers people prefer straight from their rankings, without rollouts. In the place of ppo.

    roundhouse run recipes/quickstart.yaml align=preference preference.method=simpo

A ranking of K answers is one sample, as for the reward model: the prompt computed once, one forward for all its answers. Its loss
is the mean over its pairs (dpo, ipo, simpo) or over its answers (kto: desirable are those scored above the ranking's mean,
undesirable those below). The reference is the SFT model; what it says of the answers is computed once, before training, so that
it takes no memory while the policy learns.

Held-out figures: `pair_accuracy`, of the implicit rewards; and how far the better and the worse answers have moved,
`better_log_ratio` and `worse_log_ratio`: both far below zero means that the model unlearns rather than chooses.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from cluster.hardware import hardware
from cluster.training import Report
from data.examples import Examples
from data.order import batch_indices
from data.packing import Sample
from rlhf.learner import shard
from rlhf.losses import dpo, ipo, kto, simpo
from rlhf.models import Batch, LanguageModel, load_causal_lm
from rlhf.monitoring import Monitor
from rlhf.recipe import Preference, Recipe
from rlhf.reward import pairs
from rlhf.training import Task, Unit, Units, batch_of, plan, train

PER_TOKEN = ("ipo", "simpo")  # compare log-probabilities per token, the others those of whole answers
AT_ONCE = 64  # rankings between two reports of the reference's pass


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    train("preference", task, recipe, inputs, out, monitor)


def task(recipe: Recipe, inputs: dict[str, Path], report: Report) -> Task:
    config, base = recipe.preference, inputs["sft"] / "model"
    rankings, held_out = (Examples(inputs["data"] / "preferences", split) for split in ("train", "validation"))
    steps = math.ceil(config.epochs * len(rankings) / config.global_batch)
    used = np.unique(batch_indices(recipe.seed, 0, steps * config.global_batch, len(rankings), rankings.manifest_hash))
    known: list[np.ndarray | None] = [None, None]
    if config.method != "simpo":
        reference = shard(LanguageModel(load_causal_lm(base)).to(hardware().device), dist.get_world_size()).eval()
        for place, (of, ids) in enumerate(((rankings, used), (held_out, np.arange(len(held_out))))):
            known[place] = reference_log_probs(reference, of, ids, recipe, report)
    return Task(
        model=lambda: LanguageModel(load_causal_lm(base)),
        train=units(rankings, config, recipe.reward.max_tokens, known[0]),
        validation=units(held_out, config, recipe.reward.max_tokens, known[1]),
        loss=partial(preference_loss, config=config),
        figures=figures,
        steps=steps,
    )


def units(rankings: Examples, config: Preference, max_tokens: int, reference: np.ndarray | None = None) -> Units:
    """A ranking is one sample: the prompt, and the answers that continue it, best first. kto adds one answer to another prompt, without
    a score. The weights of a ranking's answers sum to 1, so that weights count rankings.

    `reference`: the log-probabilities of all rankings' answers, one after the other, as `reference_log_probs` returns them.
    """
    n, foreign = len(rankings), config.method == "kto"
    counts = answers_of(rankings, config)
    first = np.cumsum(counts) - counts

    def other(i: int, room: int) -> np.ndarray:
        answer: np.ndarray = rankings[(i + 1) % n]["answers"][0][:room]
        return answer

    def ranking(i: int) -> Unit:
        row = rankings[i]
        answers, scores = row["answers"], row["scores"]
        if foreign:
            answers, scores = [*answers, other(i, max_tokens - len(row["prompt"]))], [*scores, np.nan]
        lengths = [len(row["prompt"]), *map(len, answers)]
        ends = np.cumsum(lengths)
        weights, at_ends, known = np.zeros((3, ends[-1]), np.float32)
        weights[lengths[0] :] = 1 / (ends[-1] - lengths[0])
        at_ends[ends[1:] - 1] = scores
        if reference is not None:
            known[ends[1:] - 1] = reference[first[i] : first[i] + counts[i]]
        extras = {"scores": at_ends, "reference": known}
        return [Sample(np.concatenate([row["prompt"], *answers]), weights, extras, lengths, prefix=True)]

    prompts = rankings.lengths("prompt")
    lengths = prompts + rankings.lengths("answers")
    if foreign:
        lengths = lengths + [len(other(i, max_tokens - prompts[i])) for i in range(n)]
    return Units(lengths.tolist(), ranking, rankings.manifest_hash, rankings.source)


def answers_of(rankings: Examples, config: Preference) -> np.ndarray:
    """How many answers are computed with each ranking's prompt, int64 [rankings]."""
    return rankings.lengths("scores") + (config.method == "kto")


@torch.no_grad()
def reference_log_probs(model: nn.Module, rankings: Examples, ids: np.ndarray, recipe: Recipe, report: Report) -> np.ndarray:
    """log pi_ref of every answer of the rankings `ids`, float32 [answers of all rankings], 0 for the others. All ranks share the work."""
    config, rank, world, device = recipe.preference, dist.get_rank(), dist.get_world_size(), hardware().device
    of = units(rankings, config, recipe.reward.max_tokens)
    budget = max(of.lengths) if config.micro_batch == "auto" else config.micro_batch
    counts = answers_of(rankings, config)
    first = np.cumsum(counts) - counts
    found = torch.zeros(int(counts.sum()), device=device)
    for start in range(0, len(ids), AT_ONCE):
        some = ids[start : start + AT_ONCE].tolist()
        for mine in plan(of, some, world, budget)[rank]:
            batch = batch_of(of, mine, some[0], device)
            whole, tokens = segment_log_probs(model(batch), batch)  # all ranks meet here
            places = [np.arange(first[i], first[i] + counts[i]) for i in mine]
            if mine:
                found[np.concatenate(places)] = whole[tokens > 0]
        report({"step": min(start + AT_ONCE, len(ids)), "steps": len(ids), "text": "rankings, read by the reference"})
    if world > 1:
        dist.all_reduce(found)
    return found.cpu().numpy()


def preference_loss(model: nn.Module, batch: Batch, config: Preference) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean over each ranking's pairs, or with kto over its answers, summed over rankings; further sums for `figures`."""
    whole, tokens = segment_log_probs(model(batch), batch)
    ratios = whole - batch.extras["reference"][batch.last]
    if config.method in PER_TOKEN:
        ratios = ratios / tokens.clamp(min=1)
    better, worse, _, shares = pairs(batch)
    leads = ratios[better] - ratios[worse]
    further = {}
    if config.method == "kto":
        desirable, counted, foreign = judged(batch)
        level = ratios[foreign].mean().clamp(min=0).detach()
        coefs = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
        value = (counted * coefs * kto(ratios, desirable, level, config.beta)).sum()
        further["level"] = level * batch.weights.sum()
    elif config.method == "simpo":
        value = (shares * simpo(leads, config.beta, config.simpo_margin)).sum()
    else:
        value = (shares * (dpo if config.method == "dpo" else ipo)(leads, config.beta)).sum()
    told = {"accuracy": (leads > 0).float(), "better_log_ratio": ratios[better], "worse_log_ratio": ratios[worse]}
    return value, further | {name: (shares * values.detach()).sum() for name, values in told.items()}


def segment_log_probs(log_probs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of each segment's counted tokens, their number), float32 [S] each, from those of the tokens [R]."""
    zeros = torch.zeros(len(batch.segments.lengths), device=log_probs.device)
    return zeros.index_add(0, batch.owners, log_probs), zeros.index_add(0, batch.owners, torch.ones_like(log_probs))


def judged(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For kto, of every segment [S]: is it desirable (scored above its ranking's mean), its share of its ranking's loss (those at the
    mean, prompts and answers to other prompts have none), and is it an answer to another prompt."""
    prompts = torch.tensor(batch.segments.prefixes, device=batch.tokens.device)
    scores = batch.extras["scores"][batch.last]
    foreign, scored = scores.isnan(), (prompts >= 0) & ~scores.isnan()
    of = prompts.clamp(min=0)

    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(scores).index_add(0, of[scored], values[scored])[of]

    apart = torch.where(scored, scores - summed(scores) / summed(torch.ones_like(scores)).clamp(min=1), 0.0)
    # A mean of equal numbers differs from them by rounding.
    labelled = (apart.abs() > 1e-6 * scores.nan_to_num().abs()).float()
    return apart > 0, labelled / summed(labelled).clamp(min=1) * float(len(batch.rows) > 0), foreign


def figures(sums: dict[str, float]) -> dict[str, float]:
    names = {"loss": "val_loss", "accuracy": "pair_accuracy", "better_log_ratio": "better_log_ratio", "worse_log_ratio": "worse_log_ratio"}
    return {shown: sums[name] / sums["count"] for name, shown in names.items()}
