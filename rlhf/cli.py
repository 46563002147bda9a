"""The command line.

    roundhouse run recipes/quickstart.yaml ppo.kl_coef=0.1      # or python -m rlhf.cli run ...

Exit codes: 0 it worked, 2 the user can mend it (one clear message), 1 a fault of ours (with its traceback), 130 / 143
stopped by ctrl-C / SIGTERM. Heavy imports stay inside the commands: --help and a recipe's mistakes take a fraction of a second.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from rlhf import recipe_file, recipe_keys
from rlhf.cli_data import data_app
from rlhf.errors import RecipeError, user_error
from rlhf.monitoring import console, errors, say


class Speaking(TyperGroup):
    """Turns what a command raises into a message and an exit code, for all commands in one place."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            errors.print("[yellow]stopped[/]; the same command resumes where it was")
            sys.exit(143 if type(stop).__name__ == "Terminated" else 130)
        except Exception as error:
            mistake = user_error(error)
            if mistake is None:
                raise  # ours: the traceback is the message
            errors.print("[bold red]error[/] ", end="")
            errors.print(str(mistake), markup=False, soft_wrap=True)
            sys.exit(2)


app = typer.Typer(
    name="roundhouse",
    cls=Speaking,
    help="Train language models on Ray: raw text goes in, an aligned chat model comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, for example recipes/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set: ppo.kl_coef=0.1")]
Only = Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Bring this stage alone up to date.")]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Bring this stage and all after it up to date.")]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, only: Only = None, start: From = None, until: Until = None) -> None:
    """Carry out a recipe: [b]data, pretrain, sft, reward, ppo (or preference, or distill), evaluate[/]. What is finished is skipped."""
    loaded = recipe_file.load(recipe, overrides)
    from rlhf import pipeline

    pipeline.run(loaded, only=only, start=start, until=until)


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="The cluster's dashboard.")] = "http://127.0.0.1:8265",
    only: Only = None,
    start: From = None,
    until: Until = None,
) -> None:
    """The same as [b]run[/], as a job on a running Ray cluster. Streams the job's log and ends with its exit code."""
    overrides = overrides or []
    loaded = recipe_file.load(recipe, overrides)
    here = Path.cwd()
    if not recipe.absolute().is_relative_to(here):
        raise RecipeError(f"{recipe} lies outside of {here}, which is what the job gets; copy it into the repository")
    from cluster import jobs
    from rlhf.artefacts import stages_of
    from rlhf.pipeline import choose

    choose(stages_of(loaded), only, start, until)
    command = [jobs.python_for(address), "-m", "rlhf.cli", "run", recipe.absolute().relative_to(here).as_posix(), *overrides]
    if not Path(loaded.runs_dir).expanduser().is_absolute():
        # A job runs in a throw-away copy of this directory: artefacts must not end there, nor start afresh every time.
        command.append(f"runs_dir={here / loaded.runs_dir}")
    command += [part for flag, value in (("--only", only), ("--from", start), ("--until", until)) if value for part in (flag, value)]
    raise typer.Exit(jobs.submit(command, address, here, echo=say))


@app.command()
def tune(
    recipe: RecipePath,
    overrides: Annotated[
        list[str],
        typer.Argument(metavar="KEY=SPACE...", help="Keys to search, as 'ppo.kl_coef=loguniform(1e-3, 1)'; plain KEY=VALUE sets one."),
    ],
    metric: Annotated[str, typer.Option(help="What to search for: a figure of summary.json.")] = "evaluate/reward_gain_sd",
    better: Annotated[str | None, typer.Option(metavar="min|max", help="Which way is better; known for the usual figures.")] = None,
    trials: Annotated[int, typer.Option(help="How many samples.", min=1)] = 8,
    at_once: Annotated[int, typer.Option(help="Trials side by side; each needs what a run needs.", min=1)] = 1,
) -> None:
    """Search recipe keys with Ray Tune: loguniform(a, b), uniform(a, b), randint(a, b), choice(x, y, ...)."""
    if better not in (None, "min", "max"):
        raise RecipeError(f"--better {better}: min or max")
    from rlhf.artefacts import run_directory
    from rlhf.tuning import search

    found = search(recipe, overrides, metric, better, trials, at_once)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("trial", *found[0].values, metric, "state"):
        table.add_column(column, overflow="fold")
    for trial in found:
        result = "" if trial.result is None else f"{trial.result:.4g}"
        table.add_row(trial.name, *trial.values.values(), result, trial.state)
    console.print(table)
    if found[0].result is None:
        raise RecipeError("no trial came to an end; the table says why")
    say(f"best: {' '.join(f'{key}={value}' for key, value in found[0].values.items())}")
    say(f"  table and plot in {run_directory(found[0].recipe).parent}")


@app.command()
def explain(key: Annotated[str | None, typer.Argument(help="A key such as ppo.kl_coef, or a section such as ppo.")] = None) -> None:
    """What a recipe key means: default, unit, limits, source."""
    keys = recipe_keys.explain(key)
    if len(keys) == 1 and keys[0].default is not None:
        only = keys[0]
        console.print(f"[bold]{only.name}[/]")
        say(f"  {only.meaning}")
        rows = {"type": only.type, "default": only.default, "unit": only.unit, "limits": only.limits, "source": only.source}
        for label, text in rows.items():
            if text:
                say(f"  {label:<8} {text}")
        for line in only.values.splitlines():
            say(f"  {line}")
        return
    if key:
        head = keys.pop(0)
        console.print(f"[bold]{head.name}[/]  {head.meaning}")
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for column in ("key", "default", "unit", "meaning"):
        table.add_column(column, overflow="fold")
    for k in keys:
        table.add_row(k.name, "..." if k.default is None else k.default, k.unit, k.meaning)
    console.print(table)


@app.command()
def status(where: Annotated[Path, typer.Argument(metavar="[RUN]", help="A run's directory, or a folder of runs.")] = Path("runs")) -> None:
    """How far runs are, stage by stage."""
    from rlhf.status import runs, stages

    for run_dir in runs(where):
        table = Table(title=str(run_dir), title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
        for column in ("stage", "state", "made", "took", "figures"):
            table.add_column(column, no_wrap=column != "figures")
        for s in stages(run_dir):
            table.add_row(s.name, s.state, s.made_at, s.took, s.figures)
        console.print(table)


@app.command()
def chat(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, for example runs/quickstart.")],
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="ppo, sft or pretrain; the newest that is there.")] = None,
    message: Annotated[str | None, typer.Option(help="Ask this alone, print the answer and end.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Talk to the model that a run made."""
    from rlhf.chat import talk

    talk(run_dir, stage=stage, temperature=temperature, max_tokens=max_tokens, seed=seed, message=message)


def main() -> None:
    """The console script."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    app()


if __name__ == "__main__":
    main()
