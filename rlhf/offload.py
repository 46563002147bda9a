"""Weights and optimizer states between a device and host memory, for roles that share their devices.

    offload(learner.model, learner.optimizers)              # to host memory; the device's is free for another process
    restore(learner.model, learner.optimizers, device)      # as it was, to the bit

Local to a rank: sharded parameters (FSDP2) stay sharded and nothing is sent. On a CPU there is nothing to move.
"""

from collections.abc import Sequence

import torch
from torch import nn

CPU = torch.device("cpu")


def offload(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Move everything to host memory and give the device's memory back to the driver, not only to torch's cache."""
    restore(model, optimizers, CPU)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def restore(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
    """Move parameters, buffers and optimizer states to `device`. Parameters keep their identity: optimizers know them by it."""
    model.to(device)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):  # the fused AdamW's step counts too, which live beside the parameters
                    state[name] = value.to(device)
