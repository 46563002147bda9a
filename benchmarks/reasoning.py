"""Do PPO and GRPO learn to be right? Success on held-out questions of reasoning-gym before and after, by seed.

    python -m benchmarks.reasoning --json reasoning.json
    python -m benchmarks.reasoning --task chain_sum --algorithm grpo --seeds 0 1 --runs-dir runs ppo.steps=200

Runs recipes/grpo.yaml and recipes/ppo_verifier.yaml with the questions of each task; both start from the same pretrained and fine-tuned
model of a seed. A question is held out by its text: no stage has seen it. Answers are sampled at temperature 1, one to each question.
Of letter_counting one is right when all its counting is (`benchmarks/counting.py`), for the number alone is often right by luck.
Rows are
{"task", "algorithm", "seed", "before", "after", "curve": [[step, success], ...], "steps", "seconds"}.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from cluster.connect import connect
from rlhf import pipeline, recipe_file
from rlhf.artefacts import read_json
from rlhf.report import read_rows

RECIPES = {"grpo": "grpo.yaml", "ppo": "ppo_verifier.yaml"}


@dataclass(frozen=True)
class Task:
    questions: str  # what the catalogue draws
    taught: str = "chat"  # which kind of it is fine-tuned on
    keys: tuple[str, ...] = ()  # of the recipe, which is made for the first task


TASKS = {
    "spell_backward": Task("spell_backward?min_word_len=3&max_word_len=4"),
    "chain_sum": Task(
        "chain_sum?min_terms=3&max_terms=3&max_digits=1",
        keys=("sft.epochs=5", "sft.stop_at_val_loss=0.65", "sft.max_tokens=96", "ppo.max_prompt_tokens=80", "ppo.steps=300"),
    ),
    "letter_counting": Task(
        "letter_counting?min_words=3&max_words=4",
        taught="worked",  # the bare number is not learned at this size, told right answers or not
        keys=(
            *("model.max_positions=176", "sft.max_tokens=176", "ppo.max_prompt_tokens=112", "ppo.max_response_tokens=56"),
            *("sft.learning_rate=1e-2", "sft.final_lr_fraction=0.1", "sft.epochs=2.2", "sft.stop_at_val_loss=0.26"),
            *("ppo.reward_function=benchmarks/counting.py:aloud", "ppo.rollout_batch=64", "ppo.steps=440", "ppo.learning_rate=1e-3"),
        ),
    ),
}


def learn(task: str, algorithm: str, seed: int, runs_dir: Path, more: list[str]) -> dict[str, Any]:
    """One run. What an earlier one of this task and seed has made is not made again."""
    of = TASKS[task]
    sources = [f"data.{key}=['{of.questions}:{kind}']" for key, kind in (("pretrain", "text"), ("sft", of.taught), ("prompts", "prompts"))]
    own = [f"name={task}-{seed}", f"seed={seed}", f"runs_dir={runs_dir}"]
    run_dir = pipeline.run(recipe_file.load(ROOT / "recipes" / RECIPES[algorithm], [*sources, *of.keys, *own, *more]))
    summary = read_json(run_dir / "summary.json") or {}
    curve = [[row["step"], row["ppo/held_out_reward"]] for row in read_rows(run_dir / "ppo") if "ppo/held_out_reward" in row]
    (run_dir / "report.html").rename(run_dir / f"report-{algorithm}.html")
    return {
        "task": task,
        "algorithm": algorithm,
        "seed": seed,
        "before": summary["evaluate/sft_success"],
        "after": summary["evaluate/aligned_success"],
        "curve": curve,
        "steps": summary["ppo/steps"],
        "seconds": summary["ppo/wall_seconds"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("task", "algorithm", "seed", "before", "after", "steps", "min")
    for row in rows:
        figures = f"{row['before']:.3f}", f"{row['after']:.3f}", str(row["steps"]), f"{row['seconds'] / 60:.1f}"
        table.add_row(row["task"], row["algorithm"], str(row["seed"]), *figures)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--algorithm", choices=RECIPES, action="append", help="default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, help="keep the runs, and their reports, here")
    parser.add_argument("--json", type=Path)
    asked, more = parser.parse_known_args()  # what is left are keys of the recipe
    rows = []
    with tempfile.TemporaryDirectory() as folder, connect("local"):
        for task in asked.task or TASKS:
            for seed in asked.seeds:
                for algorithm in asked.algorithm or RECIPES:
                    rows.append(learn(task, algorithm, seed, (asked.runs_dir or Path(folder)).absolute(), more))
                    if asked.json:
                        asked.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
