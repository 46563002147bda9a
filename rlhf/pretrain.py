"""Stage pretrain: learn to predict the text of the corpus, from scratch or from a model directory.

roundhouse run recipes/quickstart.yaml --only pretrain
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from cluster.training import Report
from data.mixture import Source
from data.mixture import sources as sources_in
from data.packing import Sample
from data.shards import TokenShards
from data.tokenizers import from_model
from data.tokenizers import load as load_tokenizer
from rlhf import curriculum
from rlhf.curriculum import windows
from rlhf.losses import cross_entropy
from rlhf.models import Batch, LanguageModel, extend_vocabulary, load_causal_lm, new_causal_lm
from rlhf.monitoring import Monitor
from rlhf.recipe import Recipe
from rlhf.training import Task, Unit, Units, train


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    plan = curriculum.of(recipe.pretrain, recipe.seed, inputs["data"] / "pretrain")
    if plan is not None:
        plan.check()
        monitor.say(plan.summary())
    train("pretrain", task, recipe, inputs, out, monitor)


def task(recipe: Recipe, inputs: dict[str, Path], report: Report) -> Task:
    folder = inputs["data"] / "pretrain"
    length = recipe.pretrain.sequence_length
    train_shards, held_out = TokenShards(folder / "train"), TokenShards(folder / "validation")
    plan = curriculum.of(recipe.pretrain, recipe.seed, folder)
    texts = [source for source in sources_in(folder, "validation") if source.tokens]
    texts = texts if len(texts) > 1 else []
    tokenizer = load_tokenizer(inputs["data"] / "tokenizer")

    def model() -> nn.Module:
        if recipe.model.init is None:
            return LanguageModel(new_causal_lm(recipe.model, tokenizer.vocab_size, tokenizer.end_of_text, recipe.seed))
        found = load_causal_lm(recipe.model.init)
        if recipe.tokenizer.extend is not None or recipe.tokenizer.extend_from_corpus:
            extend_vocabulary(found, from_model(Path(recipe.model.init)), tokenizer)
        return LanguageModel(found)

    return Task(
        model=model,
        train=windows(train_shards, length) if plan is None else plan.units,
        validation=every_token(held_out, length, texts),
        loss=partial(loss_by_source, sources=len(texts)),
        figures=lambda sums: bits_per_byte(sums, held_out) | bits_by_source(sums, texts, held_out.vocab_size),
        steps=recipe.pretrain.total_steps,
        order=plan,
    )


def every_token(shards: TokenShards, length: int, sources: Sequence[Source] = ()) -> Units:
    """The stream in windows of `length` that overlap by one token, so that every token but a document's first is predicted once.

    With `sources`, every token says which one it is of (extra `source`).
    """
    starts = range(0, max(1, shards.tokens - 1), length - 1)
    lengths = [min(length, shards.tokens - start) for start in starts]
    ends = [source.stop for source in sources]

    def window(i: int) -> Unit:
        tokens, segments = shards.span(starts[i], starts[i] + lengths[i])
        places = np.arange(starts[i], starts[i] + lengths[i])
        extras = {"source": np.searchsorted(ends, places, side="right")} if sources else {}
        return [Sample(tokens, np.ones(len(tokens), np.float32), extras, segments)]

    return Units(lengths, window, shards.manifest_hash, lambda i: [f"tokens from {starts[i]} of {shards.folder}"])


def token_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy of the counted tokens; pretraining counts all, fine-tuning the assistant's."""
    return model(batch, summed=True), {}


def loss_by_source(model: nn.Module, batch: Batch, sources: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`token_loss`; of held-out windows whose tokens know their source, also every source's loss and count."""
    if "source" not in batch.extras:
        return token_loss(model, batch)
    log_probs, of = model(batch), batch.extras["source"][batch.rows]
    sums: dict[str, torch.Tensor] = {}
    for name, values in (("loss", -log_probs * batch.weights), ("count", batch.weights)):
        found = torch.zeros(sources, dtype=torch.float64, device=of.device).index_add_(0, of, values.double())
        sums |= {f"{name}/{source}": found[source] for source in range(sources)}
    return cross_entropy(log_probs, batch.weights), sums


def bits_per_byte(sums: dict[str, float], shards: TokenShards) -> dict[str, float]:
    """Validation loss in nats per predicted token, and bits per UTF-8 byte of the whole held-out text.

    The first token of a document has nothing before it and is not predicted: it is charged log2(vocabulary) bits.
    """
    bits = sums["loss"] / math.log(2) + (shards.tokens - sums["count"]) * math.log2(shards.vocab_size)
    return {"val_loss": sums["loss"] / sums["count"], "val_bits_per_byte": bits / shards.bytes_of_text}


def bits_by_source(sums: dict[str, float], sources: Sequence[Source], vocab_size: int) -> dict[str, float]:
    """`bits_per_byte` of each source's held-out text, as val_bits_per_byte/NAME."""
    found = {}
    for number, source in enumerate(sources):
        bits = sums[f"loss/{number}"] / math.log(2) + (source.tokens - sums[f"count/{number}"]) * math.log2(vocab_size)
        found[f"pretrain/val_bits_per_byte/{source.name}"] = bits / source.bytes_of_text
    return found
