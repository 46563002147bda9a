"""A reward model on real human comparisons (hh-harmless), by us and by TRL: accuracy and calibration on held-out pairs.

    make peers
    python -m benchmarks.reward_model --base runs/quickstart/sft/model --corpora FOLDER --json reward_model.json

FOLDER holds hh-harmless-pairs.jsonl.gz ({"chosen", "rejected"} dialogues). Both start from the same weights, a zero head on --base, and
see the same ids for as many epochs, with the same optimizer, rates and batches; what differs is the harness and the order of the
pairs, which the seed decides. One pair in five is held out. Both models are judged by the same code, `rlhf.reward.figures`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT, add_corpora
from benchmarks.contest import PEERS, THREADS
from benchmarks.training import dialogue_pairs, write_lines
from cluster.hardware import hardware, use_threads
from data.packing import Sample, pack
from data.tokenizers import load as load_tokenizer
from rlhf.models import Batch, ScalarModel, load_reward_model, save_model
from rlhf.recipe import Recipe, Reward
from rlhf.reward import figures, ranking_loss
from rlhf.training import Task, Unit, Units, worker

BATCH, RATE, LONGEST = 8, 3e-4, 384
TOLD = ("pair_accuracy", "calibration_error", "val_loss")


def units_of(path: Path) -> Units:
    lines = [json.loads(line) for line in path.open(encoding="utf-8")]

    def pair(i: int) -> Unit:
        parts = [lines[i][name] for name in ("prompt", "chosen", "rejected")]
        lengths = [len(part) for part in parts]
        last = np.cumsum(lengths)[1:] - 1
        weights, scores = np.zeros((2, sum(lengths)), np.float32)
        weights[last], scores[last] = 0.5, [1, 0]
        return [Sample(np.concatenate(parts), weights, {"scores": scores}, lengths, prefix=True)]

    sizes = [sum(len(line[name]) for name in ("prompt", "chosen", "rejected")) for line in lines]
    return Units(sizes, pair, "pairs", lambda i: [f"pair {i}"])


def ours(folder: Path, out: Path, steps: int, seed: int) -> None:
    """Train `out/model`, as the only rank of what Ray Train runs."""
    import torch.distributed as dist

    use_threads(THREADS)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=0, world_size=1)
    tokenizer = load_tokenizer(folder / "base")
    tokenizer.save(out / "data" / "tokenizer")
    settings = {"global_batch": BATCH, "learning_rate": RATE, "warmup_fraction": 0.1, "final_lr_fraction": 0, "validate_every": steps}
    recipe: dict[str, Any] = {
        "name": "benchmark",
        "seed": seed,
        "data": {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")},
        "reward": settings | {"checkpoint_every": steps},
    }

    def task(recipe: Recipe, inputs: dict[str, Path], report: Any) -> Task:
        return Task(
            model=lambda: ScalarModel(load_reward_model(folder / "base")),
            train=units_of(folder / "train.jsonl"),
            validation=units_of(folder / "held_out.jsonl"),
            loss=partial(ranking_loss, config=recipe.reward, wide=1.0),
            figures=figures,
            steps=steps,
        )

    inputs = {"data": str(out / "data")}
    worker({"stage": "reward", "task": task, "recipe": recipe, "inputs": inputs, "out": str(out)}, lambda values: None)


def judged(model: Path, folder: Path) -> dict[str, float]:
    """Figures on the held-out pairs, whoever trained the model."""
    of = units_of(folder / "held_out.jsonl")
    scalar = ScalarModel(load_reward_model(model)).to(hardware().device).eval()
    sums: dict[str, float] = {}
    with torch.no_grad():
        for i in range(len(of.lengths)):
            batch = Batch.of(pack(of.get(i)), hardware().device)
            value, further = ranking_loss(scalar, batch, Reward(), wide=1.0)
            for name, number in {"loss": value, "count": batch.weights.sum(), **further}.items():
                sums[name] = sums.get(name, 0.0) + float(number)
    return {name: value for name, value in figures(sums).items() if name in TOLD}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a causal LM directory")
    add_corpora(parser)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    use_threads(THREADS)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "TRL": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = load_tokenizer(asked.base)
        model = load_reward_model(asked.base)
        save_model(model, dict(model.state_dict()), tokenizer, folder / "base")
        pairs = dialogue_pairs(asked.corpora, tokenizer, LONGEST)
        write_lines(folder / "held_out.jsonl", pairs[::5])
        write_lines(folder / "train.jsonl", [p for i, p in enumerate(pairs) if i % 5])
        steps = round(asked.epochs * len(pairs) * 4 / 5 / BATCH)
        env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        for seed in range(asked.seeds):
            for who in found:
                out = folder / f"{who}-{seed}"
                out.mkdir()
                if who == "ours":
                    call = f"from benchmarks.reward_model import *; ours(Path({str(folder)!r}), Path({str(out)!r}), {steps}, {seed})"
                    command = [sys.executable, "-c", call]
                else:
                    told = [folder, out, steps, seed, RATE, LONGEST]
                    command = [str(PEERS), str(ROOT / "benchmarks/peers.py"), "reward-model", "trl", *map(str, told)]
                began = time.monotonic()
                done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=3600)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                found[who].append(judged(out / "model", folder) | {"seconds": time.monotonic() - began})
                print(f"seed {seed}  {who:<5} " + "  ".join(f"{k} {v:.4f}" for k, v in found[who][-1].items()), flush=True)
    for who, runs in found.items():
        print(f"mean    {who:<5} " + "  ".join(f"{k} {statistics.mean(run[k] for run in runs):.4f}" for k in runs[0]))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
