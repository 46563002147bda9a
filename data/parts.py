"""Stand-in until the readers come."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data import reading


class Record(NamedTuple):
    file: int
    at: int
    size: int
    value: dict[str, Any] | None = None
    broken: str | None = None
    dropped: str | None = None
    head: bytes = b""


@dataclass(frozen=True)
class Part:
    number: int
    pieces: tuple[tuple[int, Path, int, int], ...]

    @property
    def size(self) -> int:
        return sum(stop - start for _, _, start, stop in self.pieces)

    @property
    def name(self) -> str:
        _, path, start, _ = self.pieces[0]
        return (
            f"{path}"
            + (f" from byte {start}" if start else "")
            + (f" and {len(self.pieces) - 1} more files" if len(self.pieces) > 1 else "")
        )


def plan_parts(files: list[Path], part_bytes: int) -> list[Part]:
    reading.RANGE = part_bytes
    return [
        Part(i, tuple((p["file"], Path(p["path"]), p["start"], p["stop"]) for p in task)) for i, task in enumerate(reading._tasks(files))
    ]


def records(part: Part) -> Iterator[Record]:
    for number, path, start, stop in part.pieces:
        for at, raw, broken in reading._records(path, start, stop):
            value = None
            try:
                if broken:
                    raise reading.Broken(broken)
                value = reading._parse(raw, str(path))
                yield Record(number, at, len(raw), value)
            except reading.Broken as error:
                yield Record(number, at, len(raw), None, str(error), None, raw[:200])
