"""Packed attention: many segments in one row of tokens, none sees another, no model is touched.

    from rlhf.attention import PACKED, Segments
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=PACKED)
    model(input_ids=tokens[None], position_ids=positions[None], segments=Segments.of([5, 3], device), use_cache=False)

A segment may continue another one: `Segments.of([5, 3, 4], device, prefixes=[-1, 0, 0])` is a prompt of 5 tokens and two
answers; each answer sees the prompt and itself. The prompt's layers are computed once for both. What is continued may continue
another one: a system prompt, questions behind it, answers to each.

Keys and values that stand before every text, learned and no token's own (prefix tuning), come with the segments too:
`Segments.of([5, 3], device, virtual=[(keys, values), ...])`, one pair per layer. Positions then begin at their number.

The function is registered with transformers under the name `PACKED`; the keyword `segments` reaches it through every
transformers decoder. `use_cache=False` is not optional: with a cache, transformers builds positions of its own and the
logits are silently wrong (0.77 off in a test with two segments).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from rlhf.errors import RecipeError

PACKED = "roundhouse_packed"

MOST_WASTE = 2.2
"""A prompt and its answers are one call with a mask while that computes at most so many times the scores they need. Forward and
backward on one core: prompt 150 + 2 x 60 tokens, 2.0 times: 36 ms against 57 in pieces; 128 + 8 x 64, 3.8 times: 51 against 31."""


@dataclass(frozen=True)
class Piece:
    """One attention call: the next `count` times `size` tokens of the row. Each run of `size` sees all virtual keys, those of the pieces
    `above`, and itself. 8 answers of 64 tokens to a prompt of 128 as one call instead of 8: see docs/LOG.md."""

    size: int
    above: tuple[int, ...] = ()
    mask: torch.Tensor | None = None  # float32 [queries, keys], 0 or -inf; None: causal
    count: int = 1


@dataclass(frozen=True)
class Segments:
    """Where one segment ends and the next begins in a packed row of T tokens, and which one continues which."""

    lengths: tuple[int, ...]  # sums to T
    prefixes: tuple[int, ...]  # the segment that each one continues, -1 for none
    ends: torch.Tensor  # int32 [n + 1], cumulative from 0, on the compute device
    pieces: tuple[Piece, ...]  # for CPUs; their sizes sum to T
    keys: torch.Tensor | None = None  # for GPUs, with prefixes or virtual keys: int64 [K], the places of all segments' keys
    key_ends: torch.Tensor | None = None  # int32 [n + 1]
    virtual: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # per layer (keys, values), each [1, H_kv, v, d]

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        prefixes: Sequence[int] = (),
        virtual: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> "Segments":
        """`prefixes`, when given, holds for each segment the index of an earlier one that it continues, or -1; `virtual` holds for
        each layer the keys and values [1, H_kv, v, d] that every text sees before its own."""
        prefixes = tuple(prefixes) or (-1,) * len(lengths)
        ends = [0, *accumulate(lengths)]
        before = virtual[0][0].shape[2] if virtual else 0
        plain = cls(tuple(lengths), prefixes, torch.tensor(ends, dtype=torch.int32, device=device), (), virtual=tuple(virtual))
        if device.type != "cuda":
            return replace(plain, pieces=tuple(_pieces(lengths, prefixes, ends, before)))
        if max(prefixes) < 0 and not before:
            return plain
        keys, key_ends = _gathered(prefixes, ends, before)
        return replace(plain, keys=keys.to(device), key_ends=key_ends.to(device))

    @property
    def most_keys(self) -> int:
        """How many keys the last token of a segment sees, in the segment where that is most."""
        before = self.virtual[0][0].shape[2] if self.virtual else 0
        return before + max(sum(self.lengths[p] for p in _text(self.prefixes, i)) for i in range(len(self.lengths)))


def _text(prefixes: Sequence[int], i: int) -> list[int]:
    """The segments of the text that ends with segment i, from its first one on."""
    text = [i]
    while (i := prefixes[i]) >= 0:
        text.append(i)
    return text[::-1]


def _gathered(prefixes: Sequence[int], ends: list[int], before: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of each segment's keys, int64 [K], and where they end, int32 [n + 1]; the row's keys stand behind `before` virtual ones."""
    spans = [[(0, before), *[(before + ends[p], before + ends[p + 1]) for p in _text(prefixes, i)]] for i in range(len(prefixes))]
    keys = torch.cat([torch.arange(*span) for some in spans for span in some])
    key_ends = [0, *accumulate(sum(end - start for start, end in some) for some in spans)]
    return keys, torch.tensor(key_ends, dtype=torch.int32)


def _causal(queries: int, keys: int) -> torch.Tensor:
    """float32 [queries, keys]: the last query sees all keys, each one before it one less."""
    return torch.full((queries, keys), -torch.inf).triu_(1 + keys - queries)


