"""Our side of `benchmarks.ppo`: the ppo stage on a local Ray, one line of JSON. `ours_ppo.py WORK ours FOLDER OUT STEPS cpu|gpu`"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ppo_sizes import FIXED, GRPO, NATURAL, SIZES, TEMPERATURE
from rlhf.recipe import Recipe

SHARED = {"temperature": TEMPERATURE, "learning_rate": 3e-6, "checkpoint_every": 1000, "compile": True}
PPO_KEYS = {"preset": "trl", "critic_learning_rate": 3e-6}
GRPO_KEYS = {"advantage": "grpo", "epochs": 1, "kl_in": "loss", "kl_coef": 0.04}
READ = {FIXED: ("short", "fixed"), NATURAL: ("short", "natural"), GRPO: ("long", "fixed")}  # prompts, policy


def recipe_for(work: str, on: str, steps: int) -> Recipe:
    """`work` on a "cpu" or "gpu"."""
    sizes = SIZES[on]
    per_prompt = sizes.group if work == GRPO else 1
    batch = {"global_batch": sizes.samples, "samples_per_prompt": per_prompt, "rollout_batch": sizes.samples // per_prompt}
    tokens = {
        "max_prompt_tokens": sizes.long if work == GRPO else sizes.short,
        "max_response_tokens": sizes.longest if work == NATURAL else sizes.fixed,
    }
    roles = ["policy", "reference", "reward", *(() if work == GRPO else ("critic",))]
    if on == "gpu":
        groups: dict[str, Any] = {role: {"gpus": 1} for role in (*roles, "rollout")}
        where = {"groups": groups, "colocate": [[*roles, "rollout"]], "micro_batch": 16_384}
    else:
        # In turn, with both cores each: side by side, a core each, the critic waited for the policy, which learns a vocabulary besides.
        groups = {role: {"cpus": 0.4, "threads": 2} for role in roles}
        # Two engines with a core each: 8 x 8 answers of 64 tokens took 1.9 to 2.0 s, one engine with both cores 2.2 to 3.2.
        where = {"groups": groups | {"rollout": {"workers": 2, "cpus": 0.2, "threads": 1}}, "colocate": [roles]}
    ppo = SHARED | (GRPO_KEYS if work == GRPO else PPO_KEYS) | batch | tokens | where | {"steps": steps}
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    return Recipe.model_validate({"name": "benchmark", "data": sources, "model": sizes.model, "ppo": ppo})


def main(work: str, _: str, folder: Path, out: Path, steps: int, on: str) -> None:
    from cluster.connect import connect
    from data import tokenizers
    from data.examples import prepare_prompts
    from rlhf.monitoring import Monitor
    from rlhf.ppo import run

    recipe, (prompts, policy) = recipe_for(work, on, steps), READ[work]
    data = out / "data"
    tokenizer = tokenizers.load(folder / "tokenizer")
    tokenizer.save(data / "tokenizer")
    lines = [json.loads(line)["text"] for line in (folder / f"{prompts}.jsonl").open(encoding="utf-8")]
    asked = out / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in lines), encoding="utf-8")
    with connect("local", num_cpus=2):
        limits = {"max_tokens": recipe.ppo.max_prompt_tokens, "validation_fraction": 0.01, "max_broken_fraction": 0.0}
        prepare_prompts([asked], tokenizer, data / "prompts", **limits)
        stage = out / "ppo"
        stage.mkdir()
        with Monitor("ppo", stage) as monitor:
            run(recipe, {"data": data, "sft": folder / policy, "reward": folder / "reward"}, stage, monitor)
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").open(encoding="utf-8")]
    held = sum(value for name, value in rows[-1].items() if name.startswith("ppo/memory_gib/"))
    rate = recipe.ppo.samples * (steps - 2) / (rows[-1]["time"] - rows[1]["time"])
    tokens = sum(row["ppo/response_tokens"] for row in rows[2:]) / (steps - 2)
    print(json.dumps({"rate": rate, "memory_gib": held, "response_tokens": tokens}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
