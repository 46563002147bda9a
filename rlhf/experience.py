"""What a rollout is, and what it becomes: flat numpy arrays that Ray maps without copying.

    rollout = merge(parts)                          # of several engines, in sample order
    samples(rollout)                                # prompt + response as packable samples, response tokens counted
    samples(rollout, groups=together(rollout, 8, budget=4096))      # a prompt and its eight responses as one
    align(parts, rollout.response_lengths)          # what the ranks of a role found, in sample order

Everything here is arithmetic on flat arrays; the roles in `roles.py` make the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from data.packing import Sample
from rlhf.advantages import GROUPED, conservative, gae, rewards_to_go, whiten
from rlhf.loss_weights import aggregate, importance, varied
from rlhf.losses import kl
from rlhf.recipe import Ppo
from rlhf.shaping import Running, judge, outcomes, token_rewards

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Scores = tuple[Ints, Floats]  # sample indices [m], and their numbers one sample after another
WEIGHTS = "weights"


@dataclass(frozen=True)
class Rollout:
    """n responses, one after another."""

    index: Ints  # [n] which sample of the step each is
    prompt_lengths: Ints  # [n]
    response_lengths: Ints  # [n]; the end-of-turn token, when the model wrote one, belongs to the response
    tokens: npt.NDArray[np.int32]  # prompt, response, prompt, response, ...
    finished: npt.NDArray[np.bool_]  # [n] the model ended its turn; otherwise the response was cut off
    log_probs: Floats  # [sum of response_lengths], by the engine, of the distribution it sampled from
    version: str  # of the weights that wrote them


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the update needs: numbers per response token [T]."""

    rollout: Rollout
    log_probs: Floats
    ref_log_probs: Floats | None  # of a reference
    advantages: Floats
    weights: Floats  # how much a token is counted; 0: not at all
    shares: Floats  # by how much its loss is multiplied
    kl_coef: float  # of the KL in the loss; 0 if it is in the rewards
    values: Floats | None = None  # of a critic
    returns: Floats | None = None  # for a critic


