"""Sharded checkpoints that are either whole or not there.

    checkpoints.save(folder, step=100, state={"model": ..., "optimizer": ...}, extra={"kl_coef": 0.05})   # all ranks
    step = max(checkpoints.steps(folder), default=None)                                                # 100, or None
    extra = checkpoints.load(folder, step, state)                                                      # fills `state` in place

`folder/step_00000100/` is written under another name by all ranks of the process group (torch.distributed.checkpoint, so
another number of ranks may read it) and renamed when every rank is done: a directory of that name is whole, whatever
moment the power went out. The newest two are kept: when two groups save one after the other, a step that both have is
always there.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp


def save(folder: Path, step: int, state: dict[str, Any], extra: dict[str, Any]) -> None:
    """Write `state` (nested dicts of tensors, sharded or not) and `extra` (JSON values) as the checkpoint of `step`."""
    target = folder / f"step_{step:08d}"
    draft = folder / _agree(f"draft-{uuid.uuid4().hex}")
    draft.mkdir(parents=True, exist_ok=True)
    dcp.save(state, checkpoint_id=draft)
    if _rank() == 0:
        with open(draft / "extra.json", "w", encoding="utf-8") as file:
            json.dump(extra, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():  # this step again, after a resume from an older one
            target.rename(folder / f"draft-{uuid.uuid4().hex}")
        draft.rename(target)
        for old in sorted(steps(folder))[:-2]:  # renamed first: a torn one must not keep a whole one's name
            (folder / f"step_{old:08d}").rename(folder / f"draft-{uuid.uuid4().hex}")
        for rest in folder.glob("draft-*"):
            shutil.rmtree(rest)
    _barrier()


def steps(folder: Path) -> set[int]:
    """The steps of all whole checkpoints in `folder`, which need not exist."""
    return {int(path.name.removeprefix("step_")) for path in folder.glob("step_*") if path.is_dir()}


def load(folder: Path, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """Fill `state` in place from the checkpoint of `step`; returns its `extra`."""
    source = folder / f"step_{step:08d}"
    dcp.load(state, checkpoint_id=source)
    return json.loads((source / "extra.json").read_text(encoding="utf-8"))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _agree(name: str) -> str:
    """Rank 0's `name`, on every rank."""
    if not dist.is_initialized():
        return name
    box = [name]
    dist.broadcast_object_list(box, src=0, device=torch.device("cuda", 0) if torch.cuda.is_available() else None)
    return box[0]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
