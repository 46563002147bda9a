"""388,331 Chinese poems, which their books share in part: what stays is exactly the different ones."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import catalog, clusters
from data.cleaning import normalise, text_id


@pytest.mark.slow  # most of it is npm's: 85 MB
@pytest.mark.skipif(shutil.which("npm") is None, reason="the poems come with npm")
def test_poems_that_stay_are_those_that_differ(ray_session: None, cache_dir: Path, tmp_path: Path) -> None:
    (path,) = catalog.resolve("chinese-poetry:text", cache_dir)
    poems = [normalise(json.loads(line)["text"]) for line in path.read_text().splitlines()]
    parts = []
    for number, start in enumerate(range(0, len(poems), 100_000)):
        parts.append(tmp_path / f"{number}.parquet")
        ids = pa.array([text_id(poem) for poem in poems[start : start + 100_000]], pa.binary(16))
        pq.write_table(pa.table({"id": ids}), parts[-1])
    manifest = clusters.exact_duplicates(parts, tmp_path / "exact")
    gone = {
        start * 100_000 + row for start in range(len(parts)) for row in clusters.dropped_rows(tmp_path / "exact", start)["row"].to_pylist()
    }
    kept = [poem for number, poem in enumerate(poems) if number not in gone]
    assert kept == list(dict.fromkeys(poems))
    assert (len(poems), len(kept), manifest["dropped"]) == (388_331, 381_534, 6_797)
