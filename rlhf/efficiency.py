"""How well the machine is used: tokens per second, MFU, waiting for data, memory, goodput.

    clock = Clock(model, world)
    clock.start(); ...; clock.data_is_there(); ...; metrics = clock.stop(tokens, micro_batches)
    clock.summary()                        # of the whole stage: goodput, mean MFU, peak memory

A training token costs 6 FLOP per parameter that multiplies it (4 when it is frozen: it needs no gradient of its own) and 12 x
layers x width per token of its segment, prefix included: Chowdhery et al. 2022, arXiv:2204.02311, appendix B, without a discount
for causality, as the published figures count. Learned keys and values (P-tuning v2) count as parameters: with as many key/value
heads as heads, 6 FLOP for each of them is what attention to them costs.
"""

import resource
import time
from collections.abc import Sequence

import torch
import torch.nn as nn

from cluster.hardware import hardware, peak_flops
from rlhf.models import Batch


class Clock:
    """The times of one rank's steps."""

    def __init__(self, model: nn.Module, world: int) -> None:
        inner = model.inner
        table = inner.get_input_embeddings().weight  # type: ignore[union-attr, operator]
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None  # type: ignore[union-attr, operator]
        tied = head is not None and head.weight is table
        cost = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters())
        self.per_token = cost - (0 if tied else (6 if table.requires_grad else 4) * table.numel())
        config = inner.config.get_text_config()  # type: ignore[union-attr, operator]
        self.attention = 12 * config.num_hidden_layers * config.hidden_size
        self.peak = peak_flops() * world
        self.world = world
        self.born = time.monotonic()
        self.in_steps = self.used = 0.0

    def start(self) -> None:
        self.began = time.monotonic()

    def data_is_there(self) -> None:
        self.waited = time.monotonic() - self.began

    def stop(self, tokens: int, mine: Sequence[Batch]) -> dict[str, float]:
        """Figures of the step just done. tokens: of all ranks; mine: this rank's micro-batches, alike those of the others."""
        seconds = time.monotonic() - self.began
        flops = self.world * sum(self._flops(batch) for batch in mine)
        self.in_steps += seconds
        self.used += flops
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self.peak,
            "data_wait_share": self.waited / seconds,
            "memory_gib": peak_memory() / 2**30,
        }

    def summary(self) -> dict[str, float]:
        """goodput: the share of the time since the start of this try that went into steps (the rest: start, validation, checkpoints)."""
        if not self.in_steps:
            return {}
        wall = time.monotonic() - self.born
        return {"goodput": self.in_steps / wall, "mfu": self.used / self.in_steps / self.peak, "memory_gib": peak_memory() / 2**30}

    def _flops(self, batch: Batch) -> float:
        lengths, prefixes = batch.segments.lengths, batch.segments.prefixes
        attended = sum(n * (n + (lengths[p] if p >= 0 else 0)) for n, p in zip(lengths, prefixes, strict=True))
        return self.per_token * len(batch.tokens) + self.attention * attended


def peak_memory() -> int:
    """Bytes: of the GPU as torch allocated it, or the largest resident size of this process."""
    if hardware().is_gpu:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
