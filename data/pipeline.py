"""Documents become token shards: the data of pretraining.

    tokenizer = prepare_text(files, 4096, out, validation_fraction=0.03, max_broken_fraction=0.01, shard_tokens=10_000_000)
    train, validation = TokenShards(out / "train"), TokenShards(out / "validation")

    part by part:    read -> clean -> id -> [signals, language, rules]       refine.py
    all together:    documents that are equal, or nearly                     clusters.py
    part by part:    what is kept -> tokens -> the part's own shards         sharding.py

A part is a fixed piece of the input, a function of the files' order and sizes alone. What is made of it is written by the worker that
made it; the driver sees counts. So more nodes make every step faster, the bytes are the same for any number of workers, and a run
that was killed goes on with the parts that were not done (engine.py). What became of every row of the input stays in
`out`/documents (fates.py).
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from data import minhash, stores, tokenizers
from data.cleaning import id_array, shares
from data.clusters import exact_duplicates, near_duplicates
from data.corpus import declare
from data.decontamination import Index, write_report
from data.engine import Result, Watch, costs, each_part
from data.errors import DataError
from data.fates import BROKEN, KEPT
from data.files import write_bytes, write_json
from data.parts import plan_parts
from data.reading import quarantine
from data.refine import NOBODY, Steps, refine
from data.sharding import Plan, shard
from data.stores import File
from data.tokenizers import Tokenizer, train
from data.vocabulary import Growth, batches
from data.work import KEYS, PASSAGES, TEXTS, compared_rows, kept_texts, path_of, read_rows

FORMAT = "roundhouse corpus 2"  # raise it when parts that are done under an earlier version must not be taken over
PART_BYTES = 8 << 20
VOCABULARY_BYTES = 2 << 30  # a vocabulary is learned from at most this much text: 2 GiB take minutes, and more changes little


def prepare_text(
    files: Sequence[File],
    tokenizer: Tokenizer | Growth | int,
    out_dir: Path,
    *,
    validation_fraction: float,
    max_broken_fraction: float,
    shard_tokens: int,
    more_texts: Iterable[str] = (),
    source_of: Sequence[str] = (),
    steps: Steps | None = None,
    evaluations: Index | None = None,
    earlier: Sequence[Path] = (),
    part_bytes: int = PART_BYTES,
    tokenizer_dir: Path | None = None,
    watch: Watch = lambda done, of, text: None,
) -> Tokenizer:
    """Write `out_dir`/{train,validation} (see `shards`), documents/, broken.jsonl and manifest.json; returns the tokenizer.

    `tokenizer` is a ready one, or one to be grown, or the size of a vocabulary to learn, from the training documents and `more_texts`:
    what the model will read and write later is not always in the words of what it is pretrained on. `source_of` names each file's source
    (default: its path); files of one source stand together, so its documents are one run of the stream, whose length the manifest tells.
    Of equal documents the first stays, so a later source may lose some to an earlier one. `steps`: what else is done to documents;
    those that hold a passage of `evaluations` are dropped, and listed in contaminated.jsonl; so are those that repeat a document of the
    `earlier` corpora, folders that this function wrote. `tokenizer_dir`: where the tokenizer is saved, before all is declared whole. Needs
    a connected Ray.
    Raises DataError when too many rows are broken or fewer than two different documents remain.
    """
    (out_dir / "manifest.json").unlink(missing_ok=True)
    steps, names = steps or Steps(), list(source_of or [str(path) for path in files])
    parts, work = plan_parts(files, part_bytes), out_dir / "work"
    known = [path for folder in earlier for path in _keys_of(folder, steps.near_duplicates)]
    key = _begin(out_dir, files, steps, part_bytes, evaluations, known)

    index = None if evaluations is None else ray.put(evaluations)
    first_pass = partial(refine, steps=steps, work=work, evaluations=index)
    read = each_part("refine", first_pass, parts, work / "refined", key, watch)
    rows = sum(r["rows"] for r in read)
    quarantine(files, _broken_rows(work, read), rows, out_dir, max_broken_fraction)
    keys = [path_of(work, part.number, KEYS) for part in parts]
    exact_duplicates(keys, work / "exact", against=known)
    if steps.near_duplicates:
        texts = [path_of(work, part.number, TEXTS) for part in parts]
        near_duplicates(keys, work / "near", texts=texts, against=known, without=work / "exact")
    limit = _validation_limit(files, rows, work, read, validation_fraction)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = _learned(tokenizer, work, len(parts), limit, more_texts)

    sources = list(dict.fromkeys(names))
    plan = Plan(ray.put(tokenizer), limit, tuple(sources.index(name) for name in names), shard_tokens)
    key = _digest(key, tokenizer.fingerprint, limit, names, shard_tokens)
    last_pass = partial(shard, plan=plan, work=work, out=out_dir)
    made = each_part("tokenize", last_pass, parts, out_dir / "documents", key, watch)
    if tokenizer_dir is not None:
        tokenizer.save(tokenizer_dir)
    about: dict[str, Any] = {
        "format": FORMAT,
        "files": [str(path) for path in files],
        "source_of": plan.source_of,
        "parts": len(parts),
        "validation_fraction": validation_fraction,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        **({"minhash": minhash.FORMAT} if steps.near_duplicates else {}),
    }
    if evaluations is not None:
        passages = (pq.read_table(path_of(work, part.number, PASSAGES)).to_pylist() for part in parts)
        write_report(out_dir / "contaminated.jsonl", files, chain.from_iterable(passages), evaluations)
    # Beside the manifest, which must not depend on who worked how fast.
    write_json(out_dir / "costs.json", costs([work / "refined", out_dir / "documents"]))
    declare(out_dir, {**about, "about": ["about", *about], "sources": sources}, made)
    shutil.rmtree(work)
    return tokenizer


def _keys_of(folder: Path, near: bool) -> list[Path]:
    """What the documents of a corpus are compared by. Raises DataError when it does not tell, or not in the way that we compare by."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder}: no manifest.json, so there is no earlier corpus here, or it is half-written") from None
    found = [path_of(folder / "work", number, KEYS) for number in range(manifest.get("parts", 0))]
    if not found or not all(path.exists() for path in found):
        raise DataError(f"{folder}: no index of its documents; prepare it again")
    if near and manifest.get("minhash") != minhash.FORMAT:
        raise DataError(
            f"{folder}: its index knows {manifest.get('minhash', 'equal documents only')}, not {minhash.FORMAT}: prepare it again"
        )
    return found


