"""P-tuning v2 against peft's own model on unpacked rows, what is saved, what a run refuses, and talking to it."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import CPU, batch_of, causal_lm, plain_twin, sequences
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from data.packing import Sample, pack
from data.tokenizers import load as load_tokenizer
from data.tokenizers import train
from rlhf import attention, preflight, recipe_file
from rlhf.adapters import PREFIX, save_prefix, with_adapter
from rlhf.artefacts import STAGES
from rlhf.attention import PACKED, Segments
from rlhf.chat import Turn, find_model, load
from rlhf.errors import RecipeError
from rlhf.learner import Learner, full_weights
from rlhf.models import Batch, LanguageModel, hidden_states, load_causal_lm, save_model
from rlhf.pretrain import token_loss
from rlhf.recipe import Adapter, Optimizer, Recipe
from rlhf.sft import task
from rlhf.training import worker

ADAPTER = Adapter(method="p_tuning_v2", virtual_tokens=5)
CONFIG = Optimizer(learning_rate=0.1, weight_decay=0.0)


def ours_and_pefts(model: PreTrainedModel) -> tuple[PreTrainedModel, PeftModel]:
    """The same base and the same prefix: packed, and as peft gives it to transformers."""
    theirs = get_peft_model(plain_twin(model), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    ours = with_adapter(model, ADAPTER, seed=1)
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(ours.get_parameter(PREFIX))
    return ours.eval(), theirs.eval()


def gpt2() -> PreTrainedModel:
    """Learned positions, and the attention of another file."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_implementation=PACKED))


@pytest.mark.parametrize("model", [causal_lm, gpt2])
@pytest.mark.parametrize("lengths", [[9, 3, 12, 7], [6, 6, 6], [1]])  # one call per piece; one for all
def test_logits_and_gradients_are_pefts_own_row_by_row(model, lengths: list[int]) -> None:
    ours, theirs = ours_and_pefts(model())
    rows = sequences(lengths)
    logits = ours.get_output_embeddings()(hidden_states(ours, batch_of(rows)))
    expected = torch.cat([theirs(input_ids=torch.from_numpy(row)[None]).logits[0] for row in rows])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    found, wanted = ours.get_parameter(PREFIX).grad, theirs.prompt_encoder.default.embedding.weight.grad
    assert found.norm() > 0
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
    learns = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert learns == {PREFIX}
    assert all(p.grad is None for name, p in ours.named_parameters() if name != PREFIX)


def answers_to_one_prompt() -> tuple[Batch, list[torch.Tensor]]:
    """Prompts with two answers each, and the same texts as rows."""
    rng = np.random.default_rng(0)
    shared, rows = [], []
    for prompt, *answers in ([20, 8, 8], [4, 9, 9], [6, 3, 5]):
        texts = [rng.integers(0, 64, n) for n in (prompt, *answers)]
        tokens = np.concatenate(texts)
        shared.append(Sample(tokens, np.ones(len(tokens), np.float32), lengths=[prompt, *answers], prefix=True))
        rows += [torch.from_numpy(np.concatenate([texts[0], text])) for text in texts[1:]]
    return Batch.of(pack(shared), CPU), rows


