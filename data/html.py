"""HTML to the text that a reader of the page reads: menus, banners and footers are left out.

    text = main_text(page_bytes)

resiliparse finds the main content: 26 MB/s here, where trafilatura takes 1.1.
"""

import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

_SLOW = re.compile(r"<(/?)(?:div|article|table)\b")
MOST_WORK = 3_000_000  # nodes times what they are nested in: about a second


def main_text(page: bytes | str, declared: str | None = None) -> str:
    """Paragraphs, lists and tables of a page, separated by newlines; "" for a page without text. `declared`: its encoding by HTTP."""
    text = page if isinstance(page, str) else _decoded(page, declared)
    return extract_plain_text(text, main_content=not _too_deep(text), alt_texts=False)


def _too_deep(page: str) -> bool:
    """Whether the main content would take for ever: of 200,000 nested <div>, an hour. Of such pages all text is taken."""
    if page.count("<") < 2000:
        return False
    page, depth, work = page.lower(), 0, 0
    tags = page.count("<")
    if tags * sum(page.count(tag) for tag in ("<div", "<article", "<table")) < MOST_WORK:
        return False
    done = 0
    for tag in _SLOW.finditer(page):
        work += depth * page.count("<", done, tag.start())
        depth, done = max(0, depth + (-1 if tag[1] else 1)), tag.start()
    return work + depth * page.count("<", done) > MOST_WORK


def _decoded(page: bytes, declared: str | None) -> str:
    """What is UTF-8 by its bytes is UTF-8, whatever it declares; the rest is what HTTP, the page itself, or its bytes say."""
    if b"\x1b" not in page:  # ISO-2022, whose bytes are all ASCII
        try:
            return page.decode()
        except UnicodeDecodeError:
            pass
    encoding = map_encoding_to_html5(declared, fallback_utf8=False) if declared else None
    return bytes_to_str(page, encoding or detect_encoding(page, from_html_meta=True) or "utf-8")
