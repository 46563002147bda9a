"""Does every algorithm learn? Each advantage and each policy loss on a task of seconds, on the real graph with real engines.

    python -m benchmarks.algorithms --json algorithms.json
    python -m benchmarks.algorithms --only rloo --only gspo --seeds 3

The model has learned to answer with any of eight letters; the reward is the share of one of them in the answer (`benchmarks/letter.py`), so
it begins at an eighth. Rows are {"algorithm", "seed", "first", "last", "seconds"}: mean rewards of the first and of the last two rollouts.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from cluster.connect import connect
from rlhf import pipeline, recipe_file
from rlhf.monitoring import Monitor
from rlhf.ppo import curve, run

LETTERS = "abcdefgh"
SHARE = {"cpus": 0.3}
GROUPED: dict[str, Any] = {"samples_per_prompt": 8, "rollout_batch": 16}
SINGLE: dict[str, Any] = {"samples_per_prompt": 1, "rollout_batch": 128}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gae": SINGLE | {"advantage": "gae", "critic_learning_rate": 3e-3},
    "grpo": GROUPED | {"advantage": "grpo"},
    "dr_grpo": GROUPED | {"advantage": "dr_grpo", "aggregation": "dr_grpo"},
    "rloo": GROUPED | {"advantage": "rloo"},
    "reinforce++": SINGLE | {"advantage": "reinforce++"},
    "reinforce++_baseline": GROUPED | {"advantage": "reinforce++_baseline"},
    "remax": SINGLE | {"advantage": "remax"},
    "clip-higher": GROUPED | {"advantage": "grpo", "clip_range_high": 0.28, "drop_equal_groups": True},
    "dual_clip": GROUPED | {"advantage": "grpo", "policy_loss": "dual_clip"},
    "gspo": GROUPED | {"advantage": "grpo", "policy_loss": "gspo", "clip_range": 3e-4, "aggregation": "sequence_mean"},
    "cispo": GROUPED | {"advantage": "grpo", "policy_loss": "cispo"},
    "sapo": GROUPED | {"advantage": "grpo", "policy_loss": "sapo"},
}
"""Keys of `ppo`. Two optimizer steps to a rollout: with one, every ratio is 1 and the losses differ in nothing."""


def recipe(folder: Path, seed: int) -> Path:
    """A recipe without its algorithm, and data for it: requests that any letters answer."""
    pick = random.Random(0)
    asked = [f"Write letters, as number {i} of many." for i in range(480)]
    answers = ["".join(pick.choices(LETTERS, k=pick.randint(4, 8))) for _ in asked]
    messages = [[{"role": "user", "content": question}] for question in asked]
    rows = {
        "text": [{"text": f"{question} {answer}"} for question, answer in zip(asked, answers, strict=True)],
        "chat": [{"messages": [*said, {"role": "assistant", "content": answer}]} for said, answer in zip(messages, answers, strict=True)],
        "prompts": [{"messages": said, "answer": LETTERS[0]} for said in messages],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps(  # which is YAML too
            {
                "name": f"seed{seed}",
                "seed": seed,
                "runs_dir": str(folder / "runs"),
                "cluster": {"workers": 1},
                "data": {
                    "validation_fraction": 0.1,
                    "pretrain": [f"{folder}/text.jsonl"],
                    "sft": [f"{folder}/chat.jsonl"],
                    "prompts": [f"{folder}/prompts.jsonl"],
                },
                "tokenizer": {"vocab_size": 300},
                "model": {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 2, "intermediate_size": 128, "max_positions": 128},
                "pretrain": {"steps": 40, "sequence_length": 64},
                "sft": {"epochs": 4, "max_tokens": 64, "learning_rate": 3e-3},
                "ppo": {
                    "reward_function": f"{ROOT}/benchmarks/letter.py:share",
                    "steps": 16,
                    "global_batch": 64,
                    "epochs": 1,
                    "learning_rate": 2e-3,
                    "kl_coef": 0.01,
                    "max_response_tokens": 10,
                    "checkpoint_every": 100,
                    "groups": dict.fromkeys(("policy", "reference", "reward", "rollout"), SHARE),
                },
            }
        ),
        encoding="utf-8",
    )
    return path


def learn(name: str, path: Path, run_dir: Path) -> dict[str, Any]:
    """The stage ppo alone, by this algorithm, from the run's fine-tuned model."""
    keys = [f"ppo.{key}={json.dumps(value)}" for key, value in ALGORITHMS[name].items()]
    keys += [f"ppo.groups.critic={json.dumps(SHARE)}"] if name == "gae" else []
    out = run_dir / f"ppo-{name}"
    out.mkdir()
    with Monitor("ppo", out) as monitor:
        run(recipe_file.load(path, keys), {stage: run_dir / stage for stage in ("data", "sft")}, out, monitor)
    rows = curve(out)
    first, last = (statistics.mean(row["ppo/reward"] for row in some) for some in (rows[:2], rows[-2:]))
    return {"algorithm": name, "first": first, "last": last, "seconds": sum(row["ppo/seconds"] for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ALGORITHMS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, connect("local"):
        for seed in range(asked.seeds):
            path = recipe(Path(name), seed)
            run_dir = pipeline.run(recipe_file.load(path), until="sft")
            for algorithm in asked.only or ALGORITHMS:
                rows.append(learn(algorithm, path, run_dir) | {"seed": seed})
                if asked.json:
                    asked.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    table = Table("algorithm", "seed", "first", "last", "s")
    for row in rows:
        table.add_row(row["algorithm"], str(row["seed"]), f"{row['first']:.3f}", f"{row['last']:.3f}", f"{row['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
