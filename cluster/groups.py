"""A group: the actors of one role, in their own placement group, forming one torch process group.

    group = Group("policy", PolicyWorker, demand, room, args=(recipe, path), threads=2)
    begin([group], seconds=600)                             # every actor knows its rank and its devices, and is constructed
    group.connect(ports=(20000, 30000), seconds=600)
    refs = group.start("update", experience_ref)            # {"policy[0]": ref, "policy[1]": ref}
    results = wait(refs, seconds=600, what="PPO step 3: update")

Ranks follow nodes and devices: rank i and i + 1 are neighbours. Groups that share their devices take turns: whoever is called
wakes as soon as the one before it has finished what it was asked and sleeps. Nobody waits for that but the actors.
"""

import ipaddress
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch.distributed as dist
from ray import ObjectRef
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.deadlines import wait
from cluster.hardware import hardware, memory_held, use_threads
from cluster.placement import Demand, Room
from cluster.ports import free_port

Span = tuple[str, float, float]  # what an actor did, from when to when (seconds since 1970, by its node's clock)
BESIDE = "beside"
Seat = tuple[bytes, str, list[tuple[int, str]]]  # address and id of an actor's node, and the GPUs that Ray gave it there


class Worker:
    """Base of a group's actors: knows its rank, owns its share of threads, joins its group's process group, knows when it worked."""

    def __init__(self, rank: int, world: int, threads: int) -> None:
        self.rank, self.world = rank, world
        self.spans: list[Span] = []
        use_threads(threads)

    def call(self, method: str, *args: Any) -> Any:
        """`method`, its time noted. What `Group.start` and `Group.ask` call."""
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

    def memory_held(self) -> int:
        """Bytes."""
        return memory_held()

    def address(self, ports: tuple[int, int]) -> tuple[str, int]:
        """Host and a free port of this worker's node, for the others to meet at."""
        return ray.util.get_node_ip_address(), free_port(ports)

    def join(self, host: str, port: int) -> None:
        """Form the process group of this role with the other ranks."""
        dist.init_process_group(hardware().backend, init_method=f"tcp://{host}:{port}", rank=self.rank, world_size=self.world)

    def sleep(self) -> None:
        """Free the devices' memory for a group that shares them; nothing may be lost. Only called when it is awake."""

    def wake(self) -> None:
        """Take back what `sleep` freed."""


