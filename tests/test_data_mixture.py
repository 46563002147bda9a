"""A mixture gives every source its share at every place, and any place is known without those before it."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import mixture
from data.mixture import Mixture, Source, sources, whole_parts

WHOLE = st.sampled_from([0, 1, 2, 3, 7, 40, 999]) | st.integers(0, 300)
WEIGHTS = st.lists(WHOLE | st.floats(0.01, 2).map(lambda weight: round(weight, 2)), min_size=1)
SOME = WEIGHTS.filter(lambda weights: sum(weights) > 0)


@given(SOME, st.integers(1, 3000))
def test_every_source_has_its_share_within_one_window_at_every_place(weights: list[float], places: int) -> None:
    found, _ = Mixture(weights, places).at(np.arange(places))
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = np.array([int(weight * scale) for weight in exact])  # no rounding error in what follows
    counts = np.cumsum(np.eye(len(weights), dtype=int)[found], axis=0)
    k = np.arange(1, places + 1)[:, None]
    assert (abs(counts * whole.sum() - k * whole) < whole.sum()).all()


@given(SOME, st.integers(1, 500), st.integers(0, 400))
def test_any_place_is_that_of_a_walk(weights: list[float], places: int, start: int) -> None:
    mix, start = Mixture(weights, places), min(start, places - 1)
    seen = [0] * len(weights)
    walked = []
    for source in mix.at(np.arange(places))[0].tolist():
        walked.append((source, seen[source]))
        seen[source] += 1
    assert list(zip(*(of.tolist() for of in mix.at(np.arange(start, places))), strict=True)) == walked[start:]
    assert mix.counts(start) == [sum(source == s for source, _ in walked[:start]) for s in range(len(weights))]
    assert mix.counts(places) == seen


def test_the_order_is_fixed_for_ever() -> None:
    """A run that resumes under a later version must go on with the same sources: these numbers may never change."""
    assert Mixture([0.5, 0.3, 0.2], 20).at(np.arange(12))[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]


def test_weights_are_taken_as_they_are_written() -> None:
    assert whole_parts([0.1, 0.2, 0.7], 10) == (1, 2, 7)
    assert whole_parts([3, 0, 1.5], 10) == (2, 0, 1)
    assert whole_parts([1e-3, 1], 10) == (1, 1000)
    for wrong in ([0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(ValueError, match="weights"):
            whole_parts(wrong, 10)


def test_long_mixtures_know_weights_to_the_millionth_and_forget_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "FINEST", 1000)
    sizes = [123_457, 654_321, 1, 0, 333_333]
    assert whole_parts(sizes, 1000) == tuple(sizes), "short ones are exact"
    rounded = whole_parts(sizes, 1001)
    assert sum(rounded) == 1000
    assert rounded[2:4] == (1, 0)
    assert all(abs(part - 1000 * size / sum(sizes)) < 1 for part, size in zip(rounded, sizes, strict=True))
    assert sum(whole_parts([1, *[10**6] * 7, *[1] * 5], 2000)) == 1000
    assert Mixture(sizes, 10**9).counts(10**9) == [part * 10**6 for part in rounded]


def test_sources_are_runs_of_the_stream(tmp_path: Path) -> None:
    size = {"documents": 1, "tokens": 5, "bytes_of_text": 9}
    entries = [{"source": name, "train": {**size, "tokens": n}, "validation": size} for name, n in (("a", 7), ("b", 0), ("c", 5))]
    (tmp_path / "manifest.json").write_text(json.dumps({"sources": entries}))
    assert sources(tmp_path, "train") == [Source("a", 0, 7, 9), Source("b", 7, 7, 9), Source("c", 7, 12, 9)]
    (tmp_path / "manifest.json").write_text("{}")
    assert sources(tmp_path, "train") == []
