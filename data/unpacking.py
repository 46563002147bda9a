"""Packed files as bytes, up to where they are damaged or turn out to be bombs; and how much of anything is read.

with Unpacked(open("a.jsonl.gz", "rb"), "gz", size) as stream:
    stream.read(1 << 20)
"""

import gzip
import zlib
from typing import BinaryIO

import pyarrow as pa

ROW_LIMIT = 128 << 20  # bytes of one line, document or page: more than enwik8 as one text
HEAD = 200  # bytes of a broken row that are kept to recognise it by
BOMB_FROM = 64 << 20  # bytes; smaller files are no danger
BOMB_RATIO = 200  # text shrinks 3 to 10 times, logs that repeat themselves up to 100; gzip's most is 1,032
SOME = 1 << 16  # bytes that are decompressed at once, and lost where an error stands in them
DAMAGE = (EOFError, zlib.error, pa.ArrowException)


class Damaged(Exception):
    """The rest of this file cannot be read; the message says why."""


class Unpacked:
    """The bytes of a packed file of `size` bytes, `gz` or `zst`. `read` gives all that is whole, then raises Damaged; so it does when there
    are far more bytes than the size explains: more than BOMB_RATIO times as many, and BOMB_FROM."""

    def __init__(self, raw: BinaryIO, packing: str, size: int) -> None:
        self._raw, self._name = raw, {"gz": "gzip", "zst": "zstd"}[packing]
        self._limit = self._left = max(BOMB_FROM, BOMB_RATIO * size)
        if packing == "gz":
            self._some = gzip.GzipFile(fileobj=self._raw).read1
        else:
            self._some = pa.CompressedInputStream(pa.PythonFile(self._raw, mode="r"), "zstd").read
        self._damage: Damaged | None = None

    def read(self, n: int) -> bytes:
        """At most `n` bytes; fewer only at the end."""
        found: list[bytes] = []
        while n and not self._damage:
            try:
                data = self._some(min(n, SOME))
            except (*DAMAGE, OSError) as error:
                if getattr(error, "errno", None) is not None:  # the disk or the network, not the data
                    raise
                self._damage = Damaged(f"damaged {self._name}, the rest of the file is lost: {error}")
                break
            if not data:
                break
            found.append(data)
            n -= len(data)
            self._left -= len(data)
            if self._left < 0:
                self._damage = Damaged(f"a decompression bomb: over {self._limit:,} bytes, the rest of the file is lost")
        if self._damage and not found:
            raise self._damage
        return b"".join(found)

    def tell(self) -> int:
        """Bytes read so far."""
        return self._limit - self._left

    def __enter__(self) -> "Unpacked":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def brief(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
