"""Hyper-parameter search over any recipe key, with Ray Tune.

    roundhouse tune recipes/quickstart.yaml "reward.learning_rate=loguniform(1e-4, 3e-3)" reward.epochs=1 \\
        --metric reward/pair_accuracy --trials 8

A trial is a run of its own, runs/NAME/tune/t000 and so on, up to the metric's stage. What comes before the first stage that a searched
key touches is made once, by the run itself, and the trials share it. The samples follow from the recipe's seed: the same command again
finds finished trials up to date, and stopped ones resume.

A trial whose metric is logged while it trains (`pretrain/val_loss`, ...) is stopped when it lags behind the others at the same number of
validations: asynchronous successive halving (Li et al. 2018, arXiv:1810.05934).
"""

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.connect import connect
from cluster.training import give_back
from data.files import write_json
from rlhf import artefacts, pipeline, recipe_file
from rlhf.artefacts import stages_of
from rlhf.errors import RecipeError
from rlhf.inputs import outside_inputs
from rlhf.monitoring import say
from rlhf.recipe import Recipe

# What one usually searches for; any other figure of summary.json needs to be told which way is better.
BETTER = {
    "evaluate/aligned_success": "max",
    "pretrain/val_loss": "min",
    "pretrain/val_bits_per_byte": "min",
    "sft/val_loss": "min",
    "reward/val_loss": "min",
    "reward/pair_accuracy": "max",
    "preference/pair_accuracy": "max",
    "distill/divergence_last": "min",
    "evaluate/reward_gain_sd": "max",
    "evaluate/independent_gain": "max",
}
SPACES = ("loguniform", "uniform", "randint", "choice")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Trial:
    """One sample of the searched keys and what came of it."""

    name: str
    values: dict[str, str]  # key -> what the override says
    recipe: Recipe
    result: float | None = None
    state: str = "made"  # made | stopped early | failed: why

    @property
    def text(self) -> str:
        return "  ".join(f"{key}={value}" for key, value in self.values.items())


def search(path: Path, overrides: Sequence[str], metric: str, better: str | None, trials: int, at_once: int) -> list[Trial]:
    """Run the trials and return them, best first; table.json and tune.png stand in runs/NAME/tune.

    Raises RecipeError for spaces, keys or sampled values that cannot work, before anything starts.
    """
    spaces = {key: text for key, _, text in (o.partition("=") for o in overrides) if _space(text)}
    fixed = [o for o in overrides if o.partition("=")[0] not in spaces]
    if not spaces:
        raise RecipeError(f"nothing to search: write key=SPACE, where SPACE is one of {', '.join(f'{s}(...)' for s in SPACES)}")
    way = better or BETTER.get(metric)
    if way is None:
        raise RecipeError(f"which way is {metric} better? add --better min or --better max ({', '.join(BETTER)} are known)")
    base = recipe_file.load(path, fixed)
    stage = metric.partition("/")[0]
    if stage not in stages_of(base):
        raise RecipeError(f"--metric {metric}: a figure of summary.json is needed, as {', '.join(BETTER)}")
    run_dir = artefacts.run_directory(base)
    asked = [_sample(path, fixed, spaces, i, base, run_dir / "tune") for i in range(trials)]
    with connect(base.cluster.address):
        shared = _shared(base, [trial.recipe for trial in asked], stage)
        if shared:
            pipeline.run(base, until=shared[-1])
        for trial in asked:
            _share(run_dir, run_dir / "tune" / trial.name, shared)
        done = _tune(asked, stage, metric, way, at_once, run_dir / "tune")
    done.sort(key=lambda t: (t.result is None, 0.0 if t.result is None else t.result if way == "min" else -t.result))
    rows = [{"trial": t.name, **t.values, metric: t.result, "state": t.state} for t in done]
    write_json(run_dir / "tune" / "table.json", {"metric": metric, "better": way, "trials": rows})
    _plot(done, spaces, metric, run_dir / "tune" / "tune.png")
    return done


def _space(text: str) -> tuple[str, list[str]] | None:
    """`loguniform(1e-4, 1e-2)` -> ("loguniform", ["1e-4", "1e-2"]); None for a plain value."""
    match = re.fullmatch(rf"\s*({'|'.join(SPACES)})\((.*)\)\s*", text)
    return (match[1], [part.strip() for part in match[2].split(",")]) if match else None


def _sample(path: Path, fixed: list[str], spaces: dict[str, str], i: int, base: Recipe, folder: Path) -> Trial:
    """Trial i, by a random generator of its own: more trials do not change the first ones."""
    rng = np.random.default_rng([base.seed, i])
    values = {key: _draw(key, text, rng) for key, text in spaces.items()}
    name = f"t{i:03d}"
    own = [*fixed, *(f"{key}={value}" for key, value in values.items()), f"name={name}", f"runs_dir={folder}"]
    return Trial(name, values, recipe_file.load(path, own))


def _draw(key: str, text: str, rng: np.random.Generator) -> str:
    kind, parts = _space(text) or ("", [])
    if kind == "choice":
        return str(rng.choice(parts))
    try:
        low, high = (float(part) for part in parts)
        if not low < high or (kind == "loguniform" and low <= 0):
            raise ValueError
    except ValueError:
        raise RecipeError(f"{key}={text}: write {kind}(low, high), two numbers{' above 0' * (kind == 'loguniform')}, low first") from None
    if kind == "randint":
        return str(rng.integers(int(low), int(high), endpoint=True))
    value = np.exp(rng.uniform(np.log(low), np.log(high))) if kind == "loguniform" else rng.uniform(low, high)
    return f"{min(max(value, low), high):.4g}"


