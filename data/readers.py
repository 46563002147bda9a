"""Records of one file, whatever its format, in bounded memory: what is broken is told, not raised.

    for record in read_piece(Piece(file=0, path="a.jsonl", start=0, stop=4 << 20)):
        record.value or record.broken or record.dropped

    .jsonl      one JSON object per line; a byte range holds the lines that begin in it
    .parquet    one row each; a byte range holds the row groups that begin in it
    .txt        the whole file is {"text": ...}
    .html .htm  the main text of the page is {"text": ...} (html.py)
    .warc       one page or text per response, {"text", "url", "date"} (warc.py)

All but parquet also as .gz and .zst. Limits: a row over ROW_LIMIT is broken, and so is JSON deeper than 1,024 (orjson's limit);
a compressed file that grows beyond BOMB_RATIO times its size (and BOMB_FROM) ends there, as one that is cut short does, with one
broken row for what is lost.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import DataError
from data.html import main_text
from data.stores import File, open_file

ROW_LIMIT = 128 << 20  # bytes of one line, document or page: more than enwik8 as one text
BOMB_FROM = 64 << 20  # bytes; smaller files are no danger
BOMB_RATIO = 200  # text shrinks 3 to 10 times, logs that repeat themselves up to 100; gzip's most is 1,032
HEAD = 200  # bytes of a broken row that are kept to recognise it by
CHUNK = 1 << 20
SOME = 1 << 16  # bytes that are decompressed at once, and lost where an error stands in them
BATCH = 16 << 20  # bytes of a parquet row group that are opened at once
DAMAGE = (EOFError, zlib.error, pa.ArrowException)


class Record(NamedTuple):
    """One row of the input: exactly one of `value`, `broken` and `dropped` is set."""

    file: int
    """Number of its file."""
    at: int
    """Where it begins: its byte (of the text, if compressed), or its number in a parquet or WARC file, from 0."""
    size: int
    """Bytes that it takes there."""
    value: dict[str, Any] | None = None
    broken: str | None = None
    """Why it cannot be read."""
    dropped: str | None = None
    """Why it is of no use, though sound: a picture in a crawl."""
    head: bytes = b""
    """Of a broken row: its first bytes."""


@dataclass(frozen=True)
class Piece:
    """A byte range of one file (of a compressed or indivisible one: all of it)."""

    file: int
    path: File
    start: int
    stop: int


def format_of(file: File) -> tuple[str, str]:
    """("jsonl", "gz") of a.jsonl.gz, ("txt", "") of b.txt. Raises DataError for formats that are not known."""
    name = str(file).partition("?")[0] if "://" in str(file) else str(file)
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    packing = suffixes.pop()[1:] if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    kind = suffixes[-1][1:] if suffixes else ""
    if kind not in _READERS or (kind == "parquet" and packing):
        raise DataError(f"{file}: cannot read this kind of file; give .jsonl, .txt, .html or .warc (also .gz or .zst of them) or .parquet")
    return kind, packing


def divisible(file: File) -> bool:
    """Whether byte ranges of this file can be read on their own."""
    kind, packing = format_of(file)
    return kind in ("jsonl", "parquet") and not packing


def read_piece(piece: Piece) -> Iterator[Record]:
    """The records of a piece, in order. Raises DataError only when the file cannot be opened at all."""
    kind, _ = format_of(piece.path)
    return _READERS[kind](piece)


class Damaged(Exception):
    """The rest of this file cannot be read; the message says why."""


class Decompressed:
    """The bytes of a compressed file. `read` gives all that is whole, then raises Damaged; so it does when there are far more bytes
    than the file's `size` explains."""

    def __init__(self, file: File, size: int) -> None:
        _, packing = format_of(file)
        self._raw, self._name = open_file(file), {"gz": "gzip", "zst": "zstd"}[packing]
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

    def __enter__(self) -> "Decompressed":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def opened(file: File, size: int) -> Any:
    """The bytes of a file of `size` bytes, decompressed: a context with `read(n)`."""
    return Decompressed(file, size) if format_of(file)[1] else open_file(file)


