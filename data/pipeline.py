"""Documents become token shards: the data of pretraining.

    tokenizer = prepare_text(files, 4096, out, validation_fraction=0.03, max_broken_fraction=0.01, shard_tokens=10_000_000)
    train, validation = TokenShards(out / "train"), TokenShards(out / "validation")

    read -> NFC, id by hash -> without exact duplicates -> split by id -> [learn a vocabulary] -> tokens -> shards

Ray Data reads, cleans and tokenizes on all cores of all nodes. The driver sees 16 bytes per document to find duplicates
(1.6 GB for 10^8 documents), the training texts of a vocabulary, and the tokens, which it writes in file order: the same
bytes for any number of workers. Finding duplicates and writing are the two steps that more nodes do not make faster.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset

from data.cleaning import OFF, Cleaning, cleaned, repeated, shares, text_id, validation_limit
from data.errors import DataError
from data.files import write_json
from data.formats import document
from data.reading import Broken, Dropped, check_broken, ordered, read
from data.shards import Document, ShardWriter
from data.stores import File
from data.tokenizers import Tokenizer, train

TEXT = pa.schema([("id", pa.binary(16)), ("text", pa.large_string())])
COUNTED = ("documents", "tokens", "bytes_of_text")
VOCABULARY_BYTES = 2 << 30  # a vocabulary is learned from at most this much text: 2 GiB take minutes, and more changes little


def prepare_text(
    files: Sequence[File],
    tokenizer: Tokenizer | int,
    out_dir: Path,
    *,
    validation_fraction: float,
    max_broken_fraction: float,
    shard_tokens: int,
    more_texts: Iterable[str] = (),
    source_of: Sequence[str] = (),
    cleaning: Cleaning = OFF,
    fields: Mapping[str, str] | None = None,
) -> Tokenizer:
    """Write `out_dir`/{train,validation} (see `shards`), broken.jsonl and manifest.json; returns the tokenizer.

    `tokenizer` is a ready one, or the size of a vocabulary to learn from the training documents and `more_texts`: what the
    model will read and write later is not always in the words of what it is pretrained on. `source_of` names each file's source (default:
    its path); files of one source stand together, so its documents are one run of the stream, whose length the manifest tells. Of equal
    documents the first stays, so a later source may lose some to an earlier one. `fields` as in `parts.records`. Needs a connected Ray.
    Raises DataError when too many rows are broken or fewer than two different documents remain.
    """
    (out_dir / "manifest.json").unlink(missing_ok=True)
    source_of = source_of or [str(path) for path in files]
    with ordered():
        rows = read(files, partial(clean, cleaning=cleaning), TEXT, fields).materialize()
        counts = check_broken(rows, files, out_dir, max_broken_fraction)
        keys, ids = _identities(rows)
        if len(np.unique(shares(ids))) < 2:
            raise DataError(
                f"{', '.join(map(str, files))}: {counts['rows']} rows hold {min(len(ids), 1)} different documents; one to train on and "
                "one to validate on are needed at least. A .txt file is one document, each line of a .jsonl file is one"
            )
        again = repeated(ids)
        plan = Plan(skip=frozenset(map(tuple, keys[again].tolist())), limit=validation_limit(ids[~again], validation_fraction))
        if isinstance(tokenizer, int):
            tokenizer = train(chain(_training_texts(rows, plan), more_texts), tokenizer)
        manifests, sizes = _write(rows, plan, tokenizer, out_dir, shard_tokens, source_of)
    write_json(
        out_dir / "manifest.json",
        {
            "files": [str(path) for path in files],
            "validation_fraction": validation_fraction,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            **counts,
            "duplicates": int(again.sum()),
            **{split: {k: m[k] for k in COUNTED} for split, m in manifests.items()},
            # Here and not in the splits' manifests, on whose hash the sample order depends: naming sources moves no sample.
            "sources": [{"source": name, **of_splits} for name, of_splits in sizes.items()],
        },
    )
    return tokenizer


def clean(record: dict[str, Any], cleaning: Cleaning = OFF) -> dict[str, Any]:
    """A record's columns `id` and `text`; Broken (or Dropped, if `cleaning` says so) when it has no text."""
    text = document(record)
    if cleaning.drop_missing and (text is None or text == ""):
        raise Dropped("no text")
    if not isinstance(text, str) or not text.strip():
        raise Broken('no text: {"text": "..."} with something in it is needed')
    try:
        text = cleaned(text, cleaning)
        identity = text_id(text)
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise Broken(f"no text: half a surrogate pair, \\u{half:04x}, at character {error.start}") from None
    if not text.strip():
        raise Dropped("nothing is left of it after cleaning")
    return {"id": identity, "text": text}


