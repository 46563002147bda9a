"""LoRA against peft's own model on unpacked rows, what is saved, resuming, and noise on embeddings; test_prefix.py is P-tuning's."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import batch_of, causal_lm, plain_twin, sequences
from torch.distributed.checkpoint import FileSystemReader

from cluster import checkpoints
from data.tokenizers import train
from rlhf.adapters import add_noise, save_merged, with_adapter
from rlhf.errors import RecipeError
from rlhf.learner import Learner, full_weights
from rlhf.models import LanguageModel, hidden_states, load_causal_lm
from rlhf.pretrain import token_loss
from rlhf.recipe import Adapter, Optimizer

LORA = Adapter(method="lora", rank=4, alpha=8)
PREFIX = Adapter(method="p_tuning_v2", virtual_tokens=5)
CONFIG = Optimizer(learning_rate=2e-2, weight_decay=0.0)


def text(step: int) -> list[np.ndarray]:
    """Easy rows of 5 to 12 tokens: each counts on from a random start."""
    rng = np.random.default_rng(step)
    return [(rng.integers(0, 9) + np.arange(n)) % 9 for n in rng.integers(5, 12, 8)]


def learner(adapter: Adapter = LORA, steps: int = 20) -> Learner:
    return Learner(LanguageModel(with_adapter(causal_lm(), adapter, seed=1)), CONFIG, steps)


def learns(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_pefts_own_row_by_row() -> None:
    rows = sequences([9, 3, 12, 7])
    ours = LanguageModel(with_adapter(causal_lm(), LORA, seed=1))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    theirs = get_peft_model(plain_twin(causal_lm()), config)
    adapters = {name.removeprefix("inner."): p for name, p in ours.named_parameters() if p.requires_grad}
    of_theirs = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert adapters.keys() == of_theirs.keys()
    assert len(adapters) == 2 * 7 * 2  # A and B of the seven matrices of two blocks, and not of the output layer
    with torch.no_grad():
        for name, p in adapters.items():
            if ".lora_B." in name:
                p.normal_(std=0.1)
            of_theirs[name].copy_(p)
    token_loss(ours, batch_of(rows))[0].backward()
    for row in map(torch.from_numpy, rows):
        F.cross_entropy(theirs(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum").backward()
    for name, p in adapters.items():
        expected = of_theirs[name].grad
        assert (p.grad - expected).norm() < 1e-5 * expected.norm(), name


def test_adapter_opens_in_peft_and_equals_the_merged_model(tmp_path: Path) -> None:
    tokenizer = train(["one word is not much of a text"], vocab_size=261)
    causal_lm(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path / "base")
    trained = Learner(LanguageModel(with_adapter(load_causal_lm(tmp_path / "base"), LORA, seed=1)), CONFIG, 5)
    for step in range(5):
        trained.step([batch_of(text(step))], token_loss)
    state = full_weights(trained.model)
    save_merged(tmp_path / "base", trained.model.inner, state, tokenizer, tmp_path / "model")
    batch = batch_of(sequences([6, 9]))
    trained.model.eval()
    with torch.no_grad():
        expected = trained.model(batch)
        merged = LanguageModel(load_causal_lm(tmp_path / "model"))(batch)
        plain = PeftModel.from_pretrained(load_causal_lm(tmp_path / "base"), tmp_path / "adapter").eval()
        opened = LanguageModel(plain.base_model.model)(batch)
        base = LanguageModel(load_causal_lm(tmp_path / "base"))(batch)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(opened, expected, atol=1e-6, rtol=0)
    assert (base - expected).abs().max() > 1e-2
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_learns_and_leaves_the_base_alone() -> None:
    trained = learner()
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters() if not p.requires_grad}
    held_out = batch_of(text(1000))
    first = trained.evaluate([held_out], token_loss)
    for step in range(20):
        trained.step([batch_of(text(step))], token_loss)
    last = trained.evaluate([held_out], token_loss)
    assert last["loss"] < 0.5 * first["loss"]
    assert all(torch.equal(p, before[name]) for name, p in trained.model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("adapter", [LORA.model_copy(update={"dropout": 0.2}), PREFIX], ids=lambda adapter: adapter.method)
def test_resumes_to_the_same_bytes_from_a_checkpoint_of_the_adapter_alone(adapter: Adapter, tmp_path: Path) -> None:
    def run(trained: Learner, steps: range) -> Learner:
        for step in steps:
            torch.manual_seed(step)
            trained.step([batch_of(text(step))], token_loss)
        return trained

    whole = run(learner(adapter), range(6))
    run(learner(adapter), range(3)).save(tmp_path, 3)
    resumed = learner(adapter)
    resumed.load(tmp_path, 3)
    run(resumed, range(3, 6))
    expected = learns(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in learns(resumed.model).items())
    written = FileSystemReader(next(tmp_path.glob("step_*"))).read_metadata().state_dict_metadata
    assert {name for name in written if name.startswith("model.")} - {"model.inner.lm_head.weight"} == {
        f"model.{name}" for name in expected
    }
    assert checkpoints.steps(tmp_path) == {3}


def test_four_bits(tmp_path: Path) -> None:
    """The adapter's gradients are those of LoRA beside the rounded matrices; checkpoint, merged model and resume as for LoRA."""
    tokenizer = train(["one word is not much of a text"], vocab_size=261)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 261}
    causal_lm(**sizes).save_pretrained(tmp_path / "base")
    four = LORA.model_copy(update={"method": "qlora"})

    def start(adapter: Adapter = four) -> Learner:
        return Learner(LanguageModel(with_adapter(load_causal_lm(tmp_path / "base"), adapter, seed=1)), CONFIG, 6)

    small, rounded = start(), start(LORA)
    own = sum(p.numel() * p.element_size() for name, p in small.model.named_parameters() if ".base_layer." in name)
    assert own < 0.13 * sum(p.numel() * 4 for name, p in rounded.model.named_parameters() if ".base_layer." in name)
    with torch.no_grad():
        for name, layer in small.model.named_modules():
            if name.endswith(".base_layer"):
                exact = rounded.model.get_submodule(name).weight
                dequantised = dequantize_4bit(layer.weight, layer.weight.quant_state)
                assert 0.01 < (dequantised - exact).norm() / exact.norm() < 0.15
                exact.copy_(dequantised)
    for each in (small, rounded):
        token_loss(each.model, batch_of(text(0)))[0].backward()
    for (name, p), (_, q) in zip(small.model.named_parameters(), rounded.model.named_parameters(), strict=True):
        if p.requires_grad:
            assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name

    def run(trained: Learner, steps: range) -> Learner:
        for step in steps:
            trained.step([batch_of(text(step))], token_loss)
        return trained

    whole = run(start(), range(6))
    run(start(), range(3)).save(tmp_path / "c", 3)
    resumed = start()
    resumed.load(tmp_path / "c", 3)
    run(resumed, range(3, 6))
    expected = learns(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in learns(resumed.model).items())
    save_merged(tmp_path / "base", whole.model.inner, full_weights(whole.model), tokenizer, tmp_path / "model")
    assert load_causal_lm(tmp_path / "model").dtype == torch.float32


