"""Losses against loops that follow the papers token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf.losses import cispo, clipped_policy, clipped_value, cross_entropy, kl, pairwise_ranking, policy_loss, sapo
from rlhf.recipe import Ppo

few = settings(max_examples=60, deadline=None)
numbers = st.floats(-4, 4, width=32)


def rows(count: int) -> st.SearchStrategy[list[np.ndarray]]:
    """`count` arrays of one length, from empty on."""
    return st.integers(0, 12).flatmap(lambda n: st.lists(arrays(np.float32, n, elements=numbers), min_size=count, max_size=count))


def tensors(values: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(v).double().requires_grad_() for v in values]


@few
@given(rows(2))
def test_cross_entropy(values: list[np.ndarray]) -> None:
    log_probs, weights = values
    expected = sum(-float(w) * float(lp) for lp, w in zip(log_probs, weights, strict=True))
    assert cross_entropy(*tensors(values)).item() == pytest.approx(expected, abs=1e-9)


@few
@given(rows(2))
def test_pairwise_ranking(values: list[np.ndarray]) -> None:
    chosen, rejected = tensors(values)
    loss = pairwise_ranking(chosen, rejected).sum()
    expected = sum(math.log1p(math.exp(-(float(c) - float(r)))) for c, r in zip(*values, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    loss.backward()
    by_hand = -1 / (1 + np.exp((values[0] - values[1]).astype(np.float64)))  # -sigmoid(rejected - chosen)
    np.testing.assert_allclose(chosen.grad.numpy(), by_hand, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(rejected.grad.numpy(), -by_hand, rtol=1e-5, atol=1e-9)


def test_pairwise_ranking_stays_finite() -> None:
    loss = pairwise_ranking(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0])).sum()
    assert loss.item() == pytest.approx(1000.0)


RANGES = st.sampled_from([(0.1, 0.1), (0.2, 0.28), (0.5, 0.3), (1.5, 4.0)])


@few
@given(rows(2), RANGES, st.sampled_from([math.inf, 3.0, 1.2]))
def test_clipped_policy(values: list[np.ndarray], ranges: tuple[float, float], dual: float) -> None:
    low, high = ranges
    log_ratio, advantages = tensors(values)
    terms, clipped = clipped_policy(log_ratio, advantages, low, high, dual)
    terms.sum().backward()
    expected, hit, gradient = [], [], []
    for d, a in zip(*(v.astype(np.float64) for v in values), strict=True):
        ratio = math.exp(d)
        objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        floor = dual * a if a < 0 else -math.inf
        expected.append(-max(objective, floor))
        hit.append(bool(objective < ratio * a or floor > objective))
        gradient.append(0.0 if hit[-1] else -ratio * a)  # d ratio / d log_ratio = ratio
    assert terms.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    ratios = np.exp(values[0].astype(np.float64))
    # At the kinks either slope is right; a float there is a coincidence worth leaving out.
    smooth = np.min(np.abs(ratios - np.array([[1 - low], [1 + high], [dual]])), axis=0) > 1e-9
    assert clipped.numpy()[smooth].tolist() == np.array(hit, bool)[smooth].tolist()
    np.testing.assert_allclose(log_ratio.grad.numpy()[smooth], np.array(gradient)[smooth], rtol=1e-9, atol=1e-9)
    assert not clipped.requires_grad


def test_clip_higher_and_dual_clip_by_hand() -> None:
    """A ratio of 1.25: past 1.2, within DAPO's 1.28. A ratio of 10 with A = -1 costs 10, and 3 with the dual clip."""
    up, one, ten = torch.tensor([1.25]).log(), torch.tensor([1.0]), torch.tensor([10.0]).log()
    assert clipped_policy(up, one, 0.2, 0.2)[0].item() == pytest.approx(-1.2)
    assert clipped_policy(up, one, 0.2, 0.28)[0].item() == pytest.approx(-1.25)
    assert clipped_policy(ten, -one, 0.2, 0.2)[0].item() == pytest.approx(10)
    assert clipped_policy(ten, -one, 0.2, 0.2, 3.0)[0].item() == pytest.approx(3)


