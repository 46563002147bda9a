"""Documents are compared with each other: equal ones first."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.cleaning import id_array, repeated
from data.engine import Result
from data.fates import DUPLICATE
from data.parts import Part
from data.refine import read_rows, write_drops


def compare(parts: Sequence[Part], read: Sequence[Result], work: Path) -> None:
    ids, rows, of_part = [np.zeros(0, "V16")], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in parts:
        table = read_rows(work, part.number, ["id", "fate"])
        here = np.flatnonzero(pc.is_null(table["fate"]).to_numpy())
        ids.append(id_array(table["id"].take(pa.array(here))))
        rows.append(here)
        of_part.append(np.full(len(here), part.number))
    all_ids = np.concatenate(ids)
    again = repeated(all_ids)
    row, number = np.concatenate(rows)[again], np.concatenate(of_part)[again]
    for part in np.unique(number):
        mine = row[number == part]
        dropped = all_ids[again][number == part]
        columns = {
            "row": mine,
            "fate": [DUPLICATE] * len(mine),
            "reason": pa.nulls(len(mine), pa.string()),
            "of": pa.array([i.tobytes() for i in dropped], pa.binary(16)),
        }
        write_drops(work, int(part), pa.table(columns))
