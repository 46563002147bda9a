"""TRL's side of `benchmarks.ppo`, run by .venv-peers: one process, one line of JSON. `peers_ppo.py WORK ppo|grpo FOLDER OUT STEPS cpu|gpu`

PPOTrainer is of TRL 1.12, which stands in a folder of its own beside the environment; GRPOTrainer of 1.16. Both generate with
transformers, as they do by themselves; the batches are cut for what they run on (16 rows at a time on 2 cores).
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import ROOT
from benchmarks.ppo_sizes import FIXED, SIZES, TEMPERATURE, Sizes


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def timed(trainer: Any) -> list[float]:
    """When each step ended."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Steps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Steps())
    trainer.train()
    return ends


def models(folder: Path, policy: str) -> tuple[Any, Any, Any]:
    """(a way to open the policy, a way to open the reward model, the tokenizer)"""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / policy / "model", padding_side="left")

    def judge() -> Any:
        found = AutoModelForSequenceClassification.from_pretrained(folder / "reward" / "model", num_labels=1, dtype=torch.float32)
        found.config.pad_token_id = tokenizer.pad_token_id
        return found

    return lambda: AutoModelForCausalLM.from_pretrained(folder / policy / "model", dtype=torch.float32), judge, tokenizer


def shared(out: Path, sizes: Sizes) -> dict[str, Any]:
    on_gpu = sizes is SIZES["gpu"]
    about = {"output_dir": str(out), "learning_rate": 3e-6, "report_to": [], "bf16": on_gpu, "use_cpu": not on_gpu, "disable_tqdm": True}
    batch = {"per_device_train_batch_size": sizes.rows, "gradient_accumulation_steps": sizes.samples // sizes.rows}
    return about | batch | {"gradient_checkpointing": False, "save_strategy": "no", "optim": "adamw_torch_fused", "logging_steps": 1}


def ppo(work: str, folder: Path, out: Path, steps: int, sizes: Sizes) -> list[float]:
    sys.path.insert(0, str(ROOT / ".venv-peers" / "trl-1.12"))
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    fixed = work == FIXED
    policy, judge, tokenizer = models(folder, "fixed" if fixed else "natural")
    config = PPOConfig(
        **shared(out, sizes),
        num_mini_batches=1,
        num_ppo_epochs=4,
        total_episodes=sizes.samples * steps,
        response_length=sizes.fixed if fixed else sizes.longest,
        stop_token=None if fixed else "eos",
        temperature=TEMPERATURE,
        local_rollout_forward_batch_size=sizes.samples,
        num_sample_generations=0,
    )
    data = Dataset.from_list([{"input_ids": line["ids"]} for line in lines(folder / "short.jsonl")])
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(),
        reward_model=judge(),
        value_model=judge(),
        train_dataset=data,
        eval_dataset=data.select(range(sizes.samples)),
    )
    return timed(trainer)


def grpo(folder: Path, out: Path, steps: int, sizes: Sizes) -> list[float]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy, judge, tokenizer = models(folder, "fixed")
    config = GRPOConfig(
        **shared(out, sizes),
        num_generations=sizes.group,
        max_completion_length=sizes.fixed,
        temperature=TEMPERATURE,
        beta=0.04,
        max_steps=steps,
    )
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": line["text"]}]} for line in lines(folder / "long.jsonl")])
    trainer = GRPOTrainer(model=policy(), reward_funcs=judge(), args=config, train_dataset=data, processing_class=tokenizer)
    return timed(trainer)


def main(work: str, who: str, folder: Path, out: Path, steps: int, on: str) -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sizes = SIZES[on]
    ends = ppo(work, folder, out, steps, sizes) if who == "ppo" else grpo(folder, out, steps, sizes)
    rate = sizes.samples * (steps - 2) / (ends[-1] - ends[1])
    print(json.dumps({"rate": rate, "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
