"""Samples of different lengths become packed micro-batches: one row of tokens, no padding.

    plan = balance([len(s.tokens) for s in samples], workers=2, budget=4096)
    mine = [pack([samples[i] for i in ids]) for ids in plan[rank]]       # this worker's micro-batches of the step

A segment is one sample's run of tokens. Segments never see each other: attention gets `lengths`, positions start at 0
in every segment, and the first token of a segment is never predicted (nothing stands before it).

Answers to one prompt share it: `Sample(tokens, weights, lengths=[P, A, B], prefix=True)` holds a prompt of P tokens and two
answers that both continue it. The prompt is computed once, and the results are those of two separate rows.

So is what all samples begin with, a system prompt or the wording of a question: `pack(samples, opening=60)` lays their first 60 tokens
once, and every sample continues them.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.errors import DataError


@dataclass
class Sample:
    """One sequence before packing. Several segments in one sample (a window of the token stream) are given by `lengths`."""

    tokens: np.ndarray
    """Integers `[t]`."""
    weights: np.ndarray
    """Numbers or bools `[t]`: the loss weight of *predicting* this token. That of each segment's first token is ignored."""
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """Further arrays by name: `[t]`, one value per token, or 0-dimensional, one value for the sample."""
    lengths: list[int] | None = None
    """Segment lengths, summing to `t`. Default: the sample is one segment."""
    prefix: bool = False
    """The first segment is a prefix that every other one continues: it sees the prefix and itself, its positions go on from
    the prefix's, and its first token is predicted from the prefix's last."""


def uncounted(sample: Sample) -> Sample:
    """The same tokens with nothing to learn: for a worker that has nothing to do while the others meet in collective operations."""
    return Sample(sample.tokens, np.zeros(len(sample.tokens), np.float32), sample.extras, sample.lengths, sample.prefix)


@dataclass
class PackedBatch:
    """Samples end to end. T = all tokens, n = samples, S = segments (S = n unless samples hold several)."""

    tokens: np.ndarray
    """int64 `[T]`."""
    positions: np.ndarray
    """int64 `[T]`, from 0 in every segment, or from the length of its prefix."""
    before: np.ndarray
    """int64 `[T]`: the place of the token that stands before token t in its text; its own place where nothing does."""
    lengths: list[int]
    """Segment lengths `[S]`, summing to T."""
    prefixes: list[int]
    """`[S]`: the segment that a segment continues, -1 for none."""
    weights: np.ndarray
    """float32 `[T]`: the loss weight of predicting token t; 0 where nothing stands before it."""
    extras: dict[str, np.ndarray]
    """Per-token extras are `[T]`, per-sample extras are `[n]`."""


def pack(samples: Sequence[Sample], opening: int = 0) -> PackedBatch:
    """Lay samples end to end, in the given order; the first `opening` tokens, of which none counts, once for all.

    All samples must carry the same extras. Raises ValueError when there is nothing to pack, when an array does not match
    its sample's tokens, when extras differ between samples, or when the samples do not begin with the same `opening` tokens and go on:
    all of these are mistakes of the caller, not of the data.
    """
    if not samples:
        raise ValueError("pack() needs at least one sample")
    names = samples[0].extras.keys()
    if opening:
        samples = _behind_opening(samples, opening)
    lengths: list[int] = []
    prefixes: list[int] = []
    begins: list[int] = []  # at which position of its text each segment begins
    for number, sample in enumerate(samples):
        size = len(sample.tokens)
        segments = [size] if sample.lengths is None else sample.lengths
        if size == 0 or sum(segments) != size or min(segments) < 1 or len(sample.weights) != size:
            raise ValueError(f"sample {number}: {size} tokens, {len(sample.weights)} weights, segments {segments}")
        if sample.extras.keys() != names:
            raise ValueError(f"sample {number} has extras {sorted(sample.extras)}, the first one has {sorted(names)}")
        for name, values in sample.extras.items():
            if np.ndim(values) and len(values) != size:
                raise ValueError(f"sample {number}: extra {name!r} has {len(values)} values for {size} tokens")
        prefixes += [0 if opening and number else -1] + [len(lengths) if sample.prefix else -1] * (len(segments) - 1)
        lengths.extend(segments)
        for parent in prefixes[len(begins) :]:
            begins.append(0 if parent < 0 else begins[parent] + lengths[parent])

    sizes, continued = np.asarray(lengths, dtype=np.int64), np.asarray(prefixes)
    ends = np.cumsum(sizes)
    starts, first = ends - sizes, continued < 0
    tokens = np.concatenate([np.asarray(s.tokens, dtype=np.int64) for s in samples])
    weights = np.concatenate([np.asarray(s.weights, dtype=np.float32) for s in samples])
    weights[starts[first]] = 0.0
    places = np.arange(len(tokens), dtype=np.int64)
    positions = places - np.repeat(starts - np.asarray(begins), sizes)
    before = places - 1
    before[starts] = np.where(first, starts, ends[continued] - 1)
    extras = {name: np.concatenate([np.atleast_1d(s.extras[name]) for s in samples]) for name in names}
    return PackedBatch(tokens, positions, before, lengths, prefixes, weights, extras)


