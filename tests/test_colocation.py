"""Roles on the same devices with real models and a real vLLM engine, and an engine of two processes."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.deadlines import wait
from data import tokenizers
from rlhf.buckets import plan
from rlhf.experience import merge
from rlhf.generation import generate
from rlhf.graph import Graph, engines, open_graph
from rlhf.models import new_causal_lm, save_model
from rlhf.recipe import Model, Recipe
from rlhf.roles import PolicyWorker, ReferenceWorker
from rlhf.sync import gate, link_to, sync_weights

pytestmark = pytest.mark.slow
SIZES = Model(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=64, max_positions=64)
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them, as large models have."""
    monkeypatch.setattr("rlhf.sync.plan", partial(plan, limit=1 << 15))


def recipe_with(groups: dict, colocate: list[list[str]], weight_sync: str = "auto") -> Recipe:
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    ppo = {"rollout_batch": 4, "global_batch": 4, "max_prompt_tokens": 16, "max_response_tokens": 16, "log_prob_gap_limit": 1e-3}
    return Recipe(name="test", data=sources, ppo=ppo | {"groups": groups, "colocate": colocate, "weight_sync": weight_sync})


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["the quick brown fox jumps over the lazy dog " * 20], 270)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> Path:
    out = tmp_path_factory.mktemp("model")
    made = new_causal_lm(SIZES, tokenizer.vocab_size, tokenizer.end_of_text, seed=7)
    save_model(made, made.state_dict(), tokenizer, out)
    return out


def changes_of_turns(graph: Graph, recipe: Recipe) -> int:
    """How often the engine has been woken by a sync of several buckets."""
    engine = graph["rollout"].actors[0]
    ray.get(engine.work_done.remote())
    sync_weights(graph, recipe, "step-1")
    return [what for what, *_ in ray.get(engine.work_done.remote())].count("wake")


def answers_of(recipe: Recipe, model: Path, tokenizer, checkpoints: Path) -> tuple:
    """A rollout, its scores by both models, an update's effect on the next rollout, and the largest gap."""
    roles = {
        "rollout": engines(recipe, model, tokenizer),
        "policy": (PolicyWorker, (recipe, model)),
        "reference": (ReferenceWorker, (recipe, model)),
    }
    with open_graph(recipe, roles) as graph:
        loading = graph["policy"].start("load", 10, checkpoints) | graph["reference"].start("load")
        wait(loading | graph["rollout"].start("ready"), 240, "load")
        sync_weights(graph, recipe, "step-0")
        gaps = [gate(graph, recipe, PROMPTS, 0)["sync/log_prob_gap"]]
        rollouts = generate(graph, recipe, PROMPTS, 0)
        scores = graph["policy"].start("log_probs", *rollouts) | graph["reference"].start("log_probs", *rollouts)
        found = wait(scores, 120, "scores")
        rollout = merge(ray.get(rollouts))
        gaps.append(float(np.abs(found["policy[0]"][1] - found["reference[0]"][1]).max()))
        assert len(link_to(graph, recipe, "policy").buckets) > 3
        assert changes_of_turns(graph, recipe) == (1 if recipe.ppo.colocate else 0), "every one moves two models"
        again = merge(ray.get(generate(graph, recipe, PROMPTS, 0)))
        assert again.version == "step-1"
        assert again.tokens.tolist() == rollout.tokens.tolist()
        return rollout.tokens.tolist(), found["reference[0]"][1].tolist(), max(gaps)


def test_a_graph_on_one_core_in_turn_equals_one_on_a_core_each(ray_session, model, tokenizer, tmp_path):
    half = {"cpus": 0.5}
    apart = answers_of(recipe_with({"policy": half, "reference": half, "rollout": half}, []), model, tokenizer, tmp_path / "a")
    whole = recipe_with({}, [["rollout", "policy", "reference"]])
    together = answers_of(whole, model, tokenizer, tmp_path / "b")
    assert together[:2] == apart[:2]
    assert together[2] < 1e-5


@pytest.mark.parametrize("transport", ["object_store", "gloo"])
def test_an_engine_of_two_processes_takes_weights_and_agrees_with_the_policy(ray_session, model, tokenizer, tmp_path, transport):
    recipe = recipe_with({"policy": {"cpus": 0.5}, "reference": {"cpus": 0.5}, "rollout": {"tensor_parallel": 2}}, [], transport)
    _, _, gap = answers_of(recipe, model, tokenizer, tmp_path)
    assert gap < 1e-5
