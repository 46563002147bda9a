"""Stage data: sources become a tokenizer, token shards and examples, all under one roof.

    out/tokenizer/                      opens in transformers, tiktoken ids
    out/pretrain/{train,validation}/    token shards
    out/sft/  out/preferences/  out/prompts/        train.parquet, validation.parquet

The work is `data`'s; here the recipe is handed to it and its counts are reported. Each part ends with a manifest of its own,
so a stopped stage keeps the parts that are whole.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from data.files import write_json
from data.stores import File
from rlhf.artefacts import read_json
from rlhf.errors import RecipeError
from rlhf.monitoring import Monitor
from rlhf.recipe import Recipe

PLAN = "plan.json"  # of a run: what `roundhouse data plan` predicted
PARTS = ("pretrain", "sft", "preferences", "prompts")


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    """Raises DataError for sources that cannot be used, RecipeError for a vocabulary that the model has no room for."""
    from data import examples, tokenizers
    from data.pipeline import prepare_text
    from rlhf import data_report  # jinja and matplotlib

    limits: dict[str, Any] = {
        "validation_fraction": recipe.data.validation_fraction,
        "max_broken_fraction": recipe.data.max_broken_fraction,
        "evaluations": _evaluations(recipe),
    }
    made = {part: read_json(out / part / "manifest.json") for part in PARTS}

    monitor.progress(0, len(PARTS), "pretraining texts")
    if made["pretrain"] is None or not (out / "tokenizer" / "tokenizer.json").is_file():
        ready = _ready_tokenizer(recipe)
        source_of = _source_of(recipe, recipe.data.pretrain)
        prepare_text(
            list(source_of),
            ready,
            out / "pretrain",
            shard_tokens=recipe.data.shard_tokens,
            more_texts=examples.training_texts(_files(recipe, recipe.data.sft), recipe.data.validation_fraction, recipe.data.fields),
            source_of=list(source_of.values()),
            steps=_steps(recipe),
            earlier=[Path(run).expanduser().absolute() / "data" / "pretrain" for run in recipe.data.earlier],
            part_bytes=recipe.data.part_bytes,
            tokenizer_dir=out / "tokenizer",
            watch=monitor.progress,
            **limits,
        )
    shutil.rmtree(out / "pretrain" / "work", ignore_errors=True)  # a kill between the manifest and the end leaves it
    tokenizer = tokenizers.load(out / "tokenizer")
    text = _report_part(monitor, out, "pretrain")
    for split in ("train", "validation"):
        monitor.result(f"{split}_tokens", text[split]["tokens"])
        monitor.result(f"{split}_documents", text[split]["documents"])
    monitor.result("bytes_per_token", text["train"]["bytes_of_text"] / text["train"]["tokens"])
    monitor.result("duplicates", text["duplicates"])
    of_sources = text.get("sources", [])
    for source in of_sources if len(of_sources) > 1 else []:
        monitor.result(f"data/train_tokens/{source['source']}", source["train"]["tokens"])
    monitor.result("vocab_size", tokenizer.vocab_size)

    wanted = (
        ("sft", recipe.data.sft, examples.prepare_chat, recipe.sft.max_tokens),
        ("preferences", recipe.data.preferences, examples.prepare_preferences, recipe.reward.max_tokens),
        ("prompts", recipe.data.prompts, examples.prepare_prompts, recipe.ppo.max_prompt_tokens),
    )
    for number, (part, sources, prepare, max_tokens) in enumerate(wanted, start=1):
        if part == "preferences" and not recipe.uses_rankings:
            continue
        monitor.progress(number, len(PARTS), part)
        if (made[part] or {}).get("tokenizer") != tokenizer.fingerprint:
            prepare(_files(recipe, sources), tokenizer, out / part, max_tokens=max_tokens, fields=recipe.data.fields, **limits)
        counts = _report_part(monitor, out, part)
        for split in ("train", "validation"):
            monitor.result(f"{part}_{split}", counts[split]["rows"])
    checked = _checked_prediction(out, text)
    for figure in checked:
        monitor.result(f"data/predicted/{figure['name']}", figure["predicted"])
    data_report.write(out, recipe, checked)
    if recipe.ppo.reward_function is not None:
        from rlhf.verifier import answers_of

        answers_of(out / "prompts", recipe.ppo.reward_function)  # to be told of prompts without one now, not when PPO begins
    monitor.progress(len(PARTS), len(PARTS))


def predict(recipe: Recipe, share: float) -> dict[str, float]:
    """What preparing the pretraining text will take and give, from a dry run over `share` of it; kept in RUN/plan.json.

    The full run of the same recipe and inputs says how good the prediction was.
    """
    from data import dry_run
    from rlhf import artefacts
    from rlhf.inputs import outside_inputs

    files, tokenizer = _files(recipe, recipe.data.pretrain), _ready_tokenizer(recipe)
    figures = dry_run.predict(files, tokenizer, _steps(recipe), share, _evaluations(recipe))
    run_dir = artefacts.run_directory(recipe)
    run_dir.mkdir(parents=True, exist_ok=True)
    identity = artefacts.identities(recipe, outside_inputs(recipe))["data"]
    write_json(run_dir / PLAN, {"hash": identity.hash, "share": share, "figures": figures})
    return figures


def _checked_prediction(out: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """{"name", "predicted", "found"} of every figure that a dry run of the same things predicted."""
    from data import dry_run

    plan, started = read_json(out.parent / PLAN), read_json(out / "started.json")
    costs = read_json(out / "pretrain" / "costs.json")
    if plan is None or started is None or costs is None or plan["hash"] != started["hash"]:
        return []
    found = dry_run.found(manifest, costs)
    return [{"name": name, "predicted": plan["figures"][name], "found": value} for name, value in found.items()]


def _steps(recipe: Recipe) -> Any:
    """What the recipe wants done to pretraining texts."""
    from data.cleaning import Cleaning
    from data.refine import Steps

    return Steps(
        exclude=frozenset(_ids(Path(recipe.data.exclude).expanduser())) if recipe.data.exclude else frozenset(),
        fields=tuple(recipe.data.fields.items()),
        near_duplicates=recipe.data.near_duplicates,
        cleaning=Cleaning(**recipe.data.clean.model_dump() | {"pii": tuple(recipe.data.clean.pii)}),
        quality=recipe.data.quality.rules() if recipe.data.quality else None,
    )


def _ids(path: Path) -> list[bytes]:
    """The document ids in a text file, one a line. Raises RecipeError naming the line that is none."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not re.fullmatch("[0-9a-fA-F]{32}", line.strip()):
            raise RecipeError(f"{path} line {number}: a document's id is 32 hexadecimal digits, this is {line[:60]!r}")
        found.append(bytes.fromhex(line.strip()))
    return found


