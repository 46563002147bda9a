"""What is written to token shards comes back, window by window; damage is noticed."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.shards import Document, ShardWriter, TokenShards, rewritten, write_manifest


def write(folder: Path, documents: list[list[int]], shard_tokens: int = 50, vocab_size: int = 4096) -> TokenShards:
    writer = ShardWriter(folder, vocab_size=vocab_size, fingerprint="f", shard_tokens=shard_tokens)
    for number, tokens in enumerate(documents):
        writer.add(Document(number.to_bytes(16, "big"), np.array(tokens, dtype=np.uint32), text_bytes=3 * len(tokens)))
    writer.finish()
    return TokenShards(folder)


DOCUMENTS = st.lists(st.lists(st.integers(0, 4095), min_size=1, max_size=40), min_size=1, max_size=30)


@given(DOCUMENTS, st.integers(1, 200), st.integers(1, 60))
def test_windows_are_the_stream_cut_at_document_ends(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int, length: int
) -> None:
    shards = write(tmp_path_factory.mktemp("shards"), documents, shard_tokens)
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    assert shards.tokens == len(stream)
    assert shards.documents == len(documents)
    assert shards.bytes_of_text == 3 * len(stream)
    assert shards.windows(length) == len(stream) // length
    for i in range(shards.windows(length)):
        tokens, lengths = shards.window(i, length)
        expected = stream[i * length : (i + 1) * length]
        assert tokens.dtype == np.int64
        assert tokens.tolist() == [token for token, _ in expected]
        owners = [number for _, number in expected]
        assert lengths == [owners.count(number) for number in sorted(set(owners))]
        assert shards.document_ids(i * length, (i + 1) * length) == [number.to_bytes(16, "big").hex() for number in sorted(set(owners))]
    with pytest.raises(IndexError):
        shards.window(shards.windows(length), length)
    assert shards.span(0, len(stream))[0].tolist() == [token for token, _ in stream]
    with pytest.raises(IndexError):
        shards.span(0, len(stream) + 1)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_the_largest_id_fits(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    shards = write(tmp_path, [[vocab_size - 1, 0]], vocab_size=vocab_size)
    assert shards.manifest["dtype"] == dtype
    assert shards.window(0, 2)[0].tolist() == [vocab_size - 1, 0]


def test_a_half_written_folder_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=300, fingerprint="f", shard_tokens=1)
    writer.add(Document(bytes(16), np.array([1, 2]), 2))  # a whole shard is on disk, the manifest is not
    with pytest.raises(DataError, match="half-written"):
        TokenShards(tmp_path)


def test_writing_again_first_takes_the_old_manifest_away(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]])
    ShardWriter(tmp_path, vocab_size=300, fingerprint="f", shard_tokens=1)
    with pytest.raises(DataError, match="half-written"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("name", ["00000.bin", "00001.idx"])
def test_a_file_of_the_wrong_size_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, [[1] * 50, [2] * 50])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(DataError, match=name):
        TokenShards(tmp_path)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    shards = write(tmp_path, [[1] * 50, [2] * 50])
    shards.verify()
    data = bytearray((tmp_path / "00001.bin").read_bytes())
    data[7] ^= 1
    (tmp_path / "00001.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"00001\.bin.*sha256"):
        TokenShards(tmp_path).verify()


@pytest.mark.parametrize("change", [{"format": "other"}, {"tokens": 99}, {"shards": None}])
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path, [[1, 2, 3]])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="prepare the data again"):
        TokenShards(tmp_path)


def test_the_manifest_hash_follows_the_data(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / n, d) for n, d in (("a", [[1, 2]]), ("b", [[1, 2]]), ("c", [[1, 3]])))
    assert one.manifest_hash == same.manifest_hash != other.manifest_hash


@given(DOCUMENTS, st.integers(1, 60), st.data())
def test_what_is_read_only_is_counted_per_document(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int, data: st.DataObject
) -> None:
    masked = [data.draw(st.integers(0, len(document))) for document in documents]
    folder = tmp_path_factory.mktemp("masked")
    writer = ShardWriter(folder, vocab_size=4096, fingerprint="f", shard_tokens=shard_tokens)
    ids = np.array([number.to_bytes(16, "big") for number in range(len(documents))], "V16")
    lengths = np.array([len(document) for document in documents])
    writer.extend(np.concatenate(documents), lengths, ids, 0, np.array(masked))
    manifest = writer.finish()
    shards = TokenShards(folder)
    shards.verify()
    expected = [i >= n for document, n in zip(documents, masked, strict=True) for i in range(len(document))]
    assert shards.learned(0, shards.tokens).tolist() == expected
    start = data.draw(st.integers(0, shards.tokens - 1))
    stop = data.draw(st.integers(start + 1, shards.tokens))
    assert shards.learned(start, stop).tolist() == expected[start:stop]
    # a shard with nothing masked has no such file, and is the same byte by byte as it would be without
    of_shards = np.split(np.array(masked), np.cumsum([entry["documents"] for entry in manifest["shards"]])[:-1])
    assert [(folder / f"{e['name']}.mask").exists() for e in manifest["shards"]] == [bool(m.any()) for m in of_shards]
    # a document that is taken out takes its count along
    entry = rewritten(folder, manifest["shards"][0], ids[:1])
    if entry is not None:
        write_manifest(folder, [entry, *manifest["shards"][1:]], 4096, "f", 0)
        again = TokenShards(folder)
        again.verify()
        assert again.learned(0, again.tokens).tolist() == expected[len(documents[0]) :]
