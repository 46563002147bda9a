"""Our side of `benchmarks.training`: one process, one kind of work, one line of JSON. `ours.py WORK ours FOLDER OUT STEPS [compiled]`"""

import json
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch.distributed as dist

from benchmarks.contest import THREADS
from benchmarks.reward_model import units_of
from benchmarks.training import WINDOW
from cluster.hardware import use_threads
from data.order import batch_indices
from data.packing import Sample
from rlhf.models import LanguageModel, ScalarModel, load_causal_lm, load_reward_model
from rlhf.pretrain import token_loss
from rlhf.recipe import Recipe
from rlhf.reward import ranking_loss
from rlhf.training import Task, Unit, Units, worker

BATCH = {"pretrain": 8, "pretrain, eager": 8, "sft": 20, "reward": 8, "memory": 2}  # of sft: about as many tokens as TRL's 8 rows of 512


def task_of(work: str, folder: Path, steps: int) -> Task:
    lines = [json.loads(line) for line in (folder / "sft.jsonl").open(encoding="utf-8")]
    stream = np.load(folder / "stream.npy")

    def window(i: int) -> Unit:
        return [Sample(stream[i * WINDOW : (i + 1) * WINDOW], np.ones(WINDOW, np.float32))]

    def conversation(i: int) -> Unit:
        return [Sample(np.array(lines[i]["input_ids"]), np.array(lines[i]["completion_mask"], np.float32))]

    if work.startswith("pretrain") or work == "memory":
        lengths, get = [WINDOW] * (len(stream) // WINDOW), window
    elif work == "sft":
        lengths, get = [len(line["input_ids"]) for line in lines], conversation
    else:
        of_pairs = units_of(folder / "pairs.jsonl")
        lengths, get = list(of_pairs.lengths), of_pairs.get
    units = Units(lengths, get, "benchmark", lambda i: [str(i)])
    model = folder / ("model-135m" if work == "memory" else "model")
    return Task(
        model=(lambda: ScalarModel(load_reward_model(model))) if work == "reward" else lambda: LanguageModel(load_causal_lm(model)),
        train=units,
        validation=Units(lengths[:2], get, "held out", lambda i: [str(i)]),
        loss=partial(ranking_loss, config=Recipe.model_fields["reward"].default, wide=1.0) if work == "reward" else token_loss,
        figures=lambda sums: {"val_loss": sums["loss"] / sums["count"]},
        steps=steps,
        save=lambda *of: None,
    )


def main(work: str, _: str, folder: Path, out: Path, steps: int, kind: str = "") -> None:
    use_threads(THREADS)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=0, world_size=1)
    stage = "reward" if work == "reward" else "pretrain"
    settings = {"global_batch": BATCH[work], "micro_batch": 4096, "validate_every": 1000, "checkpoint_every": steps // 2}
    recipe: dict[str, Any] = {
        "name": "benchmark",
        "data": {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")},
        stage: settings | {"learning_rate": 1e-3, "compile": kind == "compiled"},
    }
    task = task_of(work, folder, steps)
    ends: list[float] = []

    def report(values: dict[str, Any]) -> None:
        if "step" in values:
            ends.append(time.perf_counter())

    from data.tokenizers import load

    load(folder / "model").save(out / "data" / "tokenizer")
    worker({"stage": stage, "task": lambda *of: task, "recipe": recipe, "inputs": {"data": str(out / "data")}, "out": str(out)}, report)
    counted = range(2, steps - 1)
    ids = [batch_indices(0, step, BATCH[work], len(task.train.lengths), "benchmark") for step in counted]
    units = sum(map(len, ids)) if work == "reward" else sum(task.train.lengths[i] for of in ids for i in of)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"rate": units / (ends[-2] - ends[1]), "memory_gib": memory}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:])
