"""The peers' side of `benchmarks.training`, run by .venv-peers: one process, one kind of work, one line of JSON.

    peers.py WORK hf|loop|trl FOLDER OUT STEPS [packed|padded|compiled]

Everyone uses the same ids, the same initial weights, fp32 and scaled dot product attention; tokens are counted where they are
collated, without padding.
"""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

WINDOW, BATCH = 512, {"pretrain": 8, "pretrain, eager": 8, "memory": 2, "reward": 8, "sft": 8}


class Meter:
    """Units counted up to the end of every step, and when it ended."""

    def __init__(self) -> None:
        self.units, self.ends, self.counts = 0, [], []

    def end_of_step(self) -> None:
        self.ends.append(time.perf_counter())
        self.counts.append(self.units)

    def counting(self, collate: Any, count: Any) -> Any:
        def counted(examples: Any) -> Any:
            self.units += count(examples)
            return collate(examples)

        return counted


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def watched(trainer: Any, meter: Meter, count: Any) -> None:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.end_of_step()

    trainer.add_callback(Steps())
    trainer.data_collator = meter.counting(trainer.data_collator, count)
    trainer.train()


def common(out: Path, steps: int, batch: int, accumulate: int = 1) -> dict[str, Any]:
    """What all trainers of transformers are told."""
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_steps": steps // 2,
        "report_to": ["tensorboard"],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def hf(work: str, folder: Path, out: Path, steps: int, meter: Meter, compiled: bool) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    stream = np.load(folder / "stream.npy")
    model = AutoModelForCausalLM.from_pretrained(folder / ("model-135m" if work == "memory" else "model"), dtype=torch.float32)
    windows = stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW)[: steps * BATCH[work]].tolist()
    data = Dataset.from_dict({"input_ids": windows, "labels": windows})
    asked = TrainingArguments(**common(out, steps, BATCH[work]), torch_compile=compiled)
    trainer = Trainer(model, asked, train_dataset=data, data_collator=default_data_collator)
    watched(trainer, meter, lambda examples: WINDOW * len(examples))


def loop(work: str, folder: Path, out: Path, steps: int, meter: Meter, compiled: bool) -> None:
    """Tuned by hand: no padding, no logging, no checkpoint, fused AdamW."""
    from transformers import AutoModelForCausalLM

    stream = torch.from_numpy(np.load(folder / "stream.npy"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if compiled:
        model.compile()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        start = step * BATCH[work] * WINDOW
        batch = stream[start : start + BATCH[work] * WINDOW].view(BATCH[work], WINDOW)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.units += batch.numel()
        meter.end_of_step()


def trl_sft(kind: str, folder: Path, out: Path, steps: int, meter: Meter) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    packed = kind == "packed"
    asked = common(out, steps, 1 if packed else BATCH["sft"], BATCH["sft"] if packed else 1)
    config = SFTConfig(**asked, max_length=512, packing=packed, completion_only_loss=True, model_init_kwargs={"dtype": "float32"})
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = Dataset.from_list(rows(folder / "sft.jsonl"))
    trainer = SFTTrainer(str(folder / "model"), config, train_dataset=data, processing_class=tokenizer)
    watched(trainer, meter, lambda examples: sum(len(e["input_ids"]) for e in examples))


def trl_reward(folder: Path, out: Path, steps: int, meter: Meter) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model.config.pad_token_id = tokenizer.pad_token_id
    pairs = rows(folder / "pairs.jsonl")
    data = Dataset.from_list([{f"{k}_ids": p["prompt"] + p[k] for k in ("chosen", "rejected")} for p in pairs])
    config = RewardConfig(**common(out, steps, BATCH["reward"]), max_length=384)
    trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    watched(trainer, meter, len)


def trl_reward_model(folder: Path, out: Path, steps: int, seed: str, rate: str, longest: str) -> None:
    """For `benchmarks.reward_model`: train and leave `out/model`."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    asked = common(out, steps, BATCH["reward"]) | {"seed": int(seed), "learning_rate": float(rate), "warmup_steps": round(0.1 * steps)}
    config = RewardConfig(**asked, adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, max_length=int(longest))
    data = Dataset.from_list([{f"{k}_ids": p["prompt"] + p[k] for k in ("chosen", "rejected")} for p in rows(folder / "train.jsonl")])
    trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.model.save_pretrained(out / "model")


def main(work: str, who: str, folder: Path, out: Path, steps: int, *rest: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    meter = Meter()
    if work == "reward-model":
        trl_reward_model(folder, out, steps, *rest)
        return
    if who == "hf":
        hf(work, folder, out, steps, meter, "compiled" in rest)
    elif who == "loop":
        loop(work, folder, out, steps, meter, "compiled" in rest)
    elif work == "sft":
        trl_sft(rest[0], folder, out, steps, meter)
    else:
        trl_reward(folder, out, steps, meter)
    rate = (meter.counts[-2] - meter.counts[1]) / (meter.ends[-2] - meter.ends[1])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"rate": rate, "memory_gib": memory}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:])
