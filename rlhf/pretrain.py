"""Stage pretrain: learn to predict the text of the corpus, from scratch or from a model directory.

roundhouse run recipes/quickstart.yaml --only pretrain
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from cluster.training import Report
from data.packing import Sample
from data.shards import TokenShards
from data.tokenizers import from_model
from data.tokenizers import load as load_tokenizer
from rlhf.models import Batch, LanguageModel, extend_vocabulary, load_causal_lm, new_causal_lm
from rlhf.monitoring import Monitor
from rlhf.recipe import Recipe
from rlhf.training import Task, Unit, Units, train


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    train("pretrain", task, recipe, inputs, out, monitor)


def task(recipe: Recipe, inputs: dict[str, Path], report: Report) -> Task:
    folder = inputs["data"] / "pretrain"
    length = recipe.pretrain.sequence_length
    train_shards, held_out = TokenShards(folder / "train"), TokenShards(folder / "validation")
    tokenizer = load_tokenizer(inputs["data"] / "tokenizer")

    def model() -> nn.Module:
        if recipe.model.init is None:
            return LanguageModel(new_causal_lm(recipe.model, tokenizer.vocab_size, tokenizer.end_of_text, recipe.seed))
        found = load_causal_lm(recipe.model.init)
        if recipe.tokenizer.extend is not None:
            extend_vocabulary(found, from_model(Path(recipe.model.init)), tokenizer)
        return LanguageModel(found)

    return Task(
        model=model,
        train=windows(train_shards, length),
        validation=every_token(held_out, length),
        loss=token_loss,
        figures=lambda sums: bits_per_byte(sums, held_out),
        steps=recipe.pretrain.steps,
    )


def windows(shards: TokenShards, length: int) -> Units:
    """The token stream in windows of `length`; documents within one are segments of their own."""

    def window(i: int) -> Unit:
        tokens, lengths = shards.window(i, length)
        return [Sample(tokens, np.ones(length, np.float32), lengths=lengths)]

    def documents(i: int) -> list[str]:
        return [f"document {name[:12]} of {shards.folder}" for name in shards.document_ids(i, length)]

    return Units([length] * shards.windows(length), window, shards.manifest_hash, documents)


def every_token(shards: TokenShards, length: int) -> Units:
    """The stream in windows of `length` that overlap by one token, so that every token but a document's first is predicted once."""
    starts = range(0, max(1, shards.tokens - 1), length - 1)
    lengths = [min(length, shards.tokens - start) for start in starts]

    def window(i: int) -> Unit:
        tokens, segments = shards.span(starts[i], starts[i] + lengths[i])
        return [Sample(tokens, np.ones(len(tokens), np.float32), lengths=segments)]

    return Units(lengths, window, shards.manifest_hash, lambda i: [f"tokens from {starts[i]} of {shards.folder}"])


def token_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy of the counted tokens; pretraining counts all, fine-tuning the assistant's."""
    return model(batch, summed=True), {}


def bits_per_byte(sums: dict[str, float], shards: TokenShards) -> dict[str, float]:
    """Validation loss in nats per predicted token, and bits per UTF-8 byte of the whole held-out text.

    The first token of a document has nothing before it and is not predicted: it is charged log2(vocabulary) bits.
    """
    bits = sums["loss"] / math.log(2) + (shards.tokens - sums["count"]) * math.log2(shards.vocab_size)
    return {"val_loss": sums["loss"] / sums["count"], "val_bits_per_byte": bits / shards.bytes_of_text}
