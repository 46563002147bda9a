"""The actor graph with real models and a real vLLM engine: weights arrive, and a weight that does not is noticed."""

import json
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.deadlines import wait
from data import tokenizers
from rlhf.errors import TrainingError
from rlhf.experience import merge, responses
from rlhf.generation import generate, sample_seed
from rlhf.graph import engines, open_graph
from rlhf.models import new_causal_lm, save_model
from rlhf.ppo import running_after
from rlhf.recipe import Model, Ppo, Recipe
from rlhf.roles import PolicyWorker
from rlhf.shaping import after, begin
from rlhf.sync import gate, refuse_gap, sync_weights

pytestmark = pytest.mark.slow

SIZES = Model(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=64, max_positions=64)
GROUP = {"cpus": 0.5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    ppo = {"rollout_batch": 4, "global_batch": 4, "max_prompt_tokens": 16, "max_response_tokens": 16, "log_prob_gap_limit": 1e-3}
    return Recipe(name="test", data=sources, ppo=ppo | {"groups": {"policy": GROUP, "rollout": GROUP}})


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["the quick brown fox jumps over the lazy dog " * 20], 270)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> Path:
    out = tmp_path_factory.mktemp("model")
    made = new_causal_lm(SIZES, tokenizer.vocab_size, tokenizer.end_of_text, seed=7)
    save_model(made, made.state_dict(), tokenizer, out)
    return out


@pytest.fixture(scope="module")
def graph(ray_session, recipe, model, tokenizer, tmp_path_factory):
    roles = {"rollout": engines(recipe, model, tokenizer), "policy": (PolicyWorker, (recipe, model))}
    with open_graph(recipe, roles) as graph:
        loading = graph["policy"].start("load", 10, tmp_path_factory.mktemp("checkpoints"))
        wait(loading | graph["rollout"].start("ready"), 120, "load")
        yield graph


PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]


def rollout_of(graph, recipe, step=0):
    return merge(ray.get(generate(graph, recipe, PROMPTS, step)))


def test_a_samples_seed_fixes_it_whatever_else_is_in_the_batch(graph, recipe):
    whole = rollout_of(graph, recipe)
    assert whole.index.tolist() == [0, 1, 2, 3]
    assert whole.prompt_lengths.tolist() == [3, 1, 2, 4]
    engine = graph["rollout"].actors[0]
    alone = ray.get(engine.generate.remote([0], [PROMPTS[3]], [sample_seed(recipe.seed, 3)], 16, 1.0))
    assert alone.tokens.tolist() == whole.tokens[-len(alone.tokens) :].tolist()
    assert rollout_of(graph, recipe, step=1).tokens.tolist() != whole.tokens.tolist()


def test_engine_and_policy_agree_after_a_sync_and_a_wrong_weight_stops_the_run(graph, recipe):
    sync_weights(graph, recipe, "step-0")
    assert gate(graph, recipe, PROMPTS, 0) < 1e-5
    weights = ray.get(graph["policy"].actors[0].weights.remote())
    broken = {name: array.copy() for name, array in weights.items()}
    broken["model.layers.1.mlp.up_proj.weight"][3] += 0.5
    engine = graph["rollout"].actors[0]
    ray.get(engine.update_weights.remote("broken", broken))
    assert rollout_of(graph, recipe).version == "broken"
    with pytest.raises(TrainingError, match=r"rollout\[0\] after the weight sync: engine and policy differ by .* nats"):
        gate(graph, recipe, PROMPTS, 3)
    sync_weights(graph, recipe, "step-1")
    assert gate(graph, recipe, PROMPTS, 1) < 1e-5


def test_tied_output_layer_follows_the_embedding(graph, recipe):
    """On a CPU vLLM multiplies with a packed copy of the output layer, which a reload alone leaves stale."""
    weights = ray.get(graph["policy"].actors[0].weights.remote())
    assert "lm_head.weight" not in weights
    before = rollout_of(graph, recipe)
    moved = {name: array * (2.0 if "embed" in name else 1.0) for name, array in weights.items()}
    ray.get(graph["rollout"].actors[0].update_weights.remote("moved", moved))
    after = rollout_of(graph, recipe)
    assert not np.allclose(before.log_probs[:3], after.log_probs[:3])
    sync_weights(graph, recipe, "back")
    assert gate(graph, recipe, PROMPTS, 2) < 1e-5


@pytest.mark.parametrize(
    ("prompt", "why"),
    [([], "is empty"), ([5, 270], "id outside 0..269"), ([-1], "id outside"), ([5] * 17, "more than the engine's 32")],
)
def test_prompts_that_would_wedge_the_engine_are_refused(graph, prompt, why):
    engine = graph["rollout"].actors[0]
    with pytest.raises(ValueError, match=why):
        ray.get(engine.generate.remote([0], [prompt], [0], 16, 1.0))
    assert len(ray.get(engine.generate.remote([0], [[5]], [0], 4, 1.0)).index) == 1  # and it still answers


def test_a_gap_that_is_no_number_is_refused(recipe):
    with pytest.raises(TrainingError, match="differ by nan"):
        refuse_gap(float("nan"), recipe, "here")
    refuse_gap(1e-6, recipe, "here")


def test_answers_to_one_prompt_stand_side_by_side(graph, recipe):
    """Samples 3 p, 3 p + 1, 3 p + 2 answer prompt p, each by a seed of its own; greedy answers have none to differ by."""
    rollout = merge(ray.get(generate(graph, recipe, PROMPTS, 0, each=3)))
    assert rollout.index.tolist() == list(range(12))
    assert rollout.prompt_lengths.tolist() == [3, 3, 3, 1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert len({tuple(answer) for answer in responses(rollout)}) > 8
    engine = graph["rollout"].actors[0]
    alone = ray.get(engine.generate.remote([0], [PROMPTS[1]], [sample_seed(recipe.seed, 5)], 16, 1.0))
    assert responses(alone)[0] == responses(rollout)[5]
    greedy = merge(ray.get(generate(graph, recipe, PROMPTS, 0, each=3, temperature=0.0)))
    assert len({tuple(answer) for answer in responses(greedy)}) <= 4


def test_a_resumed_run_takes_its_kl_weight_from_the_curve(tmp_path):
    config = Ppo(kl_coef=0.2, kl_target=7, kl_horizon=512, rollout_batch=128)
    rows, running = [], begin(config)
    for step, kl in enumerate((0.1, 8.0, 7.3), start=1):
        rows.append({"step": step, "ppo/kl": kl, "ppo/kl_coef": running.kl_coef, "ppo/reward": 0.1 * step, "ppo/reward_sd": 1.5})
        running = after(running, kl, 0.1 * step, 1.5, config)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ppo')  # killed
    assert running_after(3, config, tmp_path) == running  # the same bits
    assert running_after(0, config, tmp_path) == begin(config)
    assert running_after(9, Ppo(kl_coef=0.3), tmp_path).kl_coef == 0.3  # fixed: no curve needed
    with pytest.raises(TrainingError, match="does not hold the steps 1 to 4"):
        running_after(4, config, tmp_path)
