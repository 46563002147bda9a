"""Every format gives the rows that were written, wherever it is cut and stored; what is broken is told and nothing is lost."""

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_s3 import fake_s3
from hypothesis import given, settings
from hypothesis import strategies as st

from data import readers, unpacking
from data.errors import DataError
from data.parts import plan_parts, records
from data.readers import Record
from data.reading import quarantine
from data.stores import File, find, size_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ROWS = st.lists(st.fixed_dictionaries({"text": TEXT, "n": st.integers(-(2**53), 2**53)}), min_size=1, max_size=30)


def all_records(files: list[File], part_bytes: int = 1 << 30, **options: Any) -> list[Record]:
    return [record for part in plan_parts(files, part_bytes) for record in records(part, **options)]


def values(files: list[File], part_bytes: int = 1 << 30) -> list[dict[str, Any] | None]:
    return [record.value for record in all_records(files, part_bytes)]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + ("\n\r\n" if i % 3 else "\n") for i, row in enumerate(rows)).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=3)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": as_jsonl,
    "jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows[:5])) + gzip.compress(as_jsonl(rows[5:])),
    "jsonl.zst": lambda rows: b"".join(pa.compress(as_jsonl(half), codec="zstd", asbytes=True) for half in (rows[:5], rows[5:])),
    "parquet": as_parquet,
}


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, part_bytes=st.integers(1, 3000))
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_read_wherever_it_is_cut(name: str, rows: list[dict[str, Any]], part_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files: list[File] = [Path(folder) / f"{i}.{name}" for i in range(2)]
        for file in files:
            Path(file).write_bytes(WRITERS[name](rows))
        found = all_records(files, part_bytes)
    assert [record.value for record in found] == rows * 2
    assert [record.file for record in found] == [0] * len(rows) + [1] * len(rows)
    places = [(record.file, record.at) for record in found]
    assert places == sorted(set(places))


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=400).map(lambda b: b.replace(b"\x00", b"\n")), part_bytes=st.integers(1, 100))
def test_any_bytes_are_the_same_rows_wherever_they_are_cut(data: bytes, part_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data + b"!")
        whole = all_records([path])
        assert all_records([path], part_bytes) == whole
    lines = [line for line in (data + b"!").split(b"\n") if line.strip()]
    assert len(whole) == len(lines)
    assert all((record.value is None) != (record.broken is None) for record in whole)


