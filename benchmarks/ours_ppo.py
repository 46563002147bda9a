"""Our side of `benchmarks.ppo`: the ppo stage on a local Ray, one line of JSON. `ours_ppo.py WORK ours FOLDER OUT STEPS`"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ppo import FIXED, GROUP, LONGEST, PROMPTS, SAMPLES, TEMPERATURE

SHARED = {"global_batch": SAMPLES, "temperature": TEMPERATURE, "learning_rate": 3e-6, "checkpoint_every": 1000, "compile": True}
PPO = {"preset": "trl", "rollout_batch": SAMPLES, "critic_learning_rate": 3e-6}
GRPO = {"advantage": "grpo", "epochs": 1, "rollout_batch": SAMPLES // GROUP, "samples_per_prompt": GROUP, "kl_in": "loss", "kl_coef": 0.04}
WORKS: dict[str, tuple[str, str, dict[str, Any]]] = {  # -> (prompts, policy, keys)
    "ppo step, fixed length": ("short", "fixed", PPO | {"max_response_tokens": FIXED}),
    "ppo step, natural lengths": ("short", "natural", PPO | {"max_response_tokens": LONGEST}),
    "grpo step": ("long", "fixed", GRPO | {"max_response_tokens": FIXED}),
}


def main(work: str, _: str, folder: Path, out: Path, steps: int) -> None:
    from cluster.connect import connect
    from data import tokenizers
    from data.examples import prepare_prompts
    from rlhf.monitoring import Monitor
    from rlhf.ppo import run
    from rlhf.recipe import Recipe

    prompts, policy, keys = WORKS[work]
    # In turn, with both cores each: side by side, a core each, the critic waited for the policy, which learns a vocabulary besides.
    roles = ["policy", "reference", "reward", *(() if "advantage" in keys else ("critic",))]
    groups: dict[str, Any] = {role: {"cpus": 0.4, "threads": 2} for role in roles}
    # Two engines with a core each: 8 x 8 answers of 64 tokens took 1.9 to 2.0 s, one engine with both cores 2.2 to 3.2.
    groups["rollout"] = {"workers": 2, "cpus": 0.2, "threads": 1}
    length = PROMPTS[prompts][0]
    ppo = SHARED | keys | {"steps": steps, "max_prompt_tokens": length, "groups": groups, "colocate": [roles]}
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    recipe = Recipe.model_validate({"name": "benchmark", "data": sources, "model": {"max_positions": 512}, "ppo": ppo})

    data = out / "data"
    tokenizer = tokenizers.load(folder / "tokenizer")
    tokenizer.save(data / "tokenizer")
    lines = [json.loads(line)["text"] for line in (folder / f"{prompts}.jsonl").open(encoding="utf-8")]
    asked = out / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in lines), encoding="utf-8")
    with connect("local", num_cpus=2):
        limits = {"max_tokens": length, "validation_fraction": 0.01, "max_broken_fraction": 0.0}
        prepare_prompts([asked], tokenizer, data / "prompts", **limits)
        stage = out / "ppo"
        stage.mkdir()
        with Monitor("ppo", stage) as monitor:
            run(recipe, {"data": data, "sft": folder / policy, "reward": folder / "reward"}, stage, monitor)
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").open(encoding="utf-8")]
    held = sum(value for name, value in rows[-1].items() if name.startswith("ppo/memory_gib/"))
    rate = SAMPLES * (steps - 2) / (rows[-1]["time"] - rows[1]["time"])
    tokens = sum(row["ppo/response_tokens"] for row in rows[2:]) / (steps - 2)
    print(json.dumps({"rate": rate, "memory_gib": held, "response_tokens": tokens}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