@dataclass(frozen=True)
class Plan:
    """What becomes of each document; a few bytes that every task gets."""

    skip: frozenset[tuple[int, int]]
    """(file, at) of documents whose text stood earlier."""
    limit: int
    """Ids whose share is below it are held out."""

    def select(self, block: pa.Table) -> tuple[pa.Table, np.ndarray]:
        """The block without what is skipped or unusable, and which of the rest is validation (bool `[rows]`)."""
        block = block.filter(pa.compute.is_valid(block["id"]))
        places = zip(block["file"].to_pylist(), block["at"].to_pylist(), strict=True)
        block = block.filter(pa.array([place not in self.skip for place in places], pa.bool_()))
        return block, shares(id_array(block["id"])) < self.limit


def id_array(column: pa.ChunkedArray) -> np.ndarray:
    """A column of 16-byte ids as `V16` `[n]`."""
    return np.frombuffer(b"".join(column.to_pylist()), dtype="V16")


@lru_cache(maxsize=2)
def fetched(reference: ray.ObjectRef) -> Any:
    """A tokenizer once per process: rebuilding one of 200,000 tokens for every block would cost as much as its work."""
    return ray.get(reference)


def _identities(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(file, at) int64 `[n, 2]` and ids `V16` `[n]` of all usable rows, in order."""
    keys, ids = [np.zeros((0, 2), np.int64)], [np.zeros(0, "V16")]
    for batch in rows.select_columns(["file", "at", "id"]).iter_batches(batch_size=None, batch_format="pyarrow"):
        batch = batch.filter(pa.compute.is_valid(batch["id"]))
        keys.append(np.stack([batch["file"].to_numpy(), batch["at"].to_numpy()], axis=1).astype(np.int64))
        ids.append(id_array(batch["id"]))
    return np.concatenate(keys), np.concatenate(ids)


def _training_texts(rows: Dataset, plan: Plan) -> Iterator[str]:
    size = 0
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        block, held_out = plan.select(batch)
        for text in block["text"].filter(pa.array(~held_out)).to_pylist():
            yield text
            size += len(text)
            if size > VOCABULARY_BYTES:
                return


def _write(
    rows: Dataset, plan: Plan, tokenizer: Tokenizer, out_dir: Path, shard_tokens: int, source_of: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, dict[str, int]]]]:
    """The manifests of both splits, and source -> split -> what it has there."""
    reference = ray.put(tokenizer)

    def tokenize(block: pa.Table) -> pa.Table:
        here: Tokenizer = fetched(reference)
        block, held_out = plan.select(block)
        texts = block["text"].to_pylist()
        encoded = [[*ids, here.end_of_text] for ids in here.encode_batch(texts)]
        columns = {
            "file": block["file"],
            "id": block["id"],
            "validation": pa.array(held_out),
            "bytes": pa.array([len(text.encode()) for text in texts], pa.int64()),
            "tokens": pa.array(encoded, pa.large_list(pa.uint32())),
        }
        return pa.table(columns)

    writers = {
        split: ShardWriter(out_dir / split, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint, shard_tokens=shard_tokens)
        for split in ("train", "validation")
    }
    sizes = {source: {split: dict.fromkeys(COUNTED, 0) for split in writers} for source in source_of}
    tokenized = rows.map_batches(tokenize, batch_format="pyarrow", batch_size=None)
    for batch in tokenized.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in range(len(batch)):
            document = Document(
                id=batch["id"][row].as_py(),
                tokens=batch["tokens"][row].values.to_numpy(),
                text_bytes=batch["bytes"][row].as_py(),
            )
            split = "validation" if batch["validation"][row].as_py() else "train"
            writers[split].add(document)
            size = sizes[source_of[batch["file"][row].as_py()]][split]
            for name, count in zip(COUNTED, (1, len(document.tokens), document.text_bytes), strict=True):
                size[name] += count
    return {split: writer.finish() for split, writer in writers.items()}, sizes
