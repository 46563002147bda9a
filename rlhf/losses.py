"""Losses: pure functions on tensors. Each returns a sum, or the terms of one; the learner divides by the count over the whole global batch.

A sum, because a mean over a micro-batch would weigh its tokens by how many neighbours they happen to have: with sums,
8 samples at once equal 1 sample 8 times, and 1 worker equals 2.
"""

import math

import torch
import torch.nn.functional as F

from rlhf.recipe import Ppo

EXPONENT = 20.0  # log-ratios beyond it are those of an absurd token


def cross_entropy(log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """-sum_t w_t log p_t, for log_probs and weights float32 [R]. In nats."""
    return -(log_probs * weights).sum()


def pairwise_ranking(better: torch.Tensor, worse: torch.Tensor, margins: torch.Tensor | float = 0.0) -> torch.Tensor:
    """-log sigmoid(r_better - r_worse - margin), float32 [P], for rewards float32 [P] each.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin after Touvron et al. 2023, arXiv:2307.09288, eq. 2.
    """
    return -F.logsigmoid(better - worse - margins)


def dpo(leads: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta lead), float32 [P]; lead = log (pi / pi_ref)(better) - log (pi / pi_ref)(worse), whole answers, in nats.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    return -F.logsigmoid(beta * leads)


def ipo(leads: torch.Tensor, beta: float) -> torch.Tensor:
    """(lead - 1 / (2 beta))^2, float32 [P]; lead as for `dpo`, but of log-probabilities per token, in nats.

    Azar et al. 2023, arXiv:2310.12036, eq. 17. Per token, so that long answers are not pulled apart further than short ones.
    """
    return (leads - 1 / (2 * beta)).square()


def simpo(leads: torch.Tensor, beta: float, margin: float) -> torch.Tensor:
    """-log sigmoid(beta lead - margin), float32 [P]; lead = log pi(better) - log pi(worse) per token, in nats.

    Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return -F.logsigmoid(beta * leads - margin)


def kto(ratios: torch.Tensor, desirable: torch.Tensor, level: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - sigmoid(+-beta (ratio - level)), float32 [N]: plus for desirable answers (bool [N]), minus for the others.

    ratio = log (pi / pi_ref)(answer); level, 0-dimensional, is how far the policy has moved: max(0, mean ratio of answers to other
    prompts), without gradient. All in nats. Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    return 1 - torch.sigmoid(beta * torch.where(desirable, ratios - level, level - ratios))


def kl(log_ratio: torch.Tensor, estimator: str) -> torch.Tensor:
    """An estimate of KL(p || q) per token, float32 [R], from log_ratio = log p - log q [R] of tokens that p wrote. In nats.

    k1 = d, without bias but often negative; k2 = d^2 / 2, biased; k3 = e^-d - 1 + d, without bias and never negative (d within
    +-20 in the exponent). Schulman 2020, joschu.net/blog/kl-approx.html. As a loss k1 pulls nowhere: the mean of its gradient is
    zero; that of k2 is the gradient of KL(p || q), that of k3 the one of KL(q || p). Tang & Munos 2025, arXiv:2506.09477.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    near = log_ratio.clamp(-EXPONENT, EXPONENT)
    return (-near).exp() - 1 + near


def policy_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, owners: torch.Tensor, config: Ppo
) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms of `ppo.policy_loss`, float32 [R], and which of them no longer learn from their token, bool [R].

    log_probs, old_log_probs and advantages float32 [R] over response tokens, owners int64 [R] the response that each is in. All of
    these losses are proportional to the advantage, so a weight on a term is a weight on its advantage.
    """
    low, high = config.clip_ranges
    log_ratio = log_probs - old_log_probs
    if config.policy_loss == "cispo":
        return cispo(log_probs, old_log_probs, advantages, low, high)
    if config.policy_loss == "sapo":
        return sapo(log_ratio, advantages, *config.sapo_temperatures)
    if config.policy_loss == "gspo":
        log_ratio = sequence_mean(log_ratio, owners)
    return clipped_policy(log_ratio, advantages, low, high, config.dual_clip_bound if config.policy_loss == "dual_clip" else math.inf)


def clipped_policy(
    log_ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, dual: float = math.inf
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate, max(-rho A, -clip(rho, 1 - low, 1 + high) A), float32 [R], and where it is clipped, bool [R].

    Schulman et al. 2017, arXiv:1707.06347, eq. 7; with high > low it is clip-higher, Yu et al. 2025 (DAPO), arXiv:2503.14476, 3.1.
    log_ratio and advantages float32 [R]; rho = exp(log_ratio), the exponent kept within +-20 so that one absurd token cannot make
    an infinity. `dual` bounds the loss of tokens with A < 0 by -dual A: Ye et al. 2020, arXiv:1912.09729.

    With the log-ratio of whole sequences (`sequence_mean`) this is GSPO, Zheng et al. 2025, arXiv:2507.18071, whose ranges are
    a thousand times narrower: 3e-4 and 4e-4.
    """
    ratio = log_ratio.clamp(-EXPONENT, EXPONENT).exp()
    plain = -ratio * advantages
    terms = torch.maximum(plain, -ratio.clamp(1 - low, 1 + high) * advantages)
    clipped = terms > plain
    if dual < math.inf:
        bound = torch.where(advantages < 0, -dual * advantages, math.inf)
        clipped = clipped | (bound < terms)
        terms = torch.minimum(terms, bound)
    return terms, clipped


def sequence_mean(values: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Every token's value replaced by the mean over its response, float32 [R]; owners int64 [R] says which response it is in."""
    zeros = torch.zeros(int(owners.max()) + 1 if len(owners) else 0, dtype=values.dtype, device=values.device)
    means = zeros.index_add(0, owners, values) / zeros.index_add(0, owners, torch.ones_like(values)).clamp(min=1)
    return means[owners]


def cispo(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-sg(clip(rho, 1 - low, 1 + high)) A log pi, float32 [R], and where the weight is clipped, bool [R]: every token keeps a gradient.

    MiniMax 2025 (M1), arXiv:2506.13585. All inputs float32 [R]; sg stops the gradient. low >= 1 sets no lower bound, as there.
    """
    ratio = (log_probs - old_log_probs).detach().clamp(-EXPONENT, EXPONENT).exp()
    kept = ratio.clamp(1 - low, 1 + high)
    return -kept * advantages * log_probs, kept != ratio


def sapo(log_ratio: torch.Tensor, advantages: torch.Tensor, positive: float, negative: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, float32 [R], tau = `positive` where A > 0 and else `negative`; nothing is clipped.

    Gao et al. 2025, arXiv:2511.20347. At rho = 1 its slope is that of -rho A; on both sides it fades.
    """
    ratio = log_ratio.clamp(-EXPONENT, EXPONENT).exp()
    tau = torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages, torch.zeros_like(advantages, dtype=torch.bool)


def clipped_value(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """0.5 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2), float32 [R], and where it is clipped, bool [R].

    All inputs float32 [R] over response tokens. Engstrom et al. 2020, arXiv:2005.12729.
    """
    # Clamped itself, not its distance: old + (values - old) is values only up to rounding, and would count as clipped.
    near = values.clamp(old_values - clip_range, old_values + clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain
