"""The memory estimate against what torch really keeps, and the advice that follows from it."""

import pytest
import torch
from tiny import batch_of, causal_lm, sequences

from rlhf.learner import Learner
from rlhf.losses import cross_entropy
from rlhf.memory import USABLE, Memory, estimate, help_for, is_out_of_memory, largest_micro_batch
from rlhf.models import Batch, LanguageModel
from rlhf.recipe import Optimizer


def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return cross_entropy(model(batch), batch.weights), {}


def learner(**changes: object) -> Learner:
    return Learner(LanguageModel(causal_lm(layers=6)), Optimizer(**changes), steps=5)


def test_parts_are_those_of_the_tensors() -> None:
    ours = learner()
    count = sum(p.numel() for p in ours.model.parameters())
    found = estimate(ours, loss, batch_of(sequences([30, 20])))
    assert (found.weights, found.gradients, found.optimizer) == (4 * count, 4 * count, 8 * count)
    ours.step([batch_of(sequences([30, 20]))], loss)
    states = [s for optimizer in ours.optimizers for state in optimizer.state.values() for s in state.values() if s.ndim]
    assert sum(s.numel() * 4 for s in states) == found.optimizer


def test_activations_grow_with_the_tokens() -> None:
    small, large = (estimate(learner(), loss, batch_of(sequences([n] * 4))).per_token for n in (16, 60))
    assert small == pytest.approx(large, rel=0.1)


def test_checkpointing_keeps_about_what_is_predicted() -> None:
    batch = batch_of(sequences([60] * 8))
    predicted = estimate(learner(), loss, batch).per_token_checkpointed
    one_block = estimate(learner(), loss, batch).per_token / 6
    kept = estimate(learner(activation_checkpointing="full"), loss, batch).per_token  # before it computes a block again
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
    text = help_for("sft", memory, free, micro_batch=8192, longest=512, workers=2)
    changes = text.split("What would fit:\n")[1].splitlines()
    assert len(changes) == len(advice)
    assert all(line.strip().startswith(expected) for line, expected in zip(changes, advice, strict=True))


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
