"""Losses: pure functions on tensors. Each returns a sum, or the terms of one; the learner divides by the count over the whole global batch.

A sum, because a mean over a micro-batch would weigh its tokens by how many neighbours they happen to have: with sums,
8 samples at once equal 1 sample 8 times, and 1 worker equals 2.
"""

import torch
import torch.nn.functional as F


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


def clipped_policy(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate, sum_t max(-rho_t A_t, -clip(rho_t, 1 - e, 1 + e) A_t). Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    All inputs float32 [R] over response tokens; rho = exp(log_probs - old_log_probs), the exponent kept within +-20 so
    that one absurd token cannot make an infinity. Returns (loss sum, number of clipped tokens, sum of the k3 estimates of
    KL(old || new)): the second and third are metrics and carry no gradient.
    """
    delta = (log_probs - old_log_probs).clamp(-20.0, 20.0)
    ratio = delta.exp()
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    with torch.no_grad():
        clipped_tokens = (clipped > plain).float().sum()
        moved = (ratio - 1 - delta).sum()
    return torch.maximum(plain, clipped).sum(), clipped_tokens, moved


def clipped_value(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """0.5 sum_t max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2). Engstrom et al. 2020, arXiv:2005.12729.

    All inputs float32 [R] over response tokens. Returns (loss sum, number of clipped tokens).
    """
    # Clamped itself, not its distance: old + (values - old) is values only up to rounding, and would count as clipped.
    near = values.clamp(old_values - clip_range, old_values + clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped).sum(), (clipped > plain).float().sum().detach()
