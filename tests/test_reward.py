"""Rankings of any number of answers: the loss against a loop in numpy, the figures by hand, and something learned."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, recipe_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from data.packing import Sample, pack, uncounted
from rlhf.attention import PACKED
from rlhf.experience import Rollout, align
from rlhf.learner import Learner
from rlhf.losses import pairwise_ranking
from rlhf.models import Batch, ScalarModel, hidden_states
from rlhf.recipe import Recipe, Reward
from rlhf.reward import BINS, draws, figures, pairs, ranking_loss, units
from rlhf.roles import RewardWorker

Ranking = tuple[int, list[tuple[int, float]]]  # prompt tokens, [(answer tokens, score)] best first


def scalar_model(seed: int = 0, heads: int = 1) -> ScalarModel:
    sizes = recipe_model()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        num_labels=heads,
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


def test_one_head_is_what_it_was_before_there_were_several() -> None:
    """Loss and gradients to the bit, by the formula on flat rewards."""
    packed = samples([(3, [(2, 2.0), (3, 1.0), (1, 0.0)]), (4, [(2, 1.0), (2, 0.0)])])
    config, found = Reward(margin_coef=0.3, center_coef=0.01), []
    for by_heads in (True, False):
        model, batch = scalar_model(), Batch.of(pack(packed), CPU)
        if by_heads:
            value = ranking_loss(model, batch, config, wide=1.0)[0]
        else:
            better, worse, gaps, shares = pairs(batch)
            rewards = model.inner.score(hidden_states(model.inner, batch))[:, 0].float()[batch.last]
            won, lost = rewards[better], rewards[worse]
            value = (shares * (pairwise_ranking(won, lost, 0.3 * gaps) + 0.01 * (won + lost).square())).sum()
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][-1].abs().max() > 0


def with_draws(packed: Sequence[Sample], heads: int, seed: int) -> list[Sample]:
    drawn = [np.zeros((len(s.tokens), heads), np.float32) for s in packed]
    for i, (of_one, s) in enumerate(zip(drawn, packed, strict=True)):
        of_one[np.cumsum(s.lengths)[1:] - 1] = draws(seed, "data", i, heads)
    return [Sample(s.tokens, s.weights, s.extras | {"draws": of_one}, s.lengths, True) for s, of_one in zip(packed, drawn, strict=True)]


@settings(max_examples=15, deadline=None)
@given(rankings, st.integers(0, 50), st.sampled_from([0.0, 0.7]), st.sampled_from([0.0, 0.01]))
def test_an_ensembles_loss_is_the_mean_of_its_heads_alone(found: list[Ranking], seed: int, margin: float, center: float) -> None:
    """Each head as a reward model of its own, over its own resampling: values and the heads' gradients."""
    heads, packed = 3, samples(found, seed)
    model, config = scalar_model(seed, heads), Reward(heads=heads, margin_coef=margin, center_coef=center)
    value, _ = ranking_loss(model, Batch.of(pack(with_draws(packed, heads, seed)), CPU), config, wide=1.0)
    value.backward()
    for head in range(heads):
        alone = scalar_model(seed)
        trunk = {name: p for name, p in model.inner.state_dict().items() if name != "score.weight"}
        alone.inner.load_state_dict(trunk | {"score.weight": model.inner.score.weight[head : head + 1].detach()})
        losses = [ranking_loss(alone, Batch.of(pack([s]), CPU), config, wide=1.0)[0] for s in packed]
        expected = sum((float(draws(seed, "data", i, heads)[head]) * loss for i, loss in enumerate(losses)), torch.zeros(()))
        value = value.detach() - expected.detach() / heads
        if expected.requires_grad:
            expected.backward()
            theirs = alone.inner.score.weight.grad[0] / heads
            torch.testing.assert_close(model.inner.score.weight.grad[head], theirs, atol=1e-6, rtol=1e-4)
    assert float(value) == pytest.approx(0, abs=1e-5)


