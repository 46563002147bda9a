"""The files that a part of a corpus has while it is being worked on.

work/refined/000012.rows.parquet     every row of the part: columns of fates.ROW and one for each signal
work/refined/000012.texts.parquet    the texts that may be kept, with their row
index/000012.keys.parquet            ids, and what nearly equal texts share, of those: what documents are compared by, now and in later runs
work/refined/000012.passages.parquet what they share with evaluations (decontamination.py)
work/exact/, work/near/              which rows the comparison drops (clusters.py)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.clusters import dropped_rows
from data.fates import DUPLICATE, NEAR, ROW
from data.files import partial_path

ROWS, TEXTS, KEYS, PASSAGES = "rows", "texts", "keys", "passages"
EARLIER = "of an earlier corpus"
COMPARED = ((DUPLICATE, "exact"), (NEAR, "near"))  # fate, and the folder that says whose


def path_of(work: Path, number: int, what: str) -> Path:
    """Where a part's ROWS, TEXTS, PASSAGES or KEYS are; the KEYS stay when the work is done."""
    return (work.parent / "index" if what == KEYS else work / "refined") / f"{number:06d}.{what}.parquet"


def read_rows(work: Path, number: int, columns: list[str] | None = None) -> pa.Table:
    """A part's rows as the first pass found them."""
    return pq.read_table(path_of(work, number, ROWS), columns=columns)


def compared_rows(work: Path, number: int, columns: list[str] | None = None) -> pa.Table:
    """A part's rows with the fates that the comparison with other documents gave them."""
    rows = read_rows(work, number, columns)
    for fate, folder in COMPARED:
        if not (work / folder / "manifest.json").exists():
            continue
        dropped = dropped_rows(work / folder, number)
        at = dropped["row"].to_numpy()
        if len(at):
            found = {"fate": [fate] * len(at), "of": dropped["kept"].to_pylist(), "cluster": dropped["cluster"].to_pylist()}
            found["reason"] = [EARLIER if earlier else None for earlier in dropped["earlier"].to_pylist()]
            for name, new in found.items():
                if name in rows.column_names:
                    values = np.array(rows[name].to_pylist(), object)
                    values[at] = new
                    rows = with_column(rows, name, pa.array(values, ROW.field(name).type))
    return rows


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with other values in one of its columns."""
    return table.set_column(table.schema.get_field_index(name), name, values)


def kept_texts(work: Path, number: int, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, list[str], np.ndarray]]:
    """Batches of (row numbers int64 `[n]`, texts, how many of their first characters are read only int32 `[n]`) of those of a part's
    rows that are `chosen` (bool `[rows]`)."""
    with pq.ParquetFile(path_of(work, number, TEXTS)) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            row = table["row"].to_numpy()
            here = chosen[row]
            if here.any():
                yield row[here], table["text"].filter(pa.array(here)).to_pylist(), table["source"].to_numpy()[here]


@contextmanager
def written(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A parquet file that has its name only when it is whole.

    Text: 6.5 ms of a core per MB to write and read it with zstd, for a quarter of the space; 4.3 with lz4, 1.2 plain.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    with pq.ParquetWriter(partial, schema, compression="zstd", compression_level=1, use_dictionary=False) as file:
        yield file
    os.replace(partial, path)
