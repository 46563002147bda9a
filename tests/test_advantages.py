"""Rewards and advantages against loops that follow the papers sample by sample, ragged and empty responses included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf.advantages import conservative, gae, next_kl_coef, token_rewards, whiten
from rlhf.recipe import Ppo

few = settings(max_examples=80, deadline=None)
numbers = st.floats(-5, 5, width=32)
ragged = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8]), min_size=0, max_size=6)


def with_tokens(count: int) -> st.SearchStrategy[tuple[list[int], list[np.ndarray]]]:
    """Lengths of some responses, and `count` arrays with one number per token."""
    return ragged.flatmap(
        lambda lengths: st.tuples(
            st.just(lengths), st.lists(arrays(np.float32, sum(lengths), elements=numbers), min_size=count, max_size=count)
        )
    )


def split(flat: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [flat[s : s + n] for s, n in zip(starts, lengths, strict=True)]


@few
@given(arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=numbers), st.sampled_from([0.0, 0.5, 2.0]))
def test_conservative_scores(rewards: np.ndarray, coef: float) -> None:
    expected = []
    for of_one in rewards.tolist():
        mean = sum(of_one) / len(of_one)
        expected.append(mean - coef * (sum((r - mean) ** 2 for r in of_one) / len(of_one)) ** 0.5)
    found = conservative(rewards, coef)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if rewards.shape[1] == 1:
        assert np.array_equal(found, rewards[:, 0])  # to the bit, whatever the weight
    np.testing.assert_allclose(conservative(rewards[:, :2], 1.0), rewards[:, :2].min(1), atol=1e-5)


@few
@given(with_tokens(2), st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 1.0]))
def test_token_rewards(tokens: tuple[list[int], list[np.ndarray]], seed: int, kl_coef: float) -> None:
    lengths, (log_probs, reference) = tokens
    scores = np.random.default_rng(seed).normal(0, 8, len(lengths)).astype(np.float32)
    expected = []
    for score, ours, theirs in zip(scores, split(log_probs, lengths), split(reference, lengths), strict=True):
        rewards = [-kl_coef * (float(a) - float(b)) for a, b in zip(ours, theirs, strict=True)]
        if rewards:
            rewards[-1] += max(-10.0, min(10.0, float(score)))
        expected += rewards
    before = log_probs.copy()
    found = token_rewards(scores, log_probs, reference, lengths, kl_coef, reward_clip=10.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array(expected, np.float32), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(log_probs, before)  # its arguments come read-only from Ray's object store


@few
@given(with_tokens(2), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_is_the_discounted_sum_of_surprises(tokens: tuple[list[int], list[np.ndarray]], gamma: float, lam: float) -> None:
    """A_t = sum_k (gamma lam)^k delta_{t+k}: the definition, not the recursion."""
    lengths, (rewards, values) = tokens
    expected = []
    for r, v in zip(split(rewards.astype(np.float64), lengths), split(values.astype(np.float64), lengths), strict=True):
        n = len(r)
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        expected += [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
    advantages, returns = gae(rewards, values, lengths, gamma, lam)
    assert advantages.dtype == returns.dtype == np.float32
    np.testing.assert_allclose(advantages, np.array(expected, np.float32), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(returns, advantages + values, rtol=1e-6, atol=1e-6)


@few
@given(with_tokens(2))
def test_with_gamma_and_lambda_one_returns_are_rewards_to_go(tokens: tuple[list[int], list[np.ndarray]]) -> None:
    lengths, (rewards, values) = tokens
    _, returns = gae(rewards, values, lengths, 1.0, 1.0)
    to_go = [np.cumsum(r[::-1].astype(np.float64))[::-1] for r in split(rewards, lengths)]
    np.testing.assert_allclose(returns, np.concatenate([*to_go, np.zeros(0)]), rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_hear_of_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 9)).astype(np.float32)
    lengths = [4, 0, 1, 4]
    apart = [gae(r, v, [len(r)], 0.99, 0.95)[0] for r, v in zip(split(rewards, lengths), split(values, lengths), strict=True)]
    np.testing.assert_array_equal(gae(rewards, values, lengths, 0.99, 0.95)[0], np.concatenate(apart))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_was_said(lengths: list[int]) -> None:
    empty = np.zeros(0, np.float32)
    scores = np.ones(len(lengths), np.float32)
    assert len(token_rewards(scores, empty, empty, lengths, 0.1, 10.0)) == 0
    assert [len(x) for x in gae(empty, empty, lengths, 1.0, 0.95)] == [0, 0]
    assert len(whiten(empty)) == 0


def test_one_token_by_hand() -> None:
    rewards = token_rewards(np.float32([2.0]), np.float32([-1.0]), np.float32([-1.5]), [1], kl_coef=0.1, reward_clip=10.0)
    assert rewards == pytest.approx([2.0 - 0.1 * 0.5])
    advantages, returns = gae(rewards, np.float32([0.5]), [1], 1.0, 0.95)
    assert advantages == pytest.approx([1.45])
    assert returns == pytest.approx([1.95])


@few
@given(st.integers(2, 200), st.integers(0, 10**6), st.floats(0.5, 50), st.floats(-20, 20))
def test_whiten(n: int, seed: int, scale: float, shift: float) -> None:
    values = (np.random.default_rng(seed).normal(size=n) * scale + shift).astype(np.float32)
    white = whiten(values)
    assert white.dtype == np.float32
    assert white.mean() == pytest.approx(0.0, abs=1e-3)
    if values.std() > 1e-2:
        assert white.std() == pytest.approx(1.0, abs=1e-2)
    assert (np.argsort(white, kind="stable") == np.argsort(values, kind="stable")).all() or len(np.unique(white)) < n


@pytest.mark.parametrize("constant", [0.0, 3.0, -7.5])
def test_a_constant_becomes_zero(constant: float) -> None:
    assert whiten(np.full(5, constant, np.float32)) == pytest.approx(np.zeros(5), abs=1e-3)


@pytest.mark.parametrize(("kl", "factor"), [(8.0, 1.0), (8.8, 1.025), (100.0, 1.05), (7.2, 0.975), (0.0, 0.95), (-3.0, 0.95)])
def test_kl_weight_follows_its_target(kl: float, factor: float) -> None:
    """128 of a horizon of 512 samples: a quarter of the clipped relative error."""
    config = Ppo(kl_target=8.0, kl_horizon=512, rollout_batch=128)
    assert next_kl_coef(0.2, kl, config) == pytest.approx(0.2 * factor)
    assert next_kl_coef(0.2, kl, Ppo()) == 0.2  # without a target it stays
