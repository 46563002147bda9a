"""What this process computes on. The one place that chooses device, dtype and communication backend.

from cluster.hardware import hardware
hw = hardware()                     # Hardware(device=cuda:0, dtype=bfloat16, backend="nccl") or (cpu, float32, "gloo")
"""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    device: torch.device
    dtype: torch.dtype  # of matmuls and activations; master weights and optimizer states are always float32
    backend: str  # of torch.distributed

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


def hardware() -> Hardware:
    """Choose by what Ray gave this process.

    bf16 needs a GPU: on a CPU without AMX it is emulated (0.3 GFLOP/s against 24-101 in fp32).
    """
    if torch.cuda.is_available():
        return Hardware(torch.device("cuda", 0), torch.bfloat16, "nccl")  # Ray shows every process only its own GPUs
    return Hardware(torch.device("cpu"), torch.float32, "gloo")


def use_threads(count: int) -> None:
    """Give this process its share of the cores: two busy processes with 2 threads each on 2 cores collapse (10-100 times slower)."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
