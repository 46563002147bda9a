"""HTML to the text that a reader of the page reads: menus, banners and footers are left out.

    text = main_text(page_bytes)

resiliparse finds the main content (26 MB/s here, where trafilatura takes 1.1) and the encoding: what the page declares, else what its
bytes look like.
"""

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding


def main_text(page: bytes | str, declared: str | None = None) -> str:
    """Paragraphs, lists and tables of a page, separated by newlines; "" for a page without text. `declared`: its encoding by HTTP."""
    if isinstance(page, bytes):
        page = bytes_to_str(page, declared or detect_encoding(page, from_html_meta=True) or "utf-8")
    return extract_plain_text(page, main_content=True, alt_texts=False)
