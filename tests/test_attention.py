"""A packed row must give every segment what it would get alone, in plain transformers."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import CPU, batch_of, causal_lm, plain_twin, sequences
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from data.packing import Sample, pack
from rlhf.attention import PACKED, Segments
from rlhf.models import Batch, LanguageModel, hidden_states


def packed_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model.get_output_embeddings()(hidden_states(model, batch))


def one_by_one(model: torch.nn.Module, tokens: list) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.from_numpy(t)[None]).logits[0] for t in tokens])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5, 1, 9, 3], [4, 4, 4], [1, 1], [12]])
def test_packed_equals_one_by_one(lengths: list[int], kv_heads: int, attention: str) -> None:
    model = causal_lm(kv_heads=kv_heads)
    tokens = sequences(lengths)
    with torch.no_grad():
        packed = packed_logits(model, batch_of(tokens))
        alone = one_by_one(plain_twin(model, attention), tokens)
    assert alone.std() > 0.1, "logits must differ for the comparison to say something"
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 100))
def test_any_lengths(lengths: list[int], seed: int) -> None:
    model = causal_lm()
    tokens = sequences(lengths, seed)
    with torch.no_grad():
        torch.testing.assert_close(packed_logits(model, batch_of(tokens)), one_by_one(plain_twin(model), tokens), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[7, 2, 5], [5, 5]])
def test_gradients_equal_one_by_one(lengths: list[int]) -> None:
    model = causal_lm()
    twin, tokens = plain_twin(model), sequences(lengths)
    torch.manual_seed(0)
    weight = torch.randn(sum(lengths), model.config.vocab_size)
    (packed_logits(model, batch_of(tokens)) * weight).sum().backward()
    (one_by_one(twin, tokens) * weight).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5 * scale, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_segment_sees_neither_its_neighbours_nor_the_future() -> None:
    model = causal_lm()
    before = sequences([4, 6, 5])
    after = [t.copy() for t in before]
    after[0][:] = (after[0] + 1) % 64
    after[1][3] = (after[1][3] + 1) % 64
    with torch.no_grad():
        changed = (packed_logits(model, batch_of(before)) - packed_logits(model, batch_of(after))).abs().amax(-1) > 0
    assert changed.tolist() == [True] * 4 + [False] * 3 + [True] * 3 + [False] * 5


def test_other_architectures_need_nothing_of_their_own() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "attn_implementation": PACKED}
    models = [
        Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, intermediate_size=64)),
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_implementation=PACKED)),
    ]
    tokens = sequences([6, 3, 8])
    for model in models:
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(packed_logits(model, batch_of(tokens)), one_by_one(plain_twin(model), tokens), atol=2e-5, rtol=1e-5)


def test_segments() -> None:
    segments = Segments.of([3, 1, 4], CPU)
    assert segments.ends.tolist() == [0, 3, 4, 8]
    assert segments.ends.dtype == torch.int32
    assert batch_of(sequences([3, 1, 4])).last.tolist() == [2, 3, 7]


def test_a_segment_must_stand_behind_its_prefix() -> None:
    for prefixes, told in (([-1, -1, 0], "segment 2 continues segment 0"), ([-1, 0, 1, 0, 1], "segment 4 continues segment 1")):
        with pytest.raises(ValueError, match=told):
            Segments.of([3, 1, 4, 2, 2][: len(prefixes)], CPU, prefixes)


groups = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4)  # [prompt, answer, answer, ...]


def shared_and_separate(lengths: list[list[int]], seed: int, opening: int = 0) -> tuple[Batch, Batch]:
    """Prompts with their answers as one sample each, and the same texts as rows of their own. Every token of an answer counts. All
    prompts begin with the same `opening` tokens."""
    rng, shared, separate = np.random.default_rng(seed), [], []
    same = rng.integers(0, 64, opening)
    for own, *answers in lengths:
        prompt = opening + own
        texts = [np.concatenate([same, rng.integers(0, 64, own)]), *(rng.integers(0, 64, n) for n in answers)]
        weights = [np.zeros(prompt, np.float32), *(rng.random(n, np.float32) + 0.1 for n in answers)]
        shared.append(Sample(np.concatenate(texts), np.concatenate(weights), lengths=[prompt, *answers], prefix=True))
        separate += [
            Sample(np.concatenate([texts[0], text]), np.concatenate([weights[0], weight]))
            for text, weight in zip(texts[1:], weights[1:], strict=True)
        ]
    return Batch.of(pack(shared, opening), CPU), Batch.of(pack(separate or shared), CPU)


@settings(max_examples=40, deadline=None)
@given(groups, st.integers(0, 100), st.sampled_from([0, 0, 1, 7]))
@example([[40, 8, 8], [4, 9, 9, 9]], 0, 0)  # in pieces; in one call
@example([[40, 8, 8], [4, 9, 9, 9], [3, 5]], 0, 20)
@example([[1, 1, 1, 1]], 0, 0)
@example([[1, 1, 1, 1], [1, 1]], 0, 3)
def test_shared_prefixes_equal_separate_rows(lengths: list[list[int]], seed: int, opening: int) -> None:
    """Log-probabilities of all answers and the gradients of all weights; a prompt without answers counts nothing.

    Gradients may differ by rounding: 1e-4 of their own length, or 2e-6 of the whole gradient's where they are near 0.
    """
    shared, separate = shared_and_separate(lengths, seed, opening)
    gradients, values = [], []
    for batch in (shared, separate):
        model = LanguageModel(causal_lm())
        log_probs = model(batch)
        (log_probs * batch.weights).sum().backward()
        values.append(log_probs.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(shared.weights, separate.weights)
    torch.testing.assert_close(values[0], values[1], atol=2e-5, rtol=1e-5)
    whole = torch.stack([g.norm() for g in gradients[1].values()]).norm()
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 2e-6 * whole, name


def test_answers_in_one_call_equal_answers_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(causal_lm())
    found = []
    for most_waste, pieces in ((0.0, 7), (100.0, 2)):
        monkeypatch.setattr("rlhf.attention.MOST_WASTE", most_waste)
        batch, _ = shared_and_separate([[12, 5, 7], [9, 3, 8, 1]], seed=1)
        assert len(batch.segments.pieces) == pieces
        found.append(model(batch))
    torch.testing.assert_close(*found, atol=2e-6, rtol=1e-6)
