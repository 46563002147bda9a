"""A mixture of sources is arithmetic: which source's which window stands at a place, exact after any number of places.

    mixture = Mixture([0.7, 0.3], places=6_400)
    source, rank = mixture.at(np.arange(8))     # place 5 has window rank[5] of source source[5]
    mixture.counts(8)                           # [6, 2]: windows of each source at the places before 8

After k places a source of weight w has had floor(k w) or ceil(k w) windows, for every k: window j of a source may stand at places
floor((j - 1) / w) to ceil(j / w) - 1, and each place goes to the window whose last place comes first. Such a sequence always exists, and
this rule finds it (Baruah et al. 1996, "Proportionate progress", Algorithmica 15). It repeats after as many places as
the weights' common denominator says: one period is kept, all else is division.

    Ramp([0.9, 0.1], [0.3, 0.7], places=6_400)  # the weights move on a line; after k places, floor or ceil of what they add up to
    Buckets([5_000, 700], bins=10)              # windows of two sources in 10 bins each, bin after bin of both

Where a source stands in the token stream is in the manifest that `pipeline.prepare_text` writes; `sources` reads it, and `categories`
which documents have which `category` in their rows.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from heapq import heapify, heappop, heappush
from math import gcd, isqrt, lcm
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from data import fates
from data.errors import DataError

FINEST = 1_000_000  # longest period that is kept: 2 s to make, 12 MB. Mixtures of more places know weights to the millionth
Window = tuple[int, int, int]  # the first place that it may stand at, the place after its last, its source


@dataclass(frozen=True)
class Source:
    """One source's run of a split's token stream: tokens [start, stop), whole documents."""

    name: str
    start: int
    stop: int
    bytes_of_text: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        """Tells it from other texts of the same stream."""
        return f"{self.start}-{self.stop}"

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where in the stream its own tokens [start, stop) are: one run."""
        return [(self.start + start, self.start + stop)]


class Category:
    """All documents of one category, wherever they stand in the stream, one after the other."""

    def __init__(self, name: str, starts: np.ndarray, stops: np.ndarray) -> None:
        """`starts`, `stops`: int64 `[documents]`, where in the stream each document is."""
        self.name, self.key, self._starts = name, f"category {name}", starts
        self._ends = np.cumsum(stops - starts)
        self.tokens = int(self._ends[-1])

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where in the stream its own tokens [start, stop) are, a run for each document."""
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        runs = []
        for document in range(first, last + 1):
            before = int(self._ends[document - 1]) if document else 0
            low, high = max(start, before) - before, min(stop, int(self._ends[document])) - before
            runs.append((int(self._starts[document]) + low, int(self._starts[document]) + high))
        return runs


def categories(folder: Path, split: str, ends: np.ndarray) -> list[Category]:
    """The categories of `folder`/`split` by name; rows without one are under their source's name. `ends`: TokenShards.ends."""
    rows = fates.documents(folder).to_table(["category", "file"], filter=pa.compute.field("fate") == split)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    names = [manifest["sources"][number]["source"] for number in manifest["source_of"]]
    of_files = pa.array(names).take(rows["file"].combine_chunks())
    coded = pa.compute.if_else(pa.compute.is_valid(rows["category"].combine_chunks()), rows["category"].combine_chunks(), of_files)
    coded = coded.dictionary_encode()
    if len(coded) != len(ends):
        raise DataError(f"{folder}: documents/ and the shards do not belong together: prepare the data again")
    starts, code = np.concatenate([np.zeros(1, np.int64), ends[:-1]]), coded.indices.to_numpy()
    found = {name: code == number for number, name in enumerate(coded.dictionary.to_pylist())}
    return [Category(name, starts[here], ends[here]) for name, here in sorted(found.items())]


