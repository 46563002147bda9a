"""Training with the blocks' matmuls in fp8: `pretrain.float8: true`, and pip install '.[fp8]'.

    to_float8(model)         # in place, before compile and FSDP, as torchao documents it

torchao scales every operand by its largest value at every matmul, forward in e4m3 and gradients in e5m2 (arXiv:2209.05433); weights
and optimizer states stay what they were, and checkpoints do not change. Has not run on a GPU: the tests run what torchao emulates.
"""

import torch
import torch.nn as nn

from cluster.hardware import hardware
from rlhf.errors import RecipeError

LEAST = (8, 9)  # the first compute capability with fp8 matmuls: Ada; Hopper is 9.0


def to_float8(model: nn.Module, emulate: bool = False) -> None:
    """Swap the blocks' plain linear layers, in place. `emulate` rounds to fp8 and multiplies in the model's dtype, on any hardware.

    Adapters and matrices of 4 bits stay as they are. Raises RecipeError without such a GPU, without torchao, and when there is
    no layer to swap.
    """
    if not emulate:
        found = torch.cuda.get_device_capability(hardware().device) if hardware().is_gpu else None
        if found is None or found < LEAST:
            what = "a CPU" if found is None else f"a GPU of {found[0]}.{found[1]}"
            raise RecipeError(f"float8 needs GPUs of compute capability {LEAST[0]}.{LEAST[1]} or newer, this is {what}; set float8: false")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise RecipeError(f"float8 needs torchao ({error}): pip install '.[fp8]' on every node") from None

    def suits(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and ".lora_" not in name and not (module.in_features % 16 or module.out_features % 16)

    blocks = model.inner.base_model.layers  # type: ignore[union-attr]
    count = sum(suits(module, name) for name, module in blocks.named_modules())  # type: ignore[union-attr, operator]
    if not count:
        raise RecipeError("float8: no plain matrix of the blocks has both sides a multiple of 16, as fp8 matmuls want; set float8: false")
    # A packed row has any number of tokens; the weights' gradients sum over them, and there too it must be a multiple of 16.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(blocks, module_filter_fn=suits, config=config)