LOSSES = {
    "clip": {},
    "dual_clip": {"policy_loss": "dual_clip"},
    "gspo": {"policy_loss": "gspo", "clip_range_low": 0.3, "clip_range_high": 0.4},
    "cispo": {"policy_loss": "cispo", "clip_range_low": 1.0, "clip_range_high": 0.5},
    "sapo": {"policy_loss": "sapo"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_at_ratio_one_every_loss_has_the_policy_gradient(name: str) -> None:
    """-A per token; gspo shares its answer's out evenly."""
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages, owners = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0, 0, 1])
    terms, clipped = policy_loss(log_probs, log_probs.detach(), advantages, owners, Ppo(**LOSSES[name]))
    terms.sum().backward()
    expected = [0.5, 0.5, -0.5] if name == "gspo" else (-advantages).tolist()
    assert log_probs.grad.tolist() == pytest.approx(expected)
    assert not clipped.any()


@few
@given(st.lists(st.sampled_from([1, 1, 2, 3, 5]), max_size=5), st.integers(0, 10**6))
def test_gspo_equals_its_formula_answer_by_answer(lengths: list[int], seed: int) -> None:
    """-min(s A, clip(s) A) with s = (pi(y) / pi_old(y))^(1 / |y|); the gradient by autograd of that formula."""
    rng = np.random.default_rng(seed)
    now, old = (torch.from_numpy(rng.normal(-2, 0.5, sum(lengths))).requires_grad_() for _ in range(2))
    of_answers = torch.from_numpy(rng.normal(size=len(lengths)))
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    terms, _ = policy_loss(now, old, of_answers[owners], owners, Ppo(**LOSSES["gspo"]))
    shares = torch.from_numpy(np.repeat(1 / np.maximum(lengths, 1), lengths)) if lengths else torch.zeros(0)
    (gradient,) = torch.autograd.grad((shares * terms).sum(), now)

    formula = torch.zeros((), dtype=torch.float64)
    for i in range(len(lengths)):
        s = ((now - old)[owners == i].sum() / lengths[i]).exp()
        formula = formula - torch.minimum(s * of_answers[i], s.clamp(0.7, 1.4) * of_answers[i])
    assert (shares * terms).sum().item() == pytest.approx(formula.item(), rel=1e-9, abs=1e-9)
    if lengths:
        torch.testing.assert_close(gradient, torch.autograd.grad(formula, now)[0], rtol=1e-9, atol=1e-9)


