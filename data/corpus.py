"""What a prepared corpus says of itself, put together from what its parts left; and how documents are found in it and taken out.

declare(out, about, results)            # the splits' manifests, then manifest.json
rows = find(out, ["0f3a9c41d2e8"])      # what became of documents, by the first digits of their ids
drop(out, rows)                         # rewrites the shards that hold them, and no other file of tokens

out/documents/000012.parquet            every row of part 12 and its fate (fates.py)
out/documents/000012.json               its shards and counts, which manifest.json adds up
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data import fates
from data.engine import Result, read_marker, write_marker
from data.errors import DataError
from data.fates import BROKEN, DUPLICATE, KEPT, REMOVED, UNUSABLE
from data.files import write_json
from data.shards import files_of, rewritten, write_manifest
from data.work import with_column, written

COUNTED = ("documents", "tokens", "bytes_of_text")
About = dict[str, Any]


def declare(out: Path, about: About, results: Sequence[Result]) -> dict[str, Any]:
    """Write the manifests over all parts and take away what is in none of them; returns manifest.json.

    `about` holds what the parts do not know: at least `files`, `sources` (names), `source_of` (each file's, by number), `tokenizer` and
    `vocab_size`.
    """
    sizes = {name: {split: dict.fromkeys(COUNTED, 0) for split in KEPT} for name in about["sources"]}
    for result in results:
        for number, split, *counted in result["sizes"]:
            size = sizes[about["sources"][number]][split]
            for name, count in zip(COUNTED, counted, strict=True):
                size[name] += count
    counts = fates.merged(results)
    splits = {}
    for split in KEPT:
        entries = [entry for result in results for entry in result["shards"][split]]
        text_bytes = sum(size[split]["bytes_of_text"] for size in sizes.values())
        splits[split] = write_manifest(out / split, entries, about["vocab_size"], about["tokenizer"], text_bytes)
    rows = sum(result["rows"] for result in results)
    assert rows == sum(n for _, _, n, *_ in counts["fates"]), "a row has no fate, or two"
    assert fates.of_fate(counts, *KEPT) == sum(m["documents"] for m in splits.values()), "a kept document is in no shard"
    manifest = {
        **about,
        "rows": rows,
        "broken": fates.of_fate(counts, BROKEN),
        "duplicates": fates.of_fate(counts, DUPLICATE),
        **{f"dropped: {reason}": n for fate, reason, n, *_ in counts["fates"] if fate == UNUSABLE},
        **{split: {k: m[k] for k in COUNTED} for split, m in splits.items()},
        # Here and not in the splits' manifests, on whose hash the sample order depends: naming sources moves no sample.
        "sources": [{"source": name, **sizes[name]} for name in about["sources"]],
        **counts,
    }
    write_json(out / "manifest.json", manifest)
    for split in KEPT:
        _only(out / split, {"manifest.json", *(name for entry in splits[split]["shards"] for name in files_of(entry))})
    _only(out / "documents", {f"{number:06d}.{suffix}" for number in range(len(results)) for suffix in ("parquet", "json")})
    return manifest


def find(out: Path, ids: Iterable[str]) -> pa.Table:
    """All rows of the documents with these ids: 32 hex digits, or the first 8 or more of them. Columns of `fates.ROW` and `part`.

    Raises DataError for what is no id, and for an id that the corpus does not have.
    """
    field, wanted = pc.field("id"), pc.scalar(False)
    for one in (ids := list(ids)):
        try:
            low, high = bytes.fromhex(one.ljust(32, "0")), bytes.fromhex(one.ljust(32, "f"))
        except ValueError:
            low = high = b""
        if not 8 <= len(one) <= 32 or len(low) != 16:
            raise DataError(f"{one!r} is no document id: 32 hexadecimal digits, or the first 8 or more of them")
        wanted = wanted | ((field >= pa.scalar(low, pa.binary(16))) & (field <= pa.scalar(high, pa.binary(16))))
    rows = fates.documents(out).to_table([*fates.ROW.names, "__filename"], filter=wanted)
    known = [one.hex() for one in rows["id"].to_pylist()]
    for one in ids:
        if not any(name.startswith(one.lower()) for name in known):
            raise DataError(f"{out} has no document {one}; `roundhouse data why RUN --step N` lists those of a batch")
    part = pa.array([int(Path(name).stem) for name in rows["__filename"].to_pylist()], pa.int64())
    return rows.drop_columns(["__filename"]).append_column("part", part)


def drop(out: Path, rows: pa.Table) -> dict[str, Any]:
    """Take the documents of `rows` (of `find`) out of the token stream; returns the new manifest.

    The manifests come last: a kill before leaves the old corpus, and the same call again finishes what was begun.
    """
    manifest = json.loads((out / "manifest.json").read_bytes())
    ids = np.frombuffer(b"".join(rows["id"].to_pylist()), "V16")
    results: list[Result] = []
    for number in range(manifest["parts"]):
        marker = read_marker(out / "documents", number)
        if marker is None:
            raise DataError(f"{out / 'documents'}: what part {number} holds is missing or damaged: prepare the data again")
        if number in set(rows["part"].to_pylist()):
            marker["result"] = _without(out, number, marker["result"], ids, manifest["source_of"])
            write_marker(out / "documents", number, marker["key"], marker["result"])
        results.append(marker["result"])
    about = {name: manifest[name] for name in manifest["about"]} | {"sources": [entry["source"] for entry in manifest["sources"]]}
    return declare(out, about, results)


def _without(out: Path, number: int, result: Result, ids: np.ndarray, source_of: Sequence[int]) -> Result:
    """Rewrite a part's shards and rows without these documents; its new result."""
    shards = {split: [new for entry in result["shards"][split] if (new := rewritten(out / split, entry, ids))] for split in KEPT}
    path = out / "documents" / f"{number:06d}.parquet"
    rows = pq.read_table(path)
    gone = pc.and_(pc.is_in(rows["id"], pa.array([one.tobytes() for one in ids], pa.binary(16))), pc.is_in(rows["fate"], pa.array(KEPT)))
    rows = with_column(rows, "fate", pc.if_else(gone, REMOVED, rows["fate"]))
    with written(path, rows.schema) as file:
        file.write_table(rows)
    return {"shards": shards, **summary(rows, source_of)}


def summary(rows: pa.Table, source_of: Sequence[int]) -> Result:
    """What a part's final rows add up to: `rows`, `sizes` ([source, split, documents, tokens, bytes of text]) and fates.tally."""
    source, fate = np.array(source_of, int)[rows["file"].to_numpy()], np.array(rows["fate"].to_pylist(), object)
    tokens, size = rows["tokens"].to_numpy(), rows["bytes"].to_numpy()
    sizes: list[list[int | str]] = []
    for split in KEPT:
        for number in np.unique(source[fate == split]):
            here = (source == number) & (fate == split)
            sizes.append([int(number), split, int(here.sum()), int(tokens[here].sum()), int(size[here].sum())])
    return {"rows": len(rows), "sizes": sizes, **fates.tally(rows)}


def _only(folder: Path, names: set[str]) -> None:
    """Take away what killed workers left half written, and earlier tries whole."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
