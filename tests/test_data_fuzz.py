"""2,000 damaged files: no crash, no hang, and every row is kept, dropped with a reason, or quarantined."""

import gzip
import io
import json
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_warc import PAGE, response

from data import readers, unpacking
from data.cleaning import Cleaning
from data.formats import conversation, question, ranking
from data.parts import plan_parts, records
from data.pii import KINDS
from data.reading import Broken, Dropped
from data.refine import clean

FILES = 2000
ALL = Cleaning(html=False, repair=True, control=True, boilerplate=True, pii=KINDS, drop_missing=True)
Random = random.Random

VALUES: list[Any] = [
    "words",
    "",
    " ",
    None,
    7,
    10**400,
    1.5,
    True,
    [],
    ["a"],
    {},
    {"text": "x"},
    "\x00",
    "\ud800",
    "é" * 50,
    "jane@corp.com 8.8.8.8",
]
NAMES = (
    "text",
    "messages",
    "role",
    "from",
    "content",
    "value",
    "chosen",
    "rejected",
    "ranked",
    "scores",
    "margin",
    "prompt",
    "answer",
    "split",
)


def any_value(rng: Random, depth: int = 0) -> Any:
    if depth < 3 and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(NAMES): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(VALUES)


def rows(rng: Random) -> list[dict[str, Any]]:
    good = [{"text": f"Row {i} of some words, {rng.random()}."} for i in range(rng.randrange(1, 30))]
    return [row if rng.random() < 0.7 else {rng.choice(NAMES): any_value(rng) for _ in range(3)} for row in good]


def jsonl(rng: Random) -> bytes:
    lines = [json.dumps(row).encode() for row in rows(rng)]
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines) + 1), b'{"text": "' + b"x" * rng.choice([10_000, 300_000]) + b'"}')
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines) + 1), b'{"text":' * (n := rng.choice([50, 1000, 50_000])) + b"1" + b"}" * n)
    return b"\n".join(lines) + rng.choice([b"", b"\n", b"\n\n", b"\r\n"])


def warc(rng: Random) -> bytes:
    bodies = [PAGE % 1, b"", b"\x00\xff" * 50, b"<div>" * 3000, gzip.compress(b"0" * rng.choice([100, 3_000_000])), b"<p>" + b"0" * 300_000]
    heads = [("Content-Type: text/html", "Content-Encoding: gzip"), ("Content-Type: text/html; charset=nonsense",), ()]
    pages = [response(rng.choice(bodies), *rng.choice(heads)) for _ in range(rng.randrange(1, 8))]
    return b"".join(gzip.compress(page, 1) for page in pages) if rng.random() < 0.5 else b"".join(pages)


def parquet(rng: Random) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": [f"row {i}" * 5 if rng.random() < 0.8 else None for i in range(50)], "n": list(range(50))})
    pq.write_table(table, sink, row_group_size=20, compression=rng.choice(["snappy", "zstd", "none"]))
    return sink.getvalue()


def mutated(rng: Random, data: bytes) -> bytes:
    for _ in range(rng.randrange(4)):
        at, what = rng.randrange(len(data) + 1), rng.randrange(6)
        if what == 0:
            data = data[:at]
        elif what == 1:
            data = data[:at] + rng.choice([b"\x00", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b"}", b"\x00" * 1000]) + data[at:]
        elif what == 2:
            data = data[:at] + bytes(b ^ rng.randrange(256) for b in data[at : at + 8]) + data[at + 8 :]
        elif what == 3:
            data = data[:at] + data[at : at + rng.randrange(1000)] + data[at:]
        elif what == 4:
            data = data[:at] + data[at + rng.randrange(1, 50) :]
    return data


def lines_in(data: bytes) -> int:
    return sum(bool(line.strip()) for line in data.split(b"\n"))


