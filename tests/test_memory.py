"""The memory estimate against what torch really keeps, and the advice that follows from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import batch_of, causal_lm, recipe_model, sequences

from data import tokenizers
from data.packing import Sample
from rlhf.errors import TrainingError
from rlhf.learner import Learner
from rlhf.losses import cross_entropy
from rlhf.memory import GIB, USABLE, Memory, engine_explained, estimate_memory, help_for, is_out_of_memory, largest_micro_batch
from rlhf.models import Batch, LanguageModel, new_causal_lm, save_model
from rlhf.recipe import Optimizer, Recipe
from rlhf.roles import PolicyWorker


def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return cross_entropy(model(batch), batch.weights), {}


def learner(**changes: object) -> Learner:
    return Learner(LanguageModel(causal_lm(layers=6)), Optimizer(**changes), steps=5)


def test_parts_are_those_of_the_tensors() -> None:
    ours = learner()
    count = sum(p.numel() for p in ours.model.parameters())
    found = estimate_memory(ours, loss, batch_of(sequences([30, 20])))
    assert (found.weights, found.gradients, found.optimizer) == (4 * count, 4 * count, 8 * count)
    ours.step([batch_of(sequences([30, 20]))], loss)
    states = [s for optimizer in ours.optimizers for state in optimizer.state.values() for s in state.values() if s.ndim]
    assert sum(s.numel() * 4 for s in states) == found.optimizer


def test_activations_grow_with_the_tokens() -> None:
    small, large = (estimate_memory(learner(), loss, batch_of(sequences([n] * 4))).per_token for n in (16, 60))
    assert small == pytest.approx(large, rel=0.1)


def test_checkpointing_keeps_about_what_is_predicted() -> None:
    batch = batch_of(sequences([60] * 8))
    predicted = estimate_memory(learner(), loss, batch).per_token_checkpointed
    one_block = estimate_memory(learner(), loss, batch).per_token / 6
    kept = estimate_memory(learner(activation_checkpointing="full"), loss, batch).per_token  # before it computes a block again
    assert kept + one_block == pytest.approx(predicted, rel=0.4)


def test_the_largest_micro_batch_fits() -> None:
    memory = Memory(weights=100, gradients=100, optimizer=200, logits=50, per_token=10.0, per_token_checkpointed=2.0)
    tokens = largest_micro_batch(memory, 20_000, longest=64)
    assert tokens % 64 == 0
    assert 350 + 10 * tokens <= USABLE * 20_000 < 350 + 10 * (tokens + 64)
    assert largest_micro_batch(memory, 500, longest=96) == 96, "a sample must fit, whatever it takes"


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (60_000_000, ["sft.micro_batch=", "sft.activation_checkpointing=full: "]),
        (20_000_000, ["sft.micro_batch=", "sft.activation_checkpointing=full and sft.micro_batch=512"]),
        (9_000_000, ["cluster.workers="]),
    ],
)
def test_advice_is_what_fits(free: int, advice: list[str]) -> None:
    memory = Memory(2_000_000, 2_000_000, 4_000_000, 1_000_000, per_token=10_000.0, per_token_checkpointed=5_000.0)
    text = help_for("sft", memory, free, micro_batch=8192, longest=512, workers=2, workers_key="cluster.workers")
    changes = text.split("What would fit:\n")[1].splitlines()
    assert len(changes) == len(advice)
    assert all(line.strip().startswith(expected) for line, expected in zip(changes, advice, strict=True))


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_role_of_ppo_tells_what_held_its_memory(tmp_path: Path) -> None:
    tokenizer = tokenizers.train(["the quick brown fox jumps over the lazy dog " * 20], 270)
    model = new_causal_lm(recipe_model(), tokenizer.vocab_size, tokenizer.end_of_text, seed=0)
    save_model(model, model.state_dict(), tokenizer, tmp_path / "model")
    policy = PolicyWorker(
        0, 1, 1, Recipe(name="t", data={k: ["x"] for k in ("pretrain", "sft", "preferences", "prompts")}), tmp_path / "model"
    )
    policy.load(steps=1, checkpoints=tmp_path)
    units = [[Sample(tokens, np.ones(len(tokens), np.float32))] for tokens in sequences([9, 30, 20])]

    def too_much(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if len(batch.tokens) > 9:  # the estimate's own pass takes the shortest sample
            torch.empty(1 << 46, dtype=torch.uint8)
        return loss(model, batch)

    with pytest.raises(TrainingError, match=r"^ppo: out of memory") as caught:
        policy.learn(units, 3, 0, too_much, policy.config)
    parts = ("weights", "gradients", "optimizer", "logits", f"activations of {policy.config.micro_batch:,} tokens")
    assert all(f"\n  {part}" in str(caught.value) for part in parts)


def test_an_engine_tells_how_much_its_kv_cache_takes(tmp_path: Path) -> None:
    model = causal_lm(vocab_size=64)
    model.save_pretrained(tmp_path)
    config = model.config
    with pytest.raises(TrainingError) as caught, engine_explained(tmp_path, 1 << 20, 1):
        raise ValueError("8.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB)\nmore of it")
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 2**20
    text = str(caught.value)
    assert "no room (8.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB))" in text
    assert f"KV cache of one answer of 1,048,576 tokens  {kv / GIB:8.2f} GiB\n" in text
    assert "  ppo.groups.rollout.tensor_parallel=2: " in text
    with pytest.raises(ValueError, match="nothing of the kind"), engine_explained(tmp_path, 8, 1):
        raise ValueError("nothing of the kind")