def test_parts_are_neighbours_of_about_the_size_asked_for(tmp_path: Path) -> None:
    sizes = {"a.jsonl": 250, "b.txt": 30, "c.jsonl": 30, "d.txt.gz": 500, "e.txt": 0, "f.jsonl": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    files: list[File] = [tmp_path / name for name in sizes]
    parts = [[(p.file, p.start, p.stop) for p in part.pieces] for part in plan_parts(files, 100)]
    assert parts == [[(0, 0, 100)], [(0, 100, 200)], [(0, 200, 250), (1, 0, 30)], [(2, 0, 30)], [(3, 0, 500)], [(4, 0, 0)]]
    with pytest.raises(DataError, match="no byte"):
        plan_parts([tmp_path / "f.jsonl"], 100)
    with pytest.raises(DataError, match="No such file"):
        plan_parts([tmp_path / "none.txt"], 100)
    with pytest.raises(DataError, match=r"cannot read this kind of file; give \.jsonl"):
        plan_parts([tmp_path / "a.pdf"], 100)


@pytest.mark.parametrize("packed", [gzip.compress, lambda b: pa.compress(b, codec="zstd", asbytes=True)], ids=["gz", "zst"])
def test_a_file_that_is_cut_short_gives_what_is_whole_and_one_broken_row(tmp_path: Path, packed: Callable[[bytes], bytes]) -> None:
    rows = [{"text": str(i**99)} for i in range(3000)]
    path = tmp_path / ("a.jsonl.gz" if packed is gzip.compress else "a.jsonl.zst")
    data = packed(as_jsonl(rows))
    path.write_bytes(data[: len(data) * 2 // 3])
    found = all_records([path])
    assert len(found) > 1000
    assert [record.value for record in found[:-1]] == rows[: len(found) - 1]
    assert "the rest of the file is lost" in (found[-1].broken or "")
    assert json.dumps(rows[len(found) - 1]).encode().startswith(found[-1].head[:50].strip())
    quarantine([path], [{"file": 0, "at": r.at, "reason": r.broken, "head": "x"} for r in found if r.broken], len(found), tmp_path, 1)
    listed = json.loads((tmp_path / "broken.jsonl").read_text())
    assert listed == {
        "file": str(path),
        "line": as_jsonl(rows)[: found[-1].at].count(b"\n") + 1,
        "reason": found[-1].broken,
        "begins": "x",
    }


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "ROW_LIMIT", 1000)
    monkeypatch.setattr(readers, "CHUNK", 300)
    good = b'{"text": "good"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b'{"text": "' + b"x" * 5000 + b'"}', good, b"[" * 900, b'{"a":' * 150 + b"1" + b"}" * 150, good]))
    for part_bytes in (1 << 20, 64):
        found = all_records([path], part_bytes)
        assert [bool(record.value) for record in found] == [True, False, True, False, True, True]
        assert found[1].broken == "a row of 5,012 bytes; 1,000 is the most"
        assert found[1].head == b'{"text": "' + b"x" * (unpacking.HEAD - 10)
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet([{"text": "good"}, {"text": "x" * 1001}, {"text": "good"}]))
    assert [record.broken for record in all_records([path])] == [None, "a row of more than 1,000 bytes, which is the most", None]
    path = tmp_path / "a.jsonl"
    long = tmp_path / "long.txt"
    long.write_bytes(b"x" * 1001)
    assert "1,000 bytes, which is the most" in (all_records([long])[0].broken or "")

    monkeypatch.undo()
    path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n" + good)
    deep, fine = all_records([path])
    assert "broken JSON" in (deep.broken or "")
    assert fine.value == {"text": "good"}

    monkeypatch.setattr(unpacking, "BOMB_FROM", 100_000)
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(good + b"\n" + b"0" * 5_000_000 + b"\n" + good))
    first, last = all_records([bomb])
    assert first.value == {"text": "good"}
    assert "a decompression bomb" in (last.broken or "")


def test_what_orjson_refuses_and_python_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": NaN}\n{"text": "\\ud800"}\n{"text": "caf\xe9"}\n[1]\n{"text": "a\x00b"}\n')
    found = all_records([path])
    assert found[0].value is not None
    assert found[1].value == {"text": "\ud800"}
    assert [record.broken for record in found[2:]] == [
        "not UTF-8: 0xe9 at byte 13 of the line",
        "broken JSON: an object {...} is needed, this is a list",
        "broken JSON: Invalid control character at: line 1 column 12 (char 11)",
    ]


def test_damaged_parquet_loses_what_is_damaged_and_counts_it(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " * 50} for i in range(3000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, use_dictionary=False, compression="snappy")
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    for part_bytes in (1 << 30, 1000):
        found = all_records([path], part_bytes)
        assert [record.value for record in found if record.value] == rows[:1000] + rows[2000:]
        (lost,) = (record for record in found if record.broken)
        assert lost.at == 1000
        assert "1000 rows of group 1 are lost" in (lost.broken or "")
    path.write_bytes(data[:-9])
    (lost,) = all_records([path], 1000)
    assert "damaged parquet, the file is lost" in (lost.broken or "")


def test_fields_say_which_column_is_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "words", "text": "another"}\n{"other": 1}\n')
    assert [r.value for r in all_records([path], fields={"text": "content"})] == [
        {"content": "words", "text": "words"},
        {"other": 1},
    ]


def test_object_stores_are_read_like_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    rows = [{"text": f"row {i}"} for i in range(200)]
    for name, write in WRITERS.items():
        memory.pipe(f"/crawl/{name.replace('.', '')}/a.{name}", write(rows))
        memory.pipe(f"/crawl/{name.replace('.', '')}/deep/b.{name}", write(rows[:7]))
    files = find("memory://crawl/**/*.*")
    assert len(files) == len(WRITERS) * 2
    for name in WRITERS:
        files = find(f"memory://crawl/{name.replace('.', '')}/*.{name}")
        assert files == [f"memory://crawl/{name.replace('.', '')}/a.{name}"]
        assert values(files, 500) == rows
    assert find("memory://crawl/none.txt") == find("memory://crawl/*.none") == find("memory://none/*") == []
    path = tmp_path / "a b.txt"
    path.write_text("words")
    assert values([f"file://{tmp_path}/a%20b.txt"]) == [{"text": "words"}]
    assert find(f"file://{tmp_path}/*.txt") == [path]


def test_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_EC2_METADATA_DISABLED", "true"), ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y")):
        monkeypatch.setenv(name, value)
    rows = [{"text": f"row {i}"} for i in range(300)]
    stored = {"a/1.jsonl": as_jsonl(rows), "a/2.parquet": as_parquet(rows), "a/b/3.jsonl.gz": gzip.compress(as_jsonl(rows)), "c.txt": b"x"}
    with fake_s3("bucket", stored) as options:
        assert [str(file).partition("?")[0] for file in find(f"s3://bucket/**/*.jsonl*?{options}")] == [
            "s3://bucket/a/1.jsonl",
            "s3://bucket/a/b/3.jsonl.gz",
        ]
        files = find(f"s3://bucket/a/**/*?{options}")
        assert values(files, 2000) == rows * 3
        assert [size_of(file) for file in files] == [len(data) for name, data in stored.items() if name != "c.txt"]
        with pytest.raises(DataError, match="no such file"):
            size_of(f"s3://bucket/none.txt?{options}")


def test_a_store_without_library_or_answer_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^abfs://container/a\.txt: no library for abfs:// is installed: Install adlfs"):
        size_of("abfs://container/a.txt")
    with pytest.raises(DataError, match=r"^memory://none\.txt: no such file$"):
        size_of("memory://none.txt")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match="the store does not answer or refuses; check the address, credentials and network"):
        plan_parts(["s3://bucket/a.txt?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9"], 100)
