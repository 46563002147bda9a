"""Roles of the actor graph whose work is a short sleep: real Ray actors, real rollouts, no models.

They show what the controller itself costs, and how well it lets work overlap (`benchmarks.controller`, `tests/test_stream.py`).
"""

import time
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

import numpy as np
import ray

from cluster.groups import Worker
from rlhf.experience import Rollout, Scores, merge
from rlhf.sampling import Piece, Sampling, Wanted

SECONDS_PER_TOKEN = 1e-3


class SleepingEngine(Worker):
    """Writes all it has at once, a token a millisecond; an answer's length is its seed."""

    def __init__(self, rank: int, world: int, threads: int, broken: str = "") -> None:
        super().__init__(rank, world, threads)
        self.inbox: SimpleQueue[tuple[Sequence[Wanted], bool]] = SimpleQueue()
        self.most, self.broken = 0, broken

    def stream(self, asked: Sequence[Wanted], sampling: Sampling, last: bool) -> Iterator[Rollout | Piece]:
        open_ends: list[tuple[float, Wanted]] = []
        while asked or open_ends or not last:
            if self.broken == "silent":
                time.sleep(60)
            if self.broken == "dies":
                ray.actor.exit_actor()
            open_ends += [(time.monotonic() + max(one.seeds) * SECONDS_PER_TOKEN, one) for one in asked]
            self.most = max(self.most, sum(len(one.seeds) for _, one in open_ends))
            asked = []
            if open_ends:
                time.sleep(max(0.0, min(end for end, _ in open_ends) - time.monotonic()))
            now = time.monotonic()
            done = [one for end, one in open_ends if end <= now]
            open_ends = [(end, one) for end, one in open_ends if end > now]
            for one in done:
                yield self.rollout(one)
                yield Piece(len(one.seeds), len(one.prompt) + sum(one.seeds), one.outstanding(sampling))
            while not last and not (self.inbox.empty() and open_ends):
                more, last = self.inbox.get()
                asked = [*asked, *more]

    def more(self, asked: Sequence[Wanted], last: bool) -> None:
        self.inbox.put((asked, last))

    def rollout(self, one: Wanted) -> Rollout:
        n, lengths = len(one.seeds), np.array(one.seeds)
        tokens = np.concatenate([np.r_[one.prompt, np.full(length, one.first + k)] for k, length in enumerate(lengths)])
        index = np.arange(one.first, one.first + n)
        prompts = np.full(n, len(one.prompt))
        return Rollout(index, prompts, lengths, tokens.astype(np.int32), np.ones(n, bool), np.zeros(lengths.sum(), np.float32), "v")

    def seen(self) -> int:
        return self.most


class SleepingScorer(Worker):
    """Scores every sample by its number; ranks share the samples."""

    def __init__(self, rank: int, world: int, threads: int) -> None:
        super().__init__(rank, world, threads)
        self.asked = 0

    def scores(self, *rollouts: Rollout) -> Scores:
        rollout = merge(rollouts)
        self.asked += 1
        time.sleep(len(rollout.tokens) * 1e-4)
        mine = np.arange(self.rank, len(rollout.index), self.world)
        return rollout.index[mine], rollout.index[mine].astype(np.float32)

    def calls(self) -> int:
        return self.asked
