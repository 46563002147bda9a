"""How tokens count, against loops over samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.loss_weights import aggregate, importance, varied

few = settings(max_examples=60, deadline=None)
WAYS = ("token_mean", "sequence_mean", "dr_grpo")


@few
@given(st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 5, 9]), st.booleans()), max_size=6), st.integers(0, 10**6), st.sampled_from(WAYS))
def test_aggregate(samples: list[tuple[int, bool]], seed: int, how: str) -> None:
    """sum share x loss / sum weight, as the learner computes it, is the mean that the name says."""
    lengths, counted = [n for n, _ in samples], np.array([c for _, c in samples], bool)
    losses = np.random.default_rng(seed).normal(size=sum(lengths))
    weights, shares = aggregate(lengths, counted, how, longest=10)
    assert weights.dtype == shares.dtype == np.float32
    own = [losses[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths)) if counted[i] and lengths[i]]
    if not own:
        assert not weights.any()
        assert not shares.any()
        return
    expected = {
        "token_mean": np.concatenate(own).mean(),
        "sequence_mean": np.mean([one.mean() for one in own]),
        "dr_grpo": np.mean([one.sum() / 10 for one in own]),
    }[how]
    assert (shares * losses).sum() / weights.sum() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_varied() -> None:
    assert varied(np.float32([1, 0, 0, 0, 2, 2, 2, 2, 0.1, 0.1, 0.1, 0.1]), 4).tolist() == [True, False, False]
    assert varied(np.zeros(0, np.float32), 4).tolist() == []


def test_importance_by_hand() -> None:
    """Ratios of 1/4, 1, 1.5 and 4."""
    ours, engine = np.log(np.float32([0.1, 0.3, 0.3, 0.4])), np.log(np.float32([0.4, 0.3, 0.2, 0.1]))
    assert importance(ours, engine, "truncated", 0.5, 2.0) == pytest.approx([0.25, 1, 1.5, 2], rel=1e-6)
    assert importance(ours, engine, "icepop", 0.5, 2.0) == pytest.approx([0, 1, 1.5, 0], rel=1e-6)
    assert np.isfinite(importance(np.float32([0]), np.float32([-1e4]), "icepop", 0.5, 5.0)).all()
