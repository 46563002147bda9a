"""Optimizers and schedules: AdamW, or Muon for the matrices of the blocks and AdamW for everything else.

    found = optimizers(model, recipe.pretrain)            # sharded parameters already in place
    for optimizer in found: ...                           # their "lr" is set before every step:
    rate = learning_rate(step, steps, peak, recipe.pretrain)

Weight decay is decoupled and spares norms and biases.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cluster.hardware import hardware
from rlhf.recipe import Optimizer

# A quintic whose five iterations bring singular values of [0.001, 1] to 0.7 ... 1.2 (Jordan et al. 2024): nearly
# orthogonal is enough, and three matmuls an iteration are all it takes.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def optimizers(model: nn.Module, config: Optimizer, peak: float, embeddings_apart: bool = False) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters that learn; with `embeddings_apart`, embeddings and output layer are a group of their own, which
    says so by "embeddings"."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = [p for name, p in learning if config.optimizer == "muon" and p.ndim == 2 and ".layers." in name]
    apart = {id(p) for p in by_muon}
    embeddings: list[nn.Parameter] = []
    if embeddings_apart:
        tables = {id(m.weight) for m in (model.inner.get_input_embeddings(), model.inner.get_output_embeddings())}  # type: ignore[union-attr, operator]
        embeddings = [p for _, p in learning if id(p) in tables]
        apart |= tables
    matrices = [p for _, p in learning if p.ndim >= 2 and id(p) not in apart]
    vectors = [p for _, p in learning if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups.append({"params": embeddings, "weight_decay": config.weight_decay, "embeddings": True})
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=peak, betas=config.betas, eps=1e-8, fused=True)
    return [adam, Muon(by_muon, peak, config.weight_decay)] if by_muon else [adam]


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal: every direction in it moves at the same rate.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; the update is scaled by 0.2 sqrt(max(rows, columns)), after which AdamW's
    rates and weight decay fit (Liu et al. 2025, arXiv:2502.16982, section 2.2). `torch.optim.Muon` iterates in bf16, which CPUs
    emulate 100 times slower than fp32, and sees no more than its shard of a sharded matrix; hence this one. Every rank gathers
    the momentum of a matrix, iterates, and keeps its shard.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p.grad))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov's look ahead
                whole = update.full_tensor() if isinstance(update, DTensor) else update
                change = orthogonal(whole) * (0.2 * math.sqrt(max(whole.shape)))
                if isinstance(update, DTensor):  # every rank has all of it and cuts its own part out
                    change = distribute_tensor(change, update.device_mesh, update.placements, src_data_rank=None)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the singular vectors of `matrix` [m, n] and singular values near 1, in its dtype; zero for zero."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(hardware().dtype)
    x = x.T if (tall := matrix.shape[0] > matrix.shape[1]) else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def learning_rate(step: int, steps: int, peak: float, config: Optimizer) -> float:
    """Linear warm-up from 0, then the schedule from the peak to `final_lr_fraction` of it at the last step.

    cosine: arXiv:1608.03983; linear; wsd: constant, then linear over the last `decay_fraction` of the steps, arXiv:2404.06395.
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    falls = warmup if config.schedule != "wsd" else max(warmup, steps - 1 - round(config.decay_fraction * steps))
    progress = min(1.0, max(0.0, (step - falls) / max(1, steps - 1 - falls)))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return peak * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)
