"""Kernels for CPUs that are there already, and that torch or vLLM would not take by themselves.

    use_onednn(model)                             # in place: linear layers by oneDNN, where that is the faster library
    LLM(model, ir_op_priority=cpu_norms())        # vLLM's RMS norms, in an engine that runs in this process

**Linear layers.** torch multiplies float32 by Intel's MKL. On AMD's processors (Zen 4, two threads, the matrices of a 10.5 M model, 5,504
rows) oneDNN, which torch brings along as well, does 171 to 192 GFLOP/s forward and to the inputs where MKL does 104 to 157; to the
weights MKL is as good, and stays. On an Intel machine the two were equal (one thread).

**RMS norms.** vLLM builds C++ kernels for CPUs, and gives them to GPUs alone. Otherwise a norm is six torch operations: of 1.8 s of a
rollout (32 answers of 64 tokens, 10.5 M parameters, one thread) .14 instead of .04. They are registered as vLLM asks kernels from
elsewhere to be, with what they need of their arguments.
"""

from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cluster.hardware import on_amd_cpu

NAME = "roundhouse_cpu"
LEAST = 1 << 16  # weights of a layer from which on its matmul outweighs a call through Python, 256 x 256


@torch.library.custom_op("roundhouse::linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T by oneDNN, float32 [..., out], for x [..., in] and weight [out, in]. Differentiable; compiled code calls it as it is."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad
    of_x = onednn_linear(upstream, weight.t().contiguous()) if wants_x else None
    return of_x, upstream.flatten(0, -2).t() @ x.flatten(0, -2) if wants_weight else None


onednn_linear.register_autograd(_gradients, setup_context=_keep)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, [..., out], by the library that is faster here."""
    found: Tensor = onednn_linear(x, weight) if _pays(weight) else F.linear(x, weight)
    return found


def _pays(weight: Tensor) -> bool:
    return on_amd_cpu() and weight.dtype == torch.float32 and weight.numel() >= LEAST


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A matrix and nothing else: no bias, no adapter in it."""
    return type(layer) is nn.Linear and layer.bias is None


class OneDnnLinear(nn.Linear):
    """A linear layer without bias, of float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = onednn_linear(input, self.weight)
        return found


def use_onednn(model: nn.Module) -> None:
    """Have the plain linear layers of a transformers model, but for its head, computed by oneDNN on AMD's CPUs, in place; their names and
    weights stay what they are."""
    for module in model.base_model.modules():  # type: ignore[union-attr, operator]
        if is_plain(module) and _pays(module.weight):
            module.__class__ = OneDnnLinear


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
