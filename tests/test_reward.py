"""Rankings of any number of answers: the loss against a loop in numpy, the figures by hand, and something learned."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, recipe_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from data.packing import Sample, pack, uncounted
from rlhf.attention import PACKED
from rlhf.learner import Learner
from rlhf.models import Batch, ScalarModel
from rlhf.recipe import Reward
from rlhf.reward import BINS, figures, pairs, ranking_loss

Ranking = tuple[int, list[tuple[int, float]]]  # prompt tokens, [(answer tokens, score)] best first


def scalar_model(seed: int = 0) -> ScalarModel:
    sizes = recipe_model()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        num_labels=1,
        pad_token_id=0,
        attn_implementation=PACKED,
    )
    return ScalarModel(LlamaForSequenceClassification(config))


def sample(prompt: Sequence[int], answers: Sequence[Sequence[int]], scores: Sequence[float]) -> Sample:
    lengths = [len(prompt), *map(len, answers)]
    last = np.cumsum(lengths)[1:] - 1
    weights, at = np.zeros((2, sum(lengths)), np.float32)
    weights[last], at[last] = 1 / len(answers), scores
    return Sample(np.concatenate([prompt, *answers]), weights, {"scores": at}, lengths, prefix=True)


def samples(rankings: Sequence[Ranking], seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        sample(rng.integers(1, 64, prompt), [rng.integers(1, 64, n) for n, _ in answers], [score for _, score in answers])
        for prompt, answers in rankings
    ]


ranked = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([-1.0, 0.0, 0.5, 2.0])), min_size=2, max_size=4).map(
    lambda answers: sorted(answers, key=lambda a: -a[1])
)
rankings = st.lists(st.tuples(st.integers(1, 6), ranked), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(rankings, st.integers(0, 50), st.sampled_from([0.0, 0.7]), st.sampled_from([0.0, 0.01]))
def test_loss_equals_a_loop_over_rows_of_their_own(found: list[Ranking], seed: int, margin: float, center: float) -> None:
    model, packed = scalar_model(seed), samples(found, seed)
    value, sums = ranking_loss(model, Batch.of(pack(packed), CPU), Reward(margin_coef=margin, center_coef=center), wide=1.0)

    expected = accuracy = 0.0
    for one in packed:
        prompt, *answers = np.split(one.tokens, np.cumsum(one.lengths)[:-1])
        scores = np.split(one.extras["scores"], np.cumsum(one.lengths)[:-1])[1:]
        rewards = []
        for answer in answers:
            row = np.concatenate([prompt, answer])
            rewards.append(float(model(Batch.of(pack([Sample(row, np.ones(len(row)))]), CPU))[-1].detach()))
        terms = []
        for i, j in combinations(range(len(answers)), 2):
            if (gap := scores[i][-1] - scores[j][-1]) > 0:
                difference = rewards[i] - rewards[j]
                loss = np.log1p(np.exp(-(difference - margin * gap))) + center * (rewards[i] + rewards[j]) ** 2
                terms.append((loss, difference > 0))
        if terms:
            expected += np.mean([t[0] for t in terms])
            accuracy += np.mean([t[1] for t in terms])
    assert float(value) == pytest.approx(expected, abs=1e-5)
    assert float(sums["accuracy"]) == pytest.approx(accuracy, abs=1e-6)


def test_shares_of_a_ranking_sum_to_one_and_an_idle_ranks_to_zero() -> None:
    packed = samples([(3, [(2, 2.0), (3, 1.0), (1, 0.0)]), (4, [(2, 1.0), (2, 0.0)])])
    better, worse, gaps, shares = pairs(Batch.of(pack(packed), CPU))
    assert gaps.tolist() == [1, 2, 1, 1]
    assert shares.tolist() == pytest.approx([1 / 3] * 3 + [1])
    assert (better < worse).all()
    assert pairs(Batch.of(pack([uncounted(s) for s in packed]), CPU))[3].tolist() == [0, 0, 0, 0]


def test_figures_add_up_over_pieces() -> None:
    """Sums of two micro-batches give the figures of a loop over all pairs."""
    model = scalar_model().eval()
    with torch.no_grad():
        model.inner.score.weight.mul_(60)  # confidences in several bins
    packed = samples([(2, [(3, 3.0), (2, 2.0), (4, 0.0)]), (3, [(2, 1.0), (3, 0.0)]), (5, [(1, 4.0), (1, 2.0)]), (1, [(2, 1.0), (2, 0.0)])])
    sums: dict[str, float] = {}
    with torch.no_grad():
        for part in (packed[:2], packed[2:]):
            batch = Batch.of(pack(part), CPU)
            value, further = ranking_loss(model, batch, Reward(), wide=1.5)
            for name, number in {"loss": value, "count": batch.weights.sum(), **further}.items():
                sums[name] = sums.get(name, 0.0) + float(number)
        better, worse, gaps, shares = pairs(batch := Batch.of(pack(packed), CPU))
        rewards = model(batch)[batch.last]
    difference = (rewards[better] - rewards[worse]).numpy()
    agree, share = (difference > 0).astype(float), shares.numpy()
    got = figures(sums)
    assert sums["count"] == pytest.approx(4)
    assert got["pair_accuracy"] == pytest.approx((share * agree).sum() / 4)
    wide = gaps.numpy() > 1.5
    assert got["pair_accuracy_wide"] == pytest.approx((share * agree)[wide].sum() / share[wide].sum())
    assert got["pair_accuracy_narrow"] == pytest.approx((share * agree)[~wide].sum() / share[~wide].sum())
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    error = 0.0
    for low in BINS:
        inside = (confidence >= low / 100) & (confidence < low / 100 + (0.1 if low < 90 else 1))
        error += abs((share * (agree - confidence))[inside].sum()) / 4
    assert got["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert sum(got.get(f"pairs_at_{low}", 0) for low in BINS) == pytest.approx(4)


def test_learns_a_ranking_of_four() -> None:
    """More of token 7 is better; the held-out prompts and answers are new."""

    def ranking(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        answers = []
        for sevens in (3, 2, 1, 0):
            answer = rng.integers(10, 64, 4)
            answer[rng.permutation(4)[:sevens]] = 7
            answers.append(answer)
        return sample(rng.integers(10, 64, 3), answers, [3, 2, 1, 0])

    config = Reward(learning_rate=5e-3)
    learner = Learner(scalar_model(), config, steps=60)

    def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return ranking_loss(model, batch, config, wide=1.5)

    for step in range(60):
        learner.step([Batch.of(pack([ranking(8 * step + i) for i in range(8)]), CPU)], loss)
    held_out = learner.evaluate([Batch.of(pack([ranking(10_000 + i) for i in range(40)]), CPU)], loss)
    found = figures(held_out)
    assert found["pair_accuracy"] > 0.95
    assert found["pair_accuracy_wide"] >= found["pair_accuracy_narrow"]
