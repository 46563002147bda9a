"""What happens to a text before it is counted: normal form, identity, split.

    text = normalise(raw); id = text_id(text)
    limit = validation_limit(ids, fraction=0.03)
    held_out = shares(ids) < limit

The split asks nothing but the text itself, so a document stays on its side whatever else is added, moved or reordered.
"""

import hashlib
import unicodedata

import numpy as np
import pyarrow as pa


def normalise(text: str) -> str:
    """Unicode NFC, and newlines as \\n: the same words get the same bytes, tokens and id."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def text_id(text: str) -> bytes:
    """16 bytes that stand for a text (BLAKE2b): equal texts have equal ids; in 10^12 different ones a clash has odds of 10^-15."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def id_array(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of 16-byte ids, none of them null, as `V16` `[n]`."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    arrays = [np.frombuffer(chunk.buffers()[1], "V16")[chunk.offset : chunk.offset + len(chunk)] for chunk in chunks if len(chunk)]
    return np.concatenate(arrays) if arrays else np.zeros(0, "V16")


def shares(ids: np.ndarray) -> np.ndarray:
    """Where ids (`V16` `[n]`) fall between 0 and 2^64, evenly spread: uint64 `[n]`."""
    return np.ascontiguousarray(ids).view(">u8").reshape(-1, 2)[:, 0].astype(np.uint64)


def validation_limit(ids: np.ndarray, fraction: float) -> int:
    """Texts whose share is below this number are held out: about `fraction` of them, and of two or more texts at least
    one on either side. `ids` is `V16` `[n]`, n >= 1."""
    values = np.unique(shares(ids))
    limit = int(fraction * 2**64)
    if len(values) > 1:
        limit = min(max(limit, int(values[0]) + 1), int(values[-1]))
    return limit


def in_validation(text: str, fraction: float) -> bool:
    """The same rule for one text alone."""
    return int(shares(np.frombuffer(text_id(text), dtype="V16"))[0]) < int(fraction * 2**64)


def repeated(ids: np.ndarray) -> np.ndarray:
    """bool `[n]`: True for ids (`V16` `[n]`) that stood earlier in the array."""
    halves = np.ascontiguousarray(ids).view(np.dtype([("high", "<u8"), ("low", "<u8")]))  # raw bytes cannot be sorted, numbers can
    _, first = np.unique(halves, return_index=True)
    again = np.ones(len(ids), dtype=bool)
    again[first] = False
    return again
