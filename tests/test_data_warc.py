"""Pages of a crawl: their main text, whatever they are packed in; every record that should be a page is accounted for."""

import gzip
import zlib
from pathlib import Path

import pytest

from data import unpacking
from data.parts import plan_parts, records
from data.readers import Record

PAGE = b"<html><head><title>T</title></head><body><nav>Menu</nav><main><p>Caf\xc3\xa9 number %d is open.</p></main></body></html>"


def record(kind: str, body: bytes, *headers: str) -> bytes:
    lines = ["WARC/1.0", f"WARC-Type: {kind}", "WARC-Record-ID: <urn:uuid:1>", "WARC-Date: 2024-05-01T00:00:00Z", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}"]).encode() + b"\r\n\r\n" + body + b"\r\n\r\n"


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", *(headers or ("Content-Type: text/html; charset=utf-8",))]).encode() + b"\r\n\r\n"
    return record("response", head + body, "WARC-Target-URI: https://example.com/a", "Content-Type: application/http; msgtype=response")


def read(path: Path, data: bytes) -> list[Record]:
    path.write_bytes(data)
    return [found for part in plan_parts([path], 1 << 20) for found in records(part)]


def texts(found: list[Record]) -> list[str | None]:
    return [r.value["text"] if r.value else None for r in found]


@pytest.mark.parametrize("packed", [False, True])
def test_pages_are_rows_and_a_crawlers_notes_are_none(tmp_path: Path, packed: bool) -> None:
    parts = [
        record("warcinfo", b"software: x", "Content-Type: application/warc-fields"),
        record("request", b"GET / HTTP/1.1\r\n\r\n", "Content-Type: application/http; msgtype=request"),
        response(PAGE % 1),
        response(b"\x89PNG", "Content-Type: image/png"),
        response(b"gone", status="404 Not Found"),
        response("Caf\u00e9 f\u00fcr <b>alle</b>".encode("latin-1"), "Content-Type: text/html; charset=iso-8859-1"),
        response(gzip.compress(PAGE % 2), "Content-Type: text/html", "Content-Encoding: gzip"),
        response(zlib.compress(PAGE % 3), "Content-Type: text/html", "Content-Encoding: deflate"),
        response(PAGE % 4, "Content-Type: text/html", "Content-Encoding: gzip"),  # decompressed by the crawler
        response(PAGE % 5, "Content-Type: text/html", "Content-Encoding: br"),
        record("conversion", "Caf\u00e9, as text".encode(), "WARC-Target-URI: https://example.com/b", "Content-Type: text/plain"),
        record("resource", PAGE % 6, "WARC-Target-URI: file:///c.html", "Content-Type: text/html"),
    ]
    data = b"".join(gzip.compress(part) if packed else part for part in parts)
    found = read(tmp_path / ("a.warc.gz" if packed else "a.warc"), data)
    open_ = "Caf\u00e9 number %d is open."
    expected = [open_ % 1, None, None, "Caf\u00e9 f\u00fcr alle", open_ % 2, open_ % 3, open_ % 4, None, "Caf\u00e9, as text", open_ % 6]
    assert texts(found) == expected
    assert [r.dropped for r in found if r.dropped] == ["no text: image/png", "HTTP status 404"]
    assert [r.broken for r in found if r.broken] == ["a page in the encoding 'br'; gzip and deflate can be read"]
    assert [r.at for r in found] == list(range(len(found)))
    assert found[0].value == {"text": open_ % 1, "url": "https://example.com/a", "date": "2024-05-01T00:00:00Z"}


def test_damage_ends_the_file_with_one_broken_row(tmp_path: Path) -> None:
    whole = [response(PAGE % i) for i in range(5)]
    packed = [gzip.compress(one) for one in whole]
    found = read(tmp_path / "cut.warc.gz", b"".join(packed)[: -len(packed[0]) // 2])
    assert texts(found)[:4] == [f"Caf\u00e9 number {i} is open." for i in range(4)]
    assert [bool(r.broken) for r in found] == [False] * 4 + [True]
    assert "rest of the file is lost" in (found[-1].broken or "")
    assert [bool(r.broken) for r in read(tmp_path / "no.warc", b"this is no WARC at all")] == [True]


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "ROW_LIMIT", 100_000)
    bomb = gzip.compress(b"<p>" + b"0" * 5_000_000)
    inner = response(bomb, "Content-Type: text/html", "Content-Encoding: gzip")
    long = response(b"<p>" + b"0" * 5_000_000)
    first, second, last = read(tmp_path / "inner.warc", inner + long + response(PAGE % 1))
    assert first.broken == second.broken == "a page of more than 100,000 bytes, which is the most"
    assert texts([last]) == ["Caf\u00e9 number 1 is open."]
    monkeypatch.setattr(unpacking, "BOMB_FROM", 200_000)
    found = read(tmp_path / "outer.warc.gz", gzip.compress(response(PAGE % 1)) + gzip.compress(long) + gzip.compress(response(PAGE % 2)))
    assert texts(found)[0] == "Caf\u00e9 number 1 is open."
    assert "a decompression bomb" in (found[-1].broken or "")
