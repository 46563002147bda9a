"""WARC: what a crawler saw, page by page.

    for size, value, broken, dropped, head in pages(stream): ...       # value: {"text", "url", "date"}

Rows are `response` and `resource` records (a page: its main text) and `conversion` records (text already, as Common Crawl's WET files hold
it); requests, metadata and the like are a crawler's notes and no rows. FastWARC splits the stream.
"""

import zlib
from collections.abc import Iterator
from typing import Any

from fastwarc.warc import ArchiveIterator, WarcRecordType

from data import unpacking
from data.html import main_text
from data.unpacking import HEAD, Damaged, brief

_ROWS = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
_PAGES = ("text/html", "application/xhtml+xml")
Page = tuple[int, dict[str, Any] | None, str | None, str | None, bytes]


def pages(stream: Any) -> Iterator[Page]:
    """(size, value, why broken, why dropped, first bytes if broken) of each row; damage ends the file with one broken row."""
    try:
        found = iter(ArchiveIterator(stream, record_types=_ROWS, parse_http=True, auto_decode="none", stream_detect=False))
        while record := next(found, None):
            yield _page(record)
    except (Damaged, OSError, ValueError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        reason = str(error) if isinstance(error, Damaged) else f"damaged WARC, the rest of the file is lost: {brief(error)}"
        yield 0, None, reason, None, b""


def _page(record: Any) -> Page:
    size = record.content_length
    body = record.reader.read(unpacking.ROW_LIMIT + 1)
    head, url, http = body[:HEAD], record.headers.get("WARC-Target-URI"), record.http_headers
    kind = (record.http_content_type if http is not None else record.headers.get("Content-Type")) or ""
    kind = kind.partition(";")[0].strip().lower()
    if http is not None and http.status_code != 200:
        return size, None, None, f"HTTP status {http.status_code}", b""
    if kind and kind not in _PAGES and not kind.startswith("text/"):
        return size, None, None, f"no text: {kind}", b""
    try:
        body = _decoded(body, (http.get("Content-Encoding") or "") if http is not None else "")
    except ValueError as error:
        return size, None, str(error), None, head
    if len(body) > unpacking.ROW_LIMIT:
        return size, None, f"a page of more than {unpacking.ROW_LIMIT:,} bytes, which is the most", None, head
    charset = record.http_charset if http is not None else None
    text = main_text(body, charset) if kind in _PAGES or not kind else body.decode(errors="replace")
    return size, {"text": text, "url": url, "date": record.headers.get("WARC-Date")}, None, None, b""


def _decoded(body: bytes, encoding: str) -> bytes:
    """A page as it was before HTTP compressed it, of ROW_LIMIT + 1 bytes at most. Raises ValueError."""
    name = encoding.strip().lower()
    if name in ("", "identity", "none"):
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"a page in the encoding {name!r}; gzip and deflate can be read")
    if name != "deflate" and body[:2] != b"\x1f\x8b":
        return body  # crawlers often store what they have decompressed, and keep the header
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, unpacking.ROW_LIMIT + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged page: {error}") from None
