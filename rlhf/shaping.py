"""From the reward model's scores to rewards per token: pure functions, and the few numbers that one PPO step hands to the next.

    scores -> normalised -> penalties for length and for missing ends -> clipped -> at the last token, beside the KL penalties

Scores are [n], one per response; numbers per token are flat, as in `advantages.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from rlhf.advantages import Bools, Floats, Lengths
from rlhf.recipe import Ppo


@dataclass(frozen=True)
class Running:
    """What a step needs to know of the steps before it. A fold over the curve (`after`), so that nothing has to be saved."""

    kl_coef: float
    steps: int = 0
    mean: float = 0.0  # of all scores so far
    variance: float = 0.0  # of all scores so far, biased

    def seen(self, mean: float, deviation: float) -> "Running":
        """With the scores of one more rollout: `mean` and biased standard deviation of them. All rollouts count alike.

        Chan et al. 1979: M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / n.
        """
        steps, apart = self.steps + 1, mean - self.mean
        variance = (self.steps * self.variance + deviation**2 + apart**2 * self.steps / steps) / steps
        return replace(self, steps=steps, mean=self.mean + apart / steps, variance=variance)


def begin(config: Ppo) -> Running:
    return Running(config.kl_coef)


def after(running: Running, kl: float, mean: float, deviation: float, config: Ppo) -> Running:
    """What the next step needs, after a rollout `kl` nats per answer from the reference and with scores of `mean` +- `deviation`.

    Without a reference `kl` is 0: its weight is 0 then, and stays so.
    """
    return replace(running.seen(mean, deviation), kl_coef=next_kl_coef(running.kl_coef, kl, config))


def replay(rows: Iterable[dict[str, float]], config: Ppo) -> Running:
    """What follows the steps whose curve is `rows`: a resumed run goes on with the same bits."""
    running = begin(config)
    for row in rows:
        running = after(running, row.get("ppo/kl", 0.0), row["ppo/reward"], row["ppo/reward_sd"], config)
    return running


def next_kl_coef(kl_coef: float, kl: float, config: Ppo) -> float:
    """The KL weight of the next step, after a rollout that was `kl` nats per answer from the reference.

    beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon): Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    if config.kl_target is None:
        return kl_coef
    surprise = float(np.clip(kl / config.kl_target - 1, -0.2, 0.2))
    return kl_coef * (1 + surprise * config.samples / config.kl_horizon)


def judge(scores: Floats, lengths: Lengths, finished: Bools, config: Ppo, running: Running) -> Floats:
    """What every response [n] is worth: its score, normalised if asked, less what it costs to be too long or without an end, clipped.

    `running` knows this rollout's scores already. Normalised: (score - mean) / std of all scores so far, after Engstrom et al. 2020,
    arXiv:2005.12729. A reward model knows finished answers; what it says of a torso is noise that a policy learns to exploit by
    never ending: hence `unfinished_penalty`.
    """
    if config.normalize_rewards:
        scores = (scores - running.mean) / np.sqrt(running.variance + 1e-8)
    scores = scores - config.unfinished_penalty * ~finished
    if config.overlong_buffer:
        scores = scores - config.overlong_penalty * overlong(lengths, config.max_response_tokens, config.overlong_buffer)
    return np.clip(scores, -config.reward_clip, config.reward_clip).astype(np.float32)


def overlong(lengths: Lengths, limit: int, buffer: int) -> Floats:
    """How far every response [n] has run into the last `buffer` tokens before `limit`: 0 up to limit - buffer, then linear to 1 at limit.

    The soft punishment of Yu et al. 2025 (DAPO), arXiv:2503.14476, 3.4.
    """
    beyond = np.asarray(lengths, np.float64) - (limit - buffer)
    return np.clip(beyond / buffer, 0.0, 1.0).astype(np.float32)


def token_rewards(scores: Floats, penalties: Floats, lengths: Lengths) -> Floats:
    """r_t = penalty_t, plus the sample's score at its last token. scores [n], penalties [T] -> [T].

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2, with penalty = -kl_coef KL per token as in Ouyang et al. 2022. A sample without
    tokens has nowhere to put its score: it is left out.
    """
    rewards = penalties.astype(np.float32)
    counts = np.asarray(lengths, dtype=np.int64)
    last = np.cumsum(counts) - 1
    rewards[last[counts > 0]] += scores[counts > 0]
    return rewards


def outcomes(scores: Floats, penalties: Floats, lengths: Lengths) -> Floats:
    """R_i = score_i + sum_t penalty_t, scores [n], penalties [T] -> [n]: what one response as a whole has brought."""
    owners = np.repeat(np.arange(len(scores)), np.asarray(lengths, dtype=np.int64))
    return (scores + np.bincount(owners, weights=penalties, minlength=len(scores))).astype(np.float32)
