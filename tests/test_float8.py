"""fp8 training: who is refused, and what torchao emulates on a CPU. The kernels themselves need a GPU."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import batch_of, causal_lm, sequences

from rlhf import preflight, recipe_file
from rlhf.adapters import with_adapter
from rlhf.errors import RecipeError
from rlhf.float8 import to_float8
from rlhf.learner import Learner
from rlhf.models import LanguageModel
from rlhf.pretrain import token_loss
from rlhf.recipe import Adapter, Pretrain

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def test_refused_without_the_hardware(recipe_path: Path) -> None:
    recipe = recipe_file.load(recipe_path, ["sft.float8=true"])
    preflight.check(recipe, ("data", "pretrain"))
    with pytest.raises(RecipeError, match=r"sft\.float8 needs GPUs: set cluster.gpus_per_worker"):
        preflight.check(recipe, ("data", "pretrain", "sft"))
    with pytest.raises(RecipeError, match=r"capability 8\.9 or newer, this is a CPU"):
        Learner(LanguageModel(causal_lm()), Pretrain(float8=True), steps=1)


def test_refused_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(RecipeError, match=r"needs torchao .*pip install"):
        to_float8(LanguageModel(causal_lm()), emulate=True)


def test_an_emulated_step() -> None:
    """Gradients near those of fp32 (three bits of mantissa: some percent), names of the weights as before, adapters left alone."""
    pytest.importorskip("torchao", reason="torchao is an extra: pip install '.[fp8]'")
    batch, lora = batch_of(sequences([9, 3, 11])), Adapter(method="lora", rank=16, alpha=16)
    plain, small, adapted = (LanguageModel(causal_lm(**SIZES)) for _ in range(3))
    with_adapter(adapted.inner, lora, seed=0)
    for model in (small, adapted):
        to_float8(model, emulate=True)
    swapped = [name for name, module in small.named_modules() if type(module).__name__ == "Float8Linear"]
    assert len(swapped) == 2 * 7
    assert all(".layers." in name for name in swapped)
    assert sum(type(m).__name__ == "Float8Linear" for m in adapted.modules()) == 2 * 7
    assert small.state_dict().keys() == plain.state_dict().keys()
    for model in (plain, small):
        token_loss(model, batch)[0].backward()
    for (name, p), q in zip(plain.named_parameters(), small.parameters(), strict=True):
        assert 1e-3 < (p.grad - q.grad).norm() / p.grad.norm() < 0.4, name
    before = [p.detach().clone() for p in small.parameters()]
    metrics = Learner(small, Pretrain(learning_rate=1e-2), steps=10).step([batch], token_loss)
    assert metrics["grad_norm"] > 0
    assert not any(torch.equal(p, q) for p, q in zip(before, small.parameters(), strict=True))


def test_sides_that_fp8_cannot_multiply_are_told() -> None:
    pytest.importorskip("torchao", reason="torchao is an extra: pip install '.[fp8]'")
    with pytest.raises(RecipeError, match="no plain matrix of the blocks"):
        to_float8(LanguageModel(causal_lm(hidden_size=24, intermediate_size=40)), emulate=True)
