"""The learner: model + optimizer + process group; packed batches in, one optimizer step and metrics out.

    learner = Learner(LanguageModel(causal_lm), recipe.pretrain, steps=400)
    metrics = learner.step([batch, batch], loss)     # micro-batches of this rank
    learner.save(folder / "checkpoints", step=100)   # all ranks together

The same learner is driven by Ray Train's workers (pretrain, sft, reward) and by the policy and critic actors of PPO.

Order in which a model is prepared, and why:
1. to the device, in fp32: master weights, so that small updates are not rounded away;
2. linear layers of the blocks swapped for fp8 ones, if asked: what is compiled and sharded is then theirs;
3. each block compiled, if asked: FSDP's own work stays between the compiled parts;
4. FSDP over blocks (GPU), then over the root: parameters, gradients and optimizer states are sharded, matmuls run in
   `hardware().dtype`, gradients are reduced in fp32. A single CPU process has nothing to shard and skips it;
5. the optimizer last: it must see the sharded parameters.
"""

import math
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from cluster import checkpoints
from cluster.hardware import hardware
from rlhf.errors import NotFinite
from rlhf.float8 import to_float8
from rlhf.models import Batch
from rlhf.optimizers import learning_rate, optimizers
from rlhf.recipe import Optimizer, Pretrain, Training

# What selective checkpointing keeps: the expensive part of a block. Norms, rotary embeddings and SwiGLU are cheap to compute again.
KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.roundhouse.linear.default,  # `cpu_kernels`
    torch.ops.aten._scaled_mm.default,  # fp8
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]

# FLOP of one rank from which on compiled blocks win more than they cost: 12 % of ten minutes of a core at 70 GFLOP/s; of a GPU's at 40 %
# of an H100's peak.
WORTH_COMPILING = {"cpu": 4e13, "cuda": 2e17}

