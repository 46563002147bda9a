"""A mixture of sources is arithmetic: which source's which window stands at a place, exact after any number of places.

    mixture = Mixture([0.7, 0.3], places=6_400)
    source, rank = mixture.at(np.arange(8))     # place 5 has window rank[5] of source source[5]
    mixture.counts(8)                           # [6, 2]: windows of each source at the places before 8

After k places a source of weight w has had floor(k w) or ceil(k w) windows, for every k: window j of a source may stand at places
floor((j - 1) / w) to ceil(j / w) - 1, and each place goes to the window whose last place comes first. Such a sequence always exists, and
this rule finds it (Baruah et al. 1996, "Proportionate progress", Algorithmica 15). It repeats after as many places as
the weights' common denominator says: one period is kept, all else is division.

Where a source stands in the token stream is in the manifest that `pipeline.prepare_text` writes; `sources` reads it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import gcd, lcm
from pathlib import Path

import numpy as np

FINEST = 1_000_000  # longest period that is kept: 2 s to make, 12 MB. Mixtures of more places know weights to the millionth


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


class Mixture:
    def __init__(self, weights: Sequence[float], places: int) -> None:
        """`weights` count relative to each other, as their decimal digits say; 0 is left out. `places`: how many will be asked for."""
        self.parts = whole_parts(weights, places)
        """The weights as whole numbers `[n]`; the sequence repeats after their sum."""
        self.period = sum(self.parts)
        self._order = interleaved(self.parts, min(self.period, places))
        self._slots = [np.flatnonzero(self._order == source) for source in range(len(self.parts))]
        self._rank = np.empty(len(self._order), np.int64)
        for slots in self._slots:
            self._rank[slots] = np.arange(len(slots))

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each of these places and how many of its windows stand before: int64 `[k]` each."""
        rounds, slot = np.divmod(places, self.period)
        source = self._order[slot].astype(np.int64)
        return source, rounds * np.array(self.parts, np.int64)[source] + self._rank[slot]

    def counts(self, places: int) -> list[int]:
        """Windows of each source at the first `places` places."""
        rounds, slot = divmod(places, self.period)
        return [rounds * part + int(np.searchsorted(slots, slot)) for part, slots in zip(self.parts, self._slots, strict=True)]


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
    order = np.empty(length, np.int32)
    ready = [(-(-total // part), source) for source, part in enumerate(parts) if part]  # (place after its last, source)
    heapify(ready)
    later: list[tuple[int, int, int]] = []  # (its first place, place after its last, source)
    taken = [0] * len(parts)
    for place in range(length):
        while later and later[0][0] <= place:
            heappush(ready, heappop(later)[1:])
        _, source = heappop(ready)
        order[place] = source
        taken[source] += 1
        done, part = taken[source], parts[source]
        heappush(later, (done * total // part, -(-(done + 1) * total // part), source))
    return order
