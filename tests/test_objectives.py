"""What policy and critic learn from: packed, ragged batches against plain transformers and autograd, one row after another."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, VOCAB, causal_lm, plain_twin
from transformers import LlamaConfig, LlamaForTokenClassification, PreTrainedModel

from data.packing import balance, pack
from rlhf.attention import PACKED
from rlhf.experience import Experience, Rollout, estimate, samples
from rlhf.learner import Learner
from rlhf.models import Batch, LanguageModel, ScalarModel
from rlhf.recipe import Ppo
from rlhf.roles import policy_objective, value_objective
from rlhf.shaping import begin

few = settings(max_examples=12, deadline=None)
SHARED = {"max_response_tokens": 8, "kl_coef": 0.1, "temperature": 0.8}
FAMILY = {
    "ppo": {"advantage": "gae"},
    "ppo, one pass": {"advantage": "gae", "rollout_batch": 4, "global_batch": 4},
    "ppo, entropy": {"advantage": "gae", "entropy_coef": 0.1, "policy_loss": "dual_clip"},
    "grpo": {"advantage": "grpo", "samples_per_prompt": 2, "kl_in": "loss", "aggregation": "sequence_mean"},
    "grpo, one pass": {
        **{"advantage": "grpo", "samples_per_prompt": 2, "kl_in": "loss", "kl_estimator": "k3"},
        **{"epochs": 1, "rollout_batch": 2, "global_batch": 4},
    },
    "dapo": {
        "advantage": "grpo",
        "samples_per_prompt": 2,
        "clip_range_high": 0.28,
        "overlong_buffer": 4,
        "mask_unfinished": True,
        "drop_equal_groups": True,
    },
    "dr_grpo": {"advantage": "dr_grpo", "samples_per_prompt": 2, "aggregation": "dr_grpo"},
    "rloo, k2": {"advantage": "rloo", "samples_per_prompt": 2, "kl_in": "loss", "kl_estimator": "k2"},
    "gspo": {"advantage": "grpo", "samples_per_prompt": 2, "policy_loss": "gspo", "aggregation": "sequence_mean", "clip_range": 0.05},
    "cispo": {"advantage": "reinforce++", "policy_loss": "cispo", "importance": "truncated"},
    "sapo": {"advantage": "reinforce++_baseline", "samples_per_prompt": 2, "policy_loss": "sapo", "importance": "icepop"},
}


def experience_of(lengths: list[int], seed: int, config: Ppo) -> Experience:
    """Answers of `lengths` tokens, the prompts of each group alike; old, reference and engine log-probabilities around the model's."""
    rng = np.random.default_rng(seed)
    tokens, prompts = [], []
    for i, n in enumerate(lengths):
        prompt = np.random.default_rng([seed, i // config.samples_per_prompt]).integers(0, VOCAB, 3)
        prompts.append(len(prompt))
        tokens += [*prompt, *rng.integers(0, VOCAB, n)]
    counts = np.array(lengths, np.int64)
    log_probs, reference, engine = (rng.normal(-math.log(VOCAB), 0.4, (3, sum(lengths)))).astype(np.float32)
    rollout = Rollout(
        np.arange(len(lengths)), np.array(prompts), counts, np.array(tokens, np.int32), rng.random(len(lengths)) < 0.7, engine, "v"
    )
    found = {"log_probs": log_probs, "ref_log_probs": reference, "rewards": rng.integers(0, 2, len(lengths)).astype(np.float32)}
    if config.needs_critic:
        found["values"] = rng.normal(size=sum(lengths)).astype(np.float32)
    return estimate(rollout, found, config, begin(config))[0]


def scalar_model() -> PreTrainedModel:
    """A fresh token classifier with one label and the sizes of `causal_lm`."""
    config = LlamaConfig.from_dict({**causal_lm().config.to_dict(), "num_labels": 1})
    config._attn_implementation = PACKED
    torch.manual_seed(0)
    return LlamaForTokenClassification(config).eval()


def extras_of(experience: Experience) -> dict[str, np.ndarray]:
    return {name: getattr(experience, name) for name in ("log_probs", "ref_log_probs", "advantages", "shares")}


def by_the_book(model: torch.nn.Module, experience: Experience, config: Ppo) -> torch.Tensor:
    """The loss as the papers write it: row by row, token by token, then the mean that `aggregation` names. Advantages are given."""
    rollout, low, high = experience.rollout, *config.clip_ranges
    per_answer: list[torch.Tensor] = []
    start = at = 0
    for prompt, n in zip(rollout.prompt_lengths, rollout.response_lengths, strict=True):
        ids = torch.from_numpy(rollout.tokens[start : start + prompt + n].astype(np.int64))
        mine = slice(at, at + n)
        start, at = start + prompt + n, at + n
        if not n or not experience.weights[mine].any():
            continue
        rows = (model(input_ids=ids[None]).logits[0, prompt - 1 : -1] / config.temperature).log_softmax(-1)
        old, reference, advantages = (
            torch.from_numpy(getattr(experience, name)[mine].copy()) for name in ("log_probs", "ref_log_probs", "advantages")
        )
        now = rows.gather(1, ids[prompt:, None])[:, 0]
        old = now.detach() if config.one_pass else old
        ratio = (now - old).exp()
        if config.policy_loss == "gspo":
            ratio = (now - old).mean().exp().expand(n)
        if config.policy_loss == "cispo":
            terms = -ratio.clamp(1 - low, 1 + high).detach() * advantages * now
        elif config.policy_loss == "sapo":
            tau = torch.tensor([1.0 if a > 0 else 1.05 for a in advantages])
            terms = -advantages * 4 / tau / (1 + (-tau * (ratio - 1)).exp())
        else:
            terms = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
            if config.policy_loss == "dual_clip":
                terms = torch.where(advantages < 0, torch.minimum(terms, -3 * advantages), terms)
        if config.kl_in == "loss":
            d = now - reference
            terms = terms + 0.1 * (d**2 / 2 if config.kl_estimator == "k2" else (-d).exp() - 1 + d)
        per_answer.append(terms + config.entropy_coef * (rows.exp() * rows).sum(-1))
    if not per_answer:
        return torch.zeros(())
    if config.aggregation == "token_mean":
        return torch.cat(per_answer).mean()
    sums = [one.mean() if config.aggregation == "sequence_mean" else one.sum() / 8 for one in per_answer]
    return torch.stack(sums).mean()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])