def sources(folder: Path, split: str) -> list[Source]:
    """The sources of `folder`/`split`, in the order of the stream; one that has no document there has no tokens. Folders of earlier
    versions do not tell: none."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    found, at = [], 0
    for entry in manifest.get("sources", []):
        size = entry[split]
        found.append(Source(entry["source"], at, at + size["tokens"], size["bytes_of_text"]))
        at += size["tokens"]
    return found


class Order(Protocol):
    """Which source's windows stand where."""

    shares: list[Fraction]
    """Of each source, in all the places."""

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each of these places and how many of its windows stand before: int64 `[k]` each."""

    def counts(self, places: int) -> list[int]:
        """Windows of each source at the first `places` places."""


class Mixture:
    def __init__(self, weights: Sequence[float], places: int) -> None:
        """`weights` count relative to each other, as their decimal digits say; 0 is left out. `places`: how many will be asked for."""
        self.parts = whole_parts(weights, places)
        """The weights as whole numbers `[n]`; the sequence repeats after their sum."""
        self.period = sum(self.parts)
        self.shares = [Fraction(part, self.period) for part in self.parts]
        self._order = interleaved(self.parts, min(self.period, places))
        self._slots = [np.flatnonzero(self._order == source) for source in range(len(self.parts))]
        self._rank = np.empty(len(self._order), np.int64)
        for slots in self._slots:
            self._rank[slots] = np.arange(len(slots))

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rounds, slot = np.divmod(places, self.period)
        source = self._order[slot].astype(np.int64)
        return source, rounds * np.array(self.parts, np.int64)[source] + self._rank[slot]

    def counts(self, places: int) -> list[int]:
        rounds, slot = divmod(places, self.period)
        return [rounds * part + int(np.searchsorted(slots, slot)) for part, slots in zip(self.parts, self._slots, strict=True)]


class Ramp:
    def __init__(self, weights: Sequence[float], to: Sequence[float], places: int) -> None:
        """From `weights`, before the first place, to `to`, behind the last. Beyond FINEST places, so many that FINEST remain are
        taken together, and what is exact within one window is so within as many."""
        self.together = -(-places // FINEST)
        length = -(-places // self.together)
        self._order = ramped(whole_parts(weights, length), whole_parts(to, length), length)
        slots = [np.flatnonzero(self._order == source) for source in range(len(weights))]
        self._rank = np.empty(length, np.int64)
        for of_source in slots:
            self._rank[of_source] = np.arange(len(of_source))
        self._slots = slots
        self.shares = [Fraction(count, places) for count in self.counts(places)]

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slot, inner = np.divmod(places, self.together)
        return self._order[slot].astype(np.int64), self._rank[slot] * self.together + inner

    def counts(self, places: int) -> list[int]:
        slot, inner = divmod(places, self.together)
        found = [self.together * int(np.searchsorted(slots, slot)) for slots in self._slots]
        if inner:
            found[self._order[slot]] += inner
        return found


class Buckets:
    def __init__(self, windows: Sequence[int], bins: int) -> None:
        """`windows` that each source has. Every source is cut into `bins` bins; a bucket is one bin of each, mixed by their sizes; buckets
        come one after the other, and after the last one the first again.

        Raises DataError for buckets of more than FINEST windows, whose mixture would not be exact.
        """
        self.starts = [[number * of // bins for number in range(bins + 1)] for of in windows]
        """Of each source: the window with which each bin begins."""
        self._sizes = [tuple(starts[number + 1] - starts[number] for starts in self.starts) for number in range(bins)]
        self._ends = np.cumsum([sum(sizes) for sizes in self._sizes])
        self._windows, total = np.array(windows, np.int64), sum(windows)
        self.shares = [Fraction(of, total) for of in windows]
        if total > FINEST * bins:
            least = -(-total // FINEST)
            raise DataError(f"pretrain.phases: a bucket of {total // bins:,} windows is too large to be mixed: bins = {least}")

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = np.divmod(places, self._ends[-1])
        bucket = np.searchsorted(self._ends, place, side="right")
        source, rank = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for number in np.unique(bucket).tolist():
            here = bucket == number
            inner = place[here] - (self._ends[number - 1] if number else 0)
            source[here], rank[here] = _of_bucket(self._sizes[number]).at(inner)
            rank[here] += np.array([starts[number] for starts in self.starts], np.int64)[source[here]]
        return source, rank + epoch * self._windows[source]

    def counts(self, places: int) -> list[int]:
        epoch, place = divmod(places, int(self._ends[-1]))
        bucket = int(np.searchsorted(self._ends, place, side="right"))
        begun = _of_bucket(self._sizes[bucket]).counts(place - (int(self._ends[bucket - 1]) if bucket else 0))
        return [epoch * int(of) + starts[bucket] + n for of, starts, n in zip(self._windows, self.starts, begun, strict=True)]


@lru_cache(maxsize=4)
def _of_bucket(sizes: tuple[int, ...]) -> Mixture:
    return Mixture(sizes, sum(sizes))


def whole_parts(weights: Sequence[float], places: int) -> tuple[int, ...]:
    """Whole numbers that relate to each other as the weights do.

    Should they and `places` both go beyond FINEST, they are rounded to millionths of their sum by the largest remainders, and no source
    that has a weight loses it.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    common = gcd(*parts)
    if min(parts) < 0 or not common:
        raise ValueError(f"weights must not be negative, nor all zero: {list(weights)}")
    parts = [part // common for part in parts]
    total = sum(parts)
    if total <= FINEST or places <= FINEST:
        return tuple(parts)
    rounded = [max(part * FINEST // total, int(part > 0)) for part in parts]
    rest = FINEST - sum(rounded)
    most = sorted(range(len(parts)), key=lambda i: (-(parts[i] * FINEST % total), i) if rest > 0 else (-rounded[i], i))
    for i in range(abs(rest)):
        rounded[most[i % len(most)]] += 1 if rest > 0 else -1
    return tuple(rounded)


def interleaved(parts: tuple[int, ...], length: int) -> np.ndarray:
    """The source at each of the first `length` places, int32; see the top of this file."""
    total = sum(parts)

    def window(source: int, j: int) -> Window:
        part = parts[source]
        return (j - 1) * total // part, -(-j * total // part), source

    return _earliest_deadline(window, [source for source, part in enumerate(parts) if part], length)


def ramped(parts: tuple[int, ...], to: tuple[int, ...], length: int) -> np.ndarray:
    """The source at each of `length` places, int32, when shares move on a line from `parts` to `to`.

    After k places source s shall have had W(k) = k p + k^2 (q - p) / (2 length) windows, its shares p and q as fractions. Window j may
    stand at places m with W(m + 1) > j - 1 and W(m) < j, and as before the one whose last place comes first is next: the shares
    of all sources add up to one at every place, so places and windows can be matched, and then this rule matches them.
    """
    was, will = sum(parts), sum(to)
    linear = [2 * length * part * will for part in parts]  # W(k) = (k linear + k^2 square) / whole
    square = [new * was - old * will for old, new in zip(parts, to, strict=True)]
    whole = 2 * length * was * will

    def first_above(source: int, level: int) -> int:
        """The least k with W(k) whole > level, at most length + 1; W does not fall."""
        a, b = square[source], linear[source]
        root = isqrt(max(b * b + 4 * a * level, 0))
        k = max(0, min(length + 1, (2 * level) // (b + root) if b + root else length + 1)) - 1
        k = max(k, 0)
        while k <= length and k * b + k * k * a <= level:
            k += 1
        while k > 0 and (k - 1) * b + (k - 1) ** 2 * a > level:
            k -= 1
        return k

    begins = [first_above(source, 0) - 1 for source in range(len(parts))]  # first place of each source's next window

    def window(source: int, j: int) -> Window:
        begin, stop = begins[source], first_above(source, j * whole - 1)
        passes = stop * linear[source] + stop**2 * square[source] > j * whole
        begins[source] = (stop if passes else first_above(source, j * whole)) - 1
        return begin, stop, source

    return _earliest_deadline(window, [source for source in range(len(parts)) if parts[source] or to[source]], length)


def _earliest_deadline(window: Callable[[int, int], Window], sources: Sequence[int], length: int) -> np.ndarray:
    """The source at each of `length` places, int32: of the windows that may stand there, the one whose last place comes first.

    `window(source, j)` is asked for every source's windows in turn, j = 1, 2, ...
    """
    order = np.empty(length, np.int32)
    later = [window(source, 1) for source in sources]
    heapify(later)
    ready: list[tuple[int, int]] = []  # (place after its last, source)
    taken = dict.fromkeys(sources, 0)
    for place in range(length):
        while later and later[0][0] <= place:
            heappush(ready, heappop(later)[1:])
        _, source = heappop(ready)
        order[place] = source
        taken[source] += 1
        heappush(later, window(source, taken[source] + 1))
    return order
