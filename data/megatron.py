"""Token shards as Megatron-Core reads them: one .bin and one .idx for each split.

    export(TokenShards(run / "data/pretrain/train"), out / "train")      # out/train.bin, out/train.idx
    # then: pretrain_gpt.py --data-path out/train ...

out/train.bin is the token stream. out/train.idx, little-endian: "MMIDIDX\\0\\0", version uint64 = 1, type of the tokens uint8 (8: uint16,
4: int32), sequences uint64 `n`, document marks uint64 `m`; then int32 `[n]` tokens of each sequence, int64 `[n]` the byte where it begins,
int64 `[m]` the sequence with which each document begins, and `n` at the end. A document of ours, with its <|endoftext|>, is one sequence,
as Megatron's own preprocess_data.py --append-eod makes it. Its files know no read-only tokens: there, sources of rows of
{"source", "target"} are learned. (megatron/core/datasets/indexed_dataset.py, Megatron-Core 0.16)
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_bytes
from data.shards import TokenShards

# By bytes of our tokens; Megatron has no uint32, and no id needs it.
TYPES: dict[int, tuple[int, np.dtype[Any]]] = {2: (8, np.dtype("<u2")), 4: (4, np.dtype("<i4"))}
PIECE = 8 << 20  # tokens in memory


def export(shards: TokenShards, prefix: Path) -> tuple[int, int]:
    """Write `prefix`.bin, then `prefix`.idx, without which no reader opens it; returns (documents, tokens)."""
    code, dtype = TYPES[np.dtype(shards.manifest["dtype"]).itemsize]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    index, stream = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    index.unlink(missing_ok=True)
    partial = stream.with_name(stream.name + ".partial")
    with open(partial, "wb") as file:
        for start in range(0, shards.tokens, PIECE):
            tokens, _ = shards.span(start, min(start + PIECE, shards.tokens))
            file.write(tokens.astype(dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, stream)
    starts = np.concatenate([np.zeros(1, np.int64), shards.ends])
    parts = [
        b"MMIDIDX\x00\x00",
        struct.pack("<QBQQ", 1, code, shards.documents, shards.documents + 1),
        np.diff(starts).astype("<i4").tobytes(),
        (starts[:-1] * dtype.itemsize).astype("<i8").tobytes(),
        np.arange(shards.documents + 1, dtype="<i8").tobytes(),
    ]
    write_bytes(index, b"".join(parts))
    return shards.documents, shards.tokens
