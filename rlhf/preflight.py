"""Everything that can be checked before any process starts: minutes of work should not end in a message that was due at once.

    check(recipe, stages)          # sources and directories were looked for when the recipe was loaded

What needs a running cluster (are there enough CPUs and GPUs for every group?) is checked right after connecting.
"""

import json
import os
from pathlib import Path
from typing import Any

from rlhf import rewards
from rlhf.errors import RecipeError
from rlhf.recipe import Recipe


def check(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Raises RecipeError listing everything that would stop one of the `stages`."""
    problems = _runs_dir_problems(recipe)
    after = [stage for stage in stages if stage not in ("data", "pretrain", "sft")]
    if after and recipe.sft.adapter.prefix:
        problems.append(
            f"sft.adapter.method = p_tuning_v2: a prefix cannot be merged into the model, so {after[0]} has none to start from; "
            "end with --until sft, or take lora"
        )
    for stage in ("pretrain", "sft", "reward", "preference"):
        if stage in stages and getattr(recipe, stage).float8 and not recipe.cluster.gpus_per_worker:
            problems.append(f"{stage}.float8 needs GPUs: set cluster.gpus_per_worker, or {stage}.float8: false")
    if recipe.model.init is not None:
        problems += _model_problems(recipe, Path(recipe.model.init).expanduser())
    if (function := recipe.ppo.reward_function) is not None:
        rewards.load(function, rewards.source(function))  # a user's file that cannot be imported is told now, not after the fine-tuning
    for key, teacher in teachers(recipe).values():
        problems += _directory_problems(key, teacher)
    if problems:
        raise RecipeError("\n".join(problems))


def teachers(recipe: Recipe) -> dict[str, tuple[str, Path]]:
    """The models that stages of this recipe learn from: stage -> (key, directory)."""
    found = {"sft": ("sft.distill.teacher", recipe.sft.distill.teacher)}
    if recipe.align == "distill":
        found["distill"] = ("distill.teacher", recipe.distill.teacher)
    return {stage: (key, Path(path).expanduser()) for stage, (key, path) in found.items() if path is not None}


def _runs_dir_problems(recipe: Recipe) -> list[str]:
    """The first folder of runs_dir that exists must let us write into it."""
    folder = Path(recipe.runs_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [f"runs_dir: {folder} is a file, not a folder"]
    return [] if os.access(folder, os.W_OK) else [f"runs_dir: cannot write into {folder}; set runs_dir to a folder of yours"]


def _model_problems(recipe: Recipe, model: Path) -> list[str]:
    """The directory must hold a tokenizer too, and the recipe must fit what its config says."""
    problems = _directory_problems("model.init", model)
    if recipe.tokenizer.encoding == "model" and not (model / "tokenizer.json").is_file():
        problems.append(f"model.init: {model} has no tokenizer.json; save the tokenizer beside the model, or set tokenizer.encoding")
    if problems:
        return problems
    config = _json(model / "config.json")
    config = config.get("text_config", config)  # models that also see nest their language part
    return _length_problems(recipe, config) + _vocabulary_problems(recipe, model, config)


def _directory_problems(key: str, model: Path) -> list[str]:
    """A transformers directory holds a config and weights."""
    problems = []
    if not (model / "config.json").is_file():
        problems.append(f"{key}: {model} has no config.json; it should be a directory that transformers saved")
    weights = ("model.safetensors", "model.safetensors.index.json")  # pickled weights are never loaded
    if not any((model / name).is_file() for name in weights):
        problems.append(f"{key}: {model} has no weights (model.safetensors or model.safetensors.index.json)")
    return problems


def _length_problems(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    limit = config.get("max_position_embeddings")
    model = recipe.model.init
    return [f"{k} = {n} is longer than the {limit} positions of {model}" for k, n in recipe.lengths.items() if limit and n > limit]


def _vocabulary_problems(recipe: Recipe, model: Path, config: dict[str, Any]) -> list[str]:
    """An id beyond the embedding would crash training and wedge the rollout engine."""
    rows = config.get("vocab_size")
    size = _vocabulary(recipe, model)
    if rows is None or size <= rows:
        return []
    return [
        f"tokenizer.encoding = {recipe.tokenizer.encoding} has {size} tokens, but {model} has embeddings for {rows} only; "
        "use tokenizer.encoding: model, or a model with a larger vocabulary"
    ]


def _vocabulary(recipe: Recipe, model: Path) -> int:
    """Highest token id + 1, special tokens included."""
    encoding = recipe.tokenizer.encoding
    if encoding == "train":
        return recipe.tokenizer.vocab_size
    if encoding == "model":
        content = _json(model / "tokenizer.json")
        vocab = content.get("model", {}).get("vocab", {})
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))  # Unigram keeps a list
        return max([*ids, *(t["id"] for t in content.get("added_tokens", []))], default=-1) + 1
    from data.tokenizers import named

    return named(encoding, Path(recipe.data.cache_dir).expanduser()).vocab_size


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is broken: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path} is broken: it should hold a JSON object")
    return value
