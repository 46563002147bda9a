"""RMS norms of vLLM's CPU engine by vLLM's own C++ kernels. It builds them for CPUs, and gives them to GPUs alone.

    LLM(model, ir_op_priority=cpu_norms())        # in an engine that runs in this process

Otherwise a norm is six torch operations: of 1.8 s of a rollout (32 answers of 64 tokens, 10.5 M parameters, one thread) .14 instead of .04.
They are registered as vLLM asks kernels from elsewhere to be, with what they need of their arguments.
"""

from functools import cache

import torch
from torch import Tensor

NAME = "roundhouse_cpu"


@cache  # vLLM knows each by its name, and refuses a second one
def cpu_norms() -> dict[str, list[str]]:
    """Register the kernels with vLLM; which operations they are for, as `ir_op_priority` wants it. Where arguments do not suit them
    vLLM takes its own."""
    from vllm import ir

    def suits_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        return weight is not None and weight.dtype == x.dtype and variance_size is None and x.dim() == 2 and x.is_contiguous()

    def suits_add(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        return suits_norm(x, weight, epsilon, variance_size) and x_residual.is_contiguous()

    @ir.ops.rms_norm.register_impl(NAME, supports_args=suits_norm)
    def norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(NAME, supports_args=suits_add, inplace=True)
    def add_and_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual

    return {"rms_norm": [NAME], "fused_add_rms_norm": [NAME]}
