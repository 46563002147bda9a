"""Artefacts: directories that say what they were made of, and that a kill never leaves looking whole.

    runs/NAME/STAGE/started.json     what this directory is being made of; written before the stage runs
    runs/NAME/STAGE/...              whatever the stage makes, checkpoints included
    runs/NAME/STAGE/metrics.json     its final figures
    runs/NAME/STAGE/manifest.json    as started.json, with time, duration and code; written last: the commit marker

The `hash` of a stage covers the parts of the recipe that matter to its result, its input files and its parents' hashes. Where
it ran (workers, ports, groups) does not belong to it, nor does the code: a comment must not retrain for weeks. A manifest
names the code that made it, and the pipeline tells when it has changed since. Remove a stage's directory to make it, and
all that stands on it, again.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from data.files import sha256_of, write_json
from rlhf.errors import RecipeError
from rlhf.recipe import Recipe

STAGES = ("data", "pretrain", "sft", "reward", "ppo", "preference", "distill", "evaluate")
ALIGNING = ("ppo", "preference", "distill")  # a recipe has one of them: `align` names it

PARENTS: dict[str, tuple[str, ...]] = {
    "data": (),
    "pretrain": ("data",),
    "sft": ("data", "pretrain"),
    "reward": ("data", "sft"),
    "ppo": ("data", "sft", "reward"),
    "preference": ("data", "sft"),
    "distill": ("data", "sft"),
    "evaluate": ("data", "pretrain", "sft", "reward", *ALIGNING),
}

SAMPLING = ("ppo.max_response_tokens", "ppo.temperature")  # of answers, whoever writes them; prompts are cut in the data stage

# What of the recipe changes a stage's result, beyond what its parents' hashes already cover. A section stands for all its keys.
MATTERS: dict[str, tuple[str, ...]] = {
    "data": ("seed", "data", "tokenizer", "sft.max_tokens", "reward.max_tokens", "ppo.max_prompt_tokens"),
    "pretrain": ("seed", "model", "pretrain"),
    "sft": ("seed", "sft"),
    "reward": ("seed", "reward"),
    "ppo": ("seed", "ppo"),
    "preference": ("seed", "preference"),
    "distill": ("seed", "distill", *SAMPLING),
    "evaluate": ("seed", "evaluate", *SAMPLING),
}

# Keys inside those sections that change where, how safely or how often, but not what comes out.
# `model.init`, the teachers, `tokenizer.extend`, `data.exclude` and `ppo.reward_function` count by the content of their files.
NO_MATTER = {
    "data.cache_dir",
    "data.exclude",
    "model.init",
    "tokenizer.extend",
    "pretrain.checkpoint_every",
    "sft.checkpoint_every",
    "sft.distill.teacher",
    "reward.checkpoint_every",
    "preference.checkpoint_every",
    "distill.checkpoint_every",
    "distill.teacher",
    "ppo.checkpoint_every",
    "ppo.groups",
    "ppo.colocate",
    "ppo.log_prob_gap_limit",
    "ppo.preset",  # its values count one by one
    "ppo.reward_function",
    "ppo.weight_sync",
}

WHOLE_FILE = 256 << 20  # larger inputs count by size, time of change, first and last MiB: hashing a terabyte would take an hour
EDGE = 1 << 20

State = Literal["made", "half", "other", "absent"]


@dataclass(frozen=True)
class Identity:
    """What a stage's result is made of. Equal hash: equal result, up to code and floating point."""

    stage: str
    recipe: dict[str, Any]  # dotted key -> value
    inputs: dict[str, str]  # source -> digest
    parents: dict[str, str]  # stage -> hash

    @property
    def hash(self) -> str:
        text = json.dumps([self.stage, self.recipe, self.inputs, self.parents], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "hash": self.hash, "recipe": self.recipe, "inputs": self.inputs, "parents": self.parents}


