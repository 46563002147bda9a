"""A gloo group of its own, beside a process's default group: one sender, many receivers, on any nodes.

group = gloo_group(host, port, rank, world, seconds=600)      # rank 0 listens at `port`; all call it
broadcast(group, tensor)                                      # from rank 0 into the others' tensor, in place
"""

from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist


def gloo_group(host: str, port: int, rank: int, world: int, seconds: float) -> Any:
    """Join the group that meets at host:port. Every call in it, this one too, fails after `seconds`."""
    timeout = timedelta(seconds=seconds)
    store = dist.TCPStore(host, port, world, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # By the address that Ray knows: a host's name often resolves to a loopback address, which other nodes cannot reach.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address())]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, world, options)


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """Rank 0's tensor to all; returns when this rank's part is done."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()