def unzipped(data: bytes, limit: int) -> tuple[bytes, str]:
    """What zlib can make of gzip members (`limit` bytes at most), and whether that is "all", or the file is "cut" or "damaged"."""
    found = b""
    while data := data.lstrip(b"\x00") if found else data:
        member = zlib.decompressobj(wbits=31)
        for i in range(len(data)):  # byte by byte, so that nothing is lost to an error
            try:
                found += member.decompress(data[i : i + 1])
            except zlib.error:
                return found, "damaged"
            if len(found) > limit:
                return found, "damaged"
            if member.eof:
                break
        if not member.eof:
            return found, "cut"
        data = data[i + 1 :]
    return found, "all"


MAKERS: dict[str, Callable[[Random], bytes]] = {
    "jsonl": jsonl,
    "jsonl.gz": lambda rng: gzip.compress(jsonl(rng), 1),
    "jsonl.zst": lambda rng: pa.compress(jsonl(rng), codec="zstd", asbytes=True),
    "txt": lambda rng: jsonl(rng),
    "html": lambda rng: rng.choice([PAGE % 7, b"<ul><li>" * 500, b"<div>" * 5000, b"\xff\xfe<p>", b"<p>" + b"0" * 300_000]),
    "parquet": parquet,
    "warc": warc,
    "warc.gz": lambda rng: gzip.compress(warc(rng), 1),
}


def fates(path: Path, part_bytes: int) -> tuple[Counter[str], list[readers.Record]]:
    counts, found = Counter[str](), []
    for part in plan_parts([path], part_bytes):
        for record in records(part):
            found.append(record)
            assert sum(x is not None for x in (record.value, record.broken, record.dropped)) == 1
            if record.broken is not None:
                counts["quarantined"] += 1
                assert len(record.head) <= unpacking.HEAD
                continue
            if record.dropped is not None:
                counts["dropped"] += 1
                continue
            try:
                _, text, _ = clean(record.value or {}, ALL)
                text.encode()
                counts["kept"] += 1
            except Dropped:
                counts["dropped"] += 1
            except Broken:
                counts["quarantined"] += 1
            for read in (conversation, question, ranking):
                with suppress(Broken):
                    read(record.value or {})
    return counts, found


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_every_row_of_damaged_files_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "ROW_LIMIT", 200_000)
    monkeypatch.setattr(readers, "CHUNK", 4096)
    monkeypatch.setattr(unpacking, "BOMB_FROM", 1_000_000)
    rng, total, slowest = Random(0), Counter[str](), (0.0, "")
    for i in range(FILES):
        name = list(MAKERS)[i % len(MAKERS)]
        data = mutated(rng, MAKERS[name](rng)) or b" "
        path = tmp_path / f"{i}.{name}"
        path.write_bytes(data)
        begun = time.monotonic()
        counts, found = fates(path, rng.choice([100, 5000, 1 << 30]))
        slowest = max(slowest, (time.monotonic() - begun, path.name))
        broken_files = sum("of the file is lost" in (r.broken or "") for r in found)
        assert counts.total() == len(found), path
        assert broken_files <= 1, path
        if name == "jsonl":
            assert counts.total() == lines_in(data), path
        elif name == "jsonl.gz":
            whole, state = unzipped(data, max(1_000_000, unpacking.BOMB_RATIO * len(data)))
            rows_before = lines_in(whole[: whole.rfind(b"\n") + 1])
            assert broken_files == (state != "all"), path
            if state == "all":
                assert counts.total() == lines_in(whole), path
            elif state == "cut":  # what is whole, and one row for the rest
                assert counts.total() == rows_before + 1, path
            else:  # an error takes what stands in the same few KB with it
                assert counts.total() <= rows_before + 1, path
        elif name in ("txt", "html"):
            assert counts.total() == 1, path
        elif name == "parquet" and not broken_files and not any("damaged" in (r.broken or "") for r in found):
            assert counts.total() == pq.ParquetFile(path).metadata.num_rows, path
        total += counts
        path.unlink()
    assert slowest[0] < 10, slowest
    assert min(total.values()) > 100, total
    assert len(total) == 3
