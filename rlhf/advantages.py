"""From rewards to advantages: pure functions on the flat response tokens of a rollout.

Samples lie one after another: `lengths[i]` tokens belong to sample i, T = sum(lengths); a sample may be empty. Answers to one prompt
stand side by side: samples g * size ... (g + 1) * size - 1 are group g.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Lengths = Sequence[int] | npt.NDArray[np.int64]


def gae(rewards: Floats, values: Floats, lengths: Lengths, gamma: float, lam: float, actions: Bools | None = None) -> tuple[Floats, Floats]:
    """Generalised advantage estimation, Schulman et al. 2016, arXiv:1506.02438, eq. 16.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, with V = A = 0 after the last token.
    rewards and values [T] -> (advantages [T], returns = advantages + values [T]).

    `actions` [T] marks the tokens that the policy wrote; the others, what an environment answered between its turns, are no steps:
    t + 1 is the next action token. Their rewards and values are not read, their advantage is 0. To walk over them with V = 0 or
    with their V would discount what lies behind an answer by lam per token of it, and bias it for lam < 1.

    The recursion walks the longest sample once, backwards, all samples side by side.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    if actions is not None:
        owners = np.repeat(np.arange(len(counts)), counts)
        advantages, returns = np.zeros_like(values), values.copy()
        acted = np.bincount(owners[actions], minlength=len(counts))
        advantages[actions], returns[actions] = gae(rewards[actions], values[actions], acted, gamma, lam)
        return advantages, returns
    if not counts.max(initial=0):
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    starts = np.cumsum(counts) - counts
    columns = np.arange(counts.max())
    inside = columns < counts[:, None]
    index = np.where(inside, starts[:, None] + columns, 0)
    r = np.where(inside, rewards[index], 0.0).astype(np.float64)
    v = np.where(inside, values[index], 0.0).astype(np.float64)
    delta = r + gamma * np.pad(v[:, 1:], ((0, 0), (0, 1))) - v
    found = np.zeros_like(delta)
    running = np.zeros(len(counts))
    for t in reversed(columns):
        running = (delta[:, t] + gamma * lam * running) * inside[:, t]
        found[:, t] = running
    flat = found[inside].astype(np.float32)
    return flat, flat + values


def rewards_to_go(rewards: Floats, lengths: Lengths, gamma: float) -> Floats:
    """sum_{k >= t} gamma^(k - t) r_k, [T] -> [T]: what REINFORCE weighs a token with. Williams 1992."""
    return gae(rewards, np.zeros_like(rewards), lengths, gamma, 1.0)[0]


def centred(outcomes: Floats, size: int) -> Floats:
    """R_i - mean of its group, [n] -> [n]. Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783; whitened over the rollout afterwards it is
    the REINFORCE++-baseline of Hu et al. 2025, arXiv:2501.03262."""
    groups = outcomes.reshape(-1, size).astype(np.float64)
    return (groups - groups.mean(1, keepdims=True)).reshape(-1).astype(np.float32)


def grpo(outcomes: Floats, size: int) -> Floats:
    """(R_i - mean of its group) / (std of its group + 1e-4), [n] -> [n]. Shao et al. 2024, arXiv:2402.03300, section 4.1.2.

    The std is the unbiased one (n - 1), as in TRL and verl: the paper leaves it open. A group of equal outcomes gets 0.
    """
    spread = outcomes.reshape(-1, size).astype(np.float64).std(1, ddof=1)
    return (centred(outcomes, size) / (np.repeat(spread, size) + 1e-4)).astype(np.float32)


def rloo(outcomes: Floats, size: int) -> Floats:
    """R_i - mean of the others of its group, [n] -> [n]. Ahmadian et al. 2024, arXiv:2402.14740 (Kool et al. 2019)."""
    return (centred(outcomes, size) * (size / (size - 1))).astype(np.float32)


GROUPED = {"grpo": grpo, "dr_grpo": centred, "rloo": rloo, "reinforce++_baseline": centred}


def whiten(values: Floats, unbiased: bool = False) -> Floats:
    """Mean 0, variance 1 over all values [T]; a constant becomes 0. The variance is divided by T, or by T - 1 if `unbiased`."""
    if not len(values):
        return values
    exact = values.astype(np.float64)
    variance = exact.var(ddof=1 if unbiased and len(values) > 1 else 0)
    return ((exact - exact.mean()) / np.sqrt(variance + 1e-8)).astype(np.float32)
