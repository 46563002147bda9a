"""What this process computes on. The one place that chooses device, dtype and communication backend.

from cluster.hardware import hardware
hw = hardware()                     # Hardware(device=cuda:0, dtype=bfloat16, backend="nccl") or (cpu, float32, "gloo")
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

CPUS = Path("/proc/cpuinfo")


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


@cache
def on_amd_cpu() -> bool:
    """Whether this process computes on a CPU of AMD's."""
    if hardware().is_gpu:
        return False
    with suppress(OSError):
        return "AuthenticAMD" in CPUS.read_text()
    return False


def use_threads(count: int) -> None:
    """Give this process its share of the cores: two busy processes with 2 threads each on 2 cores collapse (10-100 times slower)."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def use_deterministic_kernels() -> None:
    """From here on torch computes the same bits from the same numbers, or raises where it has no such kernel. To be called before CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS chooses among workspaces otherwise
    torch.use_deterministic_algorithms(True)


def memory_held() -> int:
    """Bytes that this process and those below it keep for themselves: resident ones without what others map too (libraries, the object
    store), and what torch holds on the GPU."""
    here = psutil.Process()
    total = 0
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found = process.memory_info()
            total += found.rss - found.shared
    return total + (torch.cuda.memory_reserved() if hardware().is_gpu else 0)


# Dense bf16 by the makers' sheets, FLOP/s; a GPU that is not here is measured, like a CPU.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


@cache
def peak_flops() -> float:
    """FLOP/s that this process can reach at most, in the dtype of `hardware()`: what MFU is a share of."""
    hw = hardware()
    if hw.is_gpu:
        known = [peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name(hw.device)]
        if known:
            return known[0]
    n = 8192 if hw.is_gpu else 1024
    a, b = (torch.randn(n, n, device=hw.device, dtype=hw.dtype) for _ in range(2))
    seconds = []
    for _ in range(5):  # the best of five: 0.15 s on one core
        began = time.perf_counter()
        product = a @ b
        if hw.is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    del product
    return 2 * n**3 / min(seconds)
