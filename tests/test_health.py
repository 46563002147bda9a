"""Sick trainings made on purpose: each is recognised, with its layer, and a sound one raises nothing."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from tiny import batch_of, causal_lm, sequences

from rlhf.efficiency import Clock
from rlhf.errors import NotFinite
from rlhf.health import LEAST, PATIENCE, QUIET, Health, monotony
from rlhf.learner import Learner
from rlhf.losses import cross_entropy
from rlhf.models import Batch, LanguageModel
from rlhf.recipe import Optimizer


def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return cross_entropy(model(batch), batch.weights), {}


def trained(steps: int, spoil: dict[int, float] | None = None, dead_layer: int | None = None) -> list[tuple[int, str, str]]:
    """Train a tiny model on easy text; at the steps of `spoil` the loss is multiplied. -> (step, kind, layer) of all warnings."""
    model = causal_lm()
    if dead_layer is not None:
        block = model.model.layers[dead_layer]
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight.register_hook(lambda g: g * 1e-12)
        for parameter in (p for p in block.parameters() if p.requires_grad):
            parameter.register_hook(lambda g: g * 1e-12)
    learner, health, found = Learner(LanguageModel(model), Optimizer(learning_rate=1e-3, warmup_fraction=0), steps), Health(), []
    for step in range(steps):
        factor = (spoil or {}).get(step, 1.0)
        tokens = [t % 7 for t in sequences([12] * 8, seed=step)]
        metrics = learner.step([batch_of(tokens)], lambda model, batch, factor=factor: (loss(model, batch)[0] * factor, {}))
        found += [(step, w.kind, w.layer) for w in health.observe(step, metrics["loss"], learner.layer_norms)]
    return found


def test_a_sound_training_warns_of_nothing() -> None:
    assert trained(60) == []


def test_a_spike_and_an_exploding_gradient() -> None:
    found = trained(40, spoil={30: 50.0, 31: 50.0})
    assert {(step, kind) for step, kind, _ in found} == {(30, "spike"), (30, "exploding")}, "said once, not at every step"
    assert all(layer for _, kind, layer in found if kind == "exploding")


def test_a_layer_without_gradient() -> None:
    found = trained(PATIENCE + 3, dead_layer=1)
    assert found == [(PATIENCE - 1, "vanishing", "layers.1")]


def test_a_head_that_begins_at_zero_is_no_illness() -> None:
    health = Health()
    assert health.observe(0, 0.7, {"layers.0": 0.0, "score": 1.0}) == []
    assert all(not health.observe(step, 0.7, {"layers.0": 0.1, "score": 1.0}) for step in range(1, 30))


def test_a_warning_comes_again_after_a_while() -> None:
    health, said = Health(), []
    for step in range(LEAST + QUIET + 1):
        loss = 9.0 if step in (LEAST, LEAST + 5, LEAST + QUIET) else 2.0 + 0.01 * math.sin(step)
        said += [step for _ in health.observe(step, loss, {"layers.0": 1.0})]
    assert said == [LEAST, LEAST + QUIET]


def test_not_finite_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(NotFinite("step 3: the loss is nan", [(1, 0)])))
    assert str(error) == "step 3: the loss is nan"
    assert error.places == [(1, 0)]


def test_clock_counts_flops_by_hand() -> None:
    model = LanguageModel(causal_lm())
    clock = Clock(model, world=2)
    batch = batch_of(sequences([5, 3]))
    clock.peak = 1e9
    clock.start()
    clock.data_is_there()
    figures = clock.stop(16, [batch])
    seconds = 16 / figures["tokens_per_second"]
    table = 64 * 32  # tied: it is the output layer too
    per_block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    by_hand = 6 * (table + 2 * per_block + 32) * 8 + 12 * 2 * 32 * (5 * 5 + 3 * 3)
    assert figures["mfu"] * seconds * 1e9 == pytest.approx(2 * by_hand)
    assert 0 <= figures["data_wait_share"] <= 1
    assert np.isfinite(json.loads(json.dumps(clock.summary()))["goodput"])


def test_answers_that_are_all_worth_the_same_are_reported_once_in_a_while() -> None:
    said = [steps for steps in range(60) if monotony(steps, 0.0)]
    assert said == [PATIENCE, PATIENCE + QUIET, PATIENCE + 2 * QUIET]
    assert monotony(PATIENCE, 1.0).startswith(f"{PATIENCE} steps in a row every answer was worth 1,")
