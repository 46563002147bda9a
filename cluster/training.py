"""The Ray Train harness: one function, on every worker, with its numbers streamed back while it runs.

    fit(worker_function, {"recipe": ...}, name="pretrain", layout=Layout(workers=2), storage=out, on_report=print)

`worker_function(config, report)` runs on each of `workers` ranks inside a torch process group; what rank 0 passes to
`report` (a dict of plain values) reaches `on_report` on the driver at once. When a worker dies the group starts again, at
most `max_failures` times, and the function continues from its newest checkpoint. An error that the function raises is not
tried again: it would only come back, a start of the group later.

A process that is to end in the midst of a `fit` calls `give_back()`: Ray Train leaves what its workers held to an actor that
asks the dashboard who is alive, and without one the CPUs and GPUs stay taken as long as the cluster is up.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group
from ray.util.queue import Empty, Queue

from cluster.hardware import use_threads
from cluster.placement import Demand, check

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
WorkerFunction = Callable[[dict[str, Any], Report], None]

_held: set[PlacementGroup] = set()  # by the workers of this process's fits


@dataclass(frozen=True)
class Layout:
    """How many training workers there are and what each one gets."""

    workers: int
    threads: int
    gpus: float
    max_failures: int

    @property
    def demand(self) -> Demand:
        return Demand(self.workers, float(self.threads), self.gpus)


def fit(
    worker: WorkerFunction, config: dict[str, Any], *, name: str, layout: Layout, storage: Path, on_report: Report, seconds: float
) -> None:
    """Run `worker` on all ranks until it returns. `config` must be plain values; `storage` is seen by all nodes.

    Raises ClusterError when the workers can never be placed, and what the worker raised when it fails.
    """
    check({name: layout.demand})
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(int(seconds)))
    queue = Queue(actor_options={"num_cpus": 0})
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(queue, done, on_report), name="reports", daemon=True)
    listener.start()
    trainer = TorchTrainer(
        _on_rank,
        train_loop_config={"worker": worker, "config": config, "queue": queue, "threads": layout.threads},
        scaling_config=ScalingConfig(num_workers=layout.workers, use_gpu=layout.gpus > 0, resources_per_worker=layout.demand.bundle),
        torch_config=TorchConfig(backend="nccl" if layout.gpus > 0 else "gloo"),
        run_config=RunConfig(name=name, storage_path=str(storage.resolve()), failure_config=FailureConfig(max_failures=0)),
    )
    try:
        for starts_left in reversed(range(layout.max_failures + 1)):
            try:
                trainer.fit()
                return
            except WorkerGroupError as error:
                dead = [f"rank {rank}" for rank, why in error.worker_failures.items() if _is_death(why)]
                if not dead or not starts_left:
                    raise
                logger.warning("%s died; starting the workers again (%d more times)", ", ".join(dead), starts_left - 1)
    finally:
        done.set()
        listener.join(timeout=30)
        queue.shutdown(force=True)
        _held.clear()


def give_back() -> None:
    """Free what the workers of this process's unfinished `fit` hold; they die of it."""
    while _held:
        remove_placement_group(_held.pop())


def _is_death(failure: BaseException) -> bool:
    """Whether a rank ended because its process did, and not by an error of the function."""
    return isinstance(getattr(failure, "failure", failure), RayActorError)


def _on_rank(config: dict[str, Any]) -> None:
    """What Ray Train runs on each rank."""
    use_threads(config["threads"])
    first = ray.train.get_context().get_world_rank() == 0
    queue: Queue = config["queue"]

    if first:
        queue.put(get_current_placement_group())

    def report(values: dict[str, Any]) -> None:
        if first:
            queue.put(values)

    config["worker"](config["config"], report)


def _listen(queue: Queue, done: threading.Event, on_report: Report) -> None:
    """Hand reports to the driver until the workers are done and the queue is empty."""
    while True:
        finished = done.is_set()
        try:
            told = queue.get(timeout=0.2)
            if isinstance(told, PlacementGroup):
                _held.add(told)
            else:
                on_report(told)
        except Empty:
            if finished:
                return
        except RayActorError:
            return  # the cluster is going away: fit() tells why