# (model, micro-batch) -> (sum of the loss, further sums to report); the batch's weights say what the sum counts
Loss = Callable[[nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class Learner:
    def __init__(self, model: nn.Module, config: Optimizer, steps: int, learning_rate: float | None = None) -> None:
        """`steps` is the length of the schedule, `learning_rate` replaces the config's peak (PPO's critic has its own)."""
        self.hardware = hardware()
        self.config = config
        self.steps = steps
        self.peak = config.learning_rate if learning_rate is None else learning_rate
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if isinstance(config, Training) and config.float8:
            to_float8(model)
        checkpoint_activations(model, config.activation_checkpointing)
        if config.compile:
            compile_blocks(model)
        self.model = shard(model.to(self.hardware.device), self.world)
        self.embeddings_only = config.embeddings_only_steps if isinstance(config, Pretrain) else 0  # steps
        self.optimizers = optimizers(self.model, config, self.peak, self.embeddings_only > 0)
        self.taken = 0
        self.layer_norms: dict[str, float] = {}

    def step(self, micro_batches: Sequence[Batch], loss: Loss) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches of a global batch.

        Gradients are those of (sum of the loss over all ranks) / (count over all ranks). Every rank must bring the same
        number of micro-batches. Returns `loss`, `grad_norm`, `learning_rate` and each further sum divided by the count;
        `layer_norms` then holds every layer's gradient norm before clipping.

        A batch that teaches nothing, every gradient being 0 (as answers that are all worth the same), moves nothing.

        Raises NotFinite when the loss or the gradient is not finite; the weights are then untouched.
        """
        self.model.train()
        counts = [batch.weights.sum() for batch in micro_batches]
        total = self._sum(torch.stack(counts).sum().double().reshape(1))[0].clamp(min=1e-9)
        sums: dict[str, torch.Tensor] = {}
        for batch in micro_batches:
            value, further = loss(self.model, batch)
            # FSDP averages gradients over the ranks, so a rank's share is multiplied by their number.
            (value * (self.world / total.float())).backward()
            for name, part in {"loss": value.detach(), **further}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=part.device)) + part.double()
        gradients = layer_gradients(self.model)
        squares = [torch.stack(torch._foreach_norm(of_layer)).double().square().sum() for of_layer in gradients.values()]
        found = self._sum(torch.stack([*sums.values(), *squares])).tolist()  # one meeting of the ranks for all figures
        means = {name: value / total.item() for name, value in zip(sums, found, strict=False)}
        self.layer_norms = dict(zip(gradients, (x**0.5 for x in found[len(sums) :]), strict=True))
        grad_norm = math.hypot(*self.layer_norms.values())
        if not (math.isfinite(grad_norm) and math.isfinite(means["loss"])):
            self.model.zero_grad(set_to_none=True)
            raise self._not_finite(micro_batches, loss, means["loss"])
        if grad_norm > self.config.max_grad_norm:
            torch._foreach_mul_([g for of_layer in gradients.values() for g in of_layer], self.config.max_grad_norm / (grad_norm + 1e-6))
        rate = learning_rate(self.taken, self.steps, self.peak, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if self.taken < self.embeddings_only and not group.get("embeddings") else rate
            if grad_norm:  # else momentum alone would move the weights, Muon's for ever: 60 steps of it went 30 nats away
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.taken += 1
        return {**means, "grad_norm": grad_norm, "learning_rate": rate}

    @torch.no_grad()
    def _not_finite(self, micro_batches: Sequence[Batch], loss: Loss, value: float) -> NotFinite:
        """Which layer and which micro-batches of which rank. All ranks compute their losses once more, watched."""
        first: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if not first and isinstance(hidden, torch.Tensor) and not hidden.isfinite().all():
                    first.append(name)

            return hook

        outermost = {layer_of(name): module for name, module in reversed(list(self.model.named_modules())) if layer_of(name)}
        hooks = [module.register_forward_hook(watch(name)) for name, module in outermost.items()]
        culprits = []
        for i, batch in enumerate(micro_batches):
            first.clear()
            part = float(loss(self.model, batch)[0])
            if first or not math.isfinite(part):
                culprits.append((i, first[0] if first else "the loss"))
        for hook in hooks:
            hook.remove()
        of_ranks = [culprits]
        if self.world > 1:
            of_ranks = [[] for _ in range(self.world)]
            dist.all_gather_object(of_ranks, culprits)
        bad = [(rank, i, where) for rank, some in enumerate(of_ranks) for i, where in some]
        # Backward goes from the last layer to the first: what is not finite began in the last one that shows it.
        backward = [layer for layer, norm in self.layer_norms.items() if not math.isfinite(norm)]
        where = bad[0][2] if bad else f"the gradient of {backward[-1]}"
        text = f"step {self.taken}: the loss is {value}; what is not finite begins in {where}. The weights of the step before are kept"
        return NotFinite(text, [(rank, i) for rank, i, _ in bad])

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch], loss: Loss) -> dict[str, float]:
        """Sums over all ranks of the loss, of what it counts (`count`) and of the further sums; nothing is learned."""
        self.model.eval()
        sums: dict[str, torch.Tensor] = {}
        for batch in micro_batches:
            value, further = loss(self.model, batch)
            for name, part in {"loss": value, "count": batch.weights.sum(), **further}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=part.device)) + part.double()
        return dict(zip(sums, self._sum(torch.stack(list(sums.values()))).tolist(), strict=True))

    def save(self, folder: Path, step: int) -> None:
        """Write checkpoint `folder/step_N`, sharded over the ranks; only whole checkpoints ever get that name."""
        model, optimizer = get_state_dict(self.model, self.optimizers, options=what_learns(self.model))
        checkpoints.save(folder, step, {"model": model, "optimizer": optimizer}, {"optimizer_steps": self.taken})

    def load(self, folder: Path, step: int) -> None:
        """Continue exactly where checkpoint `folder/step_N` was written, on any number of ranks."""
        model, optimizer = get_state_dict(self.model, self.optimizers, options=what_learns(self.model))
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        self.taken = checkpoints.load(folder, step, state)["optimizer_steps"]
        loaded = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizers, **loaded, options=what_learns(self.model))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values


def what_learns(model: nn.Module) -> StateDictOptions:
    """Checkpoints leave frozen parameters out: whoever loads one has them from the base model. (Of a tied table torch writes
    the frozen output layer all the same.)"""
    frozen = any(not p.requires_grad for p in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def compile_blocks(model: nn.Module) -> None:
    for block in model.inner.base_model.layers:  # type: ignore[union-attr]
        block.compile(dynamic=True)  # one program for all lengths; attention stays outside of it


def pays_to_compile(model: nn.Module, tokens: float) -> bool:
    """Is it a minute's gain to compile, for a rank that trains on so many tokens? A function of the recipe, not of a clock: a resumed
    run has to compute what it computed before, to the last bit."""
    work = 6 * sum(p.numel() for p in model.parameters()) * tokens
    return work > WORTH_COMPILING[hardware().device.type] and (hardware().is_gpu or shutil.which("g++") is not None)


def checkpoint_activations(model: nn.Module, what: str) -> None:
    """Keep less of each block for the backward pass: with `full` its input alone, with `selective` also its matmuls and attention."""
    if what == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    model.inner.gradient_checkpointing_enable(how)  # type: ignore[union-attr, operator]


def layer_of(name: str) -> str:
    """The layer of a parameter or module: "layers.3" for what is in a block, "embed_tokens", "norm", "score", ... elsewhere."""
    if block := re.search(r"\b(?:layers|h)\.\d+", name):
        return block[0]
    parts = [part for part in name.split(".") if part not in ("inner", "model", "transformer", "layers", "h", "weight", "bias")]
    return parts[0] if parts else ""


def layer_gradients(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """This rank's part of all gradients, by layer from first to last."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found.setdefault(layer_of(name), []).append(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad)
    return found


def shard(model: nn.Module, world: int) -> nn.Module:
    """FSDP2 over the transformer blocks and the root; see the order at the top of this file."""
    hw = hardware()
    if world == 1 and not hw.is_gpu:
        return model
    mesh = dist.device_mesh.init_device_mesh(hw.device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=hw.dtype, reduce_dtype=torch.float32)
    # Weights of 4 bits are packed bytes: every rank keeps them whole.
    whole = {p for p in model.parameters() if not p.is_floating_point()}
    if hw.is_gpu:  # A CPU's ranks share one memory: one unit, gathered at once, took 0.56 s a step against 0.62 s block by block.
        blocks: Any = model.inner.base_model.layers  # type: ignore[union-attr]
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
    return model


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole model in transformers' names, fp32 on the CPU, tied tensors once. All ranks call it; rank 0 receives it."""
    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    tied = set(getattr(model.inner, "all_tied_weights_keys", {}) or {})
    return {name.removeprefix("inner."): t for name, t in state.items() if name.removeprefix("inner.") not in tied}