@few
@given(rows(3), RANGES)
def test_cispo_clips_weights_but_no_gradient(values: list[np.ndarray], ranges: tuple[float, float]) -> None:
    now, old, advantages = tensors(values)
    terms, clipped = cispo(now, old, advantages, *ranges)
    terms.sum().backward()
    n, o, a = (v.astype(np.float64) for v in values)
    weights = np.clip(np.exp(n - o), 1 - ranges[0], 1 + ranges[1])
    assert terms.tolist() == pytest.approx((-weights * a * n).tolist(), rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(now.grad.numpy(), -weights * a, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(clipped.numpy(), weights != np.exp(n - o))


@few
@given(rows(2))
def test_sapo(values: list[np.ndarray]) -> None:
    log_ratio, advantages = tensors(values)
    terms, _ = sapo(log_ratio, advantages, 1.0, 1.05)
    terms.sum().backward()
    for d, a, term, slope in zip(*values, terms.tolist(), log_ratio.grad.tolist(), strict=True):
        ratio, tau = math.exp(d), 1.0 if a > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        assert term == pytest.approx(-4 / tau * gate * float(a), rel=1e-9, abs=1e-12)
        assert slope == pytest.approx(-4 * gate * (1 - gate) * ratio * float(a), rel=1e-6, abs=1e-12)


def test_an_absurd_token_makes_no_infinity() -> None:
    for config in LOSSES.values():
        now = torch.tensor([0.0], requires_grad=True)
        terms, _ = policy_loss(now, torch.tensor([-1e4]), torch.tensor([-1.0]), torch.tensor([0]), Ppo(**config))
        terms.sum().backward()
        assert math.isfinite(terms.item())
        assert math.isfinite(now.grad.item())
    assert all(math.isfinite(kl(torch.tensor(-1e4), k).item()) for k in ("k1", "k2", "k3"))


@few
@given(rows(1))
def test_kl_estimators(values: list[np.ndarray]) -> None:
    d = values[0].astype(np.float64)
    for name, expected in {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}.items():
        found = kl(torch.from_numpy(d), name)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
        assert name == "k1" or (found >= -1e-12).all()


def test_the_mean_of_an_estimator_is_the_kl_and_its_gradient_is_what_the_docstring_says() -> None:
    """Over all tokens of two small distributions, by enumeration: no sampling noise."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, -0.5], dtype=torch.float64).log_softmax(0)
    p, log_p = logits.softmax(0).detach(), logits.log_softmax(0)
    true = (logits.softmax(0) * (log_p - reference)).sum()
    for name in ("k1", "k3"):
        assert (p * kl(log_p - reference, name)).sum().item() == pytest.approx(true.item(), rel=1e-9)

    def slope(value: torch.Tensor) -> list[float]:
        return torch.autograd.grad(value, logits, retain_graph=True)[0].tolist()

    reverse = (reference.exp() * (reference - log_p)).sum()  # KL(ref || pi)
    assert slope((p * kl(log_p - reference, "k1")).sum()) == pytest.approx([0, 0, 0], abs=1e-12)
    assert slope((p * kl(log_p - reference, "k2")).sum()) == pytest.approx(slope(true), rel=1e-9)
    assert slope((p * kl(log_p - reference, "k3")).sum()) == pytest.approx(slope(reverse), rel=1e-9)


@few
@given(rows(3), st.sampled_from([0.2, 0.5]))
def test_clipped_value(values: list[np.ndarray], clip: float) -> None:
    now, old, returns = tensors(values)
    terms, clipped = clipped_value(now, old, returns, clip)
    expected, counted, edges = 0.0, 0, 0
    for v, o, g in zip(*(x.astype(np.float64) for x in values), strict=True):
        near = v if abs(v - o) <= clip else o + math.copysign(clip, v - o)
        expected += 0.5 * max((v - g) ** 2, (near - g) ** 2)
        counted += (near - g) ** 2 > (v - g) ** 2
        edges += abs(abs(v - o) - clip) < 1e-6  # inside or outside: a matter of rounding
    assert terms.sum().item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert abs(int(clipped.sum()) - counted) <= edges


def test_values_within_the_range_do_not_count_as_clipped() -> None:
    old, now, returns = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))
    assert clipped_value(now, old, returns, clip_range=20.0)[1].sum() == 0


@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_finite_differences(seed: int) -> None:
    """In float64, a hair away from the kinks where the clipping starts."""
    rng = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(7, dtype=torch.float64, generator=rng) for _ in range(3))
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, b), a)
    assert torch.autograd.gradcheck(lambda x: pairwise_ranking(x, b).sum(), a)
    assert torch.autograd.gradcheck(lambda x: clipped_policy(x - b, c, 0.2, 0.3, 3.0)[0], a)
    assert torch.autograd.gradcheck(lambda x: clipped_value(x, b, c, 0.3)[0], a)
    assert torch.autograd.gradcheck(lambda x: kl(x - b, "k3"), a)


def test_sums_add_up() -> None:
    """A loss of all tokens is the sum of the losses of any parts: what makes 8 x 1 equal to 1 x 8."""
    a, b, c = (torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for loss in (
        lambda i: cross_entropy(a[i], b[i]),
        lambda i: pairwise_ranking(a[i], b[i]).sum(),
        lambda i: clipped_policy(a[i] - b[i], c[i], 0.2, 0.2)[0].sum(),
        lambda i: clipped_value(a[i], b[i], c[i], 0.2)[0].sum(),
    ):
        whole, parts = loss(slice(None)), loss(slice(0, 4)) + loss(slice(4, 4)) + loss(slice(4, None))
        assert whole.item() == pytest.approx(parts.item())