class Group:
    def __init__(
        self,
        name: str,
        worker: type[Worker],
        demand: Demand,
        room: Room,
        *,
        args: tuple[Any, ...],
        threads: int,
        env: Mapping[str, str] | None = None,
        beside: bool = False,
    ) -> None:
        """Start `demand.workers` actors; `begin` constructs each as worker(rank, world, threads, *args).

        beside: actors also have a thread for calls that ask for the concurrency group BESIDE: those do not queue behind the others, which
        keep their order.
        """
        self.name, self.demand, self.room, self.args, self.threads = name, demand, room, args, threads
        self.turns: Turns | None = None
        self.before: dict[int, list[ObjectRef]] = {}  # rank that is still asleep -> what it has to wait for
        actor = ray.remote(concurrency_groups={BESIDE: 1})(_seated(worker)) if beside else ray.remote(_seated(worker))
        self.actors = [
            actor.options(  # type: ignore[attr-defined]
                num_cpus=room.cpus,
                num_gpus=room.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(room.group, placement_group_bundle_index=seat // room.per_bundle),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), **(env or {})}},
            ).remote()
            for seat in range(demand.workers)
        ]

    def connect(self, ports: tuple[int, int], seconds: float) -> None:
        """Let the actors form one torch process group; a single CPU actor needs none.

        Raises ClusterError when the first one's node has no free port left.
        """
        if not self.demand.meets:
            return
        where = wait({f"{self.name}[0]": self.actors[0].address.remote(ports)}, seconds, f"{self.name}: find a port")
        host, port = where[f"{self.name}[0]"]
        joining = {f"{self.name}[{rank}]": actor.join.remote(host, port) for rank, actor in enumerate(self.actors)}
        wait(joining, seconds, f"{self.name}: form the process group")

    def start(self, method: str, *args: Any) -> dict[str, ObjectRef]:
        """Call `method` on every actor; returns its references by the actors' names."""
        return {f"{self.name}[{rank}]": self.ask(rank, method, *args) for rank in range(len(self.actors))}

    def ask(self, rank: int, method: str, *args: Any) -> ObjectRef:
        """Call `method` on one actor. A group that shares its devices is woken for it, and the others sleep."""
        actor, before = self._turn(rank)
        return actor.call.remote(method, *args) if before is None else actor.awake.remote(method, len(before), *before, *args)

    def read(self, rank: int, method: str, *args: Any) -> ray.ObjectRefGenerator:
        """As `ask`, for a method that yields: references to its values, each there as soon as it is yielded."""
        actor, before = self._turn(rank)
        waits = before or []
        reading: ray.ObjectRefGenerator = actor.each.options(num_returns="streaming").remote(method, len(waits), *waits, *args)
        return reading

    def _turn(self, rank: int) -> tuple[Any, list[ObjectRef] | None]:
        """An actor, and what it has to wait for before it wakes; None when it is awake."""
        if self.turns is not None:
            self.turns.give(self)
        return self.actors[rank], self.before.pop(rank, None)

    def stop(self) -> None:
        """End the actors and give their CPUs and GPUs back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.room.group)


class Turns:
    """Groups on the same devices. One is awake; at the beginning, whoever was constructed with something on them."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups, self.awake = groups, list(groups)
        for group in groups:
            group.turns = self

    def give(self, group: Group) -> None:
        """From the next call on `group` is awake. Its actors wait for the sleep of the others, which comes after all that
        those were asked before; a call that fails to sleep fails the calls that wait for it."""
        if self.awake == [group]:
            return
        others = [other for other in self.awake if other is not group]
        slept = [actor.rest.remote() for other in others for actor in other.actors]
        group.before = dict.fromkeys(range(len(group.actors)), slept)
        self.awake = [group]


def begin(groups: Sequence[Group], seconds: float) -> None:
    """Wait until the actors of all `groups` stand, order them by node and device, and construct them with their ranks.

    Raises ClusterError naming the actors that are not there within `seconds`; a constructor's error is raised as it is.
    """
    standing = {f"{group.name}[{i}]": actor.where.remote() for group in groups for i, actor in enumerate(group.actors)}
    seats: dict[str, Seat] = wait(standing, seconds, "start the actors")
    starting = {}
    for group in groups:
        host = group.room.host if any(other.name == group.room.host for other in groups) else group.name
        bundles = [seats[name] for name in standing if name.startswith(f"{host}[")]
        order = sorted(range(len(bundles)), key=lambda i: (bundles[i], i))
        n, seated = group.room.per_bundle, group.actors
        group.actors = [seated[bundle * n + i] for bundle in order for i in range(n)]
        for rank, actor in enumerate(group.actors):
            gpus = [gpu for _, gpu in bundles[order[rank // n]][2]] if group.demand.gpus else []
            if n > 1:
                gpus = gpus[(rank % n) * len(gpus) // n : (rank % n + 1) * len(gpus) // n]
            starting[f"{group.name}[{rank}]"] = actor.begin.remote(gpus, rank, len(group.actors), group.threads, *group.args)
    for host in {group.room.host for group in groups}:
        sharing = [group for group in groups if group.room.host == host]
        if len(sharing) > 1:
            Turns(sharing)
    wait(starting, seconds, "start the actors")


def _seated(worker: type[Worker]) -> type:
    """`worker` as an actor that says where it is before it is constructed: its rank depends on that, and so do its devices."""

    class Seated(worker):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.asleep = False

        def where(self) -> Seat:
            node = ray.get_runtime_context().get_node_id()
            gpus = sorted((len(gpu), gpu) for gpu in map(str, ray.get_gpu_ids()))  # 9 before 10; some are no numbers
            return ipaddress.ip_address(ray.util.get_node_ip_address()).packed, node, gpus

        def begin(self, gpus: list[str], *args: Any) -> None:
            # Before CUDA is initialised. Ray shows an actor that holds no GPU all of its node's.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            worker.__init__(self, *args)

        def rest(self) -> None:
            if not self.asleep:
                with self.at_work("sleep"):
                    self.sleep()
                self.asleep = True

        def awake(self, method: str, before: int, *args: Any) -> Any:
            """`method` of args[before:], once those before have been waited for."""
            self.rise()
            return self.call(method, *args[before:])

        def each(self, method: str, before: int, *args: Any) -> Iterator[Any]:
            """The same for a method that yields, and notes its time itself."""
            self.rise()
            yield from getattr(self, method)(*args[before:])

        def rise(self) -> None:
            if self.asleep:
                with self.at_work("wake"):
                    self.wake()
                self.asleep = False

    Seated.__name__ = Seated.__qualname__ = worker.__name__
    return Seated
