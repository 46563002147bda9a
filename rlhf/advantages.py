"""From scores to advantages: pure functions on the flat response tokens of a rollout.

Samples lie one after another: `lengths[i]` tokens belong to sample i, T = sum(lengths); a sample may be empty.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rlhf.recipe import Ppo

Floats = npt.NDArray[np.float32]
Lengths = Sequence[int] | npt.NDArray[np.int64]


def conservative(rewards: Floats, uncertainty_coef: float) -> Floats:
    """mean - uncertainty_coef x standard deviation over the heads: rewards [n, heads] -> scores [n].

    The uncertainty-weighted score of Coste et al. 2023, arXiv:2310.02743, with the deviation for their variance, so that both terms are
    rewards. With two heads and a weight of 1 it is their minimum, the paper's worst case.
    """
    return rewards.mean(1) - uncertainty_coef * rewards.std(1)


def token_rewards(scores: Floats, log_probs: Floats, ref_log_probs: Floats, lengths: Lengths, kl_coef: float, reward_clip: float) -> Floats:
    """r_t = -kl_coef (log pi_old - log pi_ref)_t, plus the sample's clipped score at its last token.

    scores [n], log_probs and ref_log_probs [T] -> [T]. Ziegler et al. 2019, arXiv:1909.08593, eq. 2, per token as in
    Ouyang et al. 2022. A sample without tokens has nowhere to put its score: it is left out.
    """
    rewards = -kl_coef * (log_probs - ref_log_probs)
    counts = np.asarray(lengths, dtype=np.int64)
    last = np.cumsum(counts) - 1
    rewards[last[counts > 0]] += np.clip(scores, -reward_clip, reward_clip)[counts > 0]
    return rewards.astype(np.float32)


def next_kl_coef(kl_coef: float, kl: float, config: Ppo) -> float:
    """The KL weight of the next step, after a rollout that was `kl` nats per answer from the reference.

    beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon): Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    if config.kl_target is None:
        return kl_coef
    surprise = float(np.clip(kl / config.kl_target - 1, -0.2, 0.2))
    return kl_coef * (1 + surprise * config.rollout_batch / config.kl_horizon)


def gae(rewards: Floats, values: Floats, lengths: Lengths, gamma: float, lam: float) -> tuple[Floats, Floats]:
    """Generalised advantage estimation, Schulman et al. 2016, arXiv:1506.02438, eq. 16.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, with V = A = 0 after the last token.
    rewards and values [T] -> (advantages [T], returns = advantages + values [T]).

    The recursion walks the longest sample once, backwards, all samples side by side.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    if not len(counts) or not counts.max(initial=0):
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    starts = np.cumsum(counts) - counts
    columns = np.arange(counts.max())
    inside = columns < counts[:, None]
    index = np.where(inside, starts[:, None] + columns, 0)
    r = np.where(inside, rewards[index], 0.0).astype(np.float64)
    v = np.where(inside, values[index], 0.0).astype(np.float64)
    delta = r + gamma * np.pad(v[:, 1:], ((0, 0), (0, 1))) - v
    advantages = np.zeros_like(delta)
    running = np.zeros(len(counts))
    for t in reversed(columns):
        running = (delta[:, t] + gamma * lam * running) * inside[:, t]
        advantages[:, t] = running
    flat = advantages[inside].astype(np.float32)
    return flat, flat + values


def whiten(values: Floats) -> Floats:
    """Mean 0, variance 1 (biased estimate) over all response tokens of the rollout; a constant becomes 0."""
    if not len(values):
        return values
    return ((values - values.mean()) / np.sqrt(values.var() + 1e-8)).astype(np.float32)