def test_draws_are_poisson_and_nothing_but_arithmetic() -> None:
    many = np.stack([draws(7, "data", i, 4) for i in range(5000)])
    assert many.mean(0) == pytest.approx(1, abs=0.06)  # four standard errors
    assert many.var(0) == pytest.approx(1, abs=0.1)
    assert (many == 0).mean() == pytest.approx(np.exp(-1), abs=0.02)
    assert np.abs(np.corrcoef(many.T) - np.eye(4)).max() < 0.06
    assert np.array_equal(draws(7, "data", 3, 6)[:4], many[3])  # a head more leaves the others as they are
    assert any(not np.array_equal(draws(*other, 4), many[3]) for other in ((8, "data", 3), (7, "other", 3), (7, "data", 4)))


def test_units_carry_the_draws_of_their_ranking() -> None:
    class Rankings:
        manifest_hash, source = "data", str

        def lengths(self, column: str) -> np.ndarray:
            return np.array([3, 3])

        def __getitem__(self, i: int) -> dict[str, object]:
            return {"prompt": [1, 2], "answers": [np.array([3]), np.array([4, 5])], "scores": [1.0, 0.0]}

    (several,), (one,) = (units(Rankings(), heads, seed=5).get(1) for heads in (3, 1))
    assert several.extras["draws"][[2, 4]].tolist() == [draws(5, "data", 1, 3).tolist()] * 2
    assert not several.extras["draws"][[0, 1, 3]].any()
    assert "draws" not in one.extras


def test_the_reward_role_gives_every_heads_score_of_every_answer(tmp_path: Path) -> None:
    """Sample after sample, whatever the micro-batches; the critic's rank 0 reads them so."""
    model = scalar_model(heads=3)
    model.inner.save_pretrained(tmp_path)
    unused = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    ppo = {"micro_batch": 16, "max_prompt_tokens": 4, "max_response_tokens": 6}
    recipe = Recipe.model_validate({"name": "t", "data": unused, "reward": {"heads": 3}, "ppo": ppo})
    worker = RewardWorker(0, 1, 1, recipe, tmp_path)
    worker.load()
    prompts, answers = np.array([2, 1, 3, 4]), np.array([5, 1, 6, 2])
    tokens = np.random.default_rng(0).integers(1, 64, (prompts + answers).sum()).astype(np.int32)
    log_probs = np.zeros(answers.sum(), np.float32)
    rollout = Rollout(np.arange(4), prompts, answers, tokens, np.ones(4, bool), log_probs, "v")
    found = align([worker.scores(rollout)], np.full(4, 3)).reshape(4, 3)
    rows = np.split(tokens.astype(np.int64), np.cumsum(prompts + answers)[:-1])
    with torch.no_grad():
        expected = torch.stack([model(Batch.of(pack([Sample(row, np.ones(len(row)))]), CPU), each_head=True)[-1] for row in rows])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


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


def ranking(seed: int) -> Sample:
    """More of token 7 is better; all else is chance."""
    rng = np.random.default_rng(seed)
    answers = []
    for sevens in (3, 2, 1, 0):
        answer = rng.integers(10, 64, 4)
        answer[rng.permutation(4)[:sevens]] = 7
        answers.append(answer)
    return sample(rng.integers(10, 64, 3), answers, [3, 2, 1, 0])


@pytest.mark.parametrize("heads", [1, 4])
def test_learns_a_ranking_of_four(heads: int) -> None:
    """The held-out prompts and answers are new. Heads disagree about an answer, but less than its reward differs from others'."""
    config = Reward(learning_rate=5e-3, heads=heads, center_coef=0.01)
    learner = Learner(scalar_model(heads=heads), config, steps=60)

    def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return ranking_loss(model, batch, config, wide=1.5)

    for step in range(60):
        packed = [ranking(8 * step + i) for i in range(8)]
        learner.step([Batch.of(pack(with_draws(packed, heads, step) if heads > 1 else packed), CPU)], loss)
    found = figures(learner.evaluate([Batch.of(pack([ranking(10_000 + i) for i in range(40)]), CPU)], loss))
    assert found["pair_accuracy"] > 0.95
    assert found["pair_accuracy_wide"] >= found["pair_accuracy_narrow"]
    assert ("disagreement" in found) == (heads > 1)
    if heads > 1:
        with torch.no_grad():
            batch = Batch.of(pack([ranking(10_000)]), CPU)
            each = learner.model(batch, each_head=True)[batch.last[1:]]
        assert 0 < found["disagreement"] < float(each.mean(1).std())
