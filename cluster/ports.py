"""Free ports within the range that the cluster's firewall lets through.

    check((20000, 30000), 2, seconds=30)        # ClusterError when a node has fewer than two
    port = free_port((20000, 30000))            # of this node

A port is free when it is looked at, and not held: whoever asks should listen soon.
"""

import random
import socket
from collections.abc import Iterator

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.deadlines import wait
from cluster.errors import ClusterError


def check(ports: tuple[int, int], needed: int, seconds: float) -> None:
    """Has every node that can hold actors `needed` free ports, first to last of `ports`?

    Any of them may come to hold the first actors of all groups. Raises ClusterError naming a node that has fewer, and when a
    node does not answer within `seconds`.
    """
    look = ray.remote(num_cpus=0)(count_free)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    found = wait(
        {
            node["NodeManagerHostname"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(ports, needed)
            for node in nodes
        },
        seconds,
        "look for free ports",
    )
    for host, free in found.items():
        if free < needed:
            raise ClusterError(_too_few(ports, host, needed, free))


def free_port(ports: tuple[int, int]) -> int:
    """A port of this node that nobody listens on, first to last of `ports` from a random start.

    Raises ClusterError when all are taken.
    """
    for port in _free(ports):
        return port
    raise ClusterError(_too_few(ports, socket.gethostname(), 1, 0))


def count_free(ports: tuple[int, int], at_most: int) -> int:
    """How many ports of this node are free; stops counting at `at_most`."""
    return sum(1 for _ in zip(range(at_most), _free(ports), strict=False))


def _free(ports: tuple[int, int]) -> Iterator[int]:
    first, last = ports
    count = last - first + 1
    start = random.randrange(count)  # two groups that start together should not meet at the same port
    for i in range(count):
        port = first + (start + i) % count
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        yield port


def _too_few(ports: tuple[int, int], host: str, needed: int, free: int) -> str:
    first, last = ports
    lack = f"only {free} of the {needed} ports that are needed is free" if free else "no free port"
    return f"{lack} in {first}..{last} on {host}; widen cluster.ports"
