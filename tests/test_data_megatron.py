"""Exported shards say the same to a reader that knows Megatron's format only from its description."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import megatron
from data.shards import Document, ShardWriter, TokenShards


def read(prefix: Path) -> tuple[str, list[list[int]], list[int]]:
    """(type of the tokens, the sequences, document marks)."""
    index, stream = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, sequences, marks = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    kind, size = {4: ("int32", 4), 8: ("uint16", 2)}[code]
    at = 34
    lengths = struct.unpack_from(f"<{sequences}i", index, at)
    pointers = struct.unpack_from(f"<{sequences}q", index, at + 4 * sequences)
    documents = struct.unpack_from(f"<{marks}q", index, at + 12 * sequences)
    assert len(index) == at + 12 * sequences + 8 * marks
    found = [
        list(struct.unpack_from(f"<{length}{'H' if size == 2 else 'i'}", stream, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    assert len(stream) == size * sum(lengths)
    return kind, found, list(documents)


@pytest.mark.parametrize(("vocab_size", "kind"), [(65536, "uint16"), (65537, "int32"), (200_024, "int32")])
@settings(max_examples=15)
@given(data=st.data())
def test_every_document_is_a_sequence(tmp_path_factory: pytest.TempPathFactory, vocab_size: int, kind: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("shards")
    ids = st.lists(st.integers(0, vocab_size - 1) | st.just(vocab_size - 1), min_size=1, max_size=30)
    documents = data.draw(st.lists(ids, min_size=1, max_size=12))
    writer = ShardWriter(folder / "train", vocab_size=vocab_size, fingerprint="f", shard_tokens=40)
    for i, tokens in enumerate(documents):
        writer.add(Document(bytes([i]) * 16, np.array(tokens), 1))
    writer.finish()
    shards = TokenShards(folder / "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "PIECE", 7)
        assert megatron.export(shards, folder / "out" / "train") == (len(documents), sum(map(len, documents)))
    assert read(folder / "out" / "train") == (kind, documents, list(range(len(documents) + 1)))
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["train.bin", "train.idx"]
