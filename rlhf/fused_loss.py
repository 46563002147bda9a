"""Output layer and cross-entropy as one operation: the logits of a few rows at a time, their gradient before they are forgotten.

    loss = weighted_cross_entropy(hidden, head.weight, targets, weights)      # sum_r -w_r log p_r, for autograd
    found = target_log_probs(hidden, head.weight, targets, keep=True)         # log p_r, whose weights are not known yet

The loss is linear in the log-probabilities and its weights are known, so each chunk's gradient is known as soon as its logits are:
nothing of the size [rows, vocabulary] is kept for the backward pass and no logits are computed twice (the idea of Hsu et al. 2024,
arXiv:2410.10989, section 3.2). Where all logits fit at once that saves memory and no time (one core, 4,096 rows of 256 features, a
vocabulary of 8,192: 0.73 s either way, what the three matmuls take); where they do not, it saves a second pass through the output layer.
"""

from typing import Any

import torch

from rlhf.cpu_kernels import linear

LOGITS_OF_GPU = 1 << 26  # logits at once: 256 MiB in fp32
LOGITS_OF_CPU = 1 << 23  # 32 MiB; below 2^21 the small matmuls cost 5 to 25 %


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        wants_hidden, wants_table, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_table = torch.zeros_like(table, dtype=torch.float32) if wants_table else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for some in _chunks(hidden, table):
            h, t, w = (x[some] for x in (hidden, targets, weights))
            logits = linear(h, table)
            log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
            loss -= (log_p.gather(1, t[:, None])[:, 0] * w).sum()
            # d(-w log p_t) / d logits = w (softmax - onehot of t)
            gradient = log_p.exp_().mul_(w[:, None]).scatter_add_(1, t[:, None], -w[:, None]).to(table.dtype)
            if of_hidden is not None:
                torch.mm(gradient, table, out=of_hidden[some])
            _add(of_table, gradient, h)
        ctx.gradients = of_hidden, None if of_table is None else of_table.to(table.dtype)  # of nobody's inputs or outputs: no cycle
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if g is None else g * upstream[0].to(g.dtype) for g in ctx.gradients), None, None


def weighted_cross_entropy(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_r -w_r log softmax(table hidden_r)[target_r], float32 scalar, in nats.

    hidden [R, d], table [vocabulary, d], targets int64 [R], weights float32 [R] (no gradient flows into them).
    """
    value: torch.Tensor = _WeightedCrossEntropy.apply(hidden, table, targets, weights)
    return value


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, keep: bool) -> torch.Tensor:
        found, kept = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device), []
        for some in _chunks(hidden, table):
            log_p = torch.log_softmax(linear(hidden[some], table), -1, dtype=torch.float32)
            found[some] = log_p.gather(1, targets[some, None])[:, 0]
            if keep:
                kept.append(log_p)
        ctx.save_for_backward(hidden, table, targets, *kept)
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, table, targets, *kept = ctx.saved_tensors
        wants_hidden, wants_table, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_table = torch.zeros_like(table, dtype=torch.float32) if wants_table else None
        for i, some in enumerate(_chunks(hidden, table)):
            log_p = kept[i] if kept else torch.log_softmax(linear(hidden[some], table), -1, dtype=torch.float32)
            g, t = upstream[0][some, None], targets[some, None]
            # d log p_t / d logits = onehot of t - softmax
            gradient = log_p.exp_().mul_(-g).scatter_add_(1, t, g).to(table.dtype)
            if of_hidden is not None:
                torch.mm(gradient, table, out=of_hidden[some])
            _add(of_table, gradient, hidden[some])
        return of_hidden, None if of_table is None else of_table.to(table.dtype), None, None


def _chunks(hidden: torch.Tensor, table: torch.Tensor) -> list[slice]:
    """Rows whose logits are computed at once."""
    rows = max(1, (LOGITS_OF_GPU if hidden.is_cuda else LOGITS_OF_CPU) // table.shape[0])
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _add(of_table: torch.Tensor | None, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """of_table += gradient^T hidden, in float32: in bf16 every chunk would round what the others added."""
    if of_table is None:
        return
    if of_table.dtype == gradient.dtype:
        of_table.addmm_(gradient.T, hidden)
    else:
        of_table += gradient.T @ hidden


def target_log_probs(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, keep: bool) -> torch.Tensor:
    """log softmax(table hidden_r)[target_r], float32 [R], in nats, once differentiable.

    hidden [R, d], table [vocabulary, d], targets int64 [R]. `keep`: the [R, vocabulary] log-probabilities stay for the backward pass, which
    makes their gradient in place; without it it computes them again.
    """
    value: torch.Tensor = _TargetLogProbs.apply(hidden, table, targets, keep and torch.is_grad_enabled())
    return value
