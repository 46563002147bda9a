"""One training loop for pretrain, sft and reward. What differs between them is a `Task`.

    train("pretrain", task, recipe, inputs, out, monitor)   # on the driver: Ray Train workers run `worker` below

A task is a list of units (a window of text, a conversation, a comparison), each one or more packable samples, and a loss.
Step s takes the units at places s * global_batch ... of the sample order, unless the task has an order of its own; who computes which
of them is decided by `balance`, the same on every worker, so the number of workers changes the speed and not the curve.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from transformers import PreTrainedModel

from cluster import checkpoints
from cluster.hardware import use_deterministic_kernels
from cluster.training import Layout, Report, fit
from data.errors import DataError
from data.order import batch_indices
from data.packing import Sample, balance, pack, uncounted
from data.tokenizers import Tokenizer
from data.tokenizers import load as load_tokenizer
from rlhf.efficiency import Clock
from rlhf.errors import NotFinite
from rlhf.health import Health
from rlhf.learner import Learner, Loss, full_weights, pays_to_compile
from rlhf.memory import available, estimate_memory, explained, largest_micro_batch, least_of_all
from rlhf.models import Batch, save_model
from rlhf.monitoring import Monitor
from rlhf.recipe import Recipe, Training

Unit = list[Sample]


@dataclass(frozen=True)
class Units:
    """A sized collection of units: `lengths[i]` tokens in unit i, `get(i)` its samples."""

    lengths: Sequence[int]
    get: Callable[[int], Unit]
    hash: str  # of the data; the sample order depends on it
    documents: Callable[[int], list[str]]  # where unit i comes from, for a person who looks into it


class Order(Protocol):
    """Which units a step takes, where that is not one permutation after another (`rlhf/curriculum.py`)."""

    def ids(self, step: int) -> list[int]:
        """A function of the step alone: whoever resumes there goes on with the same units."""

    def metrics(self, done: int) -> dict[str, float]:
        """What is logged of the order after `done` steps."""

    def note(self, step: int) -> str:
        """What is said before this step; "" for nothing."""


@dataclass(frozen=True)
class Task:
    model: Callable[[], nn.Module]
    train: Units
    validation: Units
    loss: Loss
    figures: Callable[[dict[str, float]], dict[str, float]]  # sums over the validation set -> what is reported
    steps: int
    save: Callable[[PreTrainedModel, dict[str, torch.Tensor], Tokenizer, Path], None] = save_model  # what rank 0 leaves as out/model
    order: Order | None = None  # default: the permutations of data/order.py


TaskOf = Callable[[Recipe, dict[str, Path], Report], Task]  # called on every worker: what it opens is opened there


def train(stage: str, task: TaskOf, recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    """Train `stage` with Ray Train and leave `out/model`, its figures in `monitor`, checkpoints in `out/checkpoints`."""

    def on_report(values: dict[str, Any]) -> None:
        for kind in ("warning", "note"):
            if kind in values:
                monitor.say(values[kind])
        if "step" in values:
            monitor.progress(values["step"], values["steps"], values["text"])
        for name, value in values.get("results", {}).items():
            monitor.result(name, value)

    plain = recipe.model_dump(mode="json")
    for section, name in ((plain["model"], "init"), (plain["sft"]["distill"], "teacher")):
        if section[name] is not None:  # workers have working directories of their own
            section[name] = str(Path(section[name]).expanduser().resolve())
    config = {
        "stage": stage,
        "task": task,
        "recipe": plain,
        "inputs": {name: str(path.resolve()) for name, path in inputs.items()},
        "out": str(out.resolve()),
    }
    seconds = recipe.cluster.placement_timeout_s
    fit(worker, config, name="ray_train", layout=layout(recipe), storage=out, on_report=on_report, seconds=seconds)


def layout(recipe: Recipe) -> Layout:
    """What the training stages ask of the cluster."""
    asked = recipe.cluster
    return Layout(asked.workers, asked.threads_per_worker, asked.gpus_per_worker, asked.max_failures)


def worker(config: dict[str, Any], report: Report) -> None:
    """The loop of one rank."""
    recipe, out = Recipe.model_validate(config["recipe"]), Path(config["out"])
    inputs = {name: Path(path) for name, path in config["inputs"].items()}
    if recipe.deterministic:
        use_deterministic_kernels()
    task: Task = config["task"](recipe, inputs, report)
    settings: Training = getattr(recipe, config["stage"])
    rank, world = dist.get_rank(), dist.get_world_size()
    model = task.model()
    if settings.compile == "auto":
        tokens = task.steps * settings.global_batch * float(np.mean(task.train.lengths))
        settings = settings.model_copy(update={"compile": pays_to_compile(model, tokens / world)})
    learner = Learner(model, settings, task.steps)
    longest = max(*task.train.lengths, *task.validation.lengths)
    probe = Batch.of(pack(task.train.get(0)), learner.hardware.device)
    memory, free = estimate_memory(learner, task.loss, probe), available()
    budget = settings.micro_batch
    if budget == "auto":
        budget = least_of_all(largest_micro_batch(memory, free, longest))
        report({"warning": f"micro_batch is {budget:,} tokens, by {free / 2**30:.1f} GiB of free memory"})

    if longest > budget:
        raise DataError(
            f"{config['stage']}: a sample has {longest} tokens, more than micro_batch = {budget}; raise it, or lower max_tokens"
        )

    def batches(units: Units, ids: Sequence[int]) -> list[Batch]:
        return [batch_of(units, some, ids[0], learner.hardware.device) for some in plan(units, ids, world, budget)[rank]]

    # Rank 0 writes the curves, and before the checkpoint: workers outlive a killed driver by a second or two, and a
    # checkpoint of that time must not stand without its curve.
    curves = Monitor(config["stage"], out) if rank == 0 else None
    folder = out / "checkpoints"
    start = max(checkpoints.steps(folder), default=0)
    if start:
        learner.load(folder, start)
    health, clock = Health(), Clock(learner.model, world)
    done, validated = start, {}
    if settings.stop_at_val_loss is not None and start and start % settings.validate_every == 0:
        validated = task.figures(validate(learner, task, batches, budget))  # it may have been killed where it was to stop
    for step in range(start, task.steps):
        if good_enough(settings, validated):
            break
        clock.start()
        if task.order is not None:
            ids = task.order.ids(step)
            if note := task.order.note(step):
                report({"note": note})
        else:
            ids = batch_indices(recipe.seed, step, settings.global_batch, len(task.train.lengths), task.train.hash).tolist()
        mine = batches(task.train, ids)
        clock.data_is_there()
        try:
            torch.manual_seed((recipe.seed * 1_000_003 + step) * 65_536 + rank)  # dropout and noise are the same after a restart
            with explained(config["stage"], memory, free, budget, longest, world, "cluster.workers"):
                metrics = learner.step(mine, task.loss)
        except NotFinite as error:
            bad = [i for at, k in error.places for i in plan(task.train, ids, world, budget)[at][k]] or ids
            raise NotFinite(
                f"{error}. In this step: {named(task.train, bad)}. Look at them, or lower learning_rate", error.places
            ) from None
        done = step + 1
        metrics |= clock.stop(sum(task.train.lengths[i] for i in ids), mine)
        if task.order is not None:
            metrics |= task.order.metrics(done)
        for warning in health.observe(done, metrics["loss"], learner.layer_norms):
            text = f"step {done}: {warning.text}. In this step: {named(task.train, ids)}"
            report({"warning": text})
            if curves is not None:
                with (out / "warnings.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": done, **vars(warning), "documents": sources(task.train, ids)}) + "\n")
        text = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
        validated = {}
        if done % settings.validate_every == 0 or done == task.steps:
            validated = task.figures(validate(learner, task, batches, budget))
            metrics |= validated
        if curves is not None:
            curves.log(done, metrics)
        report({"step": done, "steps": task.steps, "text": text})
        if done % settings.checkpoint_every == 0 or done == task.steps or good_enough(settings, validated):
            learner.save(folder, done)
    # A stage that was killed between its last checkpoint and its end comes here with nothing left to train.
    validated = validated or task.figures(validate(learner, task, batches, budget))
    if settings.stop_at_val_loss is not None and not good_enough(settings, validated):
        target = f"stop_at_val_loss = {settings.stop_at_val_loss:g}"
        report({"warning": f"ends with a held-out loss of {validated['val_loss']:.4g}: {target} was not reached in {done} steps"})
    state = full_weights(learner.model)
    if curves is not None:
        curves.close()
        task.save(learner.model.inner, state, load_tokenizer(inputs["data"] / "tokenizer"), out / "model")
    dist.barrier()
    parameters = sum(p.numel() for p in learner.model.parameters())
    report({"results": {**validated, "steps": done, "parameters": parameters, **clock.summary()}})


def good_enough(settings: Training, validated: dict[str, float]) -> bool:
    """Whether the validation that was just made, if any, is what the stage was to reach."""
    target = settings.stop_at_val_loss
    return target is not None and bool(validated) and validated["val_loss"] <= target


def sources(units: Units, ids: Sequence[int]) -> list[str]:
    """The documents of these units, each once."""
    return list(dict.fromkeys(document for i in ids for document in units.documents(i)))


def named(units: Units, ids: Sequence[int], most: int = 4) -> str:
    found = sources(units, ids)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def validate(learner: Learner, task: Task, batches: Callable[[Units, Sequence[int]], list[Batch]], budget: int) -> dict[str, float]:
    """Sums over the whole validation set, in pieces that every rank can hold."""
    n, world = len(task.validation.lengths), learner.world
    longest = max(task.validation.lengths)
    piece = max(world, world * (budget // longest))
    sums: dict[str, float] = {}
    for start in range(0, n, piece):
        ids = range(start, min(n, start + piece))
        for name, value in learner.evaluate(batches(task.validation, ids), task.loss).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def plan(units: Units, ids: Sequence[int], world: int, budget: int) -> list[list[list[int]]]:
    """Who computes which of the units `ids`: [rank][micro-batch] -> units, as many micro-batches for every rank."""
    return [[[ids[i] for i in some] for some in of_rank] for of_rank in balance([units.lengths[i] for i in ids], world, budget)]


def batch_of(units: Units, some: Sequence[int], spare: int, device: torch.device) -> Batch:
    """One micro-batch; a rank that has no unit in it computes `spare`, and counts nothing."""
    return Batch.of(pack([s for i in some for s in units.get(i)] or [uncounted(s) for s in units.get(spare)]), device)
