"""Rollouts of several engines and the scores of several ranks, put together in sample order."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.experience import Rollout, align, estimate, merge, responses, samples
from rlhf.recipe import Ppo
from rlhf.shaping import begin

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
    config = Ppo(lam=1.0, reward_clip=10.0, whiten_advantages=False, kl_coef=0.1)
    experience, facts = estimate(rollout, found, config, begin(config))
    assert experience.returns == pytest.approx([2.0 - 0.05, 2.0, -10.0 + 0.1], abs=1e-6)
    assert experience.advantages == pytest.approx([1.45, 1.75, -10.9], abs=1e-6)
    assert experience.kl_coef == 0.0  # it is in the rewards
    assert facts["reward"] == pytest.approx(-9.0)  # as scored, before clipping
    assert facts["unfinished"] == 0.5
    found["rewards"] = np.float32([2.0, 3.0])
    strict, _ = estimate(rollout, found, config.model_copy(update={"unfinished_penalty": 1.5}), begin(config))
    assert strict.returns == pytest.approx([2.0 - 0.05, 2.0, 3.0 - 1.5 + 0.1], abs=1e-6)  # the second one was cut off
    assert facts["kl"] == pytest.approx((0.5 + 0.0 - 1.0) / 2)
    assert facts["response_tokens"] == pytest.approx(1.5)
    assert facts["log_prob_gap"] == pytest.approx(1e-3, rel=1e-3)
    white, _ = estimate(rollout, found, Ppo(lam=1.0, reward_clip=10.0), begin(config))
    assert white.advantages.mean() == pytest.approx(0.0, abs=1e-6)
    assert white.advantages.std() == pytest.approx(1.0, abs=1e-4)
    apart, _ = estimate(rollout, found, config.model_copy(update={"kl_in": "loss"}), begin(config))
    assert apart.returns == pytest.approx([2.0, 2.0, 3.0], abs=1e-6)
    assert apart.kl_coef == 0.1


def case_of(seed: int, lengths: list[int], **keys: object) -> tuple[Rollout, dict[str, np.ndarray], Ppo]:
    """A rollout of answers `lengths` long with random numbers, every second one cut off, as `estimate` takes it."""
    rng = np.random.default_rng(seed)
    rollout = rollout_of(list(range(len(lengths))), [(2, n) for n in lengths])
    log_probs, reference = rng.normal(-2, 0.5, (2, sum(lengths))).astype(np.float32)
    engine = (log_probs + rng.normal(0, 0.5, sum(lengths))).astype(np.float32)
    found = {"log_probs": log_probs, "ref_log_probs": reference, "rewards": rng.normal(0, 2, len(lengths)).astype(np.float32)}
    return replace(rollout, log_probs=engine), found, Ppo(kl_coef=0.1, **keys)


@few
@given(st.lists(st.sampled_from([0, 1, 1, 2, 5]), min_size=4, max_size=4).filter(any), st.integers(0, 10**6))
def test_estimators_from_scores_to_tokens(lengths: list[int], seed: int) -> None:
    """Each against a loop over samples: KL per token off the reward, two groups of two."""
    owners = np.repeat(np.arange(4), lengths)
    for advantage in ("grpo", "dr_grpo", "rloo", "reinforce++", "remax"):
        rollout, found, config = case_of(seed, lengths, advantage=advantage, samples_per_prompt=2, whiten_advantages=False)
        found["baselines"] = np.float32([0.5, -0.25])
        greedy = rollout_of([0, 2], [(2, 3)] * 4)  # both finished
        experience, facts = estimate(rollout, found, config, begin(config), greedy)
        cost = -0.1 * (found["log_probs"].astype(np.float64) - found["ref_log_probs"])
        score = found["rewards"].astype(np.float64)
        whole = [score[i] + cost[owners == i].sum() for i in range(4)]
        expected = []
        for i in range(4):
            other, n = whole[i ^ 1], lengths[i]
            mean = (whole[i] + other) / 2
            to_go = [score[i] + cost[owners == i][t:].sum() for t in range(n)]
            expected += {
                "grpo": [(whole[i] - mean) / (abs(whole[i] - other) / 2**0.5 + 1e-4)] * n,
                "dr_grpo": [whole[i] - mean] * n,
                "rloo": [whole[i] - other] * n,
                "reinforce++": to_go,
                "remax": [x - [0.5, -0.25][i // 2] for x in to_go],
            }[advantage]
        np.testing.assert_allclose(experience.advantages, expected, rtol=1e-5, atol=1e-5, err_msg=advantage)
        assert experience.values is None
        assert "value_explained" not in facts


def test_who_does_not_count() -> None:
    """Cut off answers, and groups of equal worth: they stay in the means of others, and out of the loss and of the whitening."""
    rollout, found, config = case_of(0, [2, 3, 1, 2], advantage="grpo", samples_per_prompt=2, mask_unfinished=True)
    found["rewards"] = np.float32([1, 0, 2, 2])
    masked, facts = estimate(rollout, found, config, begin(config))
    assert masked.weights.tolist() == [1, 1, 0, 0, 0, 1, 0, 0]
    assert facts["counted"] == 0.5
    dropped, _ = estimate(rollout, found, config.model_copy(update={"drop_equal_groups": True}), begin(config))
    assert dropped.weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(masked.advantages, dropped.advantages)
    white, _ = estimate(rollout, found, config.model_copy(update={"whiten_advantages": True, "kl_coef": 0.0}), begin(config))
    assert white.advantages[white.weights > 0].mean() == pytest.approx(0.0, abs=1e-6)


def test_importance_weights_the_advantages() -> None:
    rollout, found, config = case_of(3, [2, 3], advantage="reinforce++", whiten_advantages=False)
    plain, _ = estimate(rollout, found, config, begin(config))
    capped, facts = estimate(rollout, found, config.model_copy(update={"importance": "truncated", "importance_cap": 1.1}), begin(config))
    ratios = np.minimum(np.exp(found["log_probs"] - rollout.log_probs), 1.1)
    np.testing.assert_allclose(capped.advantages, plain.advantages * ratios, rtol=1e-6)
    assert facts["importance"] == pytest.approx(ratios.mean())


def test_nothing_was_said() -> None:
    rollout, found, config = case_of(0, [0, 0])
    experience, facts = estimate(rollout, found | {"values": np.zeros(0, np.float32)}, config, begin(config))
    assert len(experience.advantages) == len(experience.weights) == 0
    assert facts["log_prob_gap"] == 0
