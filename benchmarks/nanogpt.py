"""nanoGPT's CPU recipe on tinyshakespeare, by nanoGPT itself and by our pretraining stage, one after the other.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.nanogpt --nanogpt nanoGPT --text tinyshakespeare.txt --json nanogpt.json

Both learn characters from the first 90 % of the text and are measured on the rest, in windows of 64; both get the same
threads. nanoGPT runs the command of its README for small computers: 2,000 steps of 12 windows. Ours is a Llama of the same width,
depth and batch, trained with Muon for as many steps as `--steps` says; its time holds everything from the start of the stage to
the saved model: Ray Train's start, checkpoints, the validation over all held-out characters. nanoGPT's time is its process's.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NANOGPT = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100"]
NANOGPT += ["--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0"]
NANOGPT += ["--max_iters=2000", "--lr_decay_iters=2000"]

RECIPE = {
    "name": "nanogpt",
    "cluster": {"workers": 1, "threads_per_worker": 2},
    "data": {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")},
    "model": {"hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 4, "intermediate_size": 344, "max_positions": 64},
    "sft": {"max_tokens": 64},
    "reward": {"max_tokens": 64},
    "ppo": {"max_prompt_tokens": 32, "max_response_tokens": 32},
    "pretrain": {
        "sequence_length": 64,
        "global_batch": 12,
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "final_lr_fraction": 0,
        "validate_every": 100_000,
        "checkpoint_every": 500,
    },
}


def theirs(folder: Path, text: Path, work: Path, threads: int) -> dict[str, float]:
    """nanoGPT's best validation loss, and the seconds of its process."""
    code = work / "nanogpt"
    shutil.copytree(folder, code, ignore=shutil.ignore_patterns(".git", "out*"))
    shutil.copy(text, code / "data" / "shakespeare_char" / "input.txt")
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=code, check=True, capture_output=True, env=env, timeout=120)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "train.py", *NANOGPT], cwd=code, text=True, capture_output=True, env=env, timeout=1800)
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"nanoGPT failed:\n{done.stderr[-2000:]}")
    losses = [float(loss) for loss in re.findall(r"val loss ([\d.]+)", done.stdout)]
    return {"val_loss": min(losses), "seconds": seconds, "steps": 2000}


def ours(text: Path, work: Path, steps: int, seed: int) -> dict[str, float]:
    """Our pretraining stage's validation loss, and the seconds from its start to its end."""
    from cluster.connect import connect
    from rlhf import pretrain
    from rlhf.monitoring import Monitor
    from rlhf.recipe import Recipe

    recipe = Recipe.model_validate(RECIPE | {"seed": seed, "pretrain": RECIPE["pretrain"] | {"steps": steps}})
    out = work / f"ours-{seed}"
    out.mkdir()
    with connect("local"), Monitor("pretrain", out) as monitor:
        began = time.monotonic()
        pretrain.run(recipe, {"data": prepare(text, work / "data")}, out, monitor)
        seconds = time.monotonic() - began
        return {"val_loss": float(monitor.results["val_loss"]), "seconds": seconds, "steps": steps}


def prepare(text: Path, out: Path) -> Path:
    """The data stage's directory for one text cut in two as nanoGPT cuts it: bytes as tokens, for each character here is one."""
    from data.cleaning import text_id
    from data.files import write_json
    from data.shards import Document, ShardWriter
    from data.tokenizers import train

    whole = text.read_text(encoding="utf-8")
    tokenizer = train([whole[:1000]], vocab_size=261)  # 256 bytes and the special tokens: nothing is merged
    tokenizer.save(out / "tokenizer")
    cut = int(0.9 * len(whole))
    for split, part in (("train", whole[:cut]), ("validation", whole[cut:])):
        tokens = np.array(tokenizer.encode(part))
        assert len(tokens) == len(part), "one token per character"
        writer = ShardWriter(
            out / "pretrain" / split, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint, shard_tokens=1 << 30
        )
        writer.add(Document(text_id(part), tokens, len(part.encode())))
        writer.finish()
    write_json(out / "pretrain" / "manifest.json", {})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare as one file")
    parser.add_argument("--steps", type=int, default=500, help="our optimizer steps")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "nanogpt": []}
    for repeat in range(asked.repeats):
        with tempfile.TemporaryDirectory() as folder:
            found["ours"].append(ours(asked.text, Path(folder), asked.steps, repeat))
            found["nanogpt"].append(theirs(asked.nanogpt, asked.text, Path(folder), threads=2))
    for side, runs in found.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(f"{side:<8} val loss {middle['val_loss']:.4f} after {middle['steps']:,.0f} steps, {middle['seconds']:.1f} s")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
