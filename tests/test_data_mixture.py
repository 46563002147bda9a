"""A mixture gives every source its share at every place, and any place is known without those before it."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import mixture
from data.errors import DataError
from data.mixture import Buckets, Mixture, Ramp, Source, categories, sources, whole_parts
from data.parts import plan_parts
from data.refine import Steps, refine
from data.work import ROWS, path_of

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


@given(SOME, st.data(), st.integers(1, 1500))
def test_a_ramp_is_exact_within_one_window_at_every_place(weights: list[float], data: st.DataObject, places: int) -> None:
    size = len(weights)
    to = data.draw(st.lists(st.integers(0, 20), min_size=size, max_size=size).filter(any))
    ramp = Ramp(weights, to, places)
    found, rank = ramp.at(np.arange(places))
    counts = np.cumsum(np.eye(size, dtype=int)[found], axis=0)
    exact, target = (np.array([float(Fraction(str(w))) for w in of]) / sum(map(float, of)) for of in (weights, to))
    k = np.arange(1, places + 1)[:, None]
    wanted = k * exact + k**2 * (target - exact) / (2 * places)
    assert (abs(counts - wanted) < 1 + 1e-6).all()
    assert rank.tolist() == [int((found[:i] == source).sum()) for i, source in enumerate(found)]
    for start in {0, places // 3, places}:
        assert ramp.counts(start) == np.bincount(found[:start], minlength=size).tolist()
    assert ramp.shares == [Fraction(int(count), places) for count in counts[-1]]


def test_ramps_begin_and_end_where_they_should_and_never_change() -> None:
    assert Ramp([1, 0], [0, 1], 12).at(np.arange(12))[0].tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1]
    steady = Ramp([0.5, 0.3, 0.2], [5, 3, 2], 20).at(np.arange(20))
    for found, expected in zip(steady, Mixture([0.5, 0.3, 0.2], 20).at(np.arange(20)), strict=True):
        assert found.tolist() == expected.tolist()


def test_long_ramps_take_windows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "FINEST", 100)
    ramp = Ramp([3, 1], [1, 3], 950)
    found, rank = ramp.at(np.arange(950))
    counts = np.cumsum(np.eye(2, dtype=int)[found], axis=0)
    k = np.arange(1, 951)
    assert (abs(counts[:, 0] - (k * 0.75 - k**2 * 0.5 / 1900)) <= 10.5).all()
    for source in (0, 1):
        assert rank[found == source].tolist() == list(range(counts[-1, source]))
    assert ramp.counts(333) == counts[332].tolist()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), st.integers(1, 7), st.integers(0, 300))
def test_a_bucket_has_one_bin_of_every_source_and_an_epoch_has_every_window(windows: list[int], bins: int, start: int) -> None:
    total, buckets = sum(windows), Buckets(windows, bins)
    source, rank = buckets.at(np.arange(2 * total))
    for s, of in enumerate(windows):
        assert rank[source == s].tolist() == list(range(2 * of)), "a source's bins come in turn, every window once an epoch"
    at = 0
    for number in range(bins):
        sizes = [starts[number + 1] - starts[number] for starts in buckets.starts]
        assert max(abs(size - of / bins) for size, of in zip(sizes, windows, strict=True)) < 1
        inside = source[at : at + sum(sizes)]
        assert np.bincount(inside, minlength=len(windows)).tolist() == sizes
        for k in range(1, len(inside) + 1):  # evenly mixed within the bucket, too
            assert all(abs((inside[:k] == s).sum() - k * size / sum(sizes)) < 1 for s, size in enumerate(sizes))
        at += sum(sizes)
    start = min(start, 2 * total)
    assert buckets.counts(start) == np.bincount(source[:start], minlength=len(windows)).tolist()
    alone = [tuple(int(x[0]) for x in buckets.at(np.array([place]))) for place in range(start, min(start + 5, 2 * total))]
    assert alone == list(zip(source[start : start + 5].tolist(), rank[start : start + 5].tolist(), strict=True))


def test_buckets_that_are_too_large_say_how_many_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "FINEST", 100)
    Buckets([900, 90], 10)
    with pytest.raises(DataError, match="a bucket of 330 windows is too large to be mixed: bins = 10"):
        Buckets([900, 90], 3)


def test_categories_are_what_rows_say(tmp_path: Path) -> None:
    rows = [{"text": "a b", "category": "verse"}, {"text": "c d"}, {"text": "e", "category": 3}, {"text": "f", "category": "\ud800!"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (part,) = plan_parts([tmp_path / "a.jsonl"], 1 << 20)
    refine(part, Steps(), tmp_path)
    assert pq.read_table(path_of(tmp_path, 0, ROWS))["category"].to_pylist() == ["verse", None, None, "\\ud800!"]
    ends = np.array([3, 10, 14, 20])
    (tmp_path / "documents").mkdir()
    kept = pa.table({"category": ["verse", None, "verse", None], "file": pa.array([0, 1, 1, 0], pa.int32()), "fate": ["train"] * 4})
    pq.write_table(kept, tmp_path / "documents" / "000000.parquet")
    (tmp_path / "manifest.json").write_text(json.dumps({"sources": [{"source": "a"}, {"source": "b"}], "source_of": [1, 0]}))
    a, b, verse = categories(tmp_path, "train", ends)
    assert [(c.name, c.tokens) for c in (a, b, verse)] == [("a", 7), ("b", 6), ("verse", 7)]
    assert verse.spans(0, 7) == [(0, 3), (10, 14)]
    assert verse.spans(2, 4) == [(2, 3), (10, 11)]
    assert verse.spans(3, 5) == [(10, 12)]
    with pytest.raises(DataError, match="do not belong together"):
        categories(tmp_path, "train", ends[:3])
