"""From a YAML file and overrides to a validated `Recipe`, or to one message that lists everything wrong with them.

    recipe = load(Path("recipes/quickstart.yaml"), ["ppo.kl_coef=0.1", "data.sft=[my/chat.jsonl]"])
    text = resolved(recipe)               # the same recipe with every default written out

Line numbers come from PyYAML's node tree, which knows where each key stood; the values come from its safe constructor.
The files that a recipe names are looked for in the same pass, so that one try shows every mistake.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf.errors import RecipeError
from rlhf.recipe import Recipe
from rlhf.recipe_keys import nearest_key, section_at
from rlhf.recipe_ppo import idle
from rlhf.recipe_quality import unused_rules
from rlhf.rewards import problem as reward_problem

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the key it is about, and what to do."""

    where: KeyPath
    what: str


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in `path` with `key=value` overrides applied in order.

    Raises RecipeError with one line per problem: broken YAML, doubled and unknown keys (with the nearest valid one), wrong
    types, impossible values, keys without effect, sources and model directories that are not there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}{_neighbours(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    values, places, problems = _parse(text, str(path))
    for override in overrides or []:
        _apply(override, values, places)

    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += [p for e in error.errors() for p in _from_pydantic(e)]
    problems += _keys_without_effect(values)
    problems += _missing_files(values)
    if problems or recipe is None:
        raise RecipeError(_message(str(path), problems, places))
    return recipe


def resolved(recipe: Recipe) -> str:
    """YAML of the whole recipe, defaults included: loading it gives an equal recipe again.

    Keys that have no effect in this recipe are left out, since `load` refuses them.
    """
    values = recipe.model_dump(mode="json")
    for path in _idle_keys(values):
        _section(values, *path[:-1]).pop(path[-1], None)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


# ------------------------------------------------------------------------------------------------ reading


def _parse(text: str, path: str) -> tuple[dict[str, Any], dict[KeyPath, str], list[Problem]]:
    """Values, where each key stands ("line 7"), and doubled keys, of which YAML would silently keep the last."""
    places: dict[KeyPath, str] = {}
    doubled: list[Problem] = []

    def walk(node: yaml.Node, where: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                inner = (*where, str(key_node.value))
                if inner in places:
                    doubled.append(Problem(inner, f"stands twice ({places[inner]} has it too); keep one"))
                places[inner] = f"line {key_node.start_mark.line + 1}"
                walk(value_node, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                places[(*where, i)] = f"line {item.start_mark.line + 1}"
                walk(item, (*where, i))

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            walk(root, ())
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: this is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # odd characters, an anchor inside itself, 2001-99-99
        raise RecipeError(f"{path}: this is not YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is a {type(values).__name__}")
    return values, places, doubled


def _apply(override: str, values: dict[str, Any], places: dict[KeyPath, str]) -> None:
    """Set one `dotted.key=value`, the value read as YAML, in place."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(f"override {override!r}: write key=value, for example ppo.kl_coef=0.1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not YAML; quote it twice, for example name='\"a: b\"'") from None
    parts = tuple(key.split("."))
    section = values
    for part in parts[:-1]:
        inner = section.get(part)
        if not isinstance(inner, dict):
            inner = section[part] = {}
        section = inner
    section[parts[-1]] = value
    for n in range(1, len(parts) + 1):
        places.setdefault(parts[:n], f"override {override}")
    # the key's own place, and those of what stood under it in the file, are the override's now
    for where in [w for w in places if w[: len(parts)] == parts]:
        places[where] = f"override {override}"


# ------------------------------------------------------------------------------------------------ problems


def _from_pydantic(error: Any) -> list[Problem]:
    """One pydantic error in our words; a section's own check may have found several things, separated by `; `."""
    where: KeyPath = error["loc"]
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        wanted = ".".join(p for p in where if isinstance(p, str))
        nearest = nearest_key(wanted)
        return [Problem(where, "is no key of a recipe" + (f"; did you mean {nearest}?" if nearest else "; see roundhouse explain"))]
    if kind == "missing":
        return [Problem(where, "is missing and has no default")]
    if kind == "value_error":
        return [_from_check(where, text) for text in str(error["ctx"]["error"]).split("; ")]
    if kind in ("model_type", "model_attributes_type"):
        keys = ", ".join(list(section_at(where).model_fields)[:4])
        return [Problem(where, f"is a section with keys of its own ({keys}, ...), got {given!r}")]
    what = re.sub(r"^\w+ should", "should", error["msg"])  # "Input should", "String should", "List should"
    if kind.endswith(("_parsing", "_from_float")):
        what = what.partition(", ")[0]  # "should be a valid integer, unable to parse string as an integer" says it twice
    return [Problem(where, f"{what}, got {_short(given)}")]


def _from_check(where: KeyPath, text: str) -> Problem:
    """What a section's own check found; such a text starts with the key that it is about."""
    first = re.match(r"[a-z_.]+", text)
    named = tuple(first[0].split(".")) if first else ()
    try:
        known = bool(named) and named[-1] in section_at((*where, *named[:-1])).model_fields
    except KeyError:
        known = False
    prefix = "".join(f"{part}." for part in where)
    return Problem((*where, *named), prefix + text) if known else Problem(where, f": {text}" if where else text)


def _idle_keys(values: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """The keys that this recipe never reads, and the other key because of which."""
    model, tokenizer, adapter = _section(values, "model"), _section(values, "tokenizer"), _section(values, "sft", "adapter")
    found: dict[tuple[str, ...], str] = {}
    if model.get("init") is not None:
        found |= {("model", k): "model.init brings a model of its own" for k in section_at(("model",)).model_fields if k != "init"}
    found |= {("data", "quality", *path): why for path, why in unused_rules(_section(values, "data").get("quality")).items()}
    if tokenizer.get("encoding", "train") != "train":
        found["tokenizer", "vocab_size"] = "tokenizer.encoding names a ready vocabulary"
    if _section(values, "pretrain").get("phases") is not None:
        found["pretrain", "steps"] = "pretrain.phases have steps of their own"
    if not _section(values, "data", "decontaminate").get("against"):
        found["data", "decontaminate", "ngram"] = "data.decontaminate.against names no evaluation"
    method = adapter.get("method", "none")
    thin = ["rank", "alpha", "dropout", "targets"]
    of_method = {"none": [*thin, "virtual_tokens"], "p_tuning_v2": thin, "lora": ["virtual_tokens"], "qlora": ["virtual_tokens"]}
    for k in of_method.get(method, []) if isinstance(method, str) else []:
        found["sft", "adapter", k] = f"sft.adapter.method is {method}"
    if _section(values, "reward").get("heads", 1) == 1:
        found["ppo", "uncertainty_coef"] = "reward.heads is 1, and one head agrees with itself"
    if _section(values, "ppo").get("reward_function") is not None:
        why, ranks = "ppo.reward_function judges the answers", values.get("align") == "preference"
        unread = [("reward", k) for k in section_at(("reward",)).model_fields if not (ranks and k == "max_tokens")]
        found |= dict.fromkeys([*unread, ("evaluate", "scorer"), *([] if ranks else [("data", "preferences")])], why)
    return found | {("ppo", *path): why for path, why in idle(_section(values, "ppo")).items()}


def _keys_without_effect(values: dict[str, Any]) -> list[Problem]:
    return [
        Problem(path, f"would have no effect: {why}; remove one of the two")
        for path, why in _idle_keys(values).items()
        if path[-1] in _section(values, *path[:-1])
    ]


def _missing_files(values: dict[str, Any]) -> list[Problem]:
    """Sources that neither the catalogue nor the disk holds, a model directory that is not one, a reward function that nobody defines."""
    from data.catalog import problem  # a light import, but `explain` does not need it

    problems: list[Problem] = []
    data = _section(values, "data")
    for path in (("pretrain",), ("sft",), ("preferences",), ("prompts",), ("decontaminate", "against")):
        sources = _section(data, *path[:-1]).get(path[-1])
        for i, source in enumerate(sources if isinstance(sources, list) else []):
            what = problem(source) if isinstance(source, str) else None
            if what:
                problems.append(Problem(("data", *path, i), f": {what}"))
    directories: list[tuple[tuple[str, ...], str]] = [(("model",), "init"), (("sft", "distill"), "teacher")]
    if values.get("align") == "distill":  # a recipe may hold the settings of several ways to align
        directories.append((("distill",), "teacher"))
    for section, name in directories:
        directory = _section(values, *section).get(name)
        if isinstance(directory, str) and not Path(directory).expanduser().is_dir():
            problems.append(Problem((*section, name), f"is no directory: {directory}"))
    for i, run in enumerate(runs if isinstance(runs := data.get("earlier"), list) else []):
        if isinstance(run, str) and not (Path(run).expanduser() / "data" / "pretrain" / "train" / "manifest.json").is_file():
            problems.append(Problem(("data", "earlier", i), f": no run whose pretraining texts are ready: {run}"))
    exclude = _section(values, "data").get("exclude")
    if isinstance(exclude, str) and not Path(exclude).expanduser().is_file():
        problems.append(Problem(("data", "exclude"), f"is no file: {exclude}"))
    function = _section(values, "ppo").get("reward_function")
    if isinstance(function, str) and (what := reward_problem(function)):
        problems.append(Problem(("ppo", "reward_function"), f": {what}"))
    pieces = _section(values, "tokenizer").get("extend")
    if isinstance(pieces, str) and not Path(pieces).expanduser().is_file():
        problems.append(Problem(("tokenizer", "extend"), f"is no file: {pieces}"))
    return problems


# ------------------------------------------------------------------------------------------------ message


def _message(path: str, problems: list[Problem], places: dict[KeyPath, str]) -> str:
    """All problems, in the order of the file; overrides and problems without a place come last."""
    rows = []
    for p in problems:
        place = next((places[p.where[:n]] for n in range(len(p.where), 0, -1) if p.where[:n] in places), "")
        key = ".".join(str(part) for part in p.where if not isinstance(part, int))
        what = p.what if p.what.startswith(key) or not key else f"{key}{'' if p.what.startswith(':') else ' '}{p.what}"
        line = int(place.removeprefix("line ")) if place.startswith("line ") else 1 << 30
        rows.append((line, place, what))
    rows = sorted(dict.fromkeys(rows), key=lambda row: row[0])
    if len(rows) == 1:
        place = f" {rows[0][1]}" if rows[0][1] else ""
        return f"{path}{place}: {rows[0][2]}"
    return "\n".join([f"{path} has {len(rows)} problems:"] + [f"  {place + ': ' if place else ''}{what}" for _, place, what in rows])


def _section(values: dict[str, Any], *path: str) -> dict[str, Any]:
    """The section at `path`; empty when it is missing or no section at all."""
    found: Any = values
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _neighbours(path: Path) -> str:
    """`; did you mean X?` when a file of a similar name stands there."""
    from difflib import get_close_matches

    folder = path.expanduser().parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
