"""Bits per byte: every token of the held-out text is counted once, whatever the window."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packing import pack
from data.shards import Document, ShardWriter, TokenShards
from rlhf.curriculum import windows
from rlhf.models import Batch
from rlhf.pretrain import bits_per_byte, every_token, token_loss

DOCUMENTS = st.lists(st.lists(st.integers(1, 255), min_size=1, max_size=40), min_size=1, max_size=8)
PREDICTABLE = DOCUMENTS.filter(lambda documents: any(len(document) > 1 for document in documents))


def shards_of(folder: Path, documents: list[list[int]]) -> TokenShards:
    writer = ShardWriter(folder, vocab_size=256, fingerprint="f", shard_tokens=50)
    for number, tokens in enumerate(documents):
        writer.add(Document(number.to_bytes(16, "big"), np.array(tokens), text_bytes=2 * len(tokens)))
    writer.finish()
    return TokenShards(folder)


class Uniform(torch.nn.Module):
    """Gives each of 256 tokens the same probability: 8 bits per token, in whatever window."""

    def forward(self, batch: Batch, summed: bool = False) -> torch.Tensor:
        log_probs = torch.full((len(batch.rows),), -math.log(256))
        return -(log_probs * batch.weights).sum() if summed else log_probs


@given(PREDICTABLE, st.integers(2, 60))
def test_a_uniform_model_takes_eight_bits_for_every_token(tmp_path_factory, documents, length):
    shards = shards_of(tmp_path_factory.mktemp("shards"), documents)
    units, sums, predicted = every_token(shards, length), {"loss": 0.0, "count": 0.0}, []
    for i in range(len(units.lengths)):
        batch = Batch.of(pack(units.get(i)), torch.device("cpu"))
        sums["loss"] += float(token_loss(Uniform(), batch)[0])
        sums["count"] += float(batch.weights.sum())
        predicted += batch.tokens[batch.rows].tolist()
    assert sum(units.lengths[i] == len(units.get(i)[0].tokens) for i in range(len(units.lengths))) == len(units.lengths)
    assert sums["count"] == sum(len(document) - 1 for document in documents)
    assert predicted == [token for document in documents for token in document[1:]]
    assert bits_per_byte(sums, shards)["val_bits_per_byte"] == pytest.approx(4.0, rel=1e-5)  # 2 bytes per token


def test_training_windows_do_not_overlap(tmp_path):
    shards = shards_of(tmp_path, [list(range(1, 101))])
    units = windows(shards, 32)
    assert [unit for i in range(3) for unit in units.get(i)[0].tokens.tolist()] == list(range(1, 97))
    assert len(units.lengths) == 3
