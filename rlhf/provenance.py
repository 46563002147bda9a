"""Which text was behind a step of pretraining, and how to take a document out of the corpus of a run.

    for found in batch(Path("runs/quickstart"), step=120): print(found.id, found.tokens, found.source, found.head)
    remove(Path("runs/quickstart"), ["0f3a9c41d2e8"])

The batch of a step is arithmetic (data/order.py, rlhf/curriculum.py): nothing was noted while it trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from data import corpus
from data.files import write_json
from data.order import batch_indices
from data.shards import TokenShards
from rlhf import curriculum
from rlhf.artefacts import read_json
from rlhf.errors import RecipeError
from rlhf.recipe import Recipe


@dataclass(frozen=True)
class Found:
    """A document of a batch."""

    id: str
    tokens: int  # of it in the batch
    source: str
    file: str
    at: int  # the byte, or the number of the record, where it begins
    head: str  # its first words


def batch(run_dir: Path, step: int) -> list[Found]:
    """The documents of pretraining step `step`, from 1 as the logs count, in the order of the batch.

    Raises RecipeError for a step that the recipe does not have, DataError for a corpus that is not whole.
    """
    recipe, folder = _recipe(run_dir), _corpus(run_dir)
    steps = recipe.pretrain.total_steps
    if not 1 <= step <= steps:
        raise RecipeError(f"{run_dir} pretrains for {steps:,} steps; there is no step {step:,}")
    shards = TokenShards(folder / "train")
    tokens: dict[str, int] = {}
    for start, stop in spans(recipe, folder, shards, step - 1):
        for name, length in zip(shards.document_ids(start, stop), shards.span(start, stop)[1], strict=True):
            tokens[name] = tokens.get(name, 0) + length
    about = read_json(folder / "manifest.json") or {}
    rows = {row["id"].hex(): row for row in corpus.find(folder, tokens).to_pylist() if row["fate"] == "train"}
    return [_found(name, count, rows[name], about) for name, count in tokens.items()]


def spans(recipe: Recipe, folder: Path, shards: TokenShards, step: int) -> list[tuple[int, int]]:
    """Where in the token stream the windows of a step, from 0, begin and end."""
    config = recipe.pretrain
    plan = curriculum.of(config, recipe.seed, folder)
    if plan is not None:
        return [span for unit in plan.ids(step) for span in plan.spans(unit)]
    length = config.sequence_length
    units = batch_indices(recipe.seed, step, config.global_batch, shards.windows(length), shards.manifest_hash)
    return [(int(unit) * length, (int(unit) + 1) * length) for unit in units]


def remove(run_dir: Path, ids: Sequence[str]) -> list[Found]:
    """Take documents (by the first digits of their ids) out of the run's token stream; returns them, as they were.

    What was trained on the corpus is out of date afterwards, and the next `roundhouse run` makes it again.
    """
    folder = _corpus(run_dir)
    rows = corpus.find(folder, ids)
    about = read_json(folder / "manifest.json") or {}
    corpus.drop(folder, rows)
    stage = read_json(run_dir / "data" / "manifest.json")
    if stage is not None:
        write_json(run_dir / "data" / "manifest.json", {**stage, "made_at": datetime.now().astimezone().isoformat()})
    return [_found(row["id"].hex(), row["tokens"], row, about) for row in rows.to_pylist() if row["fate"] in ("train", "validation")]


def _found(name: str, tokens: int, row: dict[str, Any], about: dict[str, Any]) -> Found:
    source = about["sources"][about["source_of"][row["file"]]]["source"]
    return Found(name, tokens, source, about["files"][row["file"]], row["at"], row["head"])


def _recipe(run_dir: Path) -> Recipe:
    path = run_dir / "recipe.yaml"
    if not path.exists():
        raise RecipeError(f"no run at {run_dir}; `roundhouse run RECIPE` makes one")
    return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def _corpus(run_dir: Path) -> Path:
    folder = run_dir / "data" / "pretrain"
    if "source_of" not in (read_json(folder / "manifest.json") or {}):
        raise RecipeError(f"{folder} is no finished corpus, or an earlier version's, which did not note where documents are from")
    return folder
