"""Which weights of an engine are not the policy's? Found without the engine's weights in checkpoint format, which it no longer has.

    ours = {name: fingerprint(tensor)}                        # on the policy
    theirs = engine_fingerprints(engine_model, specs)         # in the engine
    differing(ours, theirs)                                   # ["model.layers.1.mlp.up_proj.weight"]

vLLM fuses q, k and v, pads the vocabulary, and on a CPU keeps of a linear layer only a packed copy in oneDNN's layout. What every layout
still does is multiply. So the fingerprint of a matrix W is W x for a fixed x of +1 and -1: an error e in any one weight moves one
number of it by e. A vector is its own fingerprint. (Freivalds, 1977, checks matrix products this way.)
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn

from rlhf.buckets import Spec

Fingerprint = npt.NDArray[np.float32]  # [rows]
# Of the fingerprint's root mean square. Two fp32 kernels sum 4096 products to 1e-6 of it; a gap of 1e-3 nats needs more than 1e-4.
TOLERANCE = 1e-4


@cache
def signs(columns: int) -> torch.Tensor:
    """float32 [1, columns] of +1 and -1, the same in every process."""
    generator = torch.Generator().manual_seed(columns)
    return torch.randint(0, 2, (1, columns), generator=generator).float() * 2 - 1


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Of a weight in checkpoint format, [rows, ...]."""
    if tensor.ndim < 2:
        return tensor.float().reshape(-1).cpu().numpy()
    matrix = tensor.flatten(1).float()
    return (matrix @ signs(matrix.shape[1]).to(matrix.device)[0]).cpu().numpy()


@torch.no_grad()
def engine_fingerprints(model: nn.Module, specs: Sequence[Spec]) -> dict[str, list[Fingerprint]]:
    """Of a vLLM model's weights by transformers' names: of the parameter, and of the packed copy that it multiplies with, where there are.

    Weights that are not found, or not of the same shape, are left out. For models that are not split over several workers.
    """
    found: dict[str, list[Fingerprint]] = {}
    for spec in specs:
        place = _place(model, spec)
        if place is None:
            continue
        module, kind, rows = place
        both = []
        tensor = getattr(module, kind, None)
        if tensor is not None and tensor.numel():
            both.append(fingerprint(tensor)[rows])
        if kind == "weight" and len(spec.shape) == 2 and hasattr(module, "cpu_linear"):
            x = signs(spec.shape[1]).to(getattr(torch, spec.dtype))
            try:
                both.append(module.quant_method.apply(module, x, None)[0].float().numpy()[rows])
            except RuntimeError:  # another number of columns: transposed, or not what it seems
                continue
        if both and all(len(f) == _rows(spec) for f in both):
            found[spec.name] = both
    return found


def differing(ours: dict[str, Fingerprint], theirs: dict[str, list[Fingerprint]]) -> list[str]:
    """Names of the weights that are not the same, in order."""
    return [name for name, mine in ours.items() if any(not _close(mine, other) for other in theirs.get(name, []))]


def _close(mine: Fingerprint, other: Fingerprint) -> bool:
    size = float(np.sqrt(np.mean(np.square(mine, dtype=np.float64))))
    return bool((np.abs(mine - other) <= TOLERANCE * size + 1e-7).all())  # NaN is not close


def _place(model: nn.Module, spec: Spec) -> tuple[Any, str, slice] | None:
    """(module, name of its parameter, rows of it) where vLLM keeps a weight, by the model's own mapping of names."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    mapped = mapper.map_name(spec.name) if mapper else spec.name
    if mapped is None:
        return None
    path, _, kind = mapped.rpartition(".")
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        return None
    ours, theirs = spec.name.rpartition(".")[0].rpartition(".")[2], path.rpartition(".")[2]
    fused = getattr(model, "packed_modules_mapping", {}).get(theirs, [])
    if ours not in fused:
        return module, kind, slice(_rows(spec))  # the vocabulary may be padded
    sizes = module.output_sizes
    begin = sum(sizes[: fused.index(ours)])
    return module, kind, slice(begin, begin + sizes[fused.index(ours)])


def _rows(spec: Spec) -> int:
    return spec.shape[0] if spec.shape else 1
