"""Documents become token shards: the data of pretraining.

    tokenizer = prepare_text(files, 4096, out, validation_fraction=0.03, max_broken_fraction=0.01, shard_tokens=10_000_000)
    train, validation = TokenShards(out / "train"), TokenShards(out / "validation")

    part by part:  read -> clean -> id -> [signals, language, rules]                      (refine.py)
    all together:  equal documents, nearly equal ones, those that evaluations hold        (compare.py)
    part by part:  what is kept -> [vocabulary] -> tokens -> the part's own shards        (refine.py)

A part is a fixed piece of the input, a function of the files and their sizes alone (`reading.plan_parts`). Its result is a few files
in `out`/work and then in `out`, written by the worker that made them; the driver sees counts. So more nodes make every step faster,
the bytes are the same for any number of workers, and a run that was killed goes on with the parts that were not done (engine.py).
What became of every row of the input stays in `out`/documents (fates.py).
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray

from data import fates, tokenizers
from data.cleaning import id_array, shares
from data.compare import compare
from data.engine import Result, Watch, each_part
from data.errors import DataError
from data.fates import BROKEN, DUPLICATE, KEPT
from data.files import write_bytes, write_json
from data.parts import Part, plan_parts
from data.reading import quarantine
from data.refine import Plan, Steps, kept_texts, read_rows, refine, tokenize, with_drops
from data.shards import write_manifest
from data.tokenizers import Tokenizer, train

COUNTED = ("documents", "tokens", "bytes_of_text")
FORMAT = "roundhouse corpus 2"  # raise it when parts that are done under an earlier version must not be taken over
PART_BYTES = 8 << 20
VOCABULARY_BYTES = 2 << 30  # a vocabulary is learned from at most this much text: 2 GiB take minutes, and more changes little
SPLITS = ("train", "validation")


def prepare_text(
    files: list[Path],
    tokenizer: Tokenizer | int,
    out_dir: Path,
    *,
    validation_fraction: float,
    max_broken_fraction: float,
    shard_tokens: int,
    more_texts: Iterable[str] = (),
    source_of: Sequence[str] = (),
    steps: Steps | None = None,
    part_bytes: int = PART_BYTES,
    tokenizer_dir: Path | None = None,
    watch: Watch = lambda done, of, text: None,
) -> Tokenizer:
    """Write `out_dir`/{train,validation} (see `shards`), documents/, broken.jsonl and manifest.json; returns the tokenizer.

    `tokenizer` is a ready one, or the size of a vocabulary to learn from the training documents and `more_texts`: what the
    model will read and write later is not always in the words of what it is pretrained on. `source_of` names each file's source (default:
    its path); files of one source stand together, so its documents are one run of the stream, whose length the manifest tells. Of equal
    documents the first stays, so a later source may lose some to an earlier one. `steps`: what else is done to documents.
    `tokenizer_dir`: where the tokenizer is saved, before all is declared whole. Needs a connected Ray.
    Raises DataError when too many rows are broken or fewer than two different documents remain.
    """
    (out_dir / "manifest.json").unlink(missing_ok=True)
    steps, names = steps or Steps(), list(source_of or [str(path) for path in files])
    parts, work = plan_parts(files, part_bytes), out_dir / "work"
    key = _begin(out_dir, files, steps, part_bytes)

    read = each_part("refine", partial(refine, steps=steps, work=work), parts, work / "refined", key, watch)
    rows, broken = sum(r["rows"] for r in read), sum(r["broken"] for r in read)
    quarantine(files, _broken_rows(work, parts, read), rows, out_dir, max_broken_fraction)
    compare(parts, read, work)
    limit = _validation_limit(files, rows, work, parts, read, validation_fraction)
    if isinstance(tokenizer, int):
        tokenizer = _learned(tokenizer, work, parts, limit, more_texts)

    sources = list(dict.fromkeys(names))
    plan = Plan(ray.put(tokenizer), limit, tuple(sources.index(name) for name in names), shard_tokens)
    key = _digest(key, tokenizer.fingerprint, limit, names, shard_tokens)
    made = each_part("tokenize", partial(tokenize, plan=plan, work=work, out=out_dir), parts, work / "tokenized", key, watch)

    sizes = _sizes(made, sources)
    manifests = {split: _declare(out_dir / split, made, split, tokenizer, sizes) for split in SPLITS}
    counts = fates.merged(made)
    kept = fates.of_fate(counts, *KEPT)
    assert rows == sum(n for _, _, n, *_ in counts["fates"]), "a row has no fate, or two"
    assert kept == sum(m["documents"] for m in manifests.values()), "a kept document is in no shard"
    if tokenizer_dir is not None:
        tokenizer.save(tokenizer_dir)
    write_json(
        out_dir / "manifest.json",
        {
            "format": FORMAT,
            "files": [str(path) for path in files],
            "validation_fraction": validation_fraction,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "rows": rows,
            "broken": broken,
            "duplicates": fates.of_fate(counts, DUPLICATE),
            **{split: {k: m[k] for k in COUNTED} for split, m in manifests.items()},
            # Here and not in the splits' manifests, on whose hash the sample order depends: naming sources moves no sample.
            "sources": [{"source": name, **sizes[name]} for name in sources],
            **counts,
        },
    )
    shutil.rmtree(work)
    return tokenizer


def _begin(out_dir: Path, files: list[Path], steps: Steps, part_bytes: int) -> str:
    """What parts are made of, as a short text; what was made of other things is taken away."""
    stats = [path.stat() for path in files]
    key = _digest(FORMAT, [str(path) for path in files], [[s.st_size, s.st_mtime_ns] for s in stats], repr(steps), part_bytes)
    began = out_dir / "work" / "key.txt"
    if not began.exists() or began.read_text() != key:
        for name in ("work", "documents", *SPLITS):
            shutil.rmtree(out_dir / name, ignore_errors=True)
        began.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(began, key.encode())
    return key


def _digest(*things: Any) -> str:
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()


def _broken_rows(work: Path, parts: Sequence[Part], read: Sequence[Result]) -> Iterator[dict[str, Any]]:
    for part, result in zip(parts, read, strict=True):
        if result["broken"]:
            table = read_rows(work, part.number, ["file", "at", "fate", "reason", "head"])
            yield from table.filter(pc.equal(table["fate"], BROKEN)).to_pylist()


def _validation_limit(files: list[Path], rows: int, work: Path, parts: Sequence[Part], read: Sequence[Result], fraction: float) -> int:
    """Texts whose share is below this number are held out: about `fraction` of what is kept, and at least one text on either side."""
    lowest, highest = 2**64, -1
    for part, result in zip(parts, read, strict=True):
        low, high = result["lowest"], result["highest"]
        if (work / f"{part.number:06d}.drops.parquet").exists():
            table = with_drops(work, part.number)
            left = shares(id_array(table["id"].filter(pc.is_null(table["fate"]))))
            low, high = (int(left.min()), int(left.max())) if len(left) else (2**64, -1)
        lowest, highest = min(lowest, low), max(highest, high)
    if lowest >= highest:
        raise DataError(
            f"{', '.join(map(str, files))}: {rows} rows hold {int(highest >= 0)} different documents; one to train on and "
            "one to validate on are needed at least. A .txt file is one document, each line of a .jsonl file is one"
        )
    return min(max(int(fraction * 2**64), lowest + 1), highest)


def _learned(vocab_size: int, work: Path, parts: Sequence[Part], limit: int, more_texts: Iterable[str]) -> Tokenizer:
    """A vocabulary of the training texts, kept in `work`: a run that goes on needs not learn it again."""
    key = _digest(vocab_size, limit)
    kept = work / "tokenizer" / key
    if (kept / "tokenizer.json").exists():
        return tokenizers.load(kept)
    learned = train(chain(_training_texts(work, parts, limit), more_texts), vocab_size)
    learned.save(kept)
    return learned


def _training_texts(work: Path, parts: Sequence[Part], limit: int) -> Iterator[str]:
    size = 0
    for part in parts:
        table = with_drops(work, part.number)
        chosen = pc.is_null(table["fate"]).to_numpy()
        chosen[chosen] = shares(id_array(table["id"].filter(chosen))) >= limit
        for _, texts in kept_texts(work, part.number, chosen):
            yield from texts
            size += sum(map(len, texts))
            if size > VOCABULARY_BYTES:
                return


def _sizes(made: Sequence[Result], sources: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Source -> split -> what it has there."""
    sizes = {name: {split: dict.fromkeys(COUNTED, 0) for split in SPLITS} for name in sources}
    for result in made:
        for place, counts in result["sizes"].items():
            number, split = place.split()
            size = sizes[sources[int(number)]][split]
            for name, count in zip(COUNTED, counts, strict=True):
                size[name] += count
    return sizes


def _declare(
    folder: Path, made: Sequence[Result], split: str, tokenizer: Tokenizer, sizes: dict[str, dict[str, dict[str, int]]]
) -> dict[str, Any]:
    """Write the manifest of a split over all parts' shards, in order, and take away what is none of them."""
    entries = [entry for result in made for entry in result["shards"][split]]
    text_bytes = sum(size[split]["bytes_of_text"] for size in sizes.values())
    manifest = write_manifest(folder, entries, tokenizer.vocab_size, tokenizer.fingerprint, text_bytes)
    names = {f"{entry['name']}.{suffix}" for entry in entries for suffix in ("bin", "idx")} | {"manifest.json"}
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    return manifest
