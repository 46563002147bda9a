"""Stage sft: learn to answer, from conversations; only what the assistant says is learned.

roundhouse run recipes/quickstart.yaml --only sft
"""

import math
from functools import partial
from pathlib import Path

from data.examples import Examples
from data.packing import Sample
from rlhf.adapters import add_noise, save_merged, with_lora
from rlhf.models import LanguageModel, load_causal_lm, save_model
from rlhf.monitoring import Monitor
from rlhf.pretrain import token_loss
from rlhf.recipe import Recipe
from rlhf.training import Task, Unit, Units, train


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    train("sft", task, recipe, inputs, out, monitor)


def task(recipe: Recipe, inputs: dict[str, Path]) -> Task:
    conversations = Examples(inputs["data"] / "sft", "train")
    base = inputs["pretrain"] / "model"
    adapter = recipe.sft.adapter

    def model() -> LanguageModel:
        found = load_causal_lm(base)
        if adapter.method == "lora":
            found = with_lora(found, adapter, recipe.seed)
        return LanguageModel(add_noise(found, recipe.sft.neftune_alpha) if recipe.sft.neftune_alpha else found)

    return Task(
        model=model,
        train=units(conversations),
        validation=units(Examples(inputs["data"] / "sft", "validation")),
        loss=token_loss,
        figures=lambda sums: {"val_loss": sums["loss"] / sums["count"]},
        steps=math.ceil(recipe.sft.epochs * len(conversations) / recipe.sft.global_batch),
        save=save_model if adapter.method == "none" else partial(save_merged, base),
    )


def units(conversations: Examples) -> Units:
    def conversation(i: int) -> Unit:
        row = conversations[i]
        return [Sample(row["tokens"], row["mask"])]

    return Units(conversations.lengths("tokens").tolist(), conversation, conversations.manifest_hash, conversations.source)
