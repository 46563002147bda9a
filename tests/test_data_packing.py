"""Packing loses and mixes nothing; the plan of an optimizer step is fair, legal and the same for everyone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.packing import Sample, balance, pack

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=80)


@given(LENGTHS)
def test_pack_keeps_every_token_in_order(lengths: list[int]) -> None:
    samples = [
        Sample(np.arange(n) + 1000 * i, np.ones(n), {"advantages": np.full(n, i, np.float32), "score": np.array(i, np.float32)})
        for i, n in enumerate(lengths)
    ]
    batch = pack(samples)
    assert batch.lengths == lengths
    assert batch.tokens.dtype == batch.positions.dtype == np.int64
    assert batch.weights.dtype == np.float32
    assert batch.extras["score"].tolist() == list(range(len(lengths)))
    start = 0
    for sample, n in zip(samples, lengths, strict=True):
        here = slice(start, start + n)
        assert (batch.tokens[here] == sample.tokens).all()
        assert batch.positions[here].tolist() == list(range(n))
        assert batch.weights[here].tolist() == [0.0] + [1.0] * (n - 1)
        assert (batch.extras["advantages"][here] == sample.extras["advantages"]).all()
        start += n
    assert start == len(batch.tokens)


def test_a_window_of_several_documents_is_several_segments() -> None:
    batch = pack([Sample(np.arange(6), np.ones(6), lengths=[2, 4]), Sample(np.arange(3), np.ones(3))])
    assert batch.lengths == [2, 4, 3]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2]
    assert batch.weights.tolist() == [0, 1, 0, 1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [Sample(np.arange(3), np.ones(2))],
        [Sample(np.arange(3), np.ones(3), lengths=[2, 2])],
        [Sample(np.arange(3), np.ones(3)), Sample(np.arange(3), np.ones(3), {"more": np.ones(3)})],
        [Sample(np.arange(3), np.ones(3), {"more": np.ones(2)})],
    ],
)
def test_pack_refuses_arrays_that_do_not_match(samples: list[Sample]) -> None:
    with pytest.raises(ValueError):
        pack(samples)


def test_answers_continue_their_shared_prompt() -> None:
    samples = [
        Sample(np.arange(10, 13), np.ones(3)),
        Sample(np.arange(20, 27), np.ones(7), lengths=[3, 2, 2], prefix=True),
    ]
    batch = pack(samples)
    assert batch.lengths == [3, 3, 2, 2]
    assert batch.prefixes == [-1, -1, 1, 1]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    assert batch.before.tolist() == [0, 0, 1, 3, 3, 4, 5, 6, 5, 8]  # both answers begin after the prompt's last token
    assert batch.weights.tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 1]


def begins_alike(**changed: object) -> Sample:
    given = {"tokens": np.array([7, 8, 9, 20, 21]), "weights": np.array([0, 0, 0, 1, 1]), "lengths": [4, 1], "prefix": True}
    return Sample(**(given | changed))


def test_what_all_begin_with_stands_there_once() -> None:
    alone = Sample(np.array([7, 8, 30, 31]), np.array([0, 0, 0, 1]), {"number": np.array([0, 1, 2, 3])})
    shared = begins_alike(extras={"number": np.array([0, 1, 4, 5, 6])})
    batch = pack([alone, shared], opening=2)
    assert batch.tokens.tolist() == [7, 8, 30, 31, 9, 20, 21]
    assert batch.lengths == [2, 2, 2, 1]
    assert batch.prefixes == [-1, 0, 0, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.before.tolist() == [0, 0, 1, 2, 1, 4, 5]
    assert batch.weights.tolist() == [0, 0, 0, 1, 0, 1, 1]
    assert batch.extras["number"].tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"tokens": np.array([7, 6, 9, 20, 21])}, "its first 2 tokens count, or are not the first sample's"),
        ({"weights": np.array([0, 1, 0, 1, 1])}, "its first 2 tokens count"),
        ({"lengths": [2, 3]}, "do not continue an opening of 2"),
        ({"prefix": False}, "do not continue an opening of 2"),
    ],
)
def test_only_a_beginning_that_is_alike_is_shared(other: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack([begins_alike(), begins_alike(**other)], opening=2)


@given(LENGTHS, st.integers(1, 5), st.integers(300, 2000))
def test_balance_is_a_fair_partition(lengths: list[int], workers: int, budget: int) -> None:
    plan = balance(lengths, workers, budget)
    assert plan == balance(lengths, workers, budget)
    assert len(plan) == workers
    micro_batches = [ids for worker in plan for ids in worker]
    assert sorted(i for ids in micro_batches for i in ids) == list(range(len(lengths)))
    assert len({len(worker) for worker in plan}) == 1  # everyone has the same number: they meet in collectives
    assert all(ids == sorted(ids) and sum(lengths[i] for i in ids) <= budget for ids in micro_batches)
    if len(lengths) >= len(micro_batches):
        assert all(micro_batches)


def test_balance_of_equal_windows_gives_equal_shares() -> None:
    plan = balance([256] * 8, workers=2, budget=512)
    assert [[len(ids) for ids in worker] for worker in plan] == [[2, 2], [2, 2]]
    assert balance([256] * 8, workers=1, budget=4096) == [[list(range(8))]]


def test_a_sample_over_the_budget_is_named() -> None:
    with pytest.raises(DataError, match=r"sample 1 .* 600 tokens.*\(512\)"):
        balance([10, 600], workers=1, budget=512)