def _ready_tokenizer(recipe: Recipe) -> Any:
    """What `prepare_text` takes: the tokenizer that the recipe names, one that grows by the texts, or a size to learn."""
    from data import tokenizers
    from data.vocabulary import Growth

    wanted, encoding = recipe.tokenizer, recipe.tokenizer.encoding
    if encoding == "train":
        return wanted.vocab_size
    if encoding == "model":
        if recipe.model.init is None:
            raise RecipeError("tokenizer.encoding = model needs model.init")
        folder = Path(recipe.model.init).expanduser()
        found = tokenizers.load(folder) if wanted.extend_from_corpus else tokenizers.from_model(folder)
    else:
        found = tokenizers.named(encoding, Path(recipe.data.cache_dir).expanduser())
    if wanted.extend is not None:
        found = found.extended(tokenizers.read_pieces(Path(wanted.extend).expanduser()))
    if not wanted.extend_from_corpus:
        return found
    if not isinstance(found, tokenizers.BytePairTokenizer):
        raise RecipeError(
            "tokenizer.extend_from_corpus counts what byte pairs of a vocabulary join, and this model's tokenizer does not keep its ranks: "
            "give the words yourself (tokenizer.extend), or start from a model that roundhouse made"
        )
    return Growth(found, wanted.extend_from_corpus)


def _evaluations(recipe: Recipe) -> Any:
    """The index of what must not be trained on; None when the recipe names nothing."""
    from data.decontamination import index_of

    asked = recipe.data.decontaminate
    return index_of(_files(recipe, asked.against), asked.ngram) if asked.against else None


def _files(recipe: Recipe, sources: list[str]) -> list[File]:
    return list(_source_of(recipe, sources))


def _source_of(recipe: Recipe, sources: list[str]) -> dict[File, str]:
    """The files of all sources, each with the first that has it. Absolute: Ray's workers have working directories of their own."""
    from data.catalog import resolve

    found: dict[File, str] = {}
    for source in sources:
        for path in resolve(source, recipe.data.cache_dir):
            found.setdefault(path.absolute() if isinstance(path, Path) else path, source)
    return found


def _report_part(monitor: Monitor, out: Path, part: str) -> dict[str, Any]:
    """The manifest of a finished part; what it left out is said, so that nobody has to look for it."""
    manifest = read_json(out / part / "manifest.json")
    assert manifest is not None, f"{part} was prepared without a manifest"
    if manifest["broken"]:
        monitor.say(f"{part}: {manifest['broken']} of {manifest['rows']} rows are broken and left out, see {out / part / 'broken.jsonl'}")
    for reason, count in manifest.items():
        if reason.startswith("dropped: ") and count:
            monitor.say(f"{part}: {count} of {manifest['rows']} left out, {reason.removeprefix('dropped: ')}")
    monitor.result(f"{part}_broken", manifest["broken"])
    return manifest
