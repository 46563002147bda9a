"""Rollouts of several engines and the scores of several ranks, put together in sample order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.experience import Rollout, align, estimate, merge, responses, samples
from rlhf.recipe import Ppo

few = settings(max_examples=60, deadline=None)


def rollout_of(index: list[int], lengths: list[tuple[int, int]], version: str = "step-1") -> Rollout:
    """Sample i has tokens 1000 i, 1000 i + 1, ... and the log-probability -token of each response token."""
    tokens, log_probs = [], []
    for i in index:
        prompt, response = lengths[i]
        ids = [1000 * i + k for k in range(prompt + response)]
        tokens += ids
        log_probs += [-float(t) for t in ids[prompt:]]
    return Rollout(
        np.array(index, np.int64),
        np.array([lengths[i][0] for i in index], np.int64),
        np.array([lengths[i][1] for i in index], np.int64),
        np.array(tokens, np.int32),
        np.array([i % 2 == 0 for i in index]),
        np.array(log_probs, np.float32),
        version,
    )


@st.composite
def engines(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Lengths (prompt, response) of some samples, and which engine answered which, in whatever order."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 1, 2, 5])), min_size=1, max_size=8))
    order = draw(st.permutations(range(len(lengths))))
    cuts = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=2)))
    return lengths, [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, len(lengths)], strict=True)]


@few
@given(engines())
def test_merge_restores_the_sample_order(case: tuple[list[tuple[int, int]], list[list[int]]]) -> None:
    lengths, parts = case
    merged = merge([rollout_of(part, lengths) for part in parts])
    expected = rollout_of(list(range(len(lengths))), lengths)
    for name in ("index", "prompt_lengths", "response_lengths", "tokens", "log_probs"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(expected, name), err_msg=name)
    assert merged.version == "step-1"
    assert responses(merged) == [[1000 * i + k for k in range(p, p + r)] for i, (p, r) in enumerate(lengths)]


def test_merge_refuses_two_policies() -> None:
    lengths = [(2, 3), (1, 1)]
    with pytest.raises(ValueError, match=r"step-1.*step-2"):
        merge([rollout_of([0], lengths), rollout_of([1], lengths, "step-2")])


@few
@given(engines())
def test_samples_count_their_response_and_carry_its_numbers(case: tuple[list[tuple[int, int]], list[list[int]]]) -> None:
    lengths, _ = case
    rollout = rollout_of(list(range(len(lengths))), lengths)
    found = samples(rollout, {"log_probs": rollout.log_probs})
    assert len(found) == len(lengths)
    for i, (sample, (prompt, response)) in enumerate(zip(found, lengths, strict=True)):
        tokens = [1000 * i + k for k in range(prompt + response)]
        assert sample.tokens.tolist() == tokens
        assert sample.tokens.dtype == np.int64
        assert sample.weights.tolist() == [0.0] * prompt + [1.0] * response
        assert sample.extras["log_probs"].tolist() == [0.0] * prompt + [-float(t) for t in tokens[prompt:]]


@few
@given(engines())
def test_align_puts_the_ranks_scores_in_order(case: tuple[list[tuple[int, int]], list[list[int]]]) -> None:
    lengths, parts = case
    per_token = [(np.array(part, np.int64), rollout_of(part, lengths).log_probs) for part in parts]
    whole = rollout_of(list(range(len(lengths))), lengths)
    np.testing.assert_array_equal(align(per_token, whole.response_lengths), whole.log_probs)
    per_sample = [(np.array(part, np.int64), np.array(part, np.float32) * 10) for part in parts]
    ones = np.ones(len(lengths), np.int64)
    np.testing.assert_array_equal(align(per_sample, ones), np.arange(len(lengths), dtype=np.float32) * 10)


@pytest.mark.parametrize("index", [[0, 2], [0, 1, 1, 2], [0, 1, 3]])
def test_every_sample_is_scored_once(index: list[int]) -> None:
    part = (np.array(index, np.int64), np.zeros(len(index), np.float32))
    with pytest.raises(ValueError, match="scored once"):
        align([part], np.ones(3, np.int64))


def test_estimate_by_hand() -> None:
    """Two responses of 2 and 1 tokens, gamma = lambda = 1: returns are rewards to go."""
    rollout = rollout_of([0, 1], [(1, 2), (3, 1)])
    log_probs = np.float32([-1.0, -2.0, -3.0])
    rollout = Rollout(
        rollout.index,
        rollout.prompt_lengths,
        rollout.response_lengths,
        rollout.tokens,
        rollout.finished,
        log_probs + np.float32([0, 1e-3, 0]),
        "v",
    )
    found = {
        "log_probs": log_probs,
        "ref_log_probs": np.float32([-1.5, -2.0, -2.0]),
        "values": np.float32([0.5, 0.25, 1.0]),
        "rewards": np.float32([2.0, -20.0]),
    }
    config = Ppo(lam=1.0, reward_clip=10.0, whiten_advantages=False)
    experience, facts = estimate(rollout, found, config, kl_coef=0.1)
    assert experience.returns == pytest.approx([2.0 - 0.05, 2.0, -10.0 + 0.1], abs=1e-6)
    assert experience.advantages == pytest.approx([1.45, 1.75, -10.9], abs=1e-6)
    assert facts["reward"] == pytest.approx(-9.0)  # as scored, before clipping
    assert facts["unfinished"] == 0.5
    found["rewards"] = np.float32([2.0, 3.0])
    strict, _ = estimate(rollout, found, config.model_copy(update={"unfinished_penalty": 1.5}), kl_coef=0.1)
    assert strict.returns == pytest.approx([2.0 - 0.05, 2.0, 3.0 - 1.5 + 0.1], abs=1e-6)  # the second one was cut off
    found["rewards"] = np.float32([1.0, 3.0, 4.0, 2.0])  # two heads: the first answer's two rewards, then the second's
    careful, uncertain = estimate(rollout, found, config.model_copy(update={"uncertainty_coef": 0.5}), kl_coef=0.1)
    assert careful.returns == pytest.approx([2.0 - 0.5 - 0.05, 1.5, 3.0 - 0.5 + 0.1], abs=1e-6)
    assert (uncertain["reward"], uncertain["reward_disagreement"]) == (2.5, 1.0)
    assert "reward_disagreement" not in facts
    assert facts["kl"] == pytest.approx((0.5 + 0.0 - 1.0) / 2)
    assert facts["response_tokens"] == pytest.approx(1.5)
    assert facts["log_prob_gap"] == pytest.approx(1e-3, rel=1e-3)
    found["rewards"] = np.float32([2.0, 3.0])
    white, _ = estimate(rollout, found, Ppo(lam=1.0, reward_clip=10.0), kl_coef=0.1)
    assert white.advantages.mean() == pytest.approx(0.0, abs=1e-6)
    assert white.advantages.std() == pytest.approx(1.0, abs=1e-4)
