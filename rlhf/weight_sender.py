"""The policy's side of a weight sync: gathers a bucket and hands it to the engines, by one of four transports.

    class PolicyWorker(WeightSender, ...): network = the module whose weights are sent
    rank 0 .. n: specs = sender.specs("float32"); sender.open_transport("gloo", host, port, world, 600); sender.send(bucket)

| transport    | how a bucket gets to the engines | where |
| --- | --- | --- |
| object_store | numpy in Ray's object store, mapped by every engine of a node without a copy | CPUs, GPUs |
| gloo         | one broadcast from rank 0, in a group of its own | CPUs, GPUs; across nodes |
| nccl         | the same between GPUs, received by vLLM's own backend | GPUs; has not run on one yet |
| ipc          | a handle to the GPU memory of the rank that shares the engine's GPU, opened by vLLM's own backend | GPUs; has not run yet |

A broadcast needs both sides at work at once, which those that take turns on the same devices (`ppo.colocate`) never are; ipc is for
them alone.

With `ppo.adapter` none of them: the adapter alone goes to the engines, in one call (`sync.send_adapter`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
import torch.nn as nn

from cluster.broadcast import broadcast, gloo_group
from cluster.hardware import hardware
from rlhf import buckets
from rlhf.buckets import Spec
from rlhf.fingerprints import Fingerprint, fingerprint
from rlhf.recipe import Recipe

ADAPTER = "adapter"  # what an engine that takes adapters says in the place of a transport
BROADCASTS = ("gloo", "nccl")  # sender and receivers must be in the call at the same time


def transport(recipe: Recipe) -> str:
    """`ppo.weight_sync`, and what `auto` means here: the object store where engines and senders take turns, nccl between GPUs, else the
    object store of one node or gloo between nodes."""
    if recipe.ppo.weight_sync != "auto":
        return recipe.ppo.weight_sync
    if recipe.ppo.sync_between_gpus:
        return "nccl"
    nodes = sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
    return "object_store" if nodes == 1 or recipe.ppo.engines_take_turns else "gloo"


class WeightSender:
    """What a role's worker needs for its weights to reach the engines. All ranks are called together; rank 0 sends."""

    rank: int
    transport: str = ""
    group: Any = None
    kept: Sequence[torch.Tensor] = ()  # buffers

    @property
    def network(self) -> nn.Module:
        raise NotImplementedError

    def specs(self, dtype: str) -> list[Spec]:
        """What there is to send, floating-point numbers as `dtype`."""
        return buckets.specs(buckets.shards(self.network), dtype)

    def open_transport(self, name: str, host: str, port: int, world: int, seconds: float) -> None:
        """Meet the engines at host:port, where the transport needs it: rank 0 here, the engines' workers as ranks 1 .. world - 1."""
        self.transport, self.group = name, None
        if self.rank or name not in BROADCASTS:
            return
        if name == "gloo":
            self.group = gloo_group(host, port, 0, world, seconds)
        else:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init

            self.group = trainer_init({"master_address": host, "master_port": port, "world_size": world})

    def send(self, bucket: Sequence[Spec]) -> dict[str, Any]:
        """Gather and send one bucket; returns what must travel with the call of the engines' `update_weights`."""
        mine = buckets.shards(self.network)
        if self.rank and self.transport != "ipc":  # there an engine reads the memory of the GPU it is on, whichever rank's
            buckets.gather(mine, bucket, None)
            return {}
        packed = buckets.gather(mine, bucket, self._buffer(buckets.size(bucket)))
        assert packed is not None
        if self.transport == "object_store":
            return {"array": packed.numpy()}  # Ray copies it into its store before the next call
        if self.transport == "gloo":
            broadcast(self.group, packed)
        elif self.transport == "nccl":
            self.group.broadcast(packed, src=0)
            torch.cuda.current_stream().synchronize()
        else:
            from torch.multiprocessing.reductions import reduce_tensor

            torch.cuda.current_stream().synchronize()
            gpu = str(torch.cuda.get_device_properties(packed.device).uuid)
            return {"ipc_handles": {gpu: reduce_tensor(packed)[1]}, "tensor_sizes": [spec.nbytes for spec in bucket]}
        return {}

    def _buffer(self, size: int) -> torch.Tensor:
        """Room for a bucket, kept from sync to sync: fresh pages for 444 MB took 3.5 s on a busy machine, copying them 0.5 s.

        With ipc every bucket has its own until this role wakes again, since the engines read all of them while it sleeps.
        """
        device = hardware().device if self.transport in ("nccl", "ipc") else torch.device("cpu")
        if self.transport != "ipc" and self.kept and self.kept[0].numel() >= size:
            return self.kept[0]
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.kept = [*self.kept, buffer] if self.transport == "ipc" else [buffer]
        return buffer

    def wake(self) -> None:
        """By now the engines have read what was left for them on the device."""
        if self.transport == "ipc":
            self.kept = ()
        super().wake()  # type: ignore[misc]  # the role's, to which this is added

    def fingerprints(self, dtype: str) -> list[tuple[Spec, Fingerprint]]:
        """Of every weight, as it is in `dtype`; on rank 0, [] on the others. Tied weights under both names."""
        mine = buckets.shards(self.network)
        found: dict[str, tuple[Spec, Fingerprint]] = {}
        for spec in buckets.specs(mine, dtype):
            tensor = buckets.whole(mine[spec.name])
            if self.rank == 0:
                found[spec.name] = spec, fingerprint(tensor.detach().to(getattr(torch, spec.dtype)))
        for name, other in buckets.tied(self.network).items():
            if other in found:
                found[name] = replace(found[other][0], name=name), found[other][1]
        return list(found.values())