def _shared(base: Recipe, recipes: list[Recipe], stage: str) -> tuple[str, ...]:
    """The stages before the metric's that are the same in all trials as in the run itself."""
    line = stages_of(base)
    of = [artefacts.identities(r, outside_inputs(r)) for r in (base, *recipes)]
    shared = []
    for name in line[: line.index(stage)]:
        if len({found[name].hash for found in of}) > 1:
            break
        shared.append(name)
    return tuple(shared)


def _share(run_dir: Path, trial_dir: Path, stages: tuple[str, ...]) -> None:
    trial_dir.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if not (trial_dir / stage).exists():
            (trial_dir / stage).symlink_to(run_dir / stage, target_is_directory=True)


def _tune(trials: list[Trial], stage: str, metric: str, way: str, at_once: int, folder: Path) -> list[Trial]:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    class Told(tune.Callback):
        """One line for every validation and every end."""

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            at = f"step {result['step']}" if result["step"] else "end"
            say(f"  {trial.config['name']}  {by_name[trial.config['name']].text}   {at}: {metric} {result['value']:.4g}")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            say(f"  {trial.config['name']}  {by_name[trial.config['name']].text}   failed")

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # a recipe's relative paths are those of where we are
    by_name = {trial.name: trial for trial in trials}
    space = [{"name": t.name, "recipe": t.recipe.model_dump(mode="json"), "stage": stage, "metric": metric} for t in trials]
    tuner = tune.Tuner(
        tune.with_resources(_trainable(), {"memory": 1 << 20}),  # its stages ask for the CPUs; nothing at all is refused
        param_space=tune.grid_search(space),  # type: ignore[arg-type]
        tune_config=tune.TuneConfig(
            metric="value",
            mode=way,
            scheduler=ASHAScheduler(max_t=1_000_000, grace_period=2, reduction_factor=3),
            max_concurrent_trials=at_once,
        ),
        run_config=tune.RunConfig(
            name="ray_tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[Told()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the stages have their own
        ),
    )
    done = []
    for result in tuner.fit():
        trial = by_name[result.config["name"]]
        last = (result.metrics or {}).get("value")
        if result.error is not None:
            why = str(result.error).strip().splitlines()[-1]
            done.append(Trial(trial.name, trial.values, trial.recipe, None, f"failed: {why}"))
        else:
            ended = (result.metrics or {}).get("step") == 0
            done.append(Trial(trial.name, trial.values, trial.recipe, last, "made" if ended else "stopped early"))
    return done


def _trainable() -> type:
    """What Ray Tune runs for each trial. Made here, since importing Tune takes seconds."""
    from ray import tune

    class Running(tune.Trainable):
        """The pipeline in a thread; a step of Tune's lasts until the metric is logged again, or the end."""

        def setup(self, config: dict[str, Any]) -> None:
            self.stage, self.metric = config["stage"], config["metric"]
            recipe = Recipe.model_validate(config["recipe"])
            self.run_dir = artefacts.run_directory(recipe)
            self.pipeline = ThreadPoolExecutor(1).submit(pipeline.run, recipe, until=self.stage)
            self.told = 0

        def step(self) -> dict[str, Any]:
            while True:
                ended = self.pipeline.done()
                logged = _logged(self.run_dir / self.stage / "metrics.jsonl", self.metric)
                if len(logged) > self.told:
                    step, value = logged[self.told]
                    self.told += 1
                    return {"value": value, "step": step}
                if ended:
                    self.pipeline.result()
                    return {"value": _result(self.run_dir / "summary.json", self.stage, self.metric), "step": 0, "done": True}
                wait([self.pipeline], POLL_SECONDS)

        def cleanup(self) -> None:
            give_back()  # of a trial that is stopped early; else there is nothing

    return Running


def _result(summary_path: Path, stage: str, metric: str) -> float:
    summary = json.loads(summary_path.read_text())
    if metric not in summary:
        names = ", ".join(name for name in summary if name.startswith(stage + "/"))
        raise RecipeError(f"there is no {metric} in {summary_path}; there are {names}")
    return float(summary[metric])


def _logged(path: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has the metric."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and metric in line:
            row = json.loads(line)
            if isinstance(row.get(metric), float):
                found.append((int(row["step"]), float(row[metric])))
    return found


def _plot(trials: list[Trial], spaces: dict[str, str], metric: str, path: Path) -> None:
    """The metric over every searched key; the best trial is marked."""
    from matplotlib.figure import Figure

    made = [trial for trial in trials if trial.result is not None]
    figure = Figure(figsize=(4.8 * len(spaces), 3.6), dpi=150, layout="constrained")
    for axes, (key, text) in zip(figure.subplots(1, len(spaces), squeeze=False)[0], spaces.items(), strict=True):
        kind = (_space(text) or ("",))[0]
        for i, trial in enumerate(made):
            x: Any = trial.values[key] if kind == "choice" else float(trial.values[key])
            whole = trial.state == "made"
            axes.plot(x, trial.result, "o", color="#1f6feb" if i == 0 else "#7a828c", fillstyle="full" if whole else "none")
        if kind == "loguniform":
            axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.set_ylabel(metric)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
