"""Phases of pretraining: every step's windows are arithmetic, the mixture is exact, and no layout or kill changes what is learned."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import checkpoints
from cluster.training import Report
from data.errors import DataError
from data.files import sha256_of, write_json
from data.order import batch_indices, sample_index
from data.shards import Document, ShardWriter
from data.tokenizers import train as train_tokenizer
from rlhf import curriculum, pretrain
from rlhf.curriculum import Curriculum
from rlhf.models import Batch
from rlhf.recipe import Pretrain, Recipe
from rlhf.training import Task, worker

SIZES = {"web": 2600, "code": 910, "qa": 335}  # training tokens; a tenth as many are held out
BATCH = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage data leaves, of three sources whose tokens tell which they are of."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_tokenizer(["a few words"] * 10, 269)
    tokenizer.save(folder / "tokenizer")
    entries = {name: {} for name in SIZES}
    for split, divisor in (("train", 1), ("validation", 10)):
        writer = ShardWriter(folder / "pretrain" / split, vocab_size=269, fingerprint=tokenizer.fingerprint, shard_tokens=1000)
        for number, (name, size) in enumerate(SIZES.items()):
            rng, lengths = np.random.default_rng(number), [30] * (size // divisor // 30) + [size // divisor % 30]
            for i, length in enumerate(lengths):
                writer.add(Document(f"{name} {i}".ljust(16).encode(), rng.integers(20 * number, 20 * number + 10, length), length))
            entries[name][split] = {"documents": len(lengths), "tokens": sum(lengths), "bytes_of_text": sum(lengths)}
        totals = writer.finish()
    write_json(folder / "pretrain" / "manifest.json", {"sources": [{"source": n, **e} for n, e in entries.items()], "train": totals})
    return folder


def of(data: Path, *phases: dict[str, Any], seed: int = 0) -> Curriculum:
    config = Pretrain(phases=list(phases), global_batch=BATCH, sequence_length=16)
    plan = curriculum.of(config, seed, data / "pretrain")
    assert plan is not None
    return plan


def source_and_length(plan: Curriculum, unit: int) -> tuple[str, int]:
    """By the tokens themselves."""
    tokens = plan.units.get(unit)[0].tokens
    (number,) = set((tokens // 20).tolist())
    assert len(tokens) == plan.units.lengths[unit]
    return list(SIZES)[number], len(tokens)


PHASES = st.lists(
    st.fixed_dictionaries(
        {
            "steps": st.integers(1, 60),
            "weights": st.none() | st.dictionaries(st.sampled_from(list(SIZES)), st.sampled_from([0.5, 0.3, 1, 2, 0.07]), min_size=1),
            "sequence_length": st.sampled_from([None, 16, 32, 50]),
        }
    ),
    min_size=1,
    max_size=4,
).filter(lambda phases: any(phase["weights"] for phase in phases))


@settings(max_examples=20)
@given(PHASES, st.integers(0, 9))
def test_any_step_alone_is_that_of_a_walk(data: Path, phases: list[dict[str, Any]], seed: int) -> None:
    """The walk knows nothing of the arithmetic: it counts what each source has had, and gives every source its turn in time."""
    plan, walked = of(data, *phases, seed=seed), []
    starts, at = {}, 0
    for name, size in SIZES.items():
        starts[name], at = (at, at + size), at + size
    had: Counter[tuple[str, int]] = Counter()  # windows of a source at a length, over all phases
    for phase in phases:
        length = phase["sequence_length"] or 16
        held = {name: size // length for name, size in SIZES.items()}
        weights = phase["weights"] or held
        in_phase: Counter[str] = Counter()
        for k in range(phase["steps"] * BATCH):
            share = {name: weights.get(name, 0) / sum(weights.values()) for name in SIZES}
            may = [name for name in SIZES if share[name] and in_phase[name] <= share[name] * (k + 1) - 1e-9]
            name = min(may, key=lambda name: (np.ceil((in_phase[name] + 1) / share[name] - 1e-9), list(SIZES).index(name)))
            start, stop = starts[name]
            epoch, place = divmod(had[name, length], held[name])
            window = sample_index(seed, epoch, place, held[name], f"{plan.units.hash}/{start}-{stop}")
            walked.append((start + window * length, length))
            in_phase[name] += 1
            had[name, length] += 1
    assert plan.steps * BATCH == len(walked)
    stream = np.concatenate([np.fromfile(p, "<u2") for p in sorted((data / "pretrain/train").glob("*.bin"))])
    for step in np.random.default_rng(0).permutation(plan.steps)[:8].tolist():  # in no order, each from nothing
        alone = of(data, *phases, seed=seed).ids(step)
        expected = walked[step * BATCH : (step + 1) * BATCH]
        for unit, (start, length) in zip(alone, expected, strict=True):
            assert plan.units.get(unit)[0].tokens.tolist() == stream[start : start + length].tolist()


@settings(max_examples=20)
@given(PHASES)
def test_shares_are_exact_after_every_window_of_a_phase(data: Path, phases: list[dict[str, Any]]) -> None:
    plan, step, tokens = of(data, *phases), 0, Counter[str]()
    for phase in phases:
        length = phase["sequence_length"] or 16
        weights = phase["weights"] or {name: size // length for name, size in SIZES.items()}
        counts: Counter[str] = Counter()
        for _ in range(phase["steps"]):
            for unit in plan.ids(step):
                name, found = source_and_length(plan, unit)
                assert found == length
                counts[name] += 1
                tokens[name] += length
                k = counts.total()
                assert all(abs(counts[s] - k * weights.get(s, 0) / sum(weights.values())) < 1 + 1e-9 for s in SIZES)
            step += 1
            logged = plan.metrics(step)
            for s in SIZES:
                assert logged[f"pretrain/share/{s}"] == pytest.approx(tokens[s] / tokens.total())


def test_a_source_is_seen_whole_before_any_of_it_is_seen_again(data: Path) -> None:
    plan = of(data, {"steps": 20}, {"steps": 30, "weights": {"qa": 1, "code": 1}}, {"steps": 50, "weights": {"web": 0.8, "qa": 0.2}})
    by_source: dict[str, list[int]] = {name: [] for name in SIZES}
    for unit in (unit for step in range(100) for unit in plan.ids(step)):
        by_source[source_and_length(plan, unit)[0]].append(unit)
    for name, units in by_source.items():
        held = SIZES[name] // 16
        for start in range(0, len(units), held):
            epoch = units[start : start + held]
            assert len(set(epoch)) == len(epoch)
    assert len(by_source["qa"]) > 3 * (SIZES["qa"] // 16)


def test_phases_without_weights_take_what_plain_steps_take(data: Path) -> None:
    plan = of(data, {"steps": 100}, {"steps": 60}, {"steps": 10, "sequence_length": 64}, {"steps": 40}, seed=5)
    n = sum(SIZES.values()) // 16
    assert len(plan.sources) == 1
    plain = [batch_indices(5, step, BATCH, n, plan.units.hash).tolist() for step in range(200)]
    assert [plan.ids(step) for step in [*range(160), *range(170, 210)]] == plain
    assert all(plan.units.lengths[unit] == 64 for step in range(160, 170) for unit in plan.ids(step))
    assert curriculum.of(Pretrain(steps=9), 0, data / "pretrain") is None


def test_too_many_epochs_are_refused_with_what_would_do(data: Path) -> None:
    phases: list[dict[str, Any]] = [{"steps": 10}, {"steps": 40, "weights": {"qa": 1, "web": 1}, "max_epochs": 2}]
    with pytest.raises(DataError) as caught:
        of(data, *phases).check()
    assert str(caught.value) == (
        "pretrain.phases: phase 2 would show qa 3.00 times, more often than max_epochs = 2 (it has 20 windows of 16 tokens): "
        "lower steps from 40 to 26, or its share of the tokens to 0.333"
    )
    of(data, phases[0], {**phases[1], "steps": 26}).check()
    of(data, phases[0], {**phases[1], "weights": {"qa": 0.333, "web": 0.667}}).check()
    with pytest.raises(DataError, match=r"would show the text 1\.25 times"):
        of(data, {"steps": 100, "max_epochs": 1}).check()


def test_what_begins_is_said(data: Path) -> None:
    plan = of(data, {"steps": 10}, {"steps": 20, "weights": {"qa": 1, "web": 3}, "sequence_length": 32})
    mixed = "web 0.75 of the tokens (0.556 epochs), qa 0.25 of the tokens (1.5 epochs)"
    assert plan.summary() == "2 phases, 30 steps; epochs over all of them: web 0.685, code 0.125, qa 1.6"
    assert plan.note(10) == f"phase 2 of 2: steps 11 to 30, windows of 32 tokens: {mixed}"
    assert [step for step in range(30) if plan.note(step)] == [0, 10]
    assert [plan.metrics(done)["phase"] for done in (1, 10, 11, 30)] == [1, 1, 2, 2]


def test_sources_without_a_window_are_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="phase 2 gives weight to qa, which has no window of 400 tokens"):
        of(data, {"steps": 1}, {"steps": 1, "weights": {"qa": 1}, "sequence_length": 400})
    with pytest.raises(DataError, match="phase 1 wants windows of 4000 tokens"):
        of(data, {"steps": 1, "sequence_length": 4000})
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "train").symlink_to(data / "pretrain" / "train")
    write_json(tmp_path / "pretrain" / "manifest.json", {})
    of(tmp_path, {"steps": 1})
    with pytest.raises(DataError, match="an earlier version prepared it"):
        of(tmp_path, {"steps": 1, "weights": {"qa": 1}})


# ---------------------------------------------------------------------------------------- the whole stage

RECIPE: dict[str, Any] = {
    "name": "t",
    "data": {"pretrain": list(SIZES)} | {name: ["unused"] for name in ("sft", "preferences", "prompts")},
    "model": {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64},
    "pretrain": {
        "phases": [
            {"steps": 4},
            {"steps": 4, "weights": {"qa": 0.6, "web": 0.4}},
            {"steps": 3, "weights": {"code": 1}, "sequence_length": 48},
        ],
        "global_batch": BATCH,
        "micro_batch": 96,
        "sequence_length": 16,
        "checkpoint_every": 3,
        "validate_every": 4,
    },
}


class PowerCut(BaseException):
    pass


def stage(data: Path, out: Path, dies_in: int = -1) -> list[dict[str, Any]]:
    """Stage pretrain of this rank; it ends without a word in step `dies_in`."""

    def task(recipe: Recipe, inputs: dict[str, Path], report: Report) -> Task:
        made = pretrain.task(recipe, inputs, report)

        def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            if reports and reports[-1].get("step") == dies_in:
                raise PowerCut
            return made.loss(model, batch)

        return replace(made, loss=loss)

    reports: list[dict[str, Any]] = []
    worker({"stage": "pretrain", "task": task, "recipe": RECIPE, "inputs": {"data": str(data)}, "out": str(out)}, reports.append)
    return reports


def one_of_two(rank: int, data: Path, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    try:
        stage(data, out)
    finally:
        dist.destroy_process_group()


def curves(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole(here: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("whole")
    return out, stage(data, out)


def test_the_stage_logs_phases_shares_and_every_source_held_out(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    out, reports = whole
    rows, notes = curves(out), [report["note"] for report in reports if "note" in report]
    assert [row["pretrain/phase"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 3
    assert [note[:12] for note in notes] == ["phase 1 of 3", "phase 2 of 3", "phase 3 of 3"]
    assert sum(rows[-1][f"pretrain/share/{name}"] for name in SIZES) == pytest.approx(1)
    assert all(a["pretrain/share/qa"] < b["pretrain/share/qa"] for a, b in pairwise(rows[4:8]))
    results = reports[-1]["results"]
    of_sources = {name: results[f"pretrain/val_bits_per_byte/{name}"] for name in SIZES}
    mean = sum(size // 10 * of_sources[name] for name, size in SIZES.items()) / sum(size // 10 for size in SIZES.values())
    assert mean == pytest.approx(results["val_bits_per_byte"], rel=1e-6), "weighted by their bytes they are the whole"
    assert results["steps"] == 11


def test_killed_and_resumed_across_a_phase_gives_the_same_bytes(
    whole: tuple[Path, list[dict[str, Any]]], here: None, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(PowerCut):
        stage(data, tmp_path, dies_in=7)
    assert max(checkpoints.steps(tmp_path / "checkpoints")) == 6
    reports = stage(data, tmp_path)
    assert [report["step"] for report in reports if "step" in report] == [7, 8, 9, 10, 11]
    one, other = (sha256_of(out / "model" / "model.safetensors") for out in (whole[0], tmp_path))
    assert one == other
    assert [row["step"] for row in curves(tmp_path)] == list(range(1, 12))


@pytest.mark.slow
def test_one_worker_and_two_draw_the_same_curve(whole: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path) -> None:
    mp.spawn(one_of_two, args=(data, tmp_path), nprocs=2)
    one, two = curves(whole[0]), curves(tmp_path)
    for name in ("pretrain/loss", *(f"pretrain/share/{source}" for source in SIZES)):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=1e-4), name
    for name in SIZES:
        key = f"pretrain/val_bits_per_byte/{name}"
        assert two[-1][key] == pytest.approx(one[-1][key], abs=1e-4)
