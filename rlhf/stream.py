"""Rollout and scoring as one stream: an answer is judged while others are still being written.

    flow = stream(graph["rollout"], wanted, sampling, scorers, seconds=600, what="PPO step 7")
    flow.rollouts                       # references to `Rollout`s, the pieces in which the engines gave their answers
    flow.scores["rewards"]              # references to `Scores`, one per rank and call

The controller holds references and, of each piece, which samples it has and how many tokens. Three rules make the stream:

- **Prompts go to whom has least to do.** An engine is given no more than it can work at; the rest goes, one prompt at a time, to
  the engine with the fewest outstanding tokens, so a long answer holds nobody but itself.
- **A scorer starts when there is a full call's worth of one engine's tokens** (`Scorer.budget`: what its ranks compute in one
  micro-batch), or when that engine has ended. A call holds answers of one engine, in the order in which it gave them: what is computed
  together does not depend on who was faster, so a resumed run computes the same bits. (Only where more is asked than the engines
  hold at once does their speed decide who writes what, and the last bits with it.)
- **A scorer has at most two calls**: one at work, one waiting with its arguments there. A scorer that shares its devices with another
  role is woken once, for everything.
"""

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayActorError

from cluster.deadlines import died
from cluster.errors import ClusterError
from cluster.groups import BESIDE, Group
from rlhf.sampling import Piece, Sampling, Wanted

IN_FLIGHT = 320  # samples an engine is given at once: the 256 that vLLM works at, and the next ones


@dataclass(frozen=True)
class Scorer:
    """`method` of `group` turns rollouts into numbers."""

    group: Group
    method: str
    budget: int  # tokens of one call, over all ranks


@dataclass
class Flow:
    """What came of it, in the order in which it came."""

    rollouts: list[ObjectRef] = field(default_factory=list)
    scores: dict[str, list[ObjectRef]] = field(default_factory=dict)

    def __add__(self, more: "Flow") -> "Flow":
        """Both, as if they had been one."""
        names = self.scores | more.scores
        return Flow(self.rollouts + more.rollouts, {name: self.scores.get(name, []) + more.scores.get(name, []) for name in names})


@dataclass
class _Engine:
    actor: Any
    rank: int
    name: str
    answers: Any = None  # the generator of its pieces; None once it has ended
    rollout: ObjectRef | None = None  # a piece whose description is still to come
    samples: int = 0  # outstanding
    tokens: int = 0


class _Scoring:
    """One scorer's queues, one for each engine."""

    def __init__(self, name: str, scorer: Scorer, engines: int) -> None:
        self.name, self.scorer = name, scorer
        self.waiting: list[deque[tuple[ObjectRef, int]]] = [deque() for _ in range(engines)]
        self.calls: list[dict[str, ObjectRef]] = []  # rank -> reference, of each call under way

    def start(self, writing: Container[int]) -> dict[ObjectRef, str]:
        """Start calls, as far as it is time for them; their references. `writing`: the engines that have not ended."""
        started: dict[ObjectRef, str] = {}
        for rank, queue in enumerate(self.waiting):
            while queue and len(self.calls) < 2 and (rank not in writing or sum(size for _, size in queue) >= self.scorer.budget):
                mine = [queue.popleft()]
                while queue and sum(size for _, size in mine) + queue[0][1] <= self.scorer.budget:
                    mine.append(queue.popleft())
                started |= self._call([ref for ref, _ in mine])
        return started

    def start_once(self, writing: Sequence[int]) -> dict[ObjectRef, str]:
        """One call for everything, when everything is there."""
        everything = [ref for queue in self.waiting for ref, _ in queue]
        if writing or not everything:
            return {}
        for queue in self.waiting:
            queue.clear()
        return self._call(everything)

    def _call(self, rollouts: list[ObjectRef]) -> dict[ObjectRef, str]:
        call = self.scorer.group.start(self.scorer.method, *rollouts)
        self.calls.append(call)
        return {ref: rank for rank, ref in call.items()}

    def finished(self, done: ObjectRef) -> None:
        for call in self.calls:
            for rank in [rank for rank, ref in call.items() if ref == done]:
                del call[rank]
        self.calls = [call for call in self.calls if call]


