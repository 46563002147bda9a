"""The two wrappers, the chunked log-probabilities, and model directories that others can open."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import batch_of, causal_lm, plain_twin, recipe_model, sequences
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from data.tokenizers import Tokenizer, from_model, train
from rlhf import fused_loss, models
from rlhf.errors import RecipeError
from rlhf.fused_loss import weighted_cross_entropy
from rlhf.model_sizes import PRESETS
from rlhf.models import (
    LanguageModel,
    ScalarModel,
    extend_vocabulary,
    load_causal_lm,
    load_critic,
    load_reward_model,
    log_probs,
    new_causal_lm,
    save_model,
)
from rlhf.recipe import Model

VOCAB = 261  # 256 bytes and 5 special tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["one word is not much of a text"], VOCAB)


@pytest.fixture
def directory(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A saved causal LM."""
    model = causal_lm(vocab_size=VOCAB)
    save_model(model, _state(model), tokenizer, tmp_path / "lm")
    return tmp_path / "lm"


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As `learner.full_weights` gives it: tied tensors once."""
    tied = set(model.all_tied_weights_keys)
    return {name: t for name, t in model.state_dict().items() if name not in tied}


# ---------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 4, 5, 6, 23])
def test_chunks_change_neither_value_nor_gradient(rows: int, temperature: float, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own operations where the layer has a bias, by ours where it is a matrix; logits that are kept, and computed again."""
    monkeypatch.setattr(models, "LOGITS", 5 * 64)
    monkeypatch.setattr(fused_loss, "LOGITS_OF_CPU", 3 * 64)
    torch.manual_seed(rows)
    head = torch.nn.Linear(8, 64, bias=bias)
    hidden, targets, weight = torch.randn(rows, 8, requires_grad=True), torch.randint(64, (rows,)), torch.randn(rows)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        found = log_probs(hidden, head, targets, temperature)
    (found * weight).sum().backward()
    gradients = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None

    full = F.log_softmax(head(hidden) / temperature, dim=-1)[torch.arange(rows), targets]
    (full * weight).sum().backward()
    assert max(kept) <= max(5 * 64, 8 * 64)  # the layer itself
    torch.testing.assert_close(found, full, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients[0], hidden.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients[1], head.weight.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(log_probs(hidden, head, targets, temperature), found)


@pytest.mark.parametrize("rows", [0, 1, 5, 23])
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_fused_cross_entropy_is_the_weighted_sum_of_log_probs(
    rows: int, learns: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradients, in chunks of 5 rows, with the factor that the learner puts before them."""
    monkeypatch.setattr(fused_loss, "LOGITS_OF_CPU", 5 * 64)
    torch.manual_seed(rows)
    hidden, table = torch.randn(rows, 8, requires_grad=learns[0]), torch.randn(64, 8, requires_grad=learns[1])
    targets, weights = torch.randint(64, (rows,)), torch.randn(rows)
    found = weighted_cross_entropy(hidden, table, targets, weights)
    (found * 0.3).backward()
    gradients = [x.grad for x in (hidden, table)]
    hidden.grad = table.grad = None
    expected = -(F.log_softmax(hidden @ table.T, -1)[torch.arange(rows), targets] * weights).sum()
    (expected * 0.3).backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    for ours, theirs in zip(gradients, (hidden.grad, table.grad), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_summed_is_the_sum_whatever_the_output_layer(bias: bool) -> None:
    """One with a bias, or with an adapter in it, takes the plain way."""
    model = LanguageModel(causal_lm(tie_embeddings=False))
    head = torch.nn.Linear(32, 64, bias=bias)
    model.inner.set_output_embeddings(head)
    tokens = sequences([6, 2, 9])
    batch = batch_of(tokens, [np.linspace(0, 1, len(t), dtype=np.float32) for t in tokens])
    summed = model(batch, summed=True)
    summed.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = -(model(batch) * batch.weights).sum()
    plain.backward()
    torch.testing.assert_close(summed, plain)
    for ours, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [0, 3, 5, 12])
def test_entropy_beside_the_log_probs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """-sum p log p of the distribution at the temperature, its gradient too; no logits outlive the forward pass, even of one chunk."""
    monkeypatch.setattr(models, "LOGITS", 5 * 64)
    torch.manual_seed(rows)
    head = torch.nn.Linear(8, 64, bias=False)
    hidden, targets, weight = torch.randn(rows, 8, requires_grad=True), torch.randint(64, (rows,)), torch.randn(rows, 2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        found = log_probs(hidden, head, targets, 0.7, entropy=True)
    assert found.shape == (rows, 2)
    assert max(kept, default=0) < max(1, min(rows, 5)) * 64
    (gradient,) = torch.autograd.grad((found * weight).sum(), hidden)

    log_p = F.log_softmax(head(hidden) / 0.7, dim=-1)
    full = torch.stack([log_p[torch.arange(rows), targets], -(log_p.exp() * log_p).sum(-1)], 1)
    torch.testing.assert_close(found, full, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad((full * weight).sum(), hidden)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_rows_no_log_probs(with_gradient: bool) -> None:
    """A rank may be idle: its micro-batch counts nothing, but its backward pass must still take place."""
    hidden = torch.zeros(0, 8, requires_grad=with_gradient)
    head = torch.nn.Linear(8, 64)
    found = log_probs(hidden, head, torch.zeros(0, dtype=torch.int64), 1.0)
    assert found.shape == (0,)
    if with_gradient:
        found.sum().backward()
        assert head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("rows", [4, 2048])
@pytest.mark.parametrize("tie", [True, False])
def test_language_model_equals_plain_transformers(tie: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LOGITS", rows * 64)
    model = causal_lm(tie_embeddings=tie)
    tokens = sequences([6, 2, 9])
    weights = [(t % 3 > 0).astype("float32") for t in tokens]
    batch = batch_of(tokens, weights)
    found = LanguageModel(model)(batch)
    found.sum().backward()

    twin, expected = plain_twin(model), []
    for t, w in zip(tokens, weights, strict=True):
        logits = twin(input_ids=torch.from_numpy(t)[None]).logits[0]
        one = F.log_softmax(logits[:-1], dim=-1)[torch.arange(len(t) - 1), torch.from_numpy(t[1:])]
        expected.append(one[torch.from_numpy(w[1:]) > 0])
    torch.cat(expected).sum().backward()
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)
    assert len(batch.rows) == len(batch.weights) == len(found)


def test_same_seed_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in new_causal_lm(recipe_model(), 64, 0, seed).parameters()])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("tie", [True, False])
def test_plain_transformers_opens_what_we_save(tie: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = causal_lm(vocab_size=VOCAB, tie_embeddings=tie)
    save_model(model, _state(model), tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not theirs.config._attn_implementation.startswith("roundhouse")
    tokens = sequences([9], vocab_size=VOCAB)[0]
    with torch.no_grad():
        expected = plain_twin(model)(input_ids=torch.from_numpy(tokens)[None]).logits
        torch.testing.assert_close(theirs(input_ids=torch.from_numpy(tokens)[None]).logits, expected, atol=1e-5, rtol=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_turn

    theirs_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs_tokenizer("a word, ünïcödé").input_ids == tokenizer.encode("a word, ünïcödé")
    assert theirs_tokenizer.chat_template
    again = load_causal_lm(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(LanguageModel(again)(batch_of([tokens])), LanguageModel(model)(batch_of([tokens])), atol=1e-5, rtol=1e-5)


def test_a_new_reward_model_starts_at_zero(directory: Path) -> None:
    rewards = ScalarModel(load_reward_model(directory))(batch_of(sequences([4, 7], vocab_size=VOCAB)))
    assert rewards.shape == (11,)
    assert rewards.abs().max() == 0


def test_critic_takes_over_the_reward_models_head(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    reward = load_reward_model(directory)
    with torch.no_grad():
        reward.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_model(reward, reward.state_dict(), tokenizer, tmp_path / "reward")
    batch = batch_of(sequences([4, 7], vocab_size=VOCAB))
    again, critic = load_reward_model(tmp_path / "reward"), load_critic(tmp_path / "reward")
    with torch.no_grad():
        expected = ScalarModel(reward)(batch)
        assert expected.std() > 0.1
        assert torch.equal(critic.score.weight, reward.score.weight)
        torch.testing.assert_close(ScalarModel(again)(batch), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ScalarModel(critic)(batch), expected, atol=1e-5, rtol=1e-5)


def test_an_ensembles_heads_differ_by_seed_and_a_critic_is_their_mean(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    reward = load_reward_model(directory, heads=3, seed=1)
    heads = reward.score.weight
    assert torch.equal(heads, load_reward_model(directory, heads=3, seed=1).score.weight)  # on every rank
    assert not torch.equal(heads, load_reward_model(directory, heads=3, seed=2).score.weight)
    assert torch.linalg.matrix_rank(heads) == 3
    save_model(reward, reward.state_dict(), tokenizer, tmp_path / "reward")
    batch = batch_of(sequences([4, 7], vocab_size=VOCAB))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    again, critic = load_reward_model(tmp_path / "reward"), load_critic(tmp_path / "reward")
    assert (theirs.config.num_labels, again.num_labels, critic.num_labels, tuple(critic.score.weight.shape)) == (3, 3, 1, (1, 32))
    with torch.no_grad():
        each = ScalarModel(again)(batch, each_head=True)
        assert each.shape == (11, 3)
        assert each.std(1).min() > 1e-3
        torch.testing.assert_close(each, ScalarModel(reward)(batch, each_head=True))
        torch.testing.assert_close(ScalarModel(again)(batch), each.mean(1))
        torch.testing.assert_close(ScalarModel(critic)(batch), each.mean(1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(theirs(batch.tokens[None, :4]).logits[0], each[3], atol=1e-5, rtol=1e-5)


def test_missing_weights_are_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"lm: weights are missing: .*layers\.1\.mlp\.up_proj"):
        load_reward_model(directory)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_parameters_of_its_name(preset: str) -> None:
    """With the vocabulary of the family it comes from; counted without a byte of memory."""
    million = float(preset[:-1]) * {"m": 1, "b": 1000}[preset[-1]]
    vocab = 4096 if million < 100 else 49152 if preset in ("135m", "360m", "1.7b") else 128256
    with torch.device("meta"):
        model = new_causal_lm(Model(preset=preset), vocab, end_of_text=0, seed=0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, rel=0.08 if preset != "1b" else 0.25)


def test_a_size_beside_a_preset_counts_more() -> None:
    model = Model(preset="135m", layers=3)
    assert (model.layers, model.hidden_size, model.kv_heads) == (3, 576, 3)
    assert Model.model_validate(model.model_dump()) == model


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_as_the_mean_of_what_spelled_them(tied: bool, directory: Path) -> None:
    old = from_model(directory)
    new = old.extended(["locomotive", "steam"])
    model = causal_lm(vocab_size=VOCAB, tie_embeddings=tied)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    extend_vocabulary(model, old, new)
    assert model.config.vocab_size == VOCAB + 2
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = model.state_dict()[name]
        torch.testing.assert_close(table[:VOCAB], before[name], atol=0, rtol=0)
        for token, piece in ((VOCAB, "locomotive"), (VOCAB + 1, "steam")):
            torch.testing.assert_close(table[token], before[name][old.encode(piece)].mean(0))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
