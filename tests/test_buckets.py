"""The bucket plan as arithmetic, and fingerprints of weights. Buckets of a sharded model: tests/test_learner.py, on its two ranks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import causal_lm

from rlhf import buckets
from rlhf.buckets import Spec, gather, plan, shards, size, specs, unpack
from rlhf.fingerprints import differing, fingerprint
from rlhf.models import LanguageModel
from rlhf.recipe import Recipe
from rlhf.weight_sender import transport

DTYPES = {"float32": 4, "bfloat16": 2, "int64": 8, "uint8": 1}


@st.composite
def tensors(draw: st.DrawFn) -> list[Spec]:
    shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    kinds = draw(st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES))), max_size=20))
    return [Spec(f"layers.{i}", shape, dtype) for i, (shape, dtype) in enumerate(kinds)]


@given(tensors(), st.integers(1, 600))
def test_every_tensor_is_in_one_bucket_in_order_and_within_the_limit(some: list[Spec], limit: int) -> None:
    cut = plan(some, limit)
    assert [spec for bucket in cut for spec in bucket] == some
    for bucket in cut:
        assert bucket
        assert len(bucket) == 1 or sum(int(np.prod(s.shape)) * DTYPES[s.dtype] for s in bucket) <= limit
    for first, second in pairwise(cut):
        assert sum(s.nbytes for s in first) + second[0].nbytes > limit, "no bucket is cut too early"


@given(tensors())
def test_a_packed_bucket_unpacks_to_the_same_tensors(some: list[Spec]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {s.name: torch.randint(0, 99, s.shape, generator=generator).to(getattr(torch, s.dtype)) for s in some}
    packed = gather(weights, some, torch.empty(size(some) + 5, dtype=torch.uint8))
    assert packed.numel() == size(some) == sum(t.numel() * t.element_size() for t in weights.values())
    found = dict(unpack(packed, some))
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_floats_travel_in_the_engines_dtype() -> None:
    weights = {"w": torch.tensor([[1.0, 1 / 3]]), "n": torch.tensor([7])}
    cut = specs(weights, "bfloat16")
    assert [(s.name, s.shape, s.dtype) for s in cut] == [("w", (1, 2), "bfloat16"), ("n", (1,), "int64")]
    found = dict(unpack(gather(weights, cut, torch.empty(size(cut), dtype=torch.uint8)), cut))
    assert torch.equal(found["w"], weights["w"].bfloat16())
    assert torch.equal(found["n"], weights["n"])


def test_tied_weights_travel_once() -> None:
    model = LanguageModel(causal_lm())
    assert buckets.tied(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in shards(model)
    untied = LanguageModel(causal_lm(tie_embeddings=False))
    assert not buckets.tied(untied)
    assert "lm_head.weight" in shards(untied)


def test_a_fingerprint_shows_a_change_of_any_one_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 576) * 0.02
    ours = {"a": fingerprint(weight), "b": fingerprint(weight[0])}
    blocks = weight.double().numpy()  # the same product, summed otherwise
    signs = np.sign(fingerprint(torch.eye(576)))
    other = (blocks[:, :100] @ signs[:100] + blocks[:, 100:] @ signs[100:]).astype(np.float32)
    assert differing(ours, {"a": [other], "b": [ours["b"]]}) == []
    for row, column in ((0, 0), (17, 300), (39, 575)):
        changed = weight.clone()
        changed[row, column] += 1e-3
        assert differing(ours, {"a": [ours["a"], fingerprint(changed)], "b": [ours["b"]]}) == ["a"]
    assert differing(ours, {"a": [np.full(40, np.nan, np.float32)]}) == ["a"], "what is not there is not compared"


@pytest.mark.parametrize(
    ("policy", "rollout", "nodes", "chosen"),
    [
        (0, 0, 1, "object_store"),
        (0, 0, 3, "gloo"),
        (1, 2, 3, "nccl"),
        (1, 1, 3, "nccl"),
        (1, 0, 1, "object_store"),
        (0.5, 0.5, 1, "object_store"),
    ],
)
def test_auto_takes_what_the_hardware_has(policy: float, rollout: float, nodes: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}] * nodes + [{"Alive": False}])
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    groups = {
        "policy": {"gpus": policy},
        "reference": {"gpus": policy},
        "rollout": {"gpus": rollout, "tensor_parallel": max(1, int(rollout))},
    }
    assert transport(Recipe(name="test", data=sources, ppo={"groups": groups})) == chosen
    assert transport(Recipe(name="test", data=sources, ppo={"groups": groups, "weight_sync": "gloo"})) == "gloo"
    if policy == rollout != 0.5:  # who takes turns cannot meet in a broadcast
        for names in (["rollout", "policy"], ["rollout", "reference"]):
            assert transport(Recipe(name="test", data=sources, ppo={"groups": groups, "colocate": [names]})) == "object_store"
