"""Linear layers by oneDNN: numbers and gradients of torch's own, where and only where they are meant to be."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from cluster import hardware
from rlhf.cpu_kernels import LEAST, OneDnnLinear, onednn_linear, use_onednn
from rlhf.models import LanguageModel


@pytest.fixture
def vendor(monkeypatch, tmp_path):
    """Let this CPU be of another maker's."""

    def be(name: str) -> None:
        monkeypatch.setattr(hardware, "CPUS", tmp_path / "cpuinfo")
        hardware.CPUS.write_text(f"processor : 0\nvendor_id : {name}\n")
        hardware.on_amd_cpu.cache_clear()

    yield be
    hardware.on_amd_cpu.cache_clear()


@pytest.mark.parametrize("shape", [(1, 37), (5,), (1, 1), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_outputs_and_gradients_are_those_of_torch(shape: tuple[int, ...], compiled: bool) -> None:
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(*shape, 256), torch.randn(320, 256) / 16, torch.randn(*shape, 320)

    def through(linear, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear(torch.tanh(x), weight) * 2
        return [out.detach(), *torch.autograd.grad(out, (x, weight), upstream)]

    ours = torch.compile(lambda x, w: onednn_linear(x, w), dynamic=True) if compiled else onednn_linear
    for mine, theirs in zip(through(ours, x, weight), through(F.linear, x, weight), strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_lie_side_by_side() -> None:
    x, weight = torch.randn(256, 9).t(), torch.randn(256, 320).t()
    torch.testing.assert_close(onednn_linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "swapped"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_amds_cpus_alone_multiply_large_matrices_of_the_blocks_by_onednn(vendor, name: str, swapped: bool) -> None:
    vendor(name)
    sizes = {"hidden_size": 256, "intermediate_size": 320, "heads": 4, "kv_heads": 1}
    model = tiny.causal_lm(**sizes)
    names = [n for n, _ in model.named_parameters()]
    batch = tiny.batch_of(tiny.sequences([7, 12, 3]))
    wrapped = LanguageModel(model)
    found = wrapped(batch)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    large = {n for n, m in layers.items() if m.weight.numel() >= LEAST and n != "lm_head"}
    assert {n for n, m in layers.items() if isinstance(m, OneDnnLinear)} == (large if swapped else set())
    assert "model.layers.0.self_attn.k_proj" not in large, "a matrix that is too small"
    assert [n for n, _ in model.named_parameters()] == names
    twin = tiny.causal_lm(**sizes)
    vendor("GenuineIntel")
    torch.testing.assert_close(found, LanguageModel(twin)(batch), rtol=1e-4, atol=1e-4)


def test_what_is_no_plain_float_layer_stays(vendor) -> None:
    vendor("AuthenticAMD")
    model = tiny.causal_lm(hidden_size=256, intermediate_size=320)
    mlp = model.model.layers[0].mlp
    mlp.up_proj, mlp.gate_proj = torch.nn.Linear(256, 320), torch.nn.Linear(256, 320, bias=False, dtype=torch.bfloat16)
    use_onednn(model)
    assert type(mlp.up_proj) is type(mlp.gate_proj) is torch.nn.Linear
    assert type(mlp.down_proj) is OneDnnLinear
