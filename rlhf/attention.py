"""Packed attention: many segments in one row of tokens, none sees another, no model is touched.

    from rlhf.attention import PACKED, Segments
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=PACKED)
    model(input_ids=tokens[None], position_ids=positions[None], segments=Segments.of([5, 3], device), use_cache=False)

The function is registered with transformers under the name `PACKED`; the keyword `segments` reaches it through every
transformers decoder. `use_cache=False` is not optional: with a cache, transformers builds positions of its own and the
logits are silently wrong (0.77 off in a test with two segments).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from rlhf.errors import RecipeError

PACKED = "roundhouse_packed"


@dataclass(frozen=True)
class Segments:
    """Where one segment ends and the next begins in a packed row of T tokens."""

    lengths: tuple[int, ...]  # sums to T
    ends: torch.Tensor  # int32 [n + 1], cumulative from 0, on the compute device

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Segments":
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(tuple(lengths), ends.to(device))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment. query [1, H, T, d], key and value [1, H_kv, T, d] -> [1, T, H, d].

    Raises RecipeError for what a model may ask of attention and this does not do: it would be wrong without a sign.

    GPU: one varlen kernel. CPU: one SDPA call when all segments are equally long (pretraining windows), else one per
    segment: 464 ms against 611 ms for one causal call over all 1024 tokens and 1123 ms with a mask (128-token segments).
    """
    if softcap is not None or s_aux is not None or (sliding_window is not None and max(segments.lengths) > sliding_window):
        raise RecipeError(
            f"{type(module).__name__}: soft-capped logits, attention sinks and segments longer than a sliding window "
            f"({sliding_window}) are not supported by packed attention; start from another model, or shorten the sequences"
        )
    if query.device.type == "cuda":
        return _varlen(query, key, value, segments, scaling), None
    lengths = segments.lengths
    grouped = query.shape[1] != key.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)

    if len(set(lengths)) == 1:
        n, length = len(lengths), lengths[0]
        q, k, v = (x[0].unflatten(1, (n, length)).transpose(0, 1) for x in (query, key, value))  # [n, H, length, d]
        return attend(q, k, v).transpose(1, 2).reshape(1, n * length, query.shape[1], query.shape[3]), None
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    return torch.cat([attend(q, k, v) for q, k, v in parts], dim=2).transpose(1, 2), None


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float | None) -> torch.Tensor:
    """The same by torch's varlen (flash) kernel; bf16 or fp16 on CUDA. Has not run on a GPU yet."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    longest = max(segments.lengths)
    causal = (-1, 0)
    out = varlen_attn(q, k, v, segments.ends, segments.ends, longest, longest, scale=scaling, window_size=causal, enable_gqa=True)
    assert isinstance(out, torch.Tensor)  # a tuple only when auxiliary outputs are asked for
    return out[None]


def _no_mask(*_: object, **__: object) -> None:
    """Segments say it all; transformers shall not build a [T, T] mask."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
