"""Records of one file, whatever its format, in bounded memory: what is broken is told, not raised.

    for record in read_piece(Piece(file=0, path="a.jsonl", start=0, stop=4 << 20)):
        record.value or record.broken or record.dropped

    .jsonl      one JSON object per line; a byte range holds the lines that begin in it
    .parquet    one row each; a byte range holds the row groups that begin in it
    .txt        the whole file is {"text": ...}
    .html .htm  the main text of the page is {"text": ...} (html.py)
    .warc       one page or text per response, {"text", "url", "date"} (warc.py)

All but parquet also as .gz and .zst. Limits: a row over ROW_LIMIT is broken, and so is JSON deeper than 1,024 (orjson's limit);
a compressed file that grows like a bomb ends there, as one that is cut short does, with one broken row for what is lost (unpacking.py).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import orjson
import pyarrow.parquet as pq

from data import unpacking
from data.errors import DataError
from data.html import main_text
from data.stores import File, open_file
from data.unpacking import DAMAGE, HEAD, Damaged, Unpacked, brief
from data.warc import pages

CHUNK = 1 << 20
BATCH = 16 << 20  # bytes of a parquet row group that are opened at once


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


def opened(file: File, size: int) -> Any:
    """The bytes of a file of `size` bytes, decompressed: a context with `read(n)`."""
    _, packing = format_of(file)
    return Unpacked(open_file(file), packing, size) if packing else open_file(file)


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
        held = [*held, first] if size <= unpacking.ROW_LIMIT else [b"".join(held)[:HEAD]]
        if not others and chunk:
            if foreign and stop is not None and at + size >= stop:
                return  # no line begins in this range
            continue
        if not foreign and (chunk or size):
            broken = f"a row of {size:,} bytes; {unpacking.ROW_LIMIT:,} is the most" if size > unpacking.ROW_LIMIT else None
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
    limit = unpacking.ROW_LIMIT
    with opened(piece.path, piece.stop) as stream:
        data = bytearray()
        try:
            while len(data) <= limit and (chunk := stream.read(CHUNK)):
                data += chunk
        except Damaged as error:
            return bytes(data), str(error)
    return bytes(data), f"a document of more than {limit:,} bytes, which is the most" if len(data) > limit else None


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
            limit = unpacking.ROW_LIMIT if batch.nbytes > unpacking.ROW_LIMIT else None
            for value in batch.to_pylist():
                if limit and sum(len(x) for x in value.values() if isinstance(x, str | bytes)) > limit:
                    yield Record(number, at + done, size, None, f"a row of more than {limit:,} bytes, which is the most")
                else:
                    yield Record(number, at + done, size, value)
                done += 1
    except (*DAMAGE, OSError, MemoryError, ValueError) as error:
        lost = about.num_rows - done
        yield Record(number, at + done, size * lost, None, f"damaged parquet, {lost} rows of group {group} are lost: {brief(error)}")


def _warc(piece: Piece) -> Iterator[Record]:
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
