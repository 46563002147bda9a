"""TRL's side of `benchmarks.loss_parity`, run by .venv-peers: its trainers' own collators and compute_loss on what FOLDER holds.

    loss_parity_trl.py FOLDER        # reads cases.json, rows.json, policy/, reference/, reward/; writes theirs.npz

theirs.npz holds CASE (the loss, 0-dimensional) and CASE/PARAMETER (its gradient) in float32.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

Rows = list[dict[str, Any]]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    cases, rows = (json.loads((folder / name).read_text()) for name in ("cases.json", "rows.json"))
    makers = {"dpo": dpo, "ipo": dpo, "simpo": simpo, "kto": kto, "reward": reward}
    found = {}
    for name, case in cases.items():
        trainer, batch = makers[case["method"]](folder, case, rows)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found[name] = loss.detach().numpy()
        found |= {f"{name}/{key}": p.grad.numpy() for key, p in trainer.model.named_parameters()}
    np.savez(folder / "theirs.npz", **found)


def opened(folder: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def trainer_of(kind: Any, config: Any, folder: Path, row: dict[str, Any], model: Any, **further: Any) -> Any:
    """A trainer needs a data set of texts; the batches that count are collated by hand, of ids."""
    common = {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    args, data = config(**common, **row.pop("config")), Dataset.from_list([row] * 2)
    return kind(model=model, args=args, train_dataset=data, processing_class=tokenizer, **further)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def dpo(folder: Path, case: dict[str, Any], rows: Rows) -> tuple[Any, Any]:
    config = {"loss_type": "sigmoid" if case["method"] == "dpo" else "ipo", "beta": case["beta"]}
    models = {"model": opened(folder, "policy"), "ref_model": opened(folder, "reference")}
    trainer = trainer_of(DPOTrainer, DPOConfig, folder, PAIR | {"config": config}, **models)
    return trainer, trainer.data_collator([{f"{k}_ids": row[k] for k in PAIR} for row in rows])


def simpo(folder: Path, case: dict[str, Any], rows: Rows) -> tuple[Any, Any]:
    config = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": case["beta"], "simpo_gamma": case["margin"]}
    trainer = trainer_of(CPOTrainer, CPOConfig, folder, PAIR | {"config": config}, opened(folder, "policy"))
    examples = []
    for row in rows:
        example = {"prompt_input_ids": row["prompt"], "prompt_attention_mask": [1] * len(row["prompt"])}
        for side in ("chosen", "rejected"):
            ids = row["prompt"] + row[side]
            example |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
            example[f"{side}_labels"] = [-100] * len(row["prompt"]) + row[side]
        examples.append(example)
    return trainer, trainer.data_collator(examples)


def kto(folder: Path, case: dict[str, Any], rows: Rows) -> tuple[Any, Any]:
    config = {name: case[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    text = {"prompt": "a", "completion": "b", "label": True, "config": config}
    trainer = trainer_of(KTOTrainer, KTOConfig, folder, text, opened(folder, "policy"), ref_model=opened(folder, "reference"))
    examples = [
        {"prompt_ids": row["prompt"], "completion_ids": row[side], "KL_completion_ids": row["foreign"], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    return trainer, trainer.data_collator(examples)


def reward(folder: Path, case: dict[str, Any], rows: Rows) -> tuple[Any, Any]:
    config = {"center_rewards_coefficient": case["center_coef"] or None}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    trainer = trainer_of(RewardTrainer, RewardConfig, folder, PAIR | {"config": config}, model)
    examples = [{f"{side}_ids": row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    if case["margin_coef"]:
        examples = [e | {"margin": case["margin_coef"] * row["gap"]} for e, row in zip(examples, rows, strict=True)]
    return trainer, trainer.data_collator(examples)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
