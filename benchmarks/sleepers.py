"""Roles of the actor graph whose work is a short sleep: real Ray actors, real rollouts, no models.

They show what the controller itself costs, and how well it lets work overlap (`benchmarks.controller`, `tests/test_stream.py`).
"""

import time
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import ray

from cluster.groups import Worker
from rlhf.buckets import Spec
from rlhf.experience import Rollout, Scores, merge
from rlhf.sampling import Piece, Sampling, Wanted

SECONDS_PER_TOKEN = 1e-3  # of an answer
SYNC_SECONDS = 0.2


class SleepingEngine(Worker):
    """Writes all it has at once, a token of each in `pace` seconds; an answer's length is its seed unless told otherwise."""

    def __init__(
        self, rank: int, world: int, threads: int, broken: str = "", lengths: Sequence[int] = (), pace: float = SECONDS_PER_TOKEN
    ) -> None:
        super().__init__(rank, world, threads)
        self.given, self.pace = list(lengths), pace
        self.inbox: SimpleQueue[tuple[Sequence[Wanted], bool]] = SimpleQueue()
        self.most, self.broken = 0, broken

    def stream(self, asked: Sequence[Wanted], sampling: Sampling, last: bool) -> Iterator[Rollout | Piece]:
        open_ends: list[tuple[float, Wanted]] = []
        ready: list[Wanted] = []
        while asked or open_ends or not last:
            if self.broken == "silent":
                time.sleep(60)
            if self.broken == "dies":
                ray.actor.exit_actor()
            open_ends += [(time.monotonic() + max(self.lengths(one)) * self.pace, one) for one in asked]
            self.most = max(self.most, sum(len(one.seeds) for _, one in open_ends))
            asked = []
            if open_ends:
                time.sleep(max(0.0, min(end for end, _ in open_ends) - time.monotonic()))
            now = time.monotonic()
            done = [one for end, one in open_ends if end <= now]
            open_ends = [(end, one) for end, one in open_ends if end > now]
            ready += done
            size = sum(len(one.prompt) + sum(self.lengths(one)) for one in ready)
            if ready and (size >= sampling.piece_tokens or not open_ends):
                yield merge([self.rollout(one) for one in ready])
                yield Piece(sum(len(one.seeds) for one in ready), size, sum(one.outstanding(sampling) for one in ready))
                ready = []
            while not last and not (self.inbox.empty() and (open_ends or asked)):
                more, last = self.inbox.get()
                asked = [*asked, *more]

    def lengths(self, one: Wanted) -> list[int]:
        """Tokens of the answers: their seeds, or those that the engine was given for the samples of the step."""
        return self.given[one.first : one.first + len(one.seeds)] if self.given else one.seeds

    def more(self, asked: Sequence[Wanted], last: bool) -> None:
        self.inbox.put((asked, last))

    def rollout(self, one: Wanted) -> Rollout:
        n, lengths = len(one.seeds), np.array(self.lengths(one))
        tokens = np.concatenate([np.r_[one.prompt, np.full(length, one.first + k)] for k, length in enumerate(lengths)])
        index = np.arange(one.first, one.first + n)
        prompts = np.full(n, len(one.prompt))
        return Rollout(index, prompts, lengths, tokens.astype(np.int32), np.ones(n, bool), np.zeros(lengths.sum(), np.float32), "v")

    def seen(self) -> int:
        return self.most

    # What a weight sync and its gate ask of an engine.

    def ready(self) -> str:
        return "v"

    def takes(self) -> tuple[str, str]:
        return "object_store", "float32"

    def open_transport(self, init_info: dict[str, Any]) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, bucket: list[Spec], *carried: Any) -> None:
        time.sleep(SYNC_SECONDS)

    def finish_weight_update(self, version: str) -> str:
        return version

    def generate(self, index: Sequence[int], prompts: Any, seeds: Any, max_tokens: int, temperature: float) -> Rollout:
        return merge([self.rollout(Wanted(i, list(prompt), [1])) for i, prompt in zip(index, prompts, strict=True)])


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


class SleepingLearner(SleepingScorer):
    """Policy, critic, reference and reward model in one: numbers without meaning, after a sleep of their length."""

    def __init__(self, rank: int, world: int, threads: int, score_pace: float, update_seconds: float) -> None:
        super().__init__(rank, world, threads)
        self.score_pace, self.update_seconds = score_pace, update_seconds

    def scores(self, *rollouts: Rollout) -> Scores:
        return self._share(rollouts, per_token=False)

    def log_probs(self, *rollouts: Rollout) -> Scores:
        return self._share(rollouts, per_token=True)

    values = log_probs

    def _share(self, rollouts: tuple[Rollout, ...], per_token: bool) -> Scores:
        rollout = merge(rollouts)
        time.sleep(len(rollout.tokens) * self.score_pace / self.world)
        mine = np.arange(self.rank, len(rollout.index), self.world)
        return rollout.index[mine], np.zeros(rollout.response_lengths[mine].sum() if per_token else len(mine), np.float32)

    def experience(self, rollouts: list[Any], parts: dict[str, list[Any]], *rest: Any) -> tuple[None, dict[str, float]]:
        merge(ray.get(rollouts))
        for shares in parts.values():
            ray.get(shares)
        return None, {"log_prob_gap": 0.0}

    def update(self, experience: None, step: int) -> dict[str, float]:
        time.sleep(self.update_seconds)
        return {"loss": 0.0}

    def specs(self, dtype: str) -> list[Spec]:
        return [Spec("weight", (1,), dtype)]

    def open_transport(self, *where: Any) -> None:
        pass

    def send(self, bucket: list[Spec]) -> None:
        pass
