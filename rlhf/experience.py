"""What a rollout is, and what it becomes: flat numpy arrays that Ray maps without copying.

    rollout = merge(parts)                          # of several engines, in sample order
    samples(rollout)                                # prompt + response as packable samples, response tokens counted
    align(parts, rollout.response_lengths)          # what the ranks of a role found, in sample order

Everything here is arithmetic on flat arrays; the roles in `roles.py` make the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.packing import Sample
from rlhf.advantages import conservative, gae, token_rewards, whiten
from rlhf.recipe import Ppo

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Scores = tuple[Ints, Floats]  # sample indices [m], and their numbers one sample after another


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
    """A rollout with everything the update needs, per response token."""

    rollout: Rollout
    log_probs: Floats
    values: Floats
    advantages: Floats
    returns: Floats


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


def samples(rollout: Rollout, extras: dict[str, Floats] | None = None) -> list[Sample]:
    """Every prompt + response as a packable sample whose response tokens count.

    `extras` are numbers per response token [sum of response_lengths]; prompt tokens get 0.
    """
    ends = np.cumsum(rollout.prompt_lengths + rollout.response_lengths)
    response_ends = np.cumsum(rollout.response_lengths)
    out = []
    for i, (prompt, response) in enumerate(zip(rollout.prompt_lengths, rollout.response_lengths, strict=True)):
        weights = np.zeros(prompt + response, np.float32)
        weights[prompt:] = 1.0
        per_token = {}
        for name, values in (extras or {}).items():
            per_token[name] = np.zeros(prompt + response, np.float32)
            per_token[name][prompt:] = values[response_ends[i] - response : response_ends[i]]
        out.append(Sample(rollout.tokens[ends[i] - prompt - response : ends[i]].astype(np.int64), weights, per_token))
    return out


def responses(rollout: Rollout) -> list[list[int]]:
    """The response token ids of every sample."""
    ends = np.cumsum(rollout.prompt_lengths + rollout.response_lengths)
    return [rollout.tokens[end - n : end].tolist() for end, n in zip(ends, rollout.response_lengths, strict=True)]


def estimate(rollout: Rollout, found: dict[str, Floats], config: Ppo, kl_coef: float) -> tuple[Experience, dict[str, float]]:
    """Advantages and returns from what the roles found, and the figures of the rollout.

    found: `log_probs`, `ref_log_probs`, `values` per response token, `rewards` per sample: of several heads, all of each sample's in turn.
    """
    lengths = rollout.response_lengths
    log_probs, reference, values = (found[name] for name in ("log_probs", "ref_log_probs", "values"))
    of_heads = found["rewards"].reshape(len(lengths), -1)
    scores = of_heads.mean(1)
    # A reward model knows finished answers; what it says of a torso is noise that a policy learns to exploit by never ending.
    judged = conservative(of_heads, config.uncertainty_coef) - config.unfinished_penalty * ~rollout.finished
    rewards = token_rewards(judged, log_probs, reference, lengths, kl_coef, config.reward_clip)
    advantages, returns = gae(rewards, values, lengths, config.gamma, config.lam)
    errors = returns - values
    facts = {
        "reward": float(scores.mean()),
        "reward_sd": float(scores.std()),
        "kl": float((log_probs - reference).sum() / len(scores)),  # nats per response, k1
        "kl_coef": kl_coef,
        "response_tokens": float(lengths.mean()),
        "unfinished": float(1 - rollout.finished.mean()),
        "surprise": float(-log_probs.mean()),  # nats per token: an estimate of the policy's entropy
        "value_explained": float(1 - errors.var() / max(returns.var(), 1e-8)),
        "log_prob_gap": float(np.abs(log_probs - rollout.log_probs).max()),
    }
    if of_heads.shape[1] > 1:
        facts["reward_disagreement"] = float(of_heads.std(1).mean())
    advantages = whiten(advantages) if config.whiten_advantages else advantages
    return Experience(rollout, log_probs, values, advantages, returns), facts


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
