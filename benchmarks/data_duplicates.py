"""Near-duplicates beside datasketch, held against the true similarity of all pairs; exact ones among Chinese poems.

    make data-peers                                        # .venv-data-peers, with datasketch
    python -m benchmarks.data_duplicates --json data_duplicates.json [--megabytes 24] [--poems 60000]

Truth is the Jaccard similarity of two texts' sets of 5-grams, of words in "real text" (speeches, code, manual pages: real_text.py), of
characters in "poems": of all pairs that are similar at all, which datasketch finds for us with more and narrower bands. The peer prepares
its texts in plain Python, as FineWeb does. A pair is ours when data/pairs.py would link it: a key in common, and similar by .8 for sure or
by its texts. It is the peer's when it shares a key (14 bands of 8, as ours) and its estimate is .8 or more. Recall: which part of the pairs
of similarity .8 or more is found. Precision: which part of what is found is similar by .8 or more. "documents": the same for those that
would be dropped, all but the first of each set of linked ones. Seconds are CPU time of one core: texts to keys and sketches; datasketch's
to its index.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from cluster.connect import connect
from data import minhash
from data.catalog import resolve
from data.cleaning import normalise, text_id
from data.clusters import dropped_rows, near_duplicates
from data.pairs import DOUBTFUL, SIMILAR, SURE

PEER = ROOT / ".venv-data-peers" / "bin" / "python"
Pairs = set[tuple[int, int]]


def texts_of(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "texts.jsonl").open(encoding="utf-8")]


def write(folder: Path, texts: Iterable[str], characters: bool) -> None:
    folder.mkdir()
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "characters": characters}, ensure_ascii=False) + "\n" for text in texts)


def our_pairs(texts: list[str], characters: bool) -> tuple[Pairs, float]:
    """Pairs that would be linked, and seconds."""
    which = np.full(len(texts), characters)
    minhash.fingerprints(texts[:1], which[:1])  # compiled
    began = time.process_time()
    keys, sketches = minhash.fingerprints(texts, which)
    seconds = time.process_time() - began
    found: Pairs = set()
    for band in keys.T:
        order = np.argsort(band, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            found |= set(combinations(group.tolist(), 2))
    sets = minhash.sets(texts, which)

    def alike(one: int, other: int) -> bool:
        estimate = minhash.similarity(sketches[one], sketches[other])
        if not DOUBTFUL <= estimate < SURE:
            return bool(estimate >= SURE)
        both = len(np.intersect1d(sets[one], sets[other], assume_unique=True))
        return both >= SIMILAR * (len(sets[one]) + len(sets[other]) - both)

    return {pair for pair in found if alike(*pair)}, seconds


def our_dropped(folder: Path, texts: list[str], characters: bool) -> set[int]:
    """What data/clusters.py drops, with the texts in parts of 1,000."""
    which = np.full(len(texts), characters)
    parts: list[tuple[Path, Path]] = []
    for start in range(0, len(texts), 1000):
        some = texts[start : start + 1000]
        parts.append((folder / f"{start}.keys.parquet", folder / f"{start}.texts.parquet"))
        ids = pa.array(map(text_id, some), pa.binary(16))
        pq.write_table(pa.table({"id": ids, **minhash.columns(some, which[start : start + 1000])}), parts[-1][0])
        pq.write_table(pa.table({"row": range(len(some)), "text": pa.array(some, pa.large_string())}), parts[-1][1])
    near_duplicates([keys for keys, _ in parts], folder / "near", texts=[texts for _, texts in parts])
    return {1000 * part + row for part in range(len(parts)) for row in dropped_rows(folder / "near", part)["row"].to_pylist()}


def dropped(pairs: Pairs) -> set[int]:
    """All but the first of each set of linked texts."""
    return {i for component in nx.connected_components(nx.Graph(pairs)) for i in component if i != min(component)}


def scores(found: set, true: set) -> tuple[float, float]:
    """Recall and precision."""
    both = len(found & true)
    return both / max(1, len(true)), both / max(1, len(found))


def compare(work: str, folder: Path, characters: bool, table: Table) -> list[dict[str, object]]:
    done = subprocess.run([PEER, ROOT / "benchmarks" / "peers_duplicates.py", folder], capture_output=True, text=True, timeout=3000)
    if done.returncode:
        raise SystemExit(f"datasketch failed:\n{done.stderr[-3000:]}")
    peer = json.loads(done.stdout.splitlines()[-1])
    known = json.loads((folder / "peer.json").read_text())
    true: Pairs = {(a, b) for a, b, s, _, _ in known if s >= SIMILAR}
    theirs: Pairs = {(a, b) for a, b, _, estimate, shared in known if shared and estimate >= SIMILAR}
    texts = texts_of(folder)
    ours, seconds = our_pairs(texts, characters)
    rows: list[dict[str, object]] = []

    def row(what: str, mine: float, other: float, unit: str) -> None:
        rows.append(
            {"work": f"{work}: {what}", "ours": mine, "peer": "datasketch", "theirs": other, "unit": unit, "ratio": mine / max(other, 1e-9)}
        )
        table.add_row(f"{work}: {what}", f"{mine:,.3f}", f"{other:,.3f}", unit)

    about = f"of {len(true):,} pairs"
    for what, mine, other in zip(("recall", "precision"), scores(ours, true), scores(theirs, true), strict=True):
        row(f"pairs, {what}", mine, other, about)
    left, gone = dropped(true), our_dropped(folder, texts, characters)
    for what, mine, other in zip(("recall", "precision"), scores(gone, left), scores(dropped(theirs), left), strict=True):
        row(f"documents, {what}", mine, other, f"of {len(left):,} documents")
    for what, mine in zip(("recall", "precision"), scores(ours, theirs), strict=True):
        row(f"pairs, {what} against datasketch's", mine, 1.0, f"of {len(theirs):,} pairs")
    row("speed", peer["megabytes"] / seconds, peer["megabytes"] / peer["seconds"], "MB of text/s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=24)
    parser.add_argument("--poems", type=int, default=60_000)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/roundhouse").expanduser())
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not PEER.exists():
        raise SystemExit("`make data-peers` makes the environment that datasketch runs in")
    from benchmarks import real_text

    table = Table("what", "ours", "datasketch", "unit")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name, connect("local", num_cpus=2):
        folder = Path(name)
        real_text.write(folder / "real", asked.cache_dir, asked.megabytes)
        real = (json.loads(line)["text"] for path in sorted((folder / "real").glob("*.jsonl")) for line in path.open(encoding="utf-8"))
        write(folder / "real text", dict.fromkeys(map(normalise, real)), characters=False)
        (path,) = resolve("chinese-poetry:text", asked.cache_dir)
        poems = [normalise(json.loads(line)["text"]) for line in Path(path).read_text().splitlines()]
        different = list(dict.fromkeys(poems))
        write(folder / "poems", different[:: max(1, len(different) // asked.poems)], characters=True)
        rows += compare("real text", folder / "real text", False, table)
        rows += compare("poems", folder / "poems", True, table)
    ids = len(set(map(text_id, poems)))
    rows.append(
        {
            "work": "poems: different",
            "ours": ids,
            "peer": "Python's set",
            "theirs": len(different),
            "unit": f"of {len(poems)}",
            "ratio": ids / len(different),
        }
    )
    table.add_row("poems: different ids, different texts", f"{ids:,}", f"{len(different):,}", f"of {len(poems):,}")
    Console().print(table)
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