def _pieces(lengths: Sequence[int], prefixes: Sequence[int], ends: list[int], before: int) -> list[Piece]:
    pieces: list[Piece] = []
    continued: set[int] = set()  # pieces that hold a segment which others continue
    answers: list[list[int]] = [[] for _ in lengths]
    for i, p in enumerate(prefixes):
        if p >= 0:
            answers[p].append(i)

    def lay(i: int, above: tuple[int, ...], seen: int) -> int:
        """Segment i and all that continues it, behind `seen` keys of the pieces `above`; returns which segment comes next."""
        own, begins, last = lengths[i], before + seen, i + 1 + len(answers[i])
        if not answers[i]:
            like = pieces[-1] if pieces and len(pieces) - 1 not in continued else None
            if like is not None and (like.size, like.above) == (own, above):
                pieces[-1] = replace(like, count=like.count + 1)
            else:
                pieces.append(Piece(own, above, _causal(own, begins + own) if begins else None))
            return i + 1
        if answers[i] == list(range(i + 1, last)) and not any(answers[a] for a in answers[i]):
            start, size = ends[i], ends[last] - ends[i]
            needed = own * (seen + own / 2) + sum(lengths[a] * (seen + own + lengths[a]) for a in answers[i])
            if size * (seen + size) <= MOST_WASTE * needed:
                mask = _causal(size, begins + size)
                for a in answers[i]:
                    mask[ends[a] - start : ends[a + 1] - start, begins + own : begins + ends[a] - start] = -torch.inf  # the answers before
                continued.add(len(pieces))
                pieces.append(Piece(size, above, mask))
                return last
        continued.add(len(pieces))
        pieces.append(Piece(own, above, _causal(own, begins + own) if begins else None))
        after, above = i + 1, (*above, len(pieces) - 1)
        for a in answers[i]:
            if a != after:
                break  # told below: whoever continues the same segment has to come next
            after = lay(a, above, seen + own)
        return after

    i = 0
    while i < len(lengths):
        if prefixes[i] >= 0:
            raise ValueError(f"segment {i} continues segment {prefixes[i]}, but does not stand right after it and what else continues it")
        i = lay(i, (), 0)
    return pieces


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
    """Causal attention within each segment, its prefix and virtual keys. query [1, H, T, d], key and value [1, H_kv, T, d] -> [1, T, H, d].

    Raises RecipeError for what a model may ask of attention and this does not do: it would be wrong without a sign.

    GPU: one varlen kernel. CPU: an SDPA call per piece, which is all there is of pretraining's windows: 464 ms against 611 ms for one
    causal call over all 1024 tokens and 1123 ms with a mask (128-token segments).
    """
    if softcap is not None or s_aux is not None or (sliding_window is not None and segments.most_keys > sliding_window):
        raise RecipeError(
            f"{type(module).__name__}: soft-capped logits, attention sinks and segments longer than a sliding window "
            f"({sliding_window}) are not supported by packed attention; start from another model, or shorten the sequences"
        )
    virtual: tuple[torch.Tensor, ...] = ()
    if segments.virtual:
        virtual = tuple(x.to(key.dtype) for x in segments.virtual[module.layer_idx])  # type: ignore[index]
    if query.device.type == "cuda":
        return _varlen(query, key, value, segments, virtual, scaling), None
    grouped, pieces = query.shape[1] != key.shape[1], segments.pieces
    # Split, not sliced: the backward pass of a slice fills a row of zeros, and adds it (16 % of a GRPO update of 72 segments).
    sizes = [piece.count * piece.size for piece in pieces]
    queries, keys, values = (of.split(sizes, dim=2) if len(sizes) > 1 else [of] for of in (query, key, value))

    def attend(at: int, piece: Piece) -> torch.Tensor:
        n = piece.count

        def runs(of: torch.Tensor) -> torch.Tensor:
            """[1, H, n * size, d] -> [n, H, size, d]. Squeezed, not indexed, for the same reason."""
            return of if n == 1 else of.squeeze(0).unflatten(1, (n, piece.size)).transpose(0, 1)

        def seen(first: tuple[torch.Tensor, ...], of: Sequence[torch.Tensor]) -> torch.Tensor:
            before = [*first, *(of[i] for i in piece.above)]
            return torch.cat([*(x.expand(n, -1, -1, -1) for x in before), runs(of[at])], dim=2) if before else runs(of[at])

        k, v = seen(virtual[:1], keys), seen(virtual[1:], values)
        mask = None if piece.mask is None else piece.mask.to(query.dtype)
        q = runs(queries[at])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(1, n * piece.size, *out.shape[1::2])  # [1, n * size, H, d]

    found = [attend(at, piece) for at, piece in enumerate(pieces)]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0], None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    virtual: Sequence[torch.Tensor],
    scaling: float | None,
) -> torch.Tensor:
    """The same by torch's varlen (flash) kernel; bf16 or fp16 on CUDA. Has not run on a GPU yet.

    A segment with a prefix or virtual keys has more keys than queries: its keys are gathered, and flash aligns the causal mask at
    the end.
    """
    from torch.nn.attention.varlen import varlen_attn

    if virtual:
        key, value = (torch.cat([x, own], dim=2) for x, own in zip(virtual, (key, value), strict=True))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    key_ends, longest = segments.ends, max(segments.lengths)
    if segments.keys is not None and segments.key_ends is not None:
        k, v, key_ends = k[segments.keys], v[segments.keys], segments.key_ends
    causal = (-1, 0)
    out = varlen_attn(q, k, v, segments.ends, key_ends, longest, segments.most_keys, scale=scaling, window_size=causal, enable_gqa=True)
    assert isinstance(out, torch.Tensor)  # a tuple only when auxiliary outputs are asked for
    return out[None]


def _no_mask(*_: object, **__: object) -> None:
    """Segments say it all; transformers shall not build a [T, T] mask."""


# Its calls differ from batch to batch: a compiled block is two programs, before it and after it.
AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
AttentionMaskInterface.register(PACKED, _no_mask)
