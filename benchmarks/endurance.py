"""A long PPO run: does memory stay flat, do engine and policy agree at every step, is every first ratio 1?

    make quickstart
    python -m benchmarks.endurance --base runs/quickstart --steps 200 --json endurance.json

Runs the ppo stage of the quickstart's recipe from the quickstart's models, with small rollouts and a constant learning rate, and reads
its curve. Rows are {"role", "at_20", "at_end", "unit", "growth"}: GiB that a role's actors hold, means over ten steps; growth 0.05 is 5 %,
null where a role held nothing at first and something at the end.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT

SETTLED, OVER = 20, 10  # steps until allocators have seen every size; steps that a figure is the mean of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a run of recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    run = asked.base.parent / "endurance"
    shutil.rmtree(run, ignore_errors=True)
    for stage in ("data", "pretrain", "sft", "reward"):
        shutil.copytree(asked.base / stage, run / stage)
    keys = {"steps": asked.steps, "rollout_batch": 16, "global_batch": 16, "learning_rate": 1e-5, "checkpoint_every": 50}
    told = [f"ppo.{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "rlhf.cli", "run", "recipes/quickstart.yaml", "--only", "ppo", "name=endurance"]
    subprocess.run([*command, f"runs_dir={asked.base.parent.absolute()}", *told], check=True, cwd=ROOT)

    rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").open(encoding="utf-8")]
    table, found = Table("role", f"GiB at step {SETTLED}", f"GiB at step {asked.steps}", "growth"), []
    prefix = "ppo/memory_gib/"
    for name in (name for name in rows[0] if name.startswith(prefix)):
        before, after = (statistics.mean(row[name] for row in some) for some in (rows[SETTLED : SETTLED + OVER], rows[-OVER:]))
        growth = after / before - 1 if before else None if after else 0.0  # the object store may well be empty
        row = {"role": name.removeprefix(prefix), "at_20": before, "at_end": after, "unit": "GiB", "growth": growth}
        found.append(row)
        table.add_row(row["role"], f"{before:.4f}", f"{after:.4f}", "" if growth is None else f"{growth:+.1%}")
    Console().print(table)
    gap = max(max(row["sync/log_prob_gap"], row["ppo/log_prob_gap"]) for row in rows)
    ratio = max(row["ppo/policy_ratio_error"] for row in rows)
    print(f"{len(rows)} steps: engine and policy {gap:.1e} nats apart at most; first ratios {ratio:.1e} from 1 on average at most")
    if asked.json:
        asked.json.write_text(json.dumps({"rows": found, "log_prob_gap_max": gap, "ratio_error_max": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
