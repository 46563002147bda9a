"""The training loop of one rank, in this process: it tells which documents made trouble, and how well the machine was used."""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import causal_lm

from cluster.training import Report
from data.examples import prepare_chat, prepare_preferences
from data.order import batch_indices
from data.packing import Sample
from data.tokenizers import train as train_tokenizer
from rlhf import reward, sft
from rlhf.errors import NotFinite, TrainingError
from rlhf.health import LEAST
from rlhf.learner import WORTH_COMPILING, pays_to_compile
from rlhf.losses import cross_entropy
from rlhf.models import Batch, LanguageModel, save_model
from rlhf.recipe import Recipe
from rlhf.training import Task, Units, worker

STEPS, BATCH, UNITS = 30, 4, 200
RECIPE: dict[str, Any] = {
    "name": "t",
    "data": {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")},
    "pretrain": {
        "steps": STEPS,
        "global_batch": BATCH,
        "micro_batch": 24,
        "validate_every": 10,
        "checkpoint_every": 100,
        "sequence_length": 16,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(folder: Path, spoiled: int = -1, factor: float = 1.0, **changes: object) -> list[dict[str, Any]]:
    """Train on units of easy text; the loss of a micro-batch that holds unit `spoiled` is multiplied. -> what was reported."""

    def unit(i: int) -> list[Sample]:
        tokens = np.random.default_rng(i).integers(0, 7, 12)
        return [Sample(np.where(i == spoiled, 63, tokens), np.ones(12, np.float32))]

    def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if changes.get("out_of_memory_at") is not None and next(calls) > changes["out_of_memory_at"]:
            torch.empty(1 << 46, dtype=torch.uint8)
        return cross_entropy(model(batch), batch.weights) * (factor if (batch.tokens == 63).any() else 1.0), {}

    def task(recipe: Recipe, inputs: dict[str, Path], report: Report) -> Task:
        units = Units([12] * UNITS, unit, "hash", lambda i: [f"row {i} of a.jsonl"])
        held_out = Units([12] * 5, lambda i: unit(UNITS + i), "held out", lambda i: [f"row {i}"])
        return Task(
            lambda: LanguageModel(causal_lm()), units, held_out, loss, lambda sums: {"val_loss": sums["loss"] / sums["count"]}, STEPS
        )

    calls = itertools.count()
    settings = {**RECIPE["pretrain"], **{name: value for name, value in changes.items() if name != "out_of_memory_at"}}
    train_tokenizer(["a few words"] * 10, 269).save(folder / "data" / "tokenizer")
    reports: list[dict[str, Any]] = []
    config = {
        "stage": "pretrain",
        "task": task,
        "recipe": {**RECIPE, "pretrain": settings},
        "inputs": {"data": str(folder / "data")},
        "out": str(folder),
    }
    worker(config, reports.append)
    return reports


def unit_of_step(step: int) -> int:
    return int(batch_indices(0, step, BATCH, UNITS, "hash")[1])


def test_a_nan_names_its_documents_and_no_others(tmp_path: Path) -> None:
    bad = unit_of_step(3)
    with pytest.raises(NotFinite, match=r"step 3: the loss is nan.*In this step: row \d+ of a\.jsonl, row \d+ of a\.jsonl\.") as caught:
        run(tmp_path, spoiled=bad, factor=math.nan)
    assert f"row {bad} of a.jsonl" in str(caught.value)  # its micro-batch holds two units of the step's four


def test_a_spike_is_told_with_its_documents_and_training_goes_on(tmp_path: Path) -> None:
    bad = unit_of_step(LEAST + 5)
    reports = run(tmp_path, spoiled=bad, factor=20.0)
    warnings = [r["warning"] for r in reports if "warning" in r]
    assert any(w.startswith(f"step {LEAST + 6}: the loss is") and f"row {bad} of a.jsonl" in w for w in warnings)
    kept = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert all(f"row {bad} of a.jsonl" in line["documents"] for line in kept if line["step"] == LEAST + 6)
    results = reports[-1]["results"]
    assert results["steps"] == STEPS
    assert 0 < results["goodput"] <= 1
    assert results["memory_gib"] > 0.1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(0 < row["pretrain/mfu"] < 2 and 0 <= row["pretrain/data_wait_share"] < 1 for row in rows)


def test_the_largest_micro_batch_is_found_and_changes_no_curve(tmp_path: Path) -> None:
    curves = []
    for name in ("fixed", "auto"):
        (tmp_path / name).mkdir()
        reports = run(tmp_path / name, micro_batch=24 if name == "fixed" else "auto", steps=10)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([row["pretrain/loss"] for row in rows])
    assert any("micro_batch is 65,536 tokens" in r.get("warning", "") for r in reports), "this model fits in any memory"
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_out_of_memory_names_what_held_it_and_what_would_fit(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="pretrain: out of memory") as caught:
        run(tmp_path, out_of_memory_at=3)
    text = str(caught.value)
    assert all(f"\n  {part}" in text for part in ("weights", "gradients", "optimizer", "logits", "activations of 24 tokens"))
    assert "What would fit:\n  " in text


def test_deterministic_kernels_serve_a_whole_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation of the learner lacks one, on CPUs at least, and nothing changes."""
    curves = []
    for name, asked in (("any", False), ("deterministic", True)):
        monkeypatch.setitem(RECIPE, "deterministic", asked)
        (tmp_path / name).mkdir()
        try:
            run(tmp_path / name, steps=10)
            assert torch.are_deterministic_algorithms_enabled() == asked
        finally:
            torch.use_deterministic_algorithms(False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["pretrain/loss"] for line in lines])
    assert curves[0] == curves[1]


class CutOff(BaseException):
    """The process is gone: nothing in the loop may handle it."""


@pytest.fixture(scope="module")
def parents(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What sft and reward start from: data of their own, and a model in both places where they look for one."""
    folder = tmp_path_factory.mktemp("parents")
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], 270)
    tokenizer.save(folder / "data" / "tokenizer")
    words = ("quick", "brown", "lazy", "fox", "over", "dog")
    rows = [
        {"messages": [{"role": "user", "content": f"the {a} {b}"}, {"role": "assistant", "content": f"{b} {a}"}]}
        for a in words
        for b in words
    ]
    pairs = [{"messages": row["messages"][:1], "ranked": ["the dog", "a fox", "over"]} for row in rows]
    limits = {"max_tokens": 64, "validation_fraction": 0.2, "max_broken_fraction": 0.0}
    for name, lines, prepare in (("sft", rows, prepare_chat), ("preferences", pairs, prepare_preferences)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        prepare([path], tokenizer, folder / "data" / name, **limits)
    model = causal_lm(vocab_size=tokenizer.vocab_size)
    for stage in ("pretrain", "sft"):
        save_model(model, model.state_dict(), tokenizer, folder / stage / "model")
    return {stage: folder / stage for stage in ("data", "pretrain", "sft")}


@pytest.mark.parametrize(
    ("stage", "task", "keys"),
    [
        ("sft", sft.task, {}),
        ("sft", sft.task, {"adapter": {"method": "lora", "dropout": 0.2}, "neftune_alpha": 5}),
        ("reward", reward.task, {"heads": 3, "center_coef": 0.01}),
    ],
    ids=["sft", "lora", "reward"],
)
def test_a_stage_cut_off_after_any_step_ends_with_the_same_bytes(
    parents: dict[str, Path], tmp_path: Path, stage: str, task: Any, keys: dict[str, Any]
) -> None:
    """Dropout, noise and resampling included: all of them are functions of the step."""
    settings = {"epochs": 0.5, "global_batch": 3, "checkpoint_every": 2, "validate_every": 2, "learning_rate": 1e-3, "max_tokens": 64}
    recipe = RECIPE | {stage: settings | keys}

    def run_until(out: Path, last: int) -> None:
        def report(values: dict[str, Any]) -> None:
            if values.get("step") == last:
                raise CutOff

        out.mkdir(exist_ok=True)
        config = {"stage": stage, "task": task, "recipe": recipe, "inputs": parents, "out": str(out)}
        worker(config, report)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_until(whole, last=-1)
    for step in (1, 3, 4):
        with pytest.raises(CutOff):
            run_until(cut, last=step)
        assert not (cut / "model").exists()
    run_until(cut, last=-1)

    def losses(out: Path) -> list[tuple[int, float]]:
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row[f"{stage}/loss"]) for row in rows]

    assert losses(cut) == losses(whole)
    assert len(losses(whole)) >= 5
    assert (cut / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_a_stage_ends_where_its_held_out_loss_is_low_enough(parents: dict[str, Path], tmp_path: Path) -> None:
    settings = {"epochs": 1, "global_batch": 3, "checkpoint_every": 100, "validate_every": 2, "learning_rate": 1e-3, "max_tokens": 64}

    def run(out: Path, **keys: Any) -> tuple[list[dict[str, float]], list[str]]:
        said: list[str] = []
        config = {"stage": "sft", "task": sft.task, "recipe": RECIPE | {"sft": settings | keys}, "inputs": parents, "out": str(out)}
        out.mkdir(exist_ok=True)
        worker(config, lambda values: said.extend([values["warning"]] if "warning" in values else []))
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [{name: row[name] for name in ("step", "sft/loss", "sft/val_loss") if name in row} for row in rows], said

    whole, _ = run(tmp_path / "whole")
    target = whole[3]["sft/val_loss"]
    assert target < whole[1]["sft/val_loss"]
    cut, _ = run(tmp_path / "cut", stop_at_val_loss=target)
    assert cut == whole[:4]
    weights = tmp_path / "cut" / "model" / "model.safetensors"
    kept = weights.read_bytes()
    shutil.rmtree(weights.parent)  # killed before its end, it has nothing left to train
    assert run(tmp_path / "cut", stop_at_val_loss=target) == (cut, [])
    assert weights.read_bytes() == kept
    _, said = run(tmp_path / "never", stop_at_val_loss=0.01)
    assert "stop_at_val_loss = 0.01 was not reached" in said[-1]


def test_only_long_stages_are_compiled() -> None:
    model = causal_lm()
    worth = WORTH_COMPILING["cpu"] / (6 * sum(p.numel() for p in model.parameters()))
    assert not pays_to_compile(model, 0.99 * worth)
    assert pays_to_compile(model, 1.01 * worth) == (shutil.which("g++") is not None)
