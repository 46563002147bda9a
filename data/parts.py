"""Files are cut into fixed pieces of work, whose records come in order whoever reads them.

for part in plan_parts([Path("a.jsonl"), "s3://bucket/b.parquet"], 64 << 20):
    for record in records(part): ...
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data.errors import DataError
from data.readers import Piece, Record, divisible, format_of, read_piece
from data.stores import File, is_uri, local, size_of


@dataclass(frozen=True)
class Part:
    """Neighbouring byte ranges of one file or more."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes as they are stored."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def name(self) -> str:
        """For messages."""
        first = self.pieces[0]
        more = f" and {len(self.pieces) - 1} more files" if len(self.pieces) > 1 else ""
        return f"{first.path}{f' from byte {first.start}' if first.start else ''}{more}"


def plan_parts(files: Sequence[File], part_bytes: int) -> list[Part]:
    """What is read together: neighbouring ranges and files of about `part_bytes` stored bytes. A function of the files' order and sizes.

    Plain .jsonl and .parquet are cut into ranges, all else is read whole: a .gz of 10 GB is one part. No row depends on where the cuts
    are. Raises DataError for missing files, unknown formats, and when all files are empty.
    """
    for file in files:
        format_of(file)
    sizes = [size_of(file) for file in files]
    if not sum(sizes):
        raise DataError(f"no data: {', '.join(map(str, files)) or 'no file was given'} hold no byte")
    parts: list[list[Piece]] = [[]]
    held = 0
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        path = file if is_uri(file) else str(local(file))
        cuts = range(0, size, part_bytes) if divisible(file) else range(1)
        for start in cuts:
            stop = size if start == cuts[-1] else start + part_bytes
            if held + stop - start > part_bytes and parts[-1]:
                parts.append([])
                held = 0
            parts[-1].append(Piece(number, path, start, stop))
            held += stop - start
    return [Part(i, tuple(part)) for i, part in enumerate(parts)]


def records(part: Part, fields: Mapping[str, str] | None = None) -> Iterator[Record]:
    """The records of a part, in order, in bounded memory. What cannot be read is a record with the reason (see `readers`).

    `fields` says under which name a file has what we call by ours: with {"text": "content"} a record's "content" is its "text"; one
    without "content" keeps what it has.
    """
    for piece in part.pieces:
        for record in read_piece(piece):
            if fields and record.value is not None:
                found = {ours: record.value[theirs] for ours, theirs in fields.items() if theirs in record.value}
                record = record._replace(value=record.value | found)
            yield record
