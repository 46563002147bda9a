"""Rewards and advantages against loops that follow the papers sample by sample, ragged and empty responses included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf.advantages import centred, gae, grpo, rewards_to_go, rloo, whiten

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
    assert [len(x) for x in gae(empty, empty, lengths, 1.0, 0.95)] == [0, 0]
    assert len(whiten(empty)) == 0


def test_one_token_by_hand() -> None:
    advantages, returns = gae(np.float32([1.95]), np.float32([0.5]), [1], 1.0, 0.95)
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


@few
@given(with_tokens(2), st.data(), st.sampled_from([0.9, 1.0]), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_of_several_turns_is_that_of_the_action_tokens_alone(
    tokens: tuple[list[int], list[np.ndarray]], data: st.DataObject, gamma: float, lam: float
) -> None:
    """A loop that walks from action to action; what stands between them may be anything."""
    lengths, (rewards, values) = tokens
    actions = data.draw(arrays(np.bool_, sum(lengths)))
    expected, target = np.zeros(sum(lengths)), values.astype(np.float64)
    for n, start in zip(lengths, np.cumsum([0, *lengths]), strict=False):
        after, running = 0.0, 0.0  # V and A of the next action token
        for t in reversed(range(start, start + n)):
            if actions[t]:
                running = float(rewards[t]) + gamma * after - float(values[t]) + gamma * lam * running
                after, expected[t] = float(values[t]), running
                target[t] = running + values[t]
    advantages, returns = gae(rewards, values, lengths, gamma, lam, actions)
    assert advantages.dtype == returns.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(returns, target, rtol=1e-6, atol=1e-5)
    noise = np.where(actions, 0, 99).astype(np.float32)
    np.testing.assert_array_equal(gae(rewards + noise, values + noise, lengths, gamma, lam, actions)[0], advantages)


def test_walking_over_observations_is_biased() -> None:
    """Two actions around an observation of 3 tokens, reward 1 at the end, V = 0: lambda^1 of it reaches the first, not lambda^4."""
    rewards, values = np.float32([0, 0, 0, 0, 1]), np.zeros(5, np.float32)
    actions = np.array([True, False, False, False, True])
    assert gae(rewards, values, [5], 1.0, 0.5, actions)[0].tolist() == [0.5, 0, 0, 0, 1]
    assert gae(rewards, values, [5], 1.0, 0.5)[0][0] == 0.5**4
    everything = np.ones(5, bool)
    np.testing.assert_array_equal(gae(rewards, values, [5], 1.0, 0.5, everything)[0], gae(rewards, values, [5], 1.0, 0.5)[0])


@few
@given(with_tokens(1), st.sampled_from([0.0, 0.9, 1.0]))
def test_rewards_to_go(tokens: tuple[list[int], list[np.ndarray]], gamma: float) -> None:
    lengths, (rewards,) = tokens
    expected = [sum(gamma ** (k - t) * float(r[k]) for k in range(t, len(r))) for r in split(rewards, lengths) for t in range(len(r))]
    np.testing.assert_allclose(rewards_to_go(rewards, lengths, gamma), expected, rtol=1e-6, atol=1e-6)


def test_group_estimators_by_hand() -> None:
    """Two prompts, four answers each: right and wrong ones in the first group (mean 1/4, std 1/2), the same score in the second."""
    scores = np.float32([1, 0, 0, 0, 2, 2, 2, 2])
    assert centred(scores, 4).tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert grpo(scores, 4) == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3, 0, 0, 0, 0])
    assert rloo(scores, 4) == pytest.approx([1 - 0, *[0 - 1 / 3] * 3, 0, 0, 0, 0])


@few
@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 10**6))
def test_group_estimators_against_loops(groups: int, size: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(0, 3, groups * size).astype(np.float32)
    apart, scaled, one_out = [], [], []
    for g in range(groups):
        own = [float(x) for x in scores[g * size : (g + 1) * size]]
        mean = sum(own) / size
        std = (sum((x - mean) ** 2 for x in own) / (size - 1)) ** 0.5
        apart += [x - mean for x in own]
        scaled += [(x - mean) / (std + 1e-4) for x in own]
        one_out += [x - (sum(own) - x) / (size - 1) for x in own]
    np.testing.assert_allclose(centred(scores, size), apart, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grpo(scores, size), scaled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rloo(scores, size), one_out, rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(seed).permutation(size)  # who is first in a group does not matter
    shuffled = scores.reshape(groups, size)[:, order].reshape(-1)
    for estimator in (centred, grpo, rloo):
        again = estimator(scores, size).reshape(groups, size)[:, order].reshape(-1)
        np.testing.assert_allclose(estimator(shuffled, size), again, rtol=1e-5, atol=1e-6)


def test_unbiased_whitening_divides_by_one_less() -> None:
    assert whiten(np.float32([0, 2])).tolist() == pytest.approx([-1, 1])
    assert whiten(np.float32([0, 2]), unbiased=True).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert whiten(np.float32([3]), unbiased=True).tolist() == [0]
