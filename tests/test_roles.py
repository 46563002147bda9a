"""The roles of the actor graph in one process: what `ppo.compile` makes of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, causal_lm

from data import tokenizers
from data.packing import pack
from rlhf.experience import Experience, Rollout, align, samples
from rlhf.learner import Learner
from rlhf.models import Batch, LanguageModel, load_causal_lm, save_model
from rlhf.recipe import Recipe
from rlhf.roles import PolicyWorker, ReferenceWorker

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = tokenizers.train(["one word is not much of a text"], 261)
    made = causal_lm(vocab_size=tokenizer.vocab_size)
    save_model(made, dict(made.state_dict()), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def recipe(**ppo: object) -> Recipe:
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    return Recipe.model_validate({"name": "t", "data": sources, "ppo": ppo})


def rollout(lengths: list[int]) -> Rollout:
    rng, n = np.random.default_rng(sum(lengths)), len(lengths)
    tokens = rng.integers(1, 250, 3 * n + sum(lengths)).astype(np.int32)
    log_probs = np.zeros(sum(lengths), np.float32)
    return Rollout(np.arange(n), np.full(n, 3), np.array(lengths), tokens, np.ones(n, bool), log_probs, "v")


@pytest.mark.parametrize("each", [1, 2])
def test_what_all_prompts_begin_with_changes_no_figure(model: Path, tmp_path: Path, each: int) -> None:
    """Log-probabilities and the weights after a step, with one answer or two to a question; in one micro-batch and in several."""
    rng, prompts, n = np.random.default_rng(0), [5, 5, 3, 3, 4, 4], 6
    same = rng.integers(1, 250, 20)
    own = [rng.integers(1, 250, prompt) for prompt in prompts]
    own[1::2] = own[::2]  # two answers to each question
    answers = [rng.integers(1, 250, size) for size in (4, 9, 1, 2, 7, 3)]
    asked = [np.concatenate([same, question]) for question in own]
    texts = np.concatenate([part for both in zip(asked, answers, strict=True) for part in both])
    lengths = np.array([len(answer) for answer in answers])
    total = int(lengths.sum())
    floats = rng.normal(size=(3, total)).astype(np.float32)
    written = Rollout(np.arange(n), np.array(prompts) + 20, lengths, texts.astype(np.int32), np.ones(n, bool), floats[0], "v")
    found = []
    for opening, micro_batch in ((0, 4096), (20, 4096), (20, 52)):
        few = {"max_prompt_tokens": 30, "max_response_tokens": 10, "micro_batch": micro_batch, "samples_per_prompt": each}
        config = recipe(**few, rollout_batch=n // each, global_batch=n, epochs=1, compile=False, learning_rate=1e-3)
        policy = PolicyWorker(0, 1, 1, config, model, opening)
        policy.load(1, tmp_path)
        index, values = policy.log_probs(written)
        before = align([(index, values)], lengths)
        ones = np.ones(total, np.float32)
        policy.update(Experience(written, before, before, floats[1], ones / total, ones, 0.0), 0)
        found.append([torch.from_numpy(before), *(p.detach() for p in policy.learner.model.parameters())])
    for ours in found[1:]:
        for one, other in zip(found[0], ours, strict=True):
            torch.testing.assert_close(one, other, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [4096, 16])
def test_old_log_probs_are_those_of_the_first_pass(model: Path, tmp_path: Path, micro_batch: int) -> None:
    """One optimizer step to a pass: what the engine says of its answers is compared, and moves nothing, in any of three passes."""
    written = rollout([4, 9, 1, 2, 7, 3])
    total = int(written.response_lengths.sum())
    floats = np.random.default_rng(0).normal(size=(2, total)).astype(np.float32)
    ones = np.ones(total, np.float32)
    few = {"max_prompt_tokens": 4, "max_response_tokens": 12, "micro_batch": micro_batch}
    config = recipe(**few, rollout_batch=6, global_batch=6, epochs=3, compile=False, learning_rate=3e-2, clip_range=0.1)
    assert config.ppo.one_pass
    policy = PolicyWorker(0, 1, 1, config, model)
    policy.load(3, tmp_path)
    engine = align([policy.log_probs(written)], written.response_lengths) + 0.1 * floats[0]
    figures = policy.update(Experience(written, engine, None, floats[1], ones / total, ones, 0.0), 0)

    learner = Learner(LanguageModel(load_causal_lm(model)), config.ppo.model_copy(update={"compile": False}), 3)
    batch = Batch.of(pack(samples(written, {"advantages": floats[1]}, ones / total)), CPU)
    old = learner.model(batch, config.ppo.temperature).detach()

    def by_hand(lm: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio, advantages = (lm(batch, config.ppo.temperature) - old).exp(), batch.extras["advantages"][batch.rows]
        return -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).sum(), {}

    for _ in range(3):
        learner.step([batch], by_hand)
    assert figures["ratio_error"] == 0
    assert figures["clip_fraction"] > 0
    assert figures["log_prob_gap"] == pytest.approx(0.1 * np.abs(floats[0]).max(), rel=1e-4)
    for ours, theirs in zip(policy.learner.model.parameters(), learner.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@NEEDS_COMPILER
def test_a_long_run_is_compiled_and_its_roles_alike(model: Path) -> None:
    """By what the recipe says the policy learns from, whoever of them scores it; ranks share the work."""
    found = {}
    for steps, workers in ((40, 1), (400_000_000, 1), (400_000_000, 10_000_000)):
        asked = recipe(steps=steps, groups={"policy": {"workers": workers}})
        roles = [kind(0, 1, 1, asked, model) for kind in (PolicyWorker, ReferenceWorker)]
        found[steps, workers] = {role.compiles(causal_lm()) for role in roles}
    assert list(found.values()) == [{False}, {True}, {False}]


@pytest.mark.slow
@NEEDS_COMPILER
def test_compiled_roles_say_what_plain_ones_do(model: Path, tmp_path: Path) -> None:
    """Policy and reference agree to the last bit while they have the same weights."""
    asked = {compiled: recipe(compile=compiled, steps=1) for compiled in (True, False)}
    policy, plain = (PolicyWorker(0, 1, 1, asked[compiled], model) for compiled in (True, False))
    reference = ReferenceWorker(0, 1, 1, asked[True], model)
    for role in (policy, plain):
        role.load(1, tmp_path)
    reference.load()
    for lengths in ([5, 9, 2], [4, 4], [1, 1, 7, 3, 8]):
        (index, ours), (_, frozen), (_, eager) = (role.log_probs(rollout(lengths)) for role in (policy, reference, plain))
        assert sorted(index) == list(range(len(lengths)))
        assert np.array_equal(ours, frozen)
        torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(eager), atol=1e-5, rtol=1e-5)