def stream(engines: Group, wanted: Sequence[Wanted], sampling: Sampling, scorers: dict[str, Scorer], *, seconds: float, what: str) -> Flow:
    """Have all of `wanted` answered and scored.

    Raises ClusterError naming who is missing when nothing happens for `seconds`, or whose actor died; what a call raises is
    raised as it is.
    """
    flow = Flow(scores={name: [] for name in scorers})
    queue = deque(wanted)
    workers = [_Engine(actor, rank, f"{engines.name}[{rank}]") for rank, actor in enumerate(engines.actors)]
    # Engines that share their devices sleep when others work: they are given all at once, and nobody is called before they are done.
    first = _deal(workers, queue, sampling, IN_FLIGHT if engines.turns is None else len(queue) * max(len(one.seeds) for one in wanted))
    for worker, mine in zip(workers, first, strict=True):
        if mine:
            worker.answers = engines.read(worker.rank, "stream", mine, sampling, not queue)
    scoring = [_Scoring(name, scorer, len(workers)) for name, scorer in scorers.items()]
    names: dict[ObjectRef, tuple[str, _Scoring]] = {}

    while any(w.answers is not None for w in workers) or names or any(any(of.waiting) for of in scoring):
        writing = {w.answers: w for w in workers if w.answers is not None}
        for of in scoring:
            still = [worker.rank for worker in writing.values()]
            started = of.start(still) if of.scorer.group.turns is None else of.start_once(still)
            names |= {ref: (rank, of) for ref, rank in started.items()}
            flow.scores[of.name] += started
        open_ends = [*writing, *names]
        done, _ = ray.wait(open_ends, timeout=seconds)
        if len(open_ends) > 1:
            done, _ = ray.wait(open_ends, num_returns=len(open_ends), timeout=0)  # and all else that is there by now
        if not done:
            raise ClusterError(_silence(what, seconds, writing.values(), names))
        for event in done:
            if event in writing:
                piece = _next(writing[event], flow, what)
                if piece is not None:
                    for of in scoring:
                        of.waiting[writing[event].rank].append((flow.rollouts[-1], piece.tokens))
                    _top_up(workers, queue, sampling)
                continue
            rank, of = names.pop(event)
            _get(event, rank, what)
            of.finished(event)
    return flow


def _next(worker: _Engine, flow: Flow, what: str) -> Piece | None:
    """Take the engine's next object: a piece, then its description, which is returned. None between the two and at the end."""
    try:
        ref = next(worker.answers)
    except StopIteration:
        worker.answers = None
        if worker.rollout is not None:  # not a piece but what ended the engine's stream
            _get(worker.rollout, worker.name, what)
        if worker.samples:
            raise ClusterError(f"{what}: {worker.name} ended and left {worker.samples} answers out") from None
        return None
    if worker.rollout is None:
        worker.rollout = ref
        return None
    piece: Piece = _get(ref, worker.name, what)
    flow.rollouts.append(worker.rollout)
    worker.rollout = None
    worker.samples -= piece.samples
    worker.tokens -= piece.outstanding
    return piece


def _deal(workers: list[_Engine], queue: deque[Wanted], sampling: Sampling, most: int = IN_FLIGHT) -> list[list[Wanted]]:
    """Prompts from the front of the queue to the engines with least to do, as long as one has room for its samples: what each gets."""
    mine: list[list[Wanted]] = [[] for _ in workers]
    while queue:
        room = [i for i, w in enumerate(workers) if w.samples == 0 or w.samples + len(queue[0].seeds) <= most]
        if not room:
            break
        least = min(room, key=lambda i: (workers[i].tokens, i))
        next_one = queue.popleft()
        workers[least].samples += len(next_one.seeds)
        workers[least].tokens += next_one.outstanding(sampling)
        mine[least].append(next_one)
    return mine


def _top_up(workers: list[_Engine], queue: deque[Wanted], sampling: Sampling) -> None:
    """More for the engines that have room. The last ones are told, so that they end when they are done."""
    if not queue:
        return
    more = _deal(workers, queue, sampling)
    for worker, mine in zip(workers, more, strict=True):
        if worker.answers is not None and (mine or not queue):
            worker.actor.more.options(concurrency_group=BESIDE).remote(mine, not queue)


def _get(ref: ObjectRef, who: str, what: str) -> Any:
    try:
        return ray.get(ref)
    except RayActorError as error:
        raise ClusterError(died(what, who, error)) from error


def _silence(what: str, seconds: float, writing: Any, names: dict[ObjectRef, tuple[str, _Scoring]]) -> str:
    missing = [f"{w.name} ({w.samples} answers)" for w in writing] + [f"{rank} ({of.name})" for rank, of in names.values()]
    return (
        f"{what}: nothing from {', '.join(missing)} for {seconds:g} s. Raise cluster.deadline_s if it is only slow; "
        "`ray stack` on its node shows where it stands"
    )
