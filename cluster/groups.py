"""A group: the actors of one role, in their own placement group, forming one torch process group.

    group = Group("policy", PolicyWorker, demand, placement, args=(recipe, path), threads=2)
    group.connect(ports=(20000, 30000), seconds=600)
    refs = group.start("update", experience_ref)            # {"policy[0]": ref, "policy[1]": ref}
    results = wait(refs, seconds=600, what="PPO step 3: update")

Ranks follow the bundles of the placement group, which Ray packs onto as few nodes as it can.
"""

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import torch.distributed as dist
from ray import ObjectRef
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.deadlines import wait
from cluster.hardware import hardware, use_threads
from cluster.placement import Demand
from cluster.ports import free_port

Span = tuple[str, float, float]  # what an actor did, from when to when (seconds since 1970, by its node's clock)


class Worker:
    """Base of a group's actors: knows its rank, owns its share of threads, joins its group's process group, knows when it worked."""

    def __init__(self, rank: int, world: int, threads: int) -> None:
        self.rank, self.world = rank, world
        self.spans: list[Span] = []
        use_threads(threads)

    def call(self, method: str, *args: Any) -> Any:
        """`method`, its time noted. What `Group.start` calls."""
        with self.at_work(method):
            return getattr(self, method)(*args)

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """Note the time of the block; what follows within a millisecond of the same is one span with it."""
        began = time.time()
        try:
            yield
        finally:
            if self.spans and self.spans[-1][0] == what and began - self.spans[-1][2] < 1e-3:
                began = self.spans.pop()[1]
            self.spans.append((what, began, time.time()))

    def work_done(self) -> list[Span]:
        """The spans since the last time this was asked."""
        found, self.spans = self.spans, []
        return found

    def address(self, ports: tuple[int, int]) -> tuple[str, int]:
        """Host and a free port of this worker's node, for the others to meet at."""
        return ray.util.get_node_ip_address(), free_port(ports)

    def join(self, host: str, port: int) -> None:
        """Form the process group of this role with the other ranks."""
        dist.init_process_group(hardware().backend, init_method=f"tcp://{host}:{port}", rank=self.rank, world_size=self.world)

    def host(self) -> str:
        return socket.gethostname()


class Group:
    def __init__(
        self,
        name: str,
        worker: type[Worker],
        demand: Demand,
        placement: PlacementGroup,
        *,
        args: tuple[Any, ...],
        threads: int,
        env: Mapping[str, str] | None = None,
        at_once: int = 1,
    ) -> None:
        """Start `demand.workers` actors of class `worker`, constructed as worker(rank, world, threads, *args).

        at_once: calls that one actor carries out side by side, each in a thread.
        """
        self.name, self.demand, self.placement = name, demand, placement
        actor = ray.remote(worker)
        self.actors = [
            actor.options(  # type: ignore[attr-defined]
                num_cpus=demand.cpus,
                num_gpus=demand.gpus,
                max_concurrency=at_once,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), **(env or {})}},
            ).remote(rank, demand.workers, threads, *args)
            for rank in range(demand.workers)
        ]

    def connect(self, ports: tuple[int, int], seconds: float) -> None:
        """Let the actors form one torch process group; a single CPU actor needs none.

        Raises ClusterError when the first one's node has no free port left.
        """
        if not self.demand.meets:
            return
        where = wait({f"{self.name}[0]": self.actors[0].address.remote(ports)}, seconds, f"{self.name}: find a port")
        host, port = where[f"{self.name}[0]"]
        wait(self.start("join", host, port), seconds, f"{self.name}: form the process group")

    def start(self, method: str, *args: Any) -> dict[str, ObjectRef]:
        """Call `method` on every actor; returns its references by the actors' names."""
        return {f"{self.name}[{rank}]": actor.call.remote(method, *args) for rank, actor in enumerate(self.actors)}

    def stop(self) -> None:
        """End the actors and give their CPUs and GPUs back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.placement)
