"""Where the memory goes: an estimate by parts, the largest micro-batch that fits, and what to change after an out-of-memory error.

    parts = estimate_memory(learner, loss, batch)              # a small batch tells the activations per token
    tokens = largest_micro_batch(parts, available())    # recipe: micro_batch: auto
    with explained("pretrain", parts, free, micro_batch, longest, workers, "cluster.workers"):
        learner.step(...)                               # an out-of-memory error becomes a TrainingError that names parts and cures
    with engine_explained(path, max_tokens=2048, tensor_parallel=1):
        LLM(...)                                        # the same for an engine: weights and KV cache

Weights, gradients and optimizer states are counted from the tensors that are there, activations from what autograd keeps for
a small batch; both are exact for this rank, and the rest is proportion.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from cluster.hardware import hardware
from rlhf.errors import TrainingError
from rlhf.learner import Learner, Loss
from rlhf.models import Batch, rows_at_once

GIB = 2**30
USABLE = 0.9  # of the free memory: allocators fragment, and Ray and the page cache need some
RECOMPUTED = "a third more work: every block computes its forward pass twice"


@dataclass(frozen=True)
class Memory:
    """Bytes on this rank."""

    weights: int
    gradients: int
    optimizer: int
    logits: int
    per_token: float  # activations of one token
    per_token_checkpointed: float  # the same with activation_checkpointing=full

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.logits


def estimate_memory(learner: Learner, loss: Loss, batch: Batch) -> Memory:
    """By the learner's tensors and what a forward pass of `batch` keeps. All ranks call it."""
    parameters = list(learner.model.parameters())
    weights = sum(_size(p) for p in parameters)
    gradients = sum(_size(p) for p in parameters if p.requires_grad)
    states = {"adamw": 2, "muon": 1}  # muon keeps one for the matrices of the blocks; the few others are not worth a line
    inner = learner.model.inner
    config = inner.config.get_text_config()  # type: ignore[union-attr, operator]
    width = torch.empty((), dtype=hardware().dtype).element_size()
    most = rows_at_once(config.vocab_size) if hasattr(inner, "lm_head") else 0
    logits = most * config.vocab_size * 4 * 2  # fp32, and their gradient
    per_token = _kept(learner, loss, batch, config.vocab_size) / len(batch.tokens)
    blocks = config.num_hidden_layers
    checkpointed = per_token / blocks + blocks * config.hidden_size * width  # one block at a time, and every block's input
    return Memory(weights, gradients, states[learner.config.optimizer] * gradients, logits, per_token, min(per_token, checkpointed))


def available() -> int:
    """Bytes that this rank may take: free on its GPU, or its share of what is free on this machine."""
    if hardware().is_gpu:
        return torch.cuda.mem_get_info()[0]
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return psutil.virtual_memory().available // ranks


def largest_micro_batch(memory: Memory, free: int, longest: int) -> int:
    """Tokens of the largest micro-batch that fits into `free` bytes beside gradients, optimizer and logits; at least `longest`.

    Rounded down to a multiple of 64, and never more than 64 k tokens: beyond it nothing gets faster.
    """
    room = USABLE * free - memory.gradients - memory.optimizer - memory.logits
    return max(longest, min(65536, int(room / max(memory.per_token, 1.0)) // 64 * 64))


def least_of_all(value: int) -> int:
    """The smallest of all ranks' values: what all can do."""
    found = torch.tensor(value, device=hardware().device)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


@contextmanager
def explained(stage: str, memory: Memory, free: int, micro_batch: int, longest: int, workers: int, workers_key: str) -> Iterator[None]:
    """An out-of-memory error of the block as a TrainingError by `help_for`; others pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(help_for(stage, memory, free, micro_batch, longest, workers, workers_key)) from error


def help_for(stage: str, memory: Memory, free: int, micro_batch: int, longest: int, workers: int, workers_key: str) -> str:
    """What held the memory, and the changes of the recipe that would fit, cheapest first."""
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "logits": memory.logits,
        f"activations of {micro_batch:,} tokens": int(memory.per_token * micro_batch),
    }
    limit = USABLE * free
    changes = []
    smaller = largest_micro_batch(memory, free, longest)
    if smaller < micro_batch and memory.fixed + memory.per_token * smaller <= limit + memory.weights:
        changes.append(f"{stage}.micro_batch={smaller}: the same work in more passes; slower only below some 1,000 tokens")
    if memory.fixed + memory.per_token_checkpointed * micro_batch <= limit:
        changes.append(f"{stage}.activation_checkpointing=full: {RECOMPUTED}")
    elif memory.fixed + memory.per_token_checkpointed * longest <= limit:
        changes.append(f"{stage}.activation_checkpointing=full and {stage}.micro_batch={longest}: {RECOMPUTED}")
    if not changes:
        need = memory.fixed - memory.logits
        more = -(-int(need * workers) // max(1, int(limit - memory.logits - memory.per_token_checkpointed * longest)))
        changes.append(f"{workers_key}={max(more, workers + 1)}: weights, gradients and optimizer are shared among the workers' devices")
    return _told(f"{stage}: out of memory. This worker had {free / GIB:.2f} GiB to fill, and would hold", parts, changes)


@contextmanager
def engine_explained(model: Path, max_tokens: int, tensor_parallel: int) -> Iterator[None]:
    """An engine that finds no room for the weights in `model` or for the KV cache of one sequence, as a TrainingError; others pass."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if not is_out_of_memory(error) and "KV cache" not in str(error) and "cache blocks" not in str(error):
            raise
        config = AutoConfig.from_pretrained(model).get_text_config()
        width = torch.empty((), dtype=hardware().dtype).element_size()
        heads, size = config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parts = {
            "weights": _parameters(model) * width // tensor_parallel,
            f"KV cache of one answer of {max_tokens:,} tokens": 2 * config.num_hidden_layers * heads * size * width * max_tokens,
        }
        changes = [
            "ppo.max_response_tokens or ppo.max_prompt_tokens lower: the KV cache grows with their sum",
            f"ppo.groups.rollout.tensor_parallel={2 * tensor_parallel}: weights and KV cache are split among as many devices of an engine",
        ]
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(_told(f"rollout: the engine finds no room ({reason}). It would hold", parts, changes)) from error


def _told(first: str, parts: Mapping[str, int], changes: Sequence[str]) -> str:
    width = max(map(len, parts))
    table = [f"  {name:<{width}}  {size / GIB:8.2f} GiB" for name, size in sorted(parts.items(), key=lambda part: -part[1])]
    return "\n".join([first, *table, "What would fit:", *(f"  {change}" for change in changes)])


def _parameters(model: Path) -> int:
    """How many numbers the weights in a directory are."""
    count = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # no mapping
    return count


def _kept(learner: Learner, loss: Loss, batch: Batch, vocabulary: int) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and logits aside, each storage once."""
    own = {_local(p).untyped_storage().data_ptr() for p in learner.model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[-1:] != (vocabulary,):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    learner.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value, _ = loss(learner.model, batch)
    (value * 0).backward()  # FSDP expects a backward pass after a forward one
    learner.model.zero_grad(set_to_none=True)
    return sum(storages.values())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _size(tensor: torch.Tensor) -> int:
    local = _local(tensor)
    return local.numel() * local.element_size()
