"""Stage sft: learn to answer, from conversations; only what the assistant says is learned.

All weights, adapters beside them or a prefix before the text (`sft.adapter`); the tokens of the data, or a teacher's distribution
over them (`sft.distill`).

roundhouse run recipes/quickstart.yaml --only sft
"""

import math
from functools import partial
from pathlib import Path

import torch.nn as nn

from cluster.training import Report
from data.examples import Examples
from data.packing import Sample
from data.tokenizers import load as load_tokenizer
from rlhf.adapters import add_noise, save_merged, save_prefix, with_adapter
from rlhf.distillation import Student, distillation_loss, load_teacher
from rlhf.distillation import figures as distillation_figures
from rlhf.models import LanguageModel, load_causal_lm, save_model
from rlhf.monitoring import Monitor
from rlhf.pretrain import token_loss
from rlhf.recipe import Recipe
from rlhf.training import Task, Unit, Units, train


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    train("sft", task, recipe, inputs, out, monitor)


def task(recipe: Recipe, inputs: dict[str, Path], report: Report) -> Task:
    conversations = Examples(inputs["data"] / "sft", "train")
    base = inputs["pretrain"] / "model"
    adapter = recipe.sft.adapter

    distill = recipe.sft.distill

    def model() -> nn.Module:
        found = load_causal_lm(base)
        if adapter.method != "none":
            found = with_adapter(found, adapter, recipe.seed)
        if recipe.sft.neftune_alpha:
            found = add_noise(found, recipe.sft.neftune_alpha)
        if distill.teacher is None:
            return LanguageModel(found)
        tokenizer = load_tokenizer(inputs["data"] / "tokenizer")
        return Student(found, load_teacher("sft.distill.teacher", distill.teacher, found, tokenizer), distill)

    return Task(
        model=model,
        train=units(conversations),
        validation=units(Examples(inputs["data"] / "sft", "validation")),
        loss=token_loss if distill.teacher is None else distillation_loss,
        figures=figures if distill.teacher is None else distillation_figures,
        steps=math.ceil(recipe.sft.epochs * len(conversations) / recipe.sft.global_batch),
        save={"none": save_model, "p_tuning_v2": save_prefix}.get(adapter.method, partial(save_merged, base)),
    )


def figures(sums: dict[str, float]) -> dict[str, float]:
    return {"val_loss": sums["loss"] / sums["count"]}


def units(conversations: Examples) -> Units:
    def conversation(i: int) -> Unit:
        row = conversations[i]
        return [Sample(row["tokens"], row["mask"])]

    return Units(conversations.lengths("tokens").tolist(), conversation, conversations.manifest_hash, conversations.source)