def _behind_opening(samples: Sequence[Sample], opening: int) -> list[Sample]:
    """The opening as a sample of its own, and the samples without it."""
    first, cut = samples[0], []
    for number, sample in enumerate(samples):
        own = [len(sample.tokens)] if sample.lengths is None else list(sample.lengths)
        if own[0] <= opening or (len(own) > 1 and not sample.prefix):
            raise ValueError(f"sample {number}: segments {own} do not continue an opening of {opening} tokens")
        if not np.array_equal(sample.tokens[:opening], first.tokens[:opening]) or np.any(sample.weights[:opening]):
            raise ValueError(f"sample {number}: its first {opening} tokens count, or are not the first sample's")
        extras = {name: values[opening:] for name, values in sample.extras.items()}
        cut.append(Sample(sample.tokens[opening:], sample.weights[opening:], extras, [own[0] - opening, *own[1:]], sample.prefix))
    once = {name: values[:opening] for name, values in first.extras.items()}
    return [Sample(first.tokens[:opening], first.weights[:opening], once), *cut]


def balance(lengths: Sequence[int], workers: int, budget: int) -> list[list[list[int]]]:
    """Share the samples of one optimizer step among workers: `[worker][micro-batch] -> sample indices`.

    Every worker gets the same number k of micro-batches, for they meet in collective operations at each of them; k is the
    smallest for which the greedy rule below keeps every micro-batch within `budget` tokens. No micro-batch is empty when
    there are at least workers x k samples. The result depends on the arguments alone: every worker computes it for itself.

    Longest first into the emptiest micro-batch (Graham's LPT rule: at most 4/3 of the best possible maximum). Indices
    ascend within a micro-batch, so one worker with one micro-batch sees the samples in their own order.

    Raises DataError when one sample alone is longer than `budget`.
    """
    if workers < 1 or not len(lengths):
        raise ValueError(f"balance() needs workers and samples, got {workers} workers and {len(lengths)} samples")
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > budget:
        raise DataError(
            f"sample {longest} of this step has {lengths[longest]} tokens, more than one micro-batch holds ({budget}): "
            "raise micro_batch or lower max_tokens"
        )
    k = max(1, -(-sum(lengths) // (workers * budget)))
    while True:
        bins = _longest_first(lengths, workers * k)
        loads = [sum(lengths[i] for i in ids) for ids in bins]
        if max(loads) <= budget:
            break
        k += 1  # ends: with one sample per bin nothing exceeds the budget
    # Heaviest first, dealt out back and forth: micro-batches that run at the same time are alike, and so are the workers' sums.
    order = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
    plan: list[list[list[int]]] = [[] for _ in range(workers)]
    for turn in range(k):
        row = order[turn * workers : (turn + 1) * workers]
        for worker, b in enumerate(row if turn % 2 == 0 else row[::-1]):
            plan[worker].append(sorted(bins[b]))
    return plan


def _longest_first(lengths: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, b) for b in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return bins
