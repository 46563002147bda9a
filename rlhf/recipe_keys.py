"""The keys of a recipe, read off the schema: what `roundhouse explain` shows and "did you mean" draws on.

    explain("ppo.kl_coef")        # one Key: meaning, default, unit, limits, source
    explain("ppo")                # the keys of that section
    nearest_key("ppo.clip")       # "ppo.clip_range"

Meanings stand in the schema alone; nothing is said twice.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf.errors import RecipeError
from rlhf.recipe import Recipe, Section


@dataclass(frozen=True)
class Key:
    """One line of the schema. `default` is None for a section, "required" when there is none."""

    name: str  # dotted
    meaning: str
    type: str
    default: str | None
    unit: str
    limits: str
    source: str
    values: str = ""  # what they stand for, a line each


def explain(name: str | None = None) -> list[Key]:
    """The key `name` alone, the keys directly below a section, or without a name every section and top-level key.

    Raises RecipeError naming the nearest valid key when there is no such key.
    """
    keys = all_keys()
    name = (name or "").strip(".")
    if name and name not in keys:
        nearest = nearest_key(name)
        raise RecipeError(f"{name} is no key of a recipe" + (f"; did you mean {nearest}?" if nearest else "; see roundhouse explain"))
    if name and keys[name].default is not None:
        return [keys[name]]
    below = [k for k in keys.values() if k.name.rpartition(".")[0] == name]
    return ([keys[name]] if name else []) + below


def all_keys() -> dict[str, Key]:
    """Every key and section by its dotted name, in the order of the schema."""
    found: dict[str, Key] = {}

    def walk(section: type[Section], defaults: Any, prefix: str) -> None:
        for short, field in section.model_fields.items():
            inner = _section_type(field)
            default = getattr(defaults, short) if defaults is not None else field.get_default()
            found[prefix + short] = _key(prefix + short, field, default)
            if inner:
                walk(inner, default if isinstance(default, Section) else None, f"{prefix}{short}.")

    walk(Recipe, None, "")
    return found


def nearest_key(wanted: str) -> str | None:
    """The valid key most like `wanted`: the same last part in another section counts as close too."""
    short = wanted.rpartition(".")[2]

    def likeness(key: str) -> float:
        last = key.rpartition(".")[2]
        initials = "".join(word[0] for word in last.split("_"))
        if len(short) > 1 and short == initials:  # lr
            return 0.8
        same_start = 0.5 if last.startswith(short) or short.startswith(last) else 0.0
        return max(SequenceMatcher(None, wanted, key).ratio(), SequenceMatcher(None, short, last).ratio() - 0.1, same_start)

    # of equally good names the one in the same section wins, hence the whole name as the second criterion
    best = max(all_keys(), key=lambda k: (round(likeness(k), 2), SequenceMatcher(None, wanted, k).ratio()))
    return best if likeness(best) >= 0.6 or (likeness(best) >= 0.5 and best.rpartition(".")[0] == wanted.rpartition(".")[0]) else None


def section_at(where: tuple[str | int, ...]) -> type[Section]:
    """The schema class of the section at that path of keys, and numbers in lists of sections."""
    section: type[Section] = Recipe
    for part in (p for p in where if isinstance(p, str)):
        field = section.model_fields.get(part)
        inner = _section_type(field) if field else None
        if inner is None:
            raise KeyError(f"{'.'.join(map(str, where))} is no section")
        section = inner
    return section


def _section_type(field: FieldInfo) -> type[Section] | None:
    """The section behind a key: its own, or that of each item of a list; either may also be null."""
    for kind in (
        field.annotation,
        *get_args(field.annotation),
        *(inner for outer in get_args(field.annotation) for inner in get_args(outer)),
    ):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _key(name: str, field: FieldInfo, default: Any) -> Key:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    unit, source = str(extra.get("unit", "")), str(extra.get("source", ""))
    if _section_type(field):
        kind = "list of sections" if any(get_origin(a) is list for a in (field.annotation, *get_args(field.annotation))) else "section"
        return Key(name, field.description or "", kind, None, unit, "", source)
    shown = "required" if field.is_required() else _text(default)
    return Key(name, field.description or "", _type(field.annotation), shown, unit, _limits(field), source, str(extra.get("values", "")))


def _text(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    return "null" if value is None else str(value)


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (Union, UnionType):
        return " | ".join(_type(a) for a in args)
    if origin is Annotated:
        return _type(args[0])
    if origin is dict:
        return "{" + ": ".join(_type(a) for a in args) + "}"
    if origin in (list, tuple):
        return "[" + ", ".join(_type(a) for a in args) + (", ..." if origin is list else "") + "]"
    return {int: "integer", float: "number", str: "text", bool: "true | false", type(None): "null"}.get(annotation, str(annotation))


def _limits(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = []
    for limit in field.metadata:
        found += [f"{sign} {getattr(limit, name)}" for name, sign in signs.items() if getattr(limit, name, None) is not None]
        if getattr(limit, "min_length", None):
            found.append(f"at least {limit.min_length}")
    return " and ".join(found)
