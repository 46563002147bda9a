"""The stream of rollout and scoring, with real actors whose work is a short sleep."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import ray

from benchmarks.sleepers import SleepingEngine, SleepingScorer
from cluster.errors import ClusterError
from cluster.groups import Group, Worker, begin
from cluster.placement import Demand, place
from rlhf.experience import align, merge
from rlhf.sampling import Sampling, Wanted, wanted
from rlhf.stream import IN_FLIGHT, Scorer, stream

pytestmark = pytest.mark.usefixtures("ray_session")


class Groups:
    """Groups on a sliver of a core each, gone after the test."""

    def __init__(self) -> None:
        self.open: list[Group] = []

    def __call__(self, name: str, worker: type[Worker], workers: int, *args: object) -> Group:
        demand = Demand(workers, 0.01, 0)
        group = Group(name, worker, demand, place({name: demand}, 60)[name], args=args, threads=1, beside=True)
        self.open.append(group)
        begin([group], 120)
        return group


@pytest.fixture
def groups() -> Iterator[Groups]:
    made = Groups()
    yield made
    for group in made.open:
        group.stop()


def asked(lengths: Sequence[Sequence[int]]) -> list[Wanted]:
    firsts = np.cumsum([0, *map(len, lengths)])
    return [Wanted(int(first), [7, 8, 9], list(seeds)) for first, seeds in zip(firsts, lengths, strict=False)]


def test_every_sample_is_answered_and_scored_once_by_every_scorer(groups: Groups) -> None:
    lengths = [[5 + i % 7, 3] for i in range(60)]
    engines = groups("rollout", SleepingEngine, 3)
    scorers = {name: Scorer(groups(name, SleepingScorer, ranks), "scores", 200) for name, ranks in (("a", 1), ("b", 2))}
    flow = stream(engines, asked(lengths), Sampling(20, 1.0, 10), scorers, seconds=30, what="step 0")
    whole = merge(ray.get(flow.rollouts))
    assert whole.index.tolist() == list(range(120))
    assert whole.response_lengths.tolist() == [length for pair in lengths for length in pair]
    for name in scorers:
        assert align(ray.get(flow.scores[name]), np.ones(120, np.int64)).tolist() == list(range(120))
    calls = ray.get(scorers["a"].group.actors[0].calls.remote())
    computed = 60 * 3 + whole.response_lengths.sum()  # each prompt once
    assert computed / 200 <= calls <= 2 * computed / 200, "calls are full"


def test_a_long_answer_holds_nobody(groups: Groups) -> None:
    """While one answer of 3 seconds is being written, the others are there and scored."""
    engines = groups("rollout", SleepingEngine, 2)
    scorer = groups("reward", SleepingScorer, 1)
    began = time.time()
    stream(engines, asked([[3000]] + [[10]] * 40), Sampling(20, 1.0, 10), {"rewards": Scorer(scorer, "scores", 100)}, seconds=30, what="")
    first_scored = min(start for what, start, _ in ray.get(scorer.actors[0].work_done.remote()) if what == "scores")
    assert first_scored - began < 1.5
    assert 3.0 < time.time() - began < 4.5


def test_an_engine_is_given_no_more_than_it_can_work_at_and_all_share_the_rest(groups: Groups) -> None:
    engines = groups("rollout", SleepingEngine, 2)
    flow = stream(engines, asked([[20]] * (3 * IN_FLIGHT)), Sampling(20, 1.0, 10), {}, seconds=30, what="")
    assert len(merge(ray.get(flow.rollouts)).index) == 3 * IN_FLIGHT
    assert [ray.get(actor.seen.remote()) for actor in engines.actors] == [IN_FLIGHT, IN_FLIGHT]


def test_who_is_silent_is_named(groups: Groups) -> None:
    engines = groups("rollout", SleepingEngine, 1, "silent")
    with pytest.raises(ClusterError, match=r"PPO step 3: nothing from rollout\[0\] \(2 answers\) for 2 s"):
        stream(engines, asked([[5], [6]]), Sampling(20, 1.0, 10), {}, seconds=2, what="PPO step 3")


def test_who_dies_is_named(groups: Groups) -> None:
    engines = groups("rollout", SleepingEngine, 1, "dies")
    with pytest.raises(ClusterError, match=r"PPO step 3: rollout\[0\] died"):
        stream(engines, asked([[5]]), Sampling(20, 1.0, 10), {}, seconds=30, what="PPO step 3")


def test_seeds_are_arithmetic() -> None:
    found = wanted([[1], [2]], seed=3, step=5, each=4)
    assert [one.first for one in found] == [0, 4]
    later = wanted([[1], [2]], seed=3, step=6, each=4)
    numbers = [seed for one in found + later for seed in one.seeds]
    assert numbers == list(range(numbers[0], numbers[0] + 16))
