"""Stage data: sources become a tokenizer, token shards and examples, all under one roof.

    out/tokenizer/                      opens in transformers, tiktoken ids
    out/pretrain/{train,validation}/    token shards
    out/sft/  out/preferences/  out/prompts/        train.parquet, validation.parquet

The work is `data`'s; here the recipe is handed to it and its counts are reported. Each part ends with a manifest of its own,
so a stopped stage keeps the parts that are whole.
"""

from pathlib import Path
from typing import Any

from rlhf.artefacts import digest, read_json
from rlhf.errors import RecipeError
from rlhf.monitoring import Monitor
from rlhf.recipe import Recipe

PARTS = ("pretrain", "sft", "preferences", "prompts")


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    """Raises DataError for sources that cannot be used, RecipeError for a vocabulary that the model has no room for."""
    from data import examples, tokenizers
    from data.pipeline import prepare_text

    limits = {"validation_fraction": recipe.data.validation_fraction, "max_broken_fraction": recipe.data.max_broken_fraction}
    made = {part: read_json(out / part / "manifest.json") for part in PARTS}

    monitor.progress(0, len(PARTS), "pretraining texts")
    if made["pretrain"] is None or not (out / "tokenizer" / "tokenizer.json").is_file():
        ready = _ready_tokenizer(recipe)
        source_of = _source_of(recipe, recipe.data.pretrain)
        tokenizer = prepare_text(
            list(source_of),
            recipe.tokenizer.vocab_size if ready is None else ready,
            out / "pretrain",
            shard_tokens=recipe.data.shard_tokens,
            more_texts=examples.training_texts(_files(recipe, recipe.data.sft), recipe.data.validation_fraction),
            source_of=list(source_of.values()),
            **limits,
        )
        tokenizer.save(out / "tokenizer")
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
            prepare(_files(recipe, sources), tokenizer, out / part, max_tokens=max_tokens, **limits)
        counts = _report_part(monitor, out, part)
        for split in ("train", "validation"):
            monitor.result(f"{part}_{split}", counts[split]["rows"])
    if recipe.ppo.reward_function is not None:
        from rlhf.verifier import answers_of

        answers_of(out / "prompts", recipe.ppo.reward_function)  # to be told of prompts without one now, not when PPO begins
    monitor.progress(len(PARTS), len(PARTS))


def source_digest(source: str) -> str:
    """What is behind a source, as a short text: of the catalogue its pinned package, of files their content.

    Nothing is fetched.
    """
    from data.catalog import CATALOG, resolve

    name, colon, _ = source.partition(":")
    if colon and (base := name.partition("?")[0]) in CATALOG:  # options stand in the recipe itself
        dataset = CATALOG[base]
        return f"{dataset.package.name} {dataset.package.version} {dataset.package.sha256} {dataset.version}"
    return " ".join(digest(path) for path in resolve(source, ""))


def _ready_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that the recipe names; None when one is to be learned from the texts."""
    from data import tokenizers

    encoding = recipe.tokenizer.encoding
    if encoding == "train":
        return None
    if encoding == "model":
        if recipe.model.init is None:
            raise RecipeError("tokenizer.encoding = model needs model.init")
        found = tokenizers.from_model(Path(recipe.model.init).expanduser())
        if recipe.tokenizer.extend is None:
            return found
        return found.extended(tokenizers.read_pieces(Path(recipe.tokenizer.extend).expanduser()))
    return tokenizers.named(encoding, Path(recipe.data.cache_dir).expanduser())


def _files(recipe: Recipe, sources: list[str]) -> list[Path]:
    return list(_source_of(recipe, sources))


def _source_of(recipe: Recipe, sources: list[str]) -> dict[Path, str]:
    """The files of all sources, each with the first that has it. Absolute: Ray's workers have working directories of their own."""
    from data.catalog import resolve

    found: dict[Path, str] = {}
    for source in sources:
        for path in resolve(source, recipe.data.cache_dir):
            found.setdefault(path.absolute(), source)
    return found


def _report_part(monitor: Monitor, out: Path, part: str) -> dict[str, Any]:
    """The manifest of a finished part; what it left out is said, so that nobody has to look for it."""
    manifest = read_json(out / part / "manifest.json")
    assert manifest is not None, f"{part} was prepared without a manifest"
    if manifest["broken"]:
        monitor.say(f"{part}: {manifest['broken']} of {manifest['rows']} rows are broken and left out, see {out / part / 'broken.jsonl'}")
    for reason, count in manifest.items():
        if reason.startswith("dropped: "):
            monitor.say(f"{part}: {count} of {manifest['rows']} left out, {reason.removeprefix('dropped: ')}")
    monitor.result(f"{part}_broken", manifest["broken"])
    return manifest
