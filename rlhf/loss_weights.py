"""How much each response token counts in the policy's loss: pure functions on the flat response tokens of a rollout.

The learner divides the sum of a loss by the sum of the tokens' weights over the whole global batch, on all ranks. So a mean is told
by two numbers per token: its share, by which its loss is multiplied, and its weight, by which it is counted. Neither depends on the
other samples of a micro-batch; that is why 8 samples at once equal 1 sample 8 times, and 1 rank equals 2.
"""

import numpy as np

from rlhf.advantages import Bools, Floats, Lengths


def aggregate(lengths: Lengths, counted: Bools, how: str, longest: int) -> tuple[Floats, Floats]:
    """(weights [T], shares [T]) of the tokens; samples that are not `counted` [n] have none of either.

    token_mean: sum_t l_t / number of tokens; every token counts the same. Yu et al. 2025 (DAPO), arXiv:2503.14476, 3.3.
    sequence_mean: mean over samples of their token means; every sample counts the same. Shao et al. 2024 (GRPO), arXiv:2402.03300, eq. 3.
    dr_grpo: mean over samples of sum_t l_t / longest, with the constant `longest` = max_response_tokens: neither long nor short answers
    are spared. Liu et al. 2025, arXiv:2503.20783.
    A sample without tokens is not counted.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    of_tokens = np.repeat(counted, counts).astype(np.float32)
    if how == "token_mean":
        return of_tokens, of_tokens
    per_sample = of_tokens / np.repeat(counts, counts)
    shares = per_sample if how == "sequence_mean" else of_tokens / longest
    return per_sample.astype(np.float32), shares.astype(np.float32)


def varied(scores: Floats, size: int) -> Bools:
    """Which groups have answers of different worth, [n] -> bool [n / size]: the others have no gradient of a group's estimator.

    The filter of dynamic sampling, Yu et al. 2025 (DAPO), arXiv:2503.14476, 3.2.
    """
    groups = scores.reshape(-1, size)
    return groups.max(1) > groups.min(1)


def importance(log_probs: Floats, engine_log_probs: Floats, how: str, floor: float, cap: float) -> Floats:
    """Weights [T] against samples that are not quite the policy's own: ratio = pi_train / pi_engine = exp(log_probs - engine_log_probs).

    truncated: min(ratio, cap), Yao et al. 2025, fengyao.notion.site/off-policy-rl; floor is not read.
    icepop: the ratio where floor <= ratio <= cap, else 0, Ling Team 2025, arXiv:2510.18855.
    """
    ratio = np.exp(np.clip(log_probs - engine_log_probs, -20.0, 20.0))
    if how == "icepop":
        return np.where((ratio >= floor) & (ratio <= cap), ratio, 0.0).astype(np.float32)
    return np.minimum(ratio, cap).astype(np.float32)
