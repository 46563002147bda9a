"""The last pass over a part, in a Ray worker: what is kept becomes tokens, and the tokens shards of this part.

    shard(part, plan, work, out)      # writes out/{train,validation}/NNNNN-*.{bin,idx} and out/documents/NNNNNN.parquet

Tokens go from the tokenizer's array straight into the shard's file. It leaves the same bytes whenever it is called again.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from data.cleaning import id_array, shares
from data.corpus import summary
from data.engine import Result, fetched
from data.fates import KEPT
from data.parts import Part
from data.shards import ShardWriter
from data.tokenizers import Tokenizer
from data.work import compared_rows, kept_texts, with_column, written


@dataclass(frozen=True)
class Plan:
    """What is known once all documents have been compared."""

    tokenizer: ray.ObjectRef
    limit: int
    """Ids whose share is below it are held out."""
    source_of: tuple[int, ...]
    """Each file's source, by number."""
    shard_tokens: int


def shard(part: Part, plan: Plan, work: Path, out: Path) -> Result:
    """Write a part's shards of both splits and its final rows; counts, sizes by source and split, and the shards for the manifests."""
    tokenizer: Tokenizer = fetched(plan.tokenizer)
    rows = compared_rows(work, part.number)
    kept = rows["fate"].is_null().to_numpy()
    ids = np.zeros(len(rows), "V16")
    ids[kept] = id_array(rows["id"].filter(pa.array(kept)))
    split = np.where(shares(ids) < plan.limit, "validation", "train")
    size, tokens = rows["bytes"].to_numpy(), np.zeros(len(rows), np.int32)
    writers = {
        name: ShardWriter(
            out / name,
            vocab_size=tokenizer.vocab_size,
            fingerprint=tokenizer.fingerprint,
            shard_tokens=plan.shard_tokens,
            prefix=f"{part.number:05d}-",
        )
        for name in KEPT
    }
    for row, texts, sources in kept_texts(work, part.number, kept):
        flat, lengths, masked = encoded(tokenizer, texts, sources)
        tokens[row] = lengths
        for name, writer in writers.items():
            here = split[row] == name
            if here.any():
                mine = flat if here.all() else flat[np.repeat(here, lengths)]
                writer.extend(mine, lengths[here], ids[row[here]], int(size[row[here]].sum()), masked[here])
    fate = np.array(rows["fate"].to_pylist(), object)
    fate[kept] = split[kept]
    # Of what is dropped an estimate, as the part's other texts have it: for questions of what other rules would keep.
    share = tokens.sum() / max(size[kept].sum(), 1) or 0.25
    tokens[~kept] = np.rint(size[~kept] * share)
    rows = with_column(with_column(rows, "fate", pa.array(fate, pa.string())), "tokens", pa.array(tokens))
    with written(out / "documents" / f"{part.number:06d}.parquet", rows.schema) as file:
        file.write_table(rows)
    return {"shards": {name: writer.close() for name, writer in writers.items()}, **summary(rows, plan.source_of)}


def encoded(tokenizer: Tokenizer, texts: list[str], sources: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`encode_flat`, and how many of each text's first tokens are read only, int64 `[n]`: those of its first `sources` characters, which
    are encoded by themselves."""
    if not sources.any():
        return *tokenizer.encode_flat(texts), np.zeros(len(texts), np.int64)
    pieces = [piece for text, n in zip(texts, sources, strict=True) for piece in ((text[:n], text[n:]) if n else (text,))]
    flat, lengths = tokenizer.encode_flat(pieces)
    first = np.cumsum([0, *(1 + (sources > 0))])[:-1]  # each text's first piece
    read = first[sources > 0]
    flat = np.delete(flat, np.cumsum(lengths)[read] - 1)  # no end of text between source and target
    lengths[read] -= 1
    return flat, np.add.reduceat(lengths, first), np.where(sources > 0, lengths[first], 0)