def run_directory(recipe: Recipe) -> Path:
    """Absolute, since workers have working directories of their own."""
    return Path(recipe.runs_dir).expanduser().absolute() / recipe.name


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a recipe, in order."""
    return _line(recipe.align, recipe.has_reward_model)


def stages_in(run_dir: Path) -> tuple[str, ...]:
    """The stages of a run, made or not."""
    path = run_dir / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return _line(recipe.get("align", ALIGNING[0]), (recipe.get("ppo") or {}).get("reward_function") is None)


def _line(align: str, has_reward_model: bool) -> tuple[str, ...]:
    others = {*ALIGNING} - {align} | ({"reward"} if not has_reward_model else set())
    return tuple(stage for stage in STAGES if stage not in others)


def identities(recipe: Recipe, inputs: dict[str, dict[str, str]]) -> dict[str, Identity]:
    """The identity of every stage. `inputs`: stage -> {source: digest}, for stages that read from outside the run."""
    flat = _flat(recipe.model_dump(mode="json"))
    found: dict[str, Identity] = {}
    for stage in stages_of(recipe):
        matters = {k: v for k, v in flat.items() if _within(k, MATTERS[stage]) and not _within(k, NO_MATTER)}
        found[stage] = Identity(stage, matters, inputs.get(stage, {}), {p: found[p].hash for p in PARENTS[stage] if p in found})
    return found


def state(out: Path, identity: Identity) -> State:
    """`made` whole from the same things, `half` made from the same things, made from `other` things, or `absent`.

    A parent that was made again since counts as another thing, although its hash is the same: someone removed its directory
    to have it made anew, perhaps by new code, and what stands on it has to follow.
    """
    for name, same in (("manifest.json", "made"), ("started.json", "half")):
        marker = read_json(out / name)
        if marker is not None:
            equal = marker.get("hash") == identity.hash and marker.get("parents_made_at") == _parents_made_at(out.parent, identity)
            return same if equal else "other"  # type: ignore[return-value]
    return "other" if out.exists() and any(out.iterdir()) else "absent"


def prepare(out: Path, identity: Identity) -> State:
    """Make `out` ready for a stage to run in, and say what is there now: `made`, `half` or `absent`.

    What an earlier try of the same identity left is kept, for the stage to resume from. Anything else moves to
    `.previous/STAGE-HASH`, and comes back from there when the recipe turns back to it: a changed mind costs no training.
    One previous version of each stage is kept there, the last.
    """
    found, replaced = state(out, identity), None
    if found == "other":
        marker = read_json(out / "manifest.json") or read_json(out / "started.json") or {}
        replaced = _attic(out, str(marker.get("hash", "unknown")))
        _move(out, replaced)
        found = "absent"
    earlier = _attic(out, identity.hash)
    if found == "absent" and earlier.exists():
        # judged at its old place in the run, since its parents are looked up beside it
        if out.exists():
            out.rmdir()
        earlier.rename(out)
        found = state(out, identity)
        if found == "other":
            _move(out, earlier)
            found = "absent"
    if replaced is not None:
        for older in replaced.parent.iterdir():
            if older.name.rpartition("-")[0] == out.name and older != replaced:
                _remove(older)
    if found != "made":
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "started.json", {**identity.as_dict(), "parents_made_at": _parents_made_at(out.parent, identity)})
    return found


def commit(out: Path, identity: Identity, seconds: float) -> None:
    """Declare `out` whole. Nothing may be written into it afterwards."""
    write_json(
        out / "manifest.json",
        {
            **identity.as_dict(),
            "parents_made_at": _parents_made_at(out.parent, identity),
            "made_at": datetime.now().astimezone().isoformat(),
            "wall_seconds": round(seconds, 3),
            "code": code_version(),
        },
    )
    (out / "started.json").unlink(missing_ok=True)


def difference(before: dict[str, Any], identity: Identity) -> list[str]:
    """Why a directory made of `before` (a manifest) is not up to date: `pretrain.steps 400 -> 500`, `sotu:text changed`, ..."""
    now, found = identity.as_dict(), []
    for part in ("recipe", "inputs", "parents"):
        old, new = before.get(part, {}), now[part]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                found.append(f"{key} {old.get(key)} -> {new.get(key)}" if part == "recipe" else f"{key} changed")
    return found or ["made again before it"]


# ------------------------------------------------------------------------------------------------ what goes in


def digest(path: Path) -> str:
    """Content of a file or directory as a short text, equal on every machine for files up to 256 MiB."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        lines = [f"{p.relative_to(path).as_posix()} {digest(p)}" for p in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    size = path.stat().st_size
    if size <= WHOLE_FILE:
        return sha256_of(path)
    with path.open("rb") as file:
        head = file.read(EDGE)
        file.seek(-EDGE, os.SEEK_END)
        edges = hashlib.sha256(head + file.read(EDGE)).hexdigest()
    return f"{size}-{path.stat().st_mtime_ns}-{edges[:32]}"


@cache
def code_version() -> dict[str, str]:
    """Which code this is: a hash over the three packages, and the git commit when there is one."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(p for package in ("data", "cluster", "rlhf") for p in (root / package).rglob("*.py"))
    packages = hashlib.sha256(b"".join(p.relative_to(root).as_posix().encode() + p.read_bytes() for p in files)).hexdigest()
    version = {"packages": packages[:16]}
    with suppress(OSError, subprocess.SubprocessError):  # no git, or no repository: an installed or shipped copy
        ask = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
        top, head = subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True).stdout.split("\n")[:2]
        if Path(top) == root:
            version["commit"] = head
    return version


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _within(key: str, sections: tuple[str, ...] | set[str]) -> bool:
    return any(key == s or key.startswith(s + ".") for s in sections)


# ------------------------------------------------------------------------------------------------ files


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None when there is no such file or no whole object in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _attic(out: Path, hash: str) -> Path:
    return out.parent / ".previous" / f"{out.name}-{hash[:12]}"


def _parents_made_at(run_dir: Path, identity: Identity) -> dict[str, str | None]:
    return {p: (read_json(run_dir / p / "manifest.json") or {}).get("made_at") for p in identity.parents}


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        _remove(target)
    source.rename(target)


def _remove(folder: Path) -> None:
    """The markers go first: what a kill leaves of the rest must not look whole."""
    for marker in ("manifest.json", "started.json"):
        (folder / marker).unlink(missing_ok=True)
    shutil.rmtree(folder)


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` for one driver. The kernel lets go when the process ends, however it ends.

    Raises RecipeError naming the other driver.
    """
    import fcntl

    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RecipeError(f"{run_dir} is in use by {holder}; wait for it, end it, or give this run another name") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
