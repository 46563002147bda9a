"""How the policy's weights get into a running vLLM engine: backends for vLLM's weight-update API.

    LLM(model, weight_transfer_config={"backend": "object_store"}, worker_extension_cls="rlhf.weight_sync.WorkerExtension")
    llm.init_weight_transfer_engine({"init_info": {}}); llm.start_weight_update()
    llm.update_weights({"update_info": {"names": [...], "dtype_names": [...], "shapes": [...], "array": bucket}})     # once per bucket
    llm.finish_weight_update("step-7")

vLLM imports this module in its worker (that is what `worker_extension_cls` is for), which registers object_store and gloo; nccl and ipc
are vLLM's own and take the same calls. `object_store` maps numpy from Ray's store: zero copies until vLLM's own `copy_`. An engine that is
split over several workers receives whole tensors in each, and vLLM's loader takes its part.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from cluster.broadcast import broadcast, gloo_group
from rlhf.buckets import Spec, size, unpack
from rlhf.fingerprints import Fingerprint, engine_fingerprints


@dataclass
class NothingToAgreeOn(WeightTransferInitInfo):
    """Ray knows where its objects are."""


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the group meets; the rank in it of this engine's first worker, from 1."""

    host: str
    port: int
    rank: int
    world: int
    seconds: float


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """What is in a packed bucket, as vLLM's own backends are told it."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    @property
    def specs(self) -> list[Spec]:
        return [Spec(n, tuple(s), d) for n, d, s in zip(self.names, self.dtype_names, self.shapes, strict=True)]


@dataclass
class MappedBucket(Bucket):
    array: npt.NDArray[Any]  # uint8, read-only


class Reloading(WeightTransferEngine[Any, Any]):
    """Full tensors in checkpoint format go through vLLM's layerwise reload. A subclass says where a bucket comes from."""

    def packed(self, update_info: Any) -> torch.Tensor:
        """The bucket's bytes. They must stay as they are: a layer that is not whole yet keeps views of them."""
        raise NotImplementedError

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class also synchronises the accelerator, and torch has none to synchronise on a CPU.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def receive_weights(self, update_info: Any) -> None:
        self.model.load_weights(unpack(self.packed(update_info), update_info.specs))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # On a CPU the output layer multiplies with a packed copy of its weights that a reload leaves as it was:
        # log-probabilities were 0.06 off, without an error. Pack it again.
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass


class ObjectStoreEngine(Reloading):
    init_info_cls = NothingToAgreeOn
    update_info_cls = MappedBucket

    def init_transfer_engine(self, init_info: NothingToAgreeOn) -> None:
        pass

    def packed(self, update_info: MappedBucket) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that Ray's memory is read-only: vLLM only ever copies from it
            return torch.from_numpy(update_info.array)


class GlooEngine(Reloading):
    init_info_cls = Meeting
    update_info_cls = Bucket

    def init_transfer_engine(self, init_info: Meeting) -> None:
        rank = init_info.rank + self.parallel_config.rank
        self.group = gloo_group(init_info.host, init_info.port, rank, init_info.world, init_info.seconds)

    def packed(self, update_info: Bucket) -> torch.Tensor:
        received = torch.empty(size(update_info.specs), dtype=torch.uint8)
        broadcast(self.group, received)
        return received


class WorkerExtension:
    """vLLM mixes this into its worker."""

    def fingerprints(self, specs: Sequence[Spec]) -> dict[str, list[Fingerprint]]:
        return engine_fingerprints(self.model_runner.model, specs)  # type: ignore[attr-defined]


WeightTransferEngineFactory.register_engine("object_store", ObjectStoreEngine)
WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