@pytest.mark.parametrize("most_waste", [0.0, 2.2, 100.0])  # in pieces; some in one call; all
def test_answers_see_the_prefix_the_prompt_and_themselves(most_waste: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_WASTE", most_waste)
    ours, theirs = ours_and_pefts(causal_lm())
    batch, rows = answers_to_one_prompt()
    found = ours.lm_head(hidden_states(ours, batch))
    expected = [theirs(input_ids=row[None]).logits[0] for row in rows]
    ends = batch.segments.ends.tolist()
    for i, of_row in enumerate(expected):
        answer = 3 * (i // 2) + 1 + i % 2
        torch.testing.assert_close(found[ends[answer] : ends[answer + 1]], of_row[-batch.segments.lengths[answer] :], atol=1e-5, rtol=1e-5)


def test_the_gpu_path_gathers_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself needs a GPU. In its place: what its documentation says it computes, by a loop over the segments."""

    def loop(q, k, v, ends, key_ends, longest, most_keys, *, scale, window_size, enable_gqa):
        outs = []
        for a, b, c, d in zip(ends[:-1], ends[1:], key_ends[:-1], key_ends[1:], strict=True):
            assert b - a <= longest
            assert d - c <= most_keys
            qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))
            outs.append(F.scaled_dot_product_attention(qs, ks, vs, mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", loop)
    torch.manual_seed(0)
    lengths = [4, 3, 5, 6, 1]
    q, k, v = torch.randn(1, 4, 19, 8), torch.randn(1, 2, 19, 8), torch.randn(1, 2, 19, 8)
    virtual = (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    for given, prefixes in product(((), virtual), ([-1, 0, 0, -1, 3], [-1, 0, 1, 1, 0])):
        on_cpu = Segments.of(lengths, CPU, prefixes, [given] if given else ())
        keys, key_ends = attention._gathered(prefixes, on_cpu.ends.tolist(), 3 if given else 0)
        on_gpu = Segments(tuple(lengths), tuple(prefixes), on_cpu.ends, (), keys, key_ends, on_cpu.virtual)
        expected, _ = attention.packed_attention(SimpleNamespace(layer_idx=0), q, k, v, None, segments=on_cpu)
        torch.testing.assert_close(attention._varlen(q, k, v, on_gpu, given, None), expected, atol=1e-5, rtol=1e-5)


def test_a_sliding_window_counts_all_keys() -> None:
    q, k = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8)
    module = SimpleNamespace(layer_idx=0)
    for virtual, prefixes in (((k[:, :, :3], k[:, :, :3]),), ()), ((), (-1, 0)):
        segments = Segments.of([4, 4], CPU, prefixes, virtual)
        attention.packed_attention(module, q, k, k, None, segments=segments, sliding_window=segments.most_keys)
        with pytest.raises(RecipeError, match="sliding window"):
            attention.packed_attention(module, q, k, k, None, segments=segments, sliding_window=segments.most_keys - 1)


def counting(step: int, by: list[int]) -> list[np.ndarray]:
    """Rows of four tokens that count on from a random start, each in steps of one of `by`."""
    rng = np.random.default_rng(step)
    return [(rng.integers(0, 9) + rng.choice(by) * np.arange(4)) % 9 for _ in range(24)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base learned to count, half of its rows in steps of 1 and half of 3; a prefix then learned to count in steps of 3."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train(["one word is not much of a text"], vocab_size=261)
    base = Learner(LanguageModel(causal_lm(vocab_size=261)), Optimizer(learning_rate=1e-2), 100)
    for step in range(100):
        base.step([batch_of(counting(step, [1, 3]))], token_loss)
    save_model(base.model.inner, full_weights(base.model), tokenizer, folder / "pretrain" / "model")
    trained = Learner(LanguageModel(with_adapter(base.model.inner, ADAPTER, seed=1)), CONFIG, 40)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    for step in range(40):
        trained.step([batch_of(counting(step, [3]))], token_loss)
    moved = {name for name, p in trained.model.named_parameters() if not torch.equal(p, before[name])}
    held_out = trained.evaluate([batch_of(counting(1000, [3]))], token_loss)
    save_prefix(trained.model.inner, full_weights(trained.model), tokenizer, folder / "sft" / "model")
    for stage in ("pretrain", "sft"):
        (folder / stage / "manifest.json").write_text(json.dumps({"stage": stage}))
    with torch.no_grad():
        logits = trained.model.inner.lm_head(hidden_states(trained.model.inner, batch_of(sequences([7, 9]))))
    torch.save((moved, held_out, logits), folder / "seen.pt")
    return folder


def test_learns_and_leaves_the_base_alone(run_dir: Path) -> None:
    moved, held_out, _ = torch.load(run_dir / "seen.pt")
    assert moved == {f"inner.{PREFIX}"}
    loss, _ = token_loss(LanguageModel(load_causal_lm(run_dir / "pretrain" / "model")), batch := batch_of(counting(1000, [3])))
    assert loss / batch.weights.sum() > 0.2  # nobody can know more than ln 2 / 3 = 0.23 about both kinds of rows
    assert held_out["loss"] / held_out["count"] < 0.1


def test_adapter_opens_in_peft(run_dir: Path) -> None:
    adapter = run_dir / "sft" / "adapter"
    assert not (run_dir / "sft" / "model").exists()
    assert load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"].shape == (5, 2 * 2 * 16)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run_dir / "pretrain" / "model"), adapter).eval()
    _, _, expected = torch.load(run_dir / "seen.pt")
    with torch.no_grad():
        found = torch.cat([opened(input_ids=torch.from_numpy(row)[None]).logits[0] for row in sequences([7, 9])])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_chat_stands_behind_the_prefix(run_dir: Path) -> None:
    """Greedy answers are those of peft's own generation; the virtual tokens take room."""
    assert find_model(run_dir) == ("sft", run_dir / "sft" / "adapter")
    talker = load(run_dir, temperature=0, max_tokens=12)
    "".join(talker.say("a"))
    assert len(talker.turns[0].answer) > 0
    opened = PeftModel.from_pretrained(talker.model, run_dir / "sft" / "adapter").eval()
    ids = torch.tensor([talker.prompt([Turn("a")])])
    for token in talker.turns[0].answer:
        with torch.no_grad():
            logits = opened(input_ids=ids).logits[0, -1, : talker.tokenizer.vocab_size]
        assert token == int(logits.argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    with pytest.raises(RecipeError, match=r"room for 47"):  # of 64
        "".join(talker.say("x" * 100))
    assert load(run_dir, "pretrain").prefix() is None


class Counting:
    """What the sft stage reads of `Examples`, in memory."""

    manifest_hash = "counting"

    def __init__(self, folder: Path, split: str) -> None:
        self.rows = counting(0 if split == "train" else 1, [3])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"tokens": self.rows[i], "mask": np.ones(4, np.float32)}

    def lengths(self, column: str) -> np.ndarray:
        return np.full(len(self.rows), 4)

    def source(self, i: int) -> list[str]:
        return [f"row {i}"]


def test_the_stage_leaves_an_adapter_and_no_model(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.sft.Examples", Counting)
    load_tokenizer(run_dir / "pretrain" / "model").save(tmp_path / "data" / "tokenizer")
    (tmp_path / "sft").mkdir()
    sft = {"adapter": ADAPTER.model_dump(), "epochs": 10, "global_batch": 8, "learning_rate": 0.1, "weight_decay": 0.0}
    unused = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    recipe = Recipe.model_validate({"name": "t", "data": unused, "sft": sft}).model_dump(mode="json")
    inputs = {"data": str(tmp_path / "data"), "pretrain": str(run_dir / "pretrain")}
    reports: list[dict[str, Any]] = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        worker({"stage": "sft", "task": task, "recipe": recipe, "inputs": inputs, "out": str(tmp_path / "sft")}, reports.append)
    finally:
        dist.destroy_process_group()
    assert reports[-1]["results"]["val_loss"] < 0.1
    assert {file.name for file in (tmp_path / "sft" / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "sft" / "model").exists()


def test_checkpointed_activations_change_nothing() -> None:
    found = []
    for how in ("none", "full"):
        config = CONFIG.model_copy(update={"activation_checkpointing": how})
        learner = Learner(LanguageModel(with_adapter(causal_lm(), ADAPTER, seed=1)), config, 5)
        learner.model.train()
        token_loss(learner.model, batch_of(sequences([9, 3, 12])))[0].backward()
        found.append(learner.model.inner.get_parameter(PREFIX).grad)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_a_recipe_with_a_prefix_ends_after_sft(recipe_path: Path) -> None:
    recipe = recipe_file.load(recipe_path, ["sft.adapter.method=p_tuning_v2"])
    preflight.check(recipe, ("data", "pretrain", "sft"))
    with pytest.raises(RecipeError, match="cannot be merged into the model, so reward has none to start from; end with --until sft"):
        preflight.check(recipe, tuple(STAGES))
    with pytest.raises(RecipeError, match="so evaluate has none"):
        preflight.check(recipe, ("evaluate",))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["method=p_tuning_v2", "rank=4"], "sft.adapter.rank would have no effect: sft.adapter.method is p_tuning_v2"),
        (["method=lora", "virtual_tokens=4"], "sft.adapter.virtual_tokens would have no effect: sft.adapter.method is lora"),
        (["rank=4"], "sft.adapter.rank would have no effect: sft.adapter.method is none"),
        (["method=p_tuning_v2", "virtual_tokens=300"], "sft.max_tokens + sft.adapter.virtual_tokens = 556 is longer than"),
        (["method=p_tuning_v2", "virtual_tokens=0"], "sft.adapter.virtual_tokens should be greater than or equal to 1"),
    ],
)
def test_keys_without_effect_and_limits(recipe_path: Path, overrides: list[str], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(recipe_path, [f"sft.adapter.{o}" for o in overrides])
    assert complaint in str(caught.value)
