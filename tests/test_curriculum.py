"""Phases of pretraining: every step's windows are arithmetic, the mixture is exact, and no layout or kill changes what is learned."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from data.shards import Document, ShardWriter, TokenShards
from data.tokenizers import train as train_tokenizer
from rlhf import curriculum, pretrain
from rlhf.curriculum import Curriculum
from rlhf.models import Batch
from rlhf.recipe import Pretrain, Recipe
from rlhf.recipe_data import Phase
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


def test_weights_move_on_a_line_and_the_next_phase_goes_on(data: Path) -> None:
    plan = of(data, {"steps": 40, "weights": {"web": 1}, "weights_to": {"qa": 3, "code": 1}}, {"steps": 4, "weights": {"qa": 1}})
    counts, seen = Counter[str](), list[int]()
    for step in range(40):
        for unit in plan.ids(step):
            name, _ = source_and_length(plan, unit)
            counts[name] += 1
            seen += [unit] if name == "qa" else []
            k = counts.total()
            for source, first, last in (("web", 1, 0), ("qa", 0, 0.75), ("code", 0, 0.25)):
                assert abs(counts[source] - (k * first + k * k * (last - first) / 240)) < 1 + 1e-9
    assert plan.metrics(40)["pretrain/share/web"] == counts["web"] / 120
    shares = "web 0.5 of the tokens (0.37 epochs), code 0.125 of the tokens (0.268 epochs), qa 0.375 of the tokens (2.25 epochs)"
    assert plan.note(0).endswith(shares)
    seen += [unit for step in range(40, 44) for unit in plan.ids(step)]
    assert len(seen) == 57
    for epoch in (seen[:20], seen[20:40]):
        assert len(set(epoch)) == 20, "qa's windows, each once before any comes again"


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(0, 9))
def test_buckets_train_in_turn_and_an_epoch_has_every_window_once(data: Path, bins: int, seed: int) -> None:
    held = {name: size // 16 for name, size in SIZES.items()}
    total = sum(held.values())
    plan = of(data, {"steps": 2 * total // BATCH + 1, "bins": bins}, seed=seed)
    stream = [unit for step in range(plan.steps) for unit in plan.ids(step)]
    for epoch in (stream[:total], stream[total : 2 * total]):
        assert sorted(epoch) == list(range(total))
        at = 0
        for number in range(bins):
            expected = set()
            first = 0
            for windows in held.values():
                expected |= set(range(first + number * windows // bins, first + (number + 1) * windows // bins))
                first += windows
            assert set(epoch[at : at + len(expected)]) == expected
            at += len(expected)
    assert stream[:total] != stream[total : 2 * total]
    alone = of(data, {"steps": 2 * total // BATCH + 1, "bins": bins}, seed=seed)
    assert alone.ids(7) == stream[7 * BATCH : 8 * BATCH], "no step before it was asked for"


def test_categories_are_mixed_wherever_their_documents_stand(data: Path, tmp_path: Path) -> None:
    """Every third document is poetry, every third of the others has no category and goes by its source."""
    folder = tmp_path / "pretrain"
    (folder / "documents").mkdir(parents=True)
    (folder / "train").symlink_to(data / "pretrain" / "train")
    manifest = json.loads((data / "pretrain" / "manifest.json").read_text())
    write_json(folder / "manifest.json", {**manifest, "source_of": [0, 1, 2]})
    shards = TokenShards(data / "pretrain" / "train")
    starts = np.concatenate([[0], shards.ends[:-1]])
    kinds = ["poetry" if i % 3 == 0 else None if i % 3 == 1 else "prose" for i in range(len(starts))]
    files = [int(shards.span(int(start), int(start) + 1)[0][0]) // 20 for start in starts]
    rows = {"file": files, "category": kinds, "fate": ["train"] * len(files)}
    dropped = {"file": [0], "category": ["poetry"], "fate": ["duplicate"]}
    half = len(files) // 2
    for number, part in enumerate(({k: v[:half] + dropped[k] for k, v in rows.items()}, {k: v[half:] for k, v in rows.items()})):
        table = pa.table(part, schema=pa.schema([("file", pa.int32()), ("category", pa.string()), ("fate", pa.string())]))
        pq.write_table(table, folder / "documents" / f"{number:06d}.parquet")

    names = [kind or list(SIZES)[file] for kind, file in zip(kinds, files, strict=True)]
    streams = {
        name: np.concatenate([shards.span(int(a), int(b))[0] for a, b, of in zip(starts, shards.ends, names, strict=True) if of == name])
        for name in set(names)
    }
    config = Pretrain(
        phases=[{"steps": 30, "weights": {"poetry": 2, "prose": 1}}, {"steps": 500, "bins": 3}],
        mix_by="category",
        global_batch=BATCH,
        sequence_length=16,
    )
    plan = curriculum.of(config, 0, folder)
    assert plan is not None
    windows = {name: [stream[i : i + 16].tolist() for i in range(0, len(stream) - 15, 16)] for name, stream in streams.items()}
    total = sum(map(len, windows.values()))
    assert len(plan.units.lengths) == total
    first = [unit for step in range(30) for unit in plan.ids(step)]
    counts: Counter[str] = Counter()
    for unit in first:
        (sample,) = plan.units.get(unit)
        (name,) = [name for name, of in windows.items() if sample.tokens.tolist() in of]
        counts[name] += 1
        assert sum(sample.lengths) == 16
        assert abs(counts["poetry"] - counts.total() * 2 / 3) < 1
        spans = plan.spans(unit)
        assert np.concatenate([shards.span(*span)[0] for span in spans]).tolist() == sample.tokens.tolist()
        assert len(plan.units.documents(unit)) == sum(len(shards.document_ids(*span)) for span in spans)
    assert set(counts) == {"poetry", "prose"}
    buckets = [unit for step in range(30, 30 + total // BATCH + 1) for unit in plan.ids(step)][:total]
    assert sorted(buckets) == list(range(total))
    with pytest.raises(DataError, match="gives weight to verse; there is code, poetry, prose, qa, web"):
        curriculum.of(config.model_copy(update={"phases": [Phase(steps=1, weights={"verse": 1})]}), 0, folder)


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
