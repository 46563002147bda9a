"""Rewards per token against loops, and the numbers that go from step to step against the whole history at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.recipe import Ppo
from rlhf.shaping import Running, after, begin, judge, next_kl_coef, outcomes, overlong, replay, token_rewards

few = settings(max_examples=60, deadline=None)
ragged = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8]), max_size=6)


@few
@given(ragged, st.integers(0, 10**6))
def test_a_score_stands_at_the_last_token(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, penalties = rng.normal(0, 3, len(lengths)).astype(np.float32), rng.normal(size=sum(lengths)).astype(np.float32)
    expected, whole, before = [], [], penalties.copy()
    for i, n in enumerate(lengths):
        own = penalties[sum(lengths[:i]) : sum(lengths[: i + 1])].astype(np.float64).tolist()
        whole.append(float(scores[i]) + sum(own))
        expected += [*own[:-1], own[-1] + float(scores[i])] if n else []
    found = token_rewards(scores, penalties, lengths)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(outcomes(scores, penalties, lengths), whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(penalties, before)  # its arguments come read-only from Ray's object store


def test_overlong_by_hand() -> None:
    """DAPO: 16,384 tokens and a buffer of 4,096 more."""
    found = overlong([100, 16_384, 18_432, 20_480, 30_000], 20_480, 4_096)
    assert found.tolist() == [0, 0, 0.5, 1, 1]


def test_judge_in_its_order() -> None:
    """Normalise, then take penalties off, then clip."""
    config = Ppo(
        max_response_tokens=10, normalize_rewards=True, unfinished_penalty=0.5, overlong_buffer=4, overlong_penalty=2.0, reward_clip=1.5
    )
    running = Running(0.1, steps=1, mean=4.0, variance=4.0)
    scores, finished = np.float32([8, 4, 4, 0]), np.array([True, False, True, False])
    assert judge(scores, [1, 1, 8, 10], finished, config, running) == pytest.approx([1.5, -0.5, -1.0, -1.5])
    plain = judge(scores, [1, 1, 8, 10], finished, Ppo(reward_clip=5.0), running)
    assert plain.tolist() == [5, 4, 4, 0]


@few
@given(st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=8))
def test_running_moments_are_those_of_all_scores(rollouts: list[list[float]]) -> None:
    running = begin(Ppo())
    for scores in rollouts:
        running = running.seen(float(np.mean(scores)), float(np.std(scores)))
    everything = np.concatenate(rollouts)
    assert running.mean == pytest.approx(everything.mean(), abs=1e-9)
    assert running.variance == pytest.approx(everything.var(), rel=1e-9, abs=1e-9)


def test_a_replayed_curve_gives_the_same_bits() -> None:
    config = Ppo(kl_coef=0.2, kl_target=7, kl_horizon=512, rollout_batch=128, normalize_rewards=True)
    rng, running, rows = np.random.default_rng(0), begin(config), []
    for _ in range(5):
        kl, mean, deviation = (float(x) for x in rng.uniform(0, 20, 3))
        rows.append({"ppo/kl": kl, "ppo/reward": mean, "ppo/reward_sd": deviation})
        running = after(running, kl, mean, deviation, config)
    assert replay(rows, config) == running
    assert running.steps == 5


@pytest.mark.parametrize(("kl", "factor"), [(8.0, 1.0), (8.8, 1.025), (100.0, 1.05), (7.2, 0.975), (0.0, 0.95), (-3.0, 0.95)])
def test_kl_weight_follows_its_target(kl: float, factor: float) -> None:
    """128 of a horizon of 512 samples: a quarter of the clipped relative error; groups count by their samples."""
    for batch in ({"rollout_batch": 128}, {"rollout_batch": 16, "samples_per_prompt": 8}):
        config = Ppo(kl_target=8.0, kl_horizon=512, **batch)
        assert next_kl_coef(0.2, kl, config) == pytest.approx(0.2 * factor)
    assert next_kl_coef(0.2, kl, Ppo()) == 0.2  # without a target it stays