def _begin(out_dir: Path, files: Sequence[File], steps: Steps, part_bytes: int, evaluations: Index | None, earlier: Sequence[Path]) -> str:
    """What parts are made of, as a short text; what was made of other things is taken away."""
    known = None if evaluations is None else hashlib.sha256(evaluations.hashes.tobytes() + evaluations.owner.tobytes()).hexdigest()
    excluded = sorted(one.hex() for one in steps.exclude)  # a set has no order of its own
    key = _digest(
        FORMAT,
        [stores.stamp(file) for file in files],
        repr(replace(steps, exclude=frozenset())),
        excluded,
        part_bytes,
        known,
        [stores.stamp(path) for path in earlier],
    )
    began = out_dir / "work" / "key.txt"
    if not began.exists() or began.read_text() != key:
        for name in ("work", "documents", "index", *KEPT):
            shutil.rmtree(out_dir / name, ignore_errors=True)
        began.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(began, key.encode())
    return key


def _digest(*things: Any) -> str:
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()


def _broken_rows(work: Path, read: Sequence[Result]) -> Iterator[dict[str, Any]]:
    for number, result in enumerate(read):
        if result["broken"]:
            table = read_rows(work, number, ["file", "at", "fate", "reason", "head"])
            yield from table.filter(pc.equal(table["fate"], BROKEN)).to_pylist()


def _validation_limit(files: Sequence[File], rows: int, work: Path, read: Sequence[Result], fraction: float) -> int:
    """Texts whose share is below this number are held out: about `fraction` of what is kept, and at least one text on either side."""
    lowest, highest = NOBODY
    for number, result in enumerate(read):
        low, high = result["lowest"], result["highest"]
        if low < lowest or high > highest:  # it counts, unless that one document is none of those that are kept
            left = _open_shares(work, number)
            low, high = (int(left.min()), int(left.max())) if len(left) else NOBODY
        lowest, highest = min(lowest, low), max(highest, high)
    if lowest >= highest:
        reasons = sum((Counter(result["dropped"]) for result in read), Counter[str]()).most_common(3)
        why = "; dropped were " + ", ".join(f"{count} ({reason})" for reason, count in reasons) if reasons else ""
        raise DataError(
            f"{', '.join(map(str, files))}: {rows} rows hold {int(highest >= 0)} different documents{why}; one to train on and "
            "one to validate on are needed at least. A .txt file is one document, each line of a .jsonl file is one"
        )
    return min(max(int(fraction * 2**64), lowest + 1), highest)


def _open_shares(work: Path, number: int) -> np.ndarray:
    """The shares of a part's documents that nothing has dropped."""
    table = compared_rows(work, number, ["id", "fate", "of"])
    return shares(id_array(table["id"].filter(pc.is_null(table["fate"]))))


def _learned(wanted: Growth | int, work: Path, parts: int, limit: int, more_texts: Iterable[str]) -> Tokenizer:
    """A vocabulary of the training texts, kept in `work`: a run that goes on needs not learn it again."""
    key = [wanted] if isinstance(wanted, int) else [wanted.base.fingerprint, wanted.pieces]
    kept = work / "tokenizer" / _digest(*key, limit)
    if (kept / "tokenizer.json").exists():
        return tokenizers.load(kept)
    first = _first_share(work, parts, limit)
    of_parts = [partial(_training_texts, work, number, first) for number in range(parts)]
    if isinstance(wanted, int):
        learned: Tokenizer = train(chain(chain.from_iterable(texts() for texts in of_parts), more_texts), wanted)
    else:
        learned = wanted.learned([*of_parts, *batches(more_texts)])
    learned.save(kept)
    return learned


def _first_share(work: Path, parts: int, limit: int) -> int:
    """The share from which on training texts are learned from: all, or as many as make VOCABULARY_BYTES, evenly from everywhere."""
    size = 0
    for number in range(parts):
        table = compared_rows(work, number, ["id", "bytes", "fate", "of"])
        size += int(table["bytes"].to_numpy()[_from(table, limit)].sum())
    return limit + int((2**64 - limit) * max(0.0, 1 - VOCABULARY_BYTES / max(size, 1)))


def _training_texts(work: Path, number: int, first: int) -> Iterator[str]:
    """Those of a part, from share `first` on."""
    for _, texts, _ in kept_texts(work, number, _from(compared_rows(work, number, ["id", "fate", "of"]), first)):
        yield from texts


def _from(rows: pa.Table, share: int) -> np.ndarray:
    """Which rows nothing has dropped and have this share or a higher one: bool `[rows]`."""
    chosen = pc.is_null(rows["fate"]).to_numpy()
    chosen[chosen] = shares(id_array(rows["id"].filter(pc.is_null(rows["fate"])))) >= share
    return chosen