def parse(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """(the object of a line, None), or (None, why it is broken)."""
    try:
        value = orjson.loads(line)
    except ValueError:
        try:  # what orjson refuses and Python writes: NaN, halves of surrogate pairs
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return None, f"not UTF-8: 0x{line[error.start]:02x} at byte {error.start} of the line"
        except (ValueError, RecursionError) as error:
            return None, f"broken JSON: {error}"
    if not isinstance(value, dict):
        return None, f"broken JSON: an object {{...}} is needed, this is a {type(value).__name__}"
    return value, None


def _jsonl(piece: Piece) -> Iterator[Record]:
    _, packing = format_of(piece.path)
    with opened(piece.path, piece.stop) as stream:
        for at, size, line, broken in _lines(stream, piece.start, None if packing else piece.stop):
            if not broken and not line.strip():
                continue
            value, broken = (None, broken) if broken else parse(line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line)
            yield Record(piece.file, at, size, value, broken, None, line[:HEAD] if broken else b"")


def _lines(stream: Any, start: int, stop: int | None) -> Iterator[tuple[int, int, bytes, str | None]]:
    """(where it begins, its size, its bytes without the newline, why it is broken) of each line that begins in [start, stop)."""
    at, foreign = start, start > 0
    if foreign:
        stream.seek(start - 1)
        at -= 1  # the line across the border belongs to the range before
    held: list[bytes] = []
    size = 0
    while stop is None or at < stop:
        try:
            chunk = stream.read(CHUNK)
        except Damaged as error:
            yield at, size, b"".join(held), str(error)
            return
        first, *others = chunk.split(b"\n")
        size += len(first)
        held = [*held, first] if size <= ROW_LIMIT else [b"".join(held)[:HEAD]]
        if not others and chunk:
            if foreign and stop is not None and at + size >= stop:
                return  # no line begins in this range
            continue
        if not foreign and (chunk or size):
            broken = f"a row of {size:,} bytes; {ROW_LIMIT:,} is the most" if size > ROW_LIMIT else None
            yield at, size + bool(chunk), b"".join(held), broken
        if not chunk:
            return
        at, foreign = at + size + 1, False
        for line in others[:-1]:
            if stop is not None and at >= stop:
                return
            yield at, len(line) + 1, line, None
            at += len(line) + 1
        held, size = [others[-1]], len(others[-1])


def _whole(piece: Piece) -> tuple[bytes, str | None]:
    """The bytes of a file that is one record, and why it is broken."""
    with opened(piece.path, piece.stop) as stream:
        data = bytearray()
        try:
            while len(data) <= ROW_LIMIT and (chunk := stream.read(CHUNK)):
                data += chunk
        except Damaged as error:
            return bytes(data), str(error)
    return bytes(data), f"a document of more than {ROW_LIMIT:,} bytes, which is the most" if len(data) > ROW_LIMIT else None


def _txt(piece: Piece) -> Iterator[Record]:
    data, broken = _whole(piece)
    text = ""
    if not broken:
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            broken = f"not UTF-8: 0x{data[error.start]:02x} at byte {error.start} of the file"
    yield Record(piece.file, 0, len(data), None if broken else {"text": text}, broken, None, data[:HEAD] if broken else b"")


def _html(piece: Piece) -> Iterator[Record]:
    data, broken = _whole(piece)
    value = None if broken else {"text": main_text(data)}
    yield Record(piece.file, 0, len(data), value, broken, None, data[:HEAD] if broken else b"")


def _parquet(piece: Piece) -> Iterator[Record]:
    with open_file(piece.path) as stream:
        try:
            file = pq.ParquetFile(stream)
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            starts = [_group_start(group) for group in groups]
        except (*DAMAGE, OSError, MemoryError) as error:
            if piece.start == 0:  # the other ranges of this file say nothing
                yield Record(piece.file, 0, piece.stop, None, f"damaged parquet, the file is lost: {brief(error)}")
            return
        at = 0
        for number, (group, start) in enumerate(zip(groups, starts, strict=True)):
            if piece.start <= start < piece.stop:
                yield from _row_group(piece.file, file, number, at, group)
            at += group.num_rows


def _group_start(group: Any) -> int:
    column = group.column(0)
    return min(x for x in (column.dictionary_page_offset, column.data_page_offset) if x)


def _row_group(number: int, file: Any, group: int, at: int, about: Any) -> Iterator[Record]:
    size = about.total_byte_size // max(about.num_rows, 1)
    done = 0
    try:
        for batch in file.iter_batches(batch_size=max(1, min(4096, BATCH // max(size, 1))), row_groups=[group]):
            limit = ROW_LIMIT if batch.nbytes > ROW_LIMIT else None
            for value in batch.to_pylist():
                if limit and sum(len(x) for x in value.values() if isinstance(x, str | bytes)) > limit:
                    yield Record(number, at + done, size, None, f"a row of more than {limit:,} bytes, which is the most")
                else:
                    yield Record(number, at + done, size, value)
                done += 1
    except (*DAMAGE, OSError, MemoryError, ValueError) as error:
        lost = about.num_rows - done
        yield Record(number, at + done, size * lost, None, f"damaged parquet, {lost} rows of group {group} are lost: {brief(error)}")


def brief(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _warc(piece: Piece) -> Iterator[Record]:
    from data.warc import pages

    with opened(piece.path, piece.stop) as stream:
        for at, (size, value, broken, dropped, head) in enumerate(pages(stream)):
            yield Record(piece.file, at, size, value, broken, dropped, head)


_READERS: dict[str, Callable[[Piece], Iterator[Record]]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
    "txt": _txt,
    "html": _html,
    "htm": _html,
    "warc": _warc,
}