def merge(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of several, in sample order.

    Raises ValueError when their weights' versions differ: such samples are not of one policy.
    """
    versions = {part.version for part in parts}
    if len(versions) != 1:
        raise ValueError(f"engines answered with different weights: {sorted(versions)}")
    index = np.concatenate([part.index for part in parts])
    prompts = np.concatenate([part.prompt_lengths for part in parts])
    responses = np.concatenate([part.response_lengths for part in parts])
    tokens = np.concatenate([part.tokens for part in parts])
    log_probs = np.concatenate([part.log_probs for part in parts])
    order = np.argsort(index, kind="stable")
    return Rollout(
        index[order],
        prompts[order],
        responses[order],
        _reorder(tokens, prompts + responses, order),
        np.concatenate([part.finished for part in parts])[order],
        _reorder(log_probs, responses, order),
        versions.pop(),
    )


def together(rollout: Rollout, each: int, budget: int) -> list[list[int]]:
    """Which samples are computed as one, places in ascending order: neighbours that answer one prompt, `each` of them at most and as
    many as `budget` tokens hold. Their prompt is computed once."""
    groups: list[list[int]] = []
    ends = np.cumsum(rollout.prompt_lengths + rollout.response_lengths)
    starts = ends - rollout.prompt_lengths - rollout.response_lengths
    size = 0
    for i, (start, prompt, response) in enumerate(zip(starts, rollout.prompt_lengths, rollout.response_lengths, strict=True)):
        first = groups[-1][0] if groups and each > 1 else i
        same = (
            first < i
            and rollout.index[first] // each == rollout.index[i] // each
            and prompt == rollout.prompt_lengths[first]
            and size + response <= budget
            and np.array_equal(rollout.tokens[start : start + prompt], rollout.tokens[starts[first] : starts[first] + prompt])
        )
        if same:
            groups[-1].append(i)
            size += response
        else:
            groups.append([i])
            size = prompt + response
    return groups


def samples(
    rollout: Rollout, extras: dict[str, Floats] | None = None, weights: Floats | None = None, groups: Sequence[list[int]] | None = None
) -> list[Sample]:
    """Every prompt + response as a packable sample whose response tokens count, 1 each or by `weights`; or every one of `groups`, of
    which a larger one is a prompt and the responses that continue it.

    `extras` and `weights` are numbers per response token [sum of response_lengths]; prompt tokens get 0.
    """
    ends = np.cumsum(rollout.prompt_lengths + rollout.response_lengths)
    response_ends = np.cumsum(rollout.response_lengths)
    numbers = {**(extras or {}), WEIGHTS: np.ones(response_ends[-1:].sum(), np.float32) if weights is None else weights}
    out = []
    for group in groups or [[i] for i in range(len(ends))]:
        lengths = [int(rollout.response_lengths[i]) for i in group]
        prompt = int(rollout.prompt_lengths[group[0]])
        start = ends[group[0]] - lengths[0] - prompt
        pieces = [rollout.tokens[start : start + prompt], *_last(rollout.tokens, ends[group], lengths)]
        nothing = np.zeros(prompt, np.float32)
        per_token = {name: np.concatenate([nothing, *_last(of, response_ends[group], lengths)]) for name, of in numbers.items()}
        segments = [prompt, *(n for n in lengths if n)] if len(group) > 1 else None
        out.append(Sample(np.concatenate(pieces).astype(np.int64), per_token.pop(WEIGHTS), per_token, segments, prefix=len(group) > 1))
    return out


def _last(flat: npt.NDArray, ends: Ints, lengths: Sequence[int]) -> list[npt.NDArray]:
    """The `lengths` numbers before each of `ends`."""
    return [flat[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def prompts(rollout: Rollout) -> list[list[int]]:
    """The prompt token ids of every sample."""
    ends = np.cumsum(rollout.prompt_lengths + rollout.response_lengths)
    whole = zip(ends, rollout.prompt_lengths, rollout.response_lengths, strict=True)
    return [rollout.tokens[end - n - m : end - n].tolist() for end, m, n in whole]


def responses(rollout: Rollout) -> list[list[int]]:
    """The response token ids of every sample."""
    ends = np.cumsum(rollout.prompt_lengths + rollout.response_lengths)
    return [rollout.tokens[end - n : end].tolist() for end, n in zip(ends, rollout.response_lengths, strict=True)]


def estimate(
    rollout: Rollout, found: dict[str, Floats], config: Ppo, running: Running, greedy: Rollout | None = None
) -> tuple[Experience, dict[str, float]]:
    """Advantages and whatever else the update needs from what the roles found, and the figures of the rollout.

    found: `log_probs` (with `one_pass` nobody has computed them yet: the engine's stand in), with a reference `ref_log_probs` and with a
    critic `values` per response token; `rewards` per sample, of several heads all of each sample's in turn; with remax `baselines`, the
    reward model's scores of the answers in `greedy`, one per prompt.
    """
    lengths, size = rollout.response_lengths, config.samples_per_prompt
    log_probs, reference, values = found.get("log_probs", rollout.log_probs), found.get("ref_log_probs"), found.get("values")
    of_heads = found["rewards"].reshape(len(lengths), -1)
    scores = of_heads.mean(1)
    facts = {"reward": float(scores.mean()), "reward_sd": float(scores.std())}
    seen = running.seen(facts["reward"], facts["reward_sd"])
    worth = worths(rollout, found["rewards"], config, seen)
    usual = None if greedy is None else worths(greedy, found["baselines"], config, seen)
    apart = np.zeros_like(log_probs) if reference is None else log_probs - reference
    in_rewards, in_loss = (running.kl_coef if config.kl_in == place else 0.0 for place in ("reward", "loss"))
    penalties = np.float32(-in_rewards) * kl(torch.from_numpy(apart), config.kl_estimator).numpy()
    advantages, returns = _advantages(worth, penalties, lengths, values, usual, config)

    counted = np.ones(len(lengths), bool)
    if config.mask_unfinished:
        counted &= rollout.finished
    if config.drop_equal_groups:
        counted &= np.repeat(varied(worth, size), size)
    weights, shares = aggregate(lengths, counted, config.aggregation, config.max_response_tokens)
    if config.whiten_advantages:
        advantages[weights > 0] = whiten(advantages[weights > 0], config.unbiased_whitening)
    if config.importance != "none":
        ratios = importance(log_probs, rollout.log_probs, config.importance, config.importance_floor, config.importance_cap)
        advantages = advantages * ratios  # every policy loss is proportional to the advantage
        facts["importance"] = float(ratios.mean())

    if reference is not None:
        facts["kl"] = float(apart.sum() / len(scores))  # nats per response, k1
    facts |= {
        "kl_coef": running.kl_coef,
        "response_tokens": float(lengths.mean()),
        "unfinished": float(1 - rollout.finished.mean()),
        "counted": float(counted.mean()),
        "surprise": float(-log_probs.sum() / max(1, len(log_probs))),  # nats per token: an estimate of the policy's entropy
        "log_prob_gap": float(np.abs(log_probs - rollout.log_probs).max(initial=0.0)),
    }
    if of_heads.shape[1] > 1:
        facts["reward_disagreement"] = float(of_heads.std(1).mean())
    if values is not None and returns is not None and len(returns):
        facts["value_explained"] = float(1 - (returns - values).var() / max(returns.var(), 1e-8))
    return Experience(rollout, log_probs, reference, advantages, weights, shares, in_loss, values, returns), facts


def worths(rollout: Rollout, rewards: Floats, config: Ppo, seen: Running) -> Floats:
    """What each response is worth [n], from the reward model's scores, all heads of each sample in turn."""
    by_head = conservative(rewards.reshape(len(rollout.index), -1), config.uncertainty_coef)
    return judge(by_head, rollout.response_lengths, rollout.finished, config, seen)


def _advantages(
    worth: Floats, penalties: Floats, lengths: Ints, values: Floats | None, usual: Floats | None, config: Ppo
) -> tuple[Floats, Floats | None]:
    """The advantages [T] by `ppo.advantage`, and a critic's returns [T], from what responses are worth [n] and what tokens cost [T]."""
    rewards = token_rewards(worth, penalties, lengths)
    if config.advantage in GROUPED:
        whole = GROUPED[config.advantage](outcomes(worth, penalties, lengths), config.samples_per_prompt)
        return np.repeat(whole, lengths), None
    if config.advantage == "gae":
        assert values is not None, "gae needs a critic's values"
        return gae(rewards, values, lengths, config.gamma, config.lam)
    if config.advantage == "remax":
        assert usual is not None, "remax needs the greedy answers' scores"
        return rewards_to_go(rewards, lengths, 1.0) - np.repeat(np.repeat(usual, config.samples_per_prompt), lengths), None
    return rewards_to_go(rewards, lengths, config.gamma), None


def align(parts: Sequence[Scores], lengths: Ints) -> Floats:
    """The ranks' scores in sample order: sample i has `lengths[i]` of them.

    Raises ValueError when a sample is missing or scored twice.
    """
    index = np.concatenate([part[0] for part in parts])
    if not np.array_equal(np.sort(index), np.arange(len(lengths))):
        raise ValueError(f"{len(index)} scores for {len(lengths)} samples: every sample must be scored once")
    values = np.concatenate([part[1] for part in parts])
    return _reorder(values, np.asarray(lengths)[index], np.argsort(index, kind="stable"))


def _reorder(flat: npt.NDArray, lengths: Ints, order: Ints) -> npt.NDArray:
    """The pieces of `flat`, `lengths` long each, in another order."""
    pieces = np.split(flat, np.cumsum(lengths)[:-1])
    return np.concatenate([pieces[i] for i in order]) if len(order) else flat
