"""Losses against loops that follow the papers token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf.losses import clipped_policy, clipped_value, cross_entropy, pairwise_ranking

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


@few
@given(rows(3), st.sampled_from([0.1, 0.2, 0.5]))
def test_clipped_policy(values: list[np.ndarray], clip: float) -> None:
    now, old, advantages = tensors(values)
    loss, clipped, moved = clipped_policy(now, old, advantages, clip)
    loss.backward()

    expected, expected_clipped, kl, gradient = 0.0, 0, 0.0, []
    for n, o, a in zip(*(v.astype(np.float64) for v in values), strict=True):
        ratio = math.exp(n - o)
        kept = min(max(ratio, 1 - clip), 1 + clip)
        objective = min(ratio * a, kept * a)
        expected -= objective
        hit = kept * a < ratio * a
        expected_clipped += hit
        kl += ratio - 1 - (n - o)
        gradient.append(0.0 if hit else -ratio * a)  # d ratio / d now = ratio
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert clipped.item() == expected_clipped
    assert moved.item() == pytest.approx(kl, rel=1e-9, abs=1e-9)
    # At a ratio of exactly 1 +- clip either slope is right; a float there is a coincidence worth leaving out.
    ratios = np.exp(values[0].astype(np.float64) - values[1].astype(np.float64))
    smooth = np.abs(np.abs(ratios - 1) - clip) > 1e-9
    np.testing.assert_allclose(now.grad.numpy()[smooth], np.array(gradient)[smooth], rtol=1e-9, atol=1e-9)
    assert not clipped.requires_grad
    assert not moved.requires_grad


def test_first_step_of_ppo_has_ratio_one_and_the_policy_gradient() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, clipped, moved = clipped_policy(log_probs, log_probs.detach(), advantages, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)  # -sum of the advantages
    assert (clipped.item(), moved.item()) == (0.0, 0.0)
    assert log_probs.grad.tolist() == (-advantages).tolist()


def test_an_absurd_token_makes_no_infinity() -> None:
    now = torch.tensor([0.0], requires_grad=True)
    loss, _, moved = clipped_policy(now, torch.tensor([-1e4]), torch.tensor([-1.0]), 0.2)
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(moved.item())
    assert now.grad.tolist() == [0.0]


@few
@given(rows(3), st.sampled_from([0.2, 0.5]))
def test_clipped_value(values: list[np.ndarray], clip: float) -> None:
    now, old, returns = tensors(values)
    loss, clipped = clipped_value(now, old, returns, clip)
    expected, counted, edges = 0.0, 0, 0
    for v, o, g in zip(*(x.astype(np.float64) for x in values), strict=True):
        near = v if abs(v - o) <= clip else o + math.copysign(clip, v - o)
        expected += 0.5 * max((v - g) ** 2, (near - g) ** 2)
        counted += (near - g) ** 2 > (v - g) ** 2
        edges += abs(abs(v - o) - clip) < 1e-6  # inside or outside: a matter of rounding
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert abs(clipped.item() - counted) <= edges


def test_values_within_the_range_do_not_count_as_clipped() -> None:
    old, now, returns = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))
    assert clipped_value(now, old, returns, clip_range=20.0)[1].item() == 0


@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_finite_differences(seed: int) -> None:
    """In float64, a hair away from the kinks where the clipping starts."""
    rng = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(7, dtype=torch.float64, generator=rng) for _ in range(3))
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, b), a)
    assert torch.autograd.gradcheck(lambda x: pairwise_ranking(x, b).sum(), a)
    assert torch.autograd.gradcheck(lambda x: clipped_policy(x, b, c, 0.2)[0], a)
    assert torch.autograd.gradcheck(lambda x: clipped_value(x, b, c, 0.3)[0], a)


def test_sums_add_up() -> None:
    """A loss of all tokens is the sum of the losses of any parts: what makes 8 x 1 equal to 1 x 8."""
    a, b, c = (torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for loss in (
        lambda i: cross_entropy(a[i], b[i]),
        lambda i: pairwise_ranking(a[i], b[i]).sum(),
        lambda i: clipped_policy(a[i], b[i], c[i], 0.2)[0],
        lambda i: clipped_value(a[i], b[i], c[i], 0.2)[0],
    ):
        whole, parts = loss(slice(None)), loss(slice(0, 4)) + loss(slice(4, 4)) + loss(slice(4, None))
        assert whole.item() == pytest.approx(parts.item())
