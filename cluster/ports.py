"""A free port within the range that the cluster's firewall lets through.

    port = free_port((20000, 30000))

The port is free when it is looked at, and not held: whoever asks should listen soon.
"""

import random
import socket

from cluster.errors import ClusterError


def free_port(ports: tuple[int, int]) -> int:
    """A port of this node that nobody listens on, first to last of `ports` from a random start.

    Raises ClusterError when all are taken.
    """
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
            return port
    raise ClusterError(f"no free port in {first}..{last} on {socket.gethostname()}; widen cluster.ports")