def test_unknown_targets_are_named() -> None:
    with pytest.raises(RecipeError, match="no_such_layer"):
        with_adapter(causal_lm(), LORA.model_copy(update={"targets": ["no_such_layer"]}), seed=0)


def test_noise_reaches_as_far_as_its_segment_says() -> None:
    model = causal_lm()
    embed = model.get_input_embeddings().weight.detach()
    batch = batch_of(sequences([4, 25]))
    seen = []
    add_noise(model, alpha=5.0)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    model.train()
    hidden_states(model, batch)
    noise = (seen[0] - embed[batch.tokens]).abs()
    for part, length in ((noise[:4], 4), (noise[4:], 25)):
        reach = 5.0 / (length * embed.shape[1]) ** 0.5
        assert part.max() <= reach * 1.0001
        assert part.mean() == pytest.approx(reach / 2, rel=0.2)
    model.eval()
    hidden_states(model, batch)
    assert torch.equal(seen[1], embed[batch.tokens])


SHARDED = (LORA, LORA.model_copy(update={"method": "qlora"}), PREFIX)


def two_ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for adapter in SHARDED:
            trained = learner(adapter, steps=4)
            for step in range(4):
                trained.step([batch_of(text(step)[4 * rank : 4 * rank + 4])], token_loss)
            state = full_weights(trained.model)
            if rank == 0:
                torch.save({name: t for name, t in state.items() if ".lora_" in name or "prompt_" in name}, folder / f"{adapter.method}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_shard_frozen_and_trained_weights_and_equal_one(tmp_path: Path) -> None:
    mp.spawn(two_ranks, args=(tmp_path,), nprocs=2)
    for adapter in SHARDED:
        alone = learner(adapter, steps=4)
        for step in range(4):
            alone.step([batch_of(text(step))], token_loss)
        expected, found = learns(alone.model), torch.load(tmp_path / f"{adapter.method}.pt", weights_only=True)
        assert {f"inner.{name}" for name in found} == expected.keys()
        for name, t in found.items():
            # Adam's first steps have the size of the rate whatever the gradient's: where that is near 0, rounding chooses the sign.
            assert (expected[f"inner.{name}"] - t).norm() <= 2e-3 * t.norm() + 1e-6, (adapter.method, name)