@few
@given(st.lists(st.sampled_from([0, 1, 1, 2, 5, 8]), min_size=4, max_size=4).filter(any), st.integers(0, 10**6))
@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradient_equal_plain_transformers(name: str, lengths: list[int], seed: int) -> None:
    config = Ppo(**SHARED, **FAMILY[name])
    experience = experience_of(lengths, seed, config)
    inner = causal_lm().eval()
    twin = plain_twin(inner)
    batch = Batch.of(pack(samples(experience.rollout, extras_of(experience), experience.weights)), CPU)
    gaps: list[float] = []
    value, _ = policy_objective(LanguageModel(inner), batch, config, experience.kl_coef, {}, gaps)
    assert len(gaps) == config.one_pass
    loss = value / max(float(experience.weights.sum()), 1e-9)
    loss.backward()
    expected = by_the_book(twin, experience, config)
    if expected.requires_grad:
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    ours, theirs = gradients(inner), gradients(twin)
    assert (ours - theirs).norm() <= 1e-6 + 3e-5 * theirs.norm()


@few
@given(st.lists(st.sampled_from([0, 1, 1, 2, 5, 8]), min_size=4, max_size=4).filter(any), st.integers(0, 10**6))
def test_critic_equals_a_plain_classifier(lengths: list[int], seed: int) -> None:
    """Values stand at the token before; answers that do not count for the policy teach the critic nothing either."""
    config = Ppo(**SHARED, mask_unfinished=True, aggregation="sequence_mean", value_clip_range=0.3)
    experience, critic = experience_of(lengths, seed, config), scalar_model()
    rollout = experience.rollout
    extras = {"values": experience.values, "returns": experience.returns}
    batch = Batch.of(pack(samples(rollout, extras, (experience.weights > 0).astype(np.float32))), CPU)
    value, _ = value_objective(ScalarModel(critic), batch, config)
    value.backward()
    twin, expected, start, at = plain_twin(critic), [], 0, 0
    for prompt, n, finished in zip(rollout.prompt_lengths, rollout.response_lengths, rollout.finished, strict=True):
        ids = torch.from_numpy(rollout.tokens[start : start + prompt + n].astype(np.int64))
        old, returns = (torch.from_numpy(x[at : at + n].copy()) for x in extras.values())
        start, at = start + prompt + n, at + n
        if n and finished:
            now = twin(input_ids=ids[None]).logits[0, prompt - 1 : -1, 0]
            near = torch.max(torch.min(now, old + 0.3), old - 0.3)
            expected.append(0.5 * torch.max((now - returns) ** 2, (near - returns) ** 2).sum())
    if expected:
        torch.stack(expected).sum().backward()
    assert value.item() == pytest.approx(sum(e.item() for e in expected), rel=1e-5, abs=1e-6)
    assert (gradients(critic) - gradients(twin)).norm() <= 1e-6 + 3e-5 * gradients(twin).norm()


@pytest.mark.parametrize("name", FAMILY)
def test_cuts_and_order_change_nothing(name: str) -> None:
    """All samples at once, one by one, in another order, and as two ranks would share them: the same loss, norm and figures."""
    config = Ppo(**SHARED, **FAMILY[name])
    lengths = [5, 1, 8, 2, 1, 3, 8, 4]
    experience = experience_of(lengths, 7, config)
    packable = samples(experience.rollout, extras_of(experience), experience.weights)
    of_ranks = balance([len(s.tokens) for s in packable], 2, 64)
    cuts = [[list(range(8))], [[i] for i in range(8)], [[7, 2, 0], [5, 6, 1, 3, 4]], of_ranks[0] + of_ranks[1]]
    found = []
    for cut in cuts:
        learner = Learner(LanguageModel(causal_lm()), config, 1)
        batches = [Batch.of(pack([packable[i] for i in ids]), CPU) for ids in cut]
        found.append(learner.step(batches, partial(policy_objective, config=config, kl_coef=experience.kl_coef, first={}, gaps=[])))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-7)
    assert {"clip_fraction", "update_kl"} <= found[0].keys()
    assert ("entropy" in found[0]) == (config.entropy_coef > 0)
    assert ("reference_kl" in found[0]) == (config.kl_in == "loss")
    assert 0 <= found[0]["clip_fraction"] <= 1
