"""A model's weights in buckets: few large pieces instead of one message per parameter, and never the whole model at once.

    mine = shards(model)                                   # this rank's part of every weight, by transformers' names
    for bucket in plan(specs(mine, "bfloat16")):           # lists of Spec, at most 256 MiB each
        packed = gather(mine, bucket, buffer)              # all ranks call it; those with a buffer get the bytes

A packed bucket is the bytes of its tensors, one after another, which is also how vLLM packs them for nccl and CUDA IPC.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

BUCKET = 256 << 20  # bytes: large enough that a call's millisecond is nothing, small enough to have two of them at once


@dataclass(frozen=True)
class Spec:
    """One tensor as it travels."""

    name: str  # transformers' name
    shape: tuple[int, ...]
    dtype: str  # torch's name of it, as "bfloat16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def plan(specs: Sequence[Spec], limit: int = BUCKET) -> list[list[Spec]]:
    """Cut `specs` into buckets of at most `limit` bytes, in their order; a larger tensor has a bucket of its own.

    A pure function: whoever knows the model knows the buckets. Neighbours stay together, so that an engine which loads a layer
    once it is whole keeps little of it waiting.
    """
    buckets: list[list[Spec]] = []
    room = 0
    for spec in specs:
        if not buckets or spec.nbytes > room:
            buckets.append([])
            room = limit
        buckets[-1].append(spec)
        room -= spec.nbytes
    return buckets


def shards(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's part of every weight by transformers' names, tied tensors once. `model` wraps a transformers model as `inner`."""
    state = model.state_dict()  # FSDP's hook shards again what a forward pass has left whole; `named_parameters` would not see that
    named = {name.removeprefix("inner."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if name not in tied(model)}


def tied(model: nn.Module) -> dict[str, str]:
    """Names of weights that are other weights: {"lm_head.weight": "model.embed_tokens.weight"}."""
    return dict(getattr(model.inner, "all_tied_weights_keys", {}) or {})


def specs(weights: Mapping[str, torch.Tensor], dtype: str) -> list[Spec]:
    """What travels: whole shapes, and floating-point numbers as `dtype`. Nothing is gathered."""
    return [
        Spec(name, tuple(t.shape), dtype if t.is_floating_point() else str(t.dtype).removeprefix("torch.")) for name, t in weights.items()
    ]


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor of which this rank may hold a part. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(weights: Mapping[str, torch.Tensor], bucket: Sequence[Spec], into: torch.Tensor | None) -> torch.Tensor | None:
    """The bucket's bytes at the beginning of `into`, a uint8 tensor on any device. All ranks call it, in the same order.

    A rank that needs nothing gives None and only takes part, one tensor at a time.
    """
    begin = 0
    for spec in bucket:
        tensor = whole(weights[spec.name])
        if into is not None:
            raw = tensor.to(getattr(torch, spec.dtype)).contiguous().reshape(-1).view(torch.uint8)
            into[begin : begin + spec.nbytes].copy_(raw)
        begin += spec.nbytes
    return None if into is None else into[:begin]


def size(bucket: Sequence[Spec]) -> int:
    """Bytes of a packed bucket."""
    return sum(spec.nbytes for spec in bucket)


def unpack(packed: torch.Tensor, bucket: Sequence[Spec]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything in a packed bucket: views, unless a tensor stands askew behind smaller numbers."""
    begin = 0
    for spec in bucket:
        part, dtype = packed[begin : begin + spec.nbytes], getattr(torch, spec.dtype)
        yield spec.name, (part if begin % dtype.itemsize == 0 else part.clone()).view(dtype).view(spec.shape)
        begin += spec.nbytes
