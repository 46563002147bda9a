"""The sample order is a permutation that depends on seed, epoch and data alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import batch_indices, sample_index


@given(st.integers(0, 2**32), st.integers(0, 50), st.integers(1, 3000))
def test_every_epoch_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    order = sample_index(seed, epoch, np.arange(n), n, "hash")
    assert sorted(order.tolist()) == list(range(n))


def test_one_place_at_a_time_gives_the_same_as_all_at_once() -> None:
    order = sample_index(3, 1, np.arange(100), 100, "hash")
    assert [sample_index(3, 1, i, 100, "hash") for i in range(100)] == order.tolist()


def test_seed_epoch_and_data_each_change_the_order() -> None:
    places = np.arange(1000)
    orders = [sample_index(*key, places, 1000, m) for *key, m in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))]  # type: ignore[call-overload]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02


def test_the_order_is_fixed_for_ever() -> None:
    """A run that resumes under a later version must go on with the same samples: these numbers may never change."""
    assert sample_index(0, 0, np.arange(8), 1000, "manifest").tolist() == [28, 607, 887, 267, 802, 488, 80, 261]


def test_neighbours_spread_evenly() -> None:
    """Mean distance of consecutive samples is n/3, as for a random permutation."""
    n = 20_000
    order = sample_index(0, 0, np.arange(n), n, "hash")
    assert np.abs(np.diff(order)).mean() / n == pytest.approx(1 / 3, rel=0.02)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03


@pytest.mark.parametrize("i", [-1, 10, np.array([0, 10])])
def test_places_outside_the_epoch_are_refused(i: int | np.ndarray) -> None:
    with pytest.raises(IndexError, match="outside an epoch of 10"):
        sample_index(0, 0, i, 10, "hash")


@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 20))
def test_batches_run_through_epochs_without_a_gap(n: int, global_batch: int, steps: int) -> None:
    seen = [i for step in range(steps) for i in batch_indices(7, step, global_batch, n, "hash").tolist()]
    for start in range(0, len(seen) - n + 1, n):
        assert sorted(seen[start : start + n]) == list(range(n))
