"""The actor graph with real models and a real vLLM engine: weights arrive, and a weight that does not is noticed."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

import rlhf.sync
from cluster.deadlines import wait
from cluster.errors import ClusterError
from cluster.groups import Group
from cluster.groups import begin as begin_groups
from cluster.placement import Demand, place
from data import tokenizers
from rlhf import buckets
from rlhf.buckets import Spec, unpack
from rlhf.cpu_kernels import NAME
from rlhf.errors import TrainingError
from rlhf.experience import merge, responses
from rlhf.generation import generate
from rlhf.graph import engines, open_graph
from rlhf.models import new_causal_lm, save_model
from rlhf.ppo import running_after
from rlhf.recipe import Model, Ppo, Recipe
from rlhf.roles import PolicyWorker
from rlhf.rollout import BATCHED, CPU_ENV, ENGINE_ENV
from rlhf.sampling import sample_seed
from rlhf.shaping import after, begin
from rlhf.sync import PROBE_PROMPT, beginnings, differences, gate, refuse_gap, sync_weights

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # what a test does inside an actor, which cannot import this file

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
        wait(loading | graph["rollout"].start("ready"), 300, "load")
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


def spoil(graph, engine: int, change, always: bool) -> None:
    """`change`, in place, the tensors that an engine is about to load, once or always, as a broken transport would."""

    def wrap(worker) -> None:
        load = type(worker.llm).update_weights

        def broken(request):
            info = request["update_info"]
            packed = torch.from_numpy(info["array"].copy())
            specs = [Spec(*of) for of in zip(info["names"], info["shapes"], info["dtype_names"], strict=True)]
            change(dict(unpack(packed, specs)))
            if not always:
                del worker.llm.update_weights
            load(worker.llm, {"update_info": info | {"array": packed.numpy()}})

        worker.llm.update_weights = broken

    ray.get(graph["rollout"].actors[engine].__ray_call__.remote(lambda worker: wrap(worker)))


def mend(graph, recipe) -> None:
    """Every engine has whole weights again, whatever the test did."""
    for actor in graph["rollout"].actors:
        ray.get(actor.__ray_call__.remote(lambda worker: vars(worker.llm).pop("update_weights", None) and None))
    sync_weights(graph, recipe, "mended")
    assert gate(graph, recipe, PROMPTS, 0)["sync/resyncs"] == 0


def up(tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3] += 0.5


def test_engine_and_policy_agree_after_a_sync(graph, recipe):
    figures = sync_weights(graph, recipe, "step-0")
    assert figures["sync/seconds"] > 0
    assert figures["sync/mb_per_s"] > 0
    found = gate(graph, recipe, PROMPTS, 0)
    assert found["sync/log_prob_gap"] < 1e-5
    assert found["sync/resyncs"] == 0
    assert gate(graph, recipe, PROMPTS[:1], 0)["sync/log_prob_gap"] < 1e-5, "one prompt serves for all probes"
    assert rollout_of(graph, recipe).version == "step-0"


def test_engines_on_cpus_compute_norms_by_their_own_kernels(graph):
    def compare(worker):
        import torch  # the global one would be taken along, for what is called `ops` below is looked for in it
        from vllm import ir

        torch.manual_seed(0)
        x, residual, weight = torch.randn(6, 64), torch.randn(6, 64), torch.randn(64)
        chosen = ir.ops.rms_norm.dispatch(x, weight, 1e-6), ir.ops.fused_add_rms_norm.dispatch(x, residual, weight, 1e-6)
        plain = [op.impls["native"].impl_fn for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)]
        expected = [plain[0](x, weight, 1e-6), *plain[1](x, residual, weight, 1e-6)]
        found = [chosen[0].impl_fn(x, weight, 1e-6), *chosen[1].impl_fn(x.clone(), residual.clone(), weight, 1e-6)]
        odd = ir.ops.rms_norm.dispatch(x.view(2, 3, 64), weight, 1e-6).provider
        apart = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        return [impl.provider for impl in chosen], odd, apart

    names, odd, apart = ray.get(graph["rollout"].actors[0].__ray_call__.remote(compare))
    assert names == [NAME, NAME]
    assert odd == "native", "what does not suit them is left to vLLM"
    assert apart < 1e-5


def test_the_longest_prompt_leaves_room_for_a_probe_where_answers_are_one_token(graph, recipe):
    sync_weights(graph, recipe, "step-0")
    longest = recipe.ppo.max_prompt_tokens + recipe.ppo.max_response_tokens
    short = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"max_response_tokens": 1})})
    assert gate(graph, short, [[5] * (longest - 1)], 0)["sync/log_prob_gap"] < 1e-5


def test_probes_are_the_beginnings_of_prompts():
    shared = list(range(30))
    prompts = [[*shared, i, *range(50, 90)] for i in range(3)]
    assert beginnings(prompts) == [prompt[: 30 + PROBE_PROMPT] for prompt in prompts]
    assert beginnings([[*shared, 7], [*shared, 7, 8]]) == [[*shared, 7], [*shared, 7, 8]], "all go on behind what all prompts begin with"
    assert beginnings([[5], [6, 7]]) == [[5], [6, 7]]
    assert beginnings([[5, 6]] * 2) == [[5, 6]] * 2


def test_a_bucket_that_arrives_broken_is_sent_once_more(graph, recipe, capsys):
    spoil(graph, 0, up, always=False)
    sync_weights(graph, recipe, "step-4")
    found = gate(graph, recipe, PROMPTS, 4)
    assert found["sync/resyncs"] == 1
    assert found["sync/log_prob_gap"] < 1e-5
    assert "rollout[0] is" in (said := capsys.readouterr().out)
    assert "nats off the policy after step-4; its weights are sent once more" in said
    mend(graph, recipe)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_weight_that_stays_wrong_stops_the_run_by_its_name(graph, recipe, name):
    def change(tensors):
        tensors[name].view(-1)[2::5] += 0.5

    spoil(graph, 0, change, always=True)
    sync_weights(graph, recipe, "step-3")
    # the embedding is the output layer too
    names = "2 of 21 tensors differ: model.embed_tokens.weight, lm_head.weight" if "embed" in name else f"1 of 21 tensors differ: {name}"
    with pytest.raises(TrainingError, match=r"PPO step 3: rollout\[0\] after the weight sync and one more try: engine and .*") as stopped:
        gate(graph, recipe, PROMPTS, 3)
    assert f"(ppo.log_prob_gap_limit). {names}. The last" in str(stopped.value)
    mend(graph, recipe)


def test_engines_that_compute_otherwise_are_told_from_wrong_weights(graph, recipe):
    sync_weights(graph, recipe, "step-5")
    assert differences(graph, recipe, "rollout[0]").startswith("All 21 tensors that were compared are equal: the two compute differently")


def test_tied_output_layer_follows_the_embedding(graph, recipe):
    """On a CPU vLLM multiplies with a packed copy of the output layer, which a reload alone leaves stale."""

    def change(tensors):
        assert "lm_head.weight" not in tensors
        tensors["model.embed_tokens.weight"] *= 2.0

    before = rollout_of(graph, recipe)
    spoil(graph, 0, change, always=False)
    sync_weights(graph, recipe, "moved")
    after = rollout_of(graph, recipe)
    assert not np.allclose(before.log_probs[:3], after.log_probs[:3])
    mend(graph, recipe)


def test_a_stale_packed_output_layer_is_named(graph, recipe):
    """The trap itself: the parameter is new, the copy that is multiplied with is old."""

    def stale(worker):
        def forget(self):
            head = self.model_runner.model.lm_head
            packed = head.cpu_linear
            head.cpu_linear = lambda x, weight, bias: 2.0 * packed(x, weight, bias)

        worker.llm.collective_rpc(forget)

    sync_weights(graph, recipe, "step-6")
    ray.get(graph["rollout"].actors[0].__ray_call__.remote(lambda worker: stale(worker)))
    assert differences(graph, recipe, "rollout[0]") == "1 of 21 tensors differ: lm_head.weight"
    mend(graph, recipe)


def test_many_buckets_and_a_broadcast_give_the_same_weights(graph, recipe, model, tokenizer, monkeypatch):
    """Two engines, one gloo group with the policy, buckets of 40 kB, fp32 on both sides: everything equal, and equal again."""
    monkeypatch.setattr(rlhf.sync, "plan", lambda specs: buckets.plan(specs, 40_000))
    of_two = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"weight_sync": "gloo"})})
    worker, args = engines(of_two, model, tokenizer)
    demand = Demand(2, cpus=0.25, gpus=0)
    room = place({"two-engines": demand}, 30)["two-engines"]
    group = Group("rollout", worker, demand, room, args=args, threads=1, env=ENGINE_ENV | CPU_ENV)
    both = {"policy": graph["policy"], "rollout": group}
    try:
        begin_groups([group], 300)
        wait(group.start("ready"), 300, "load")
        for version in ("step-1", "step-2"):  # the group is made once
            sync_weights(both, of_two, version)
            assert gate(both, of_two, PROMPTS, 1)["sync/log_prob_gap"] < 1e-5
            assert [rollout.version for rollout in ray.get(generate(both, of_two, PROMPTS, 0))] == [version, version]
        link = rlhf.sync._links[group]
        assert link.transport == "gloo"
        assert len(link.buckets) > 5
        for engine in ("rollout[0]", "rollout[1]"):
            assert differences(both, of_two, engine).startswith("All 21 tensors")

        def die(worker) -> None:
            worker.llm.update_weights = lambda request: os._exit(1)

        ray.get(group.actors[1].__ray_call__.remote(lambda worker: die(worker)))
        with pytest.raises(ClusterError, match=r"weights of step-3: rollout\[1\] died"):
            sync_weights(both, of_two, "step-3")
    finally:
        group.stop()
    mend(graph, recipe)  # the policy goes back to the object store


@pytest.mark.parametrize(
    ("prompt", "why"),
    [([], "is empty"), ([5, 270], "id outside 0..269"), ([-1], "id outside"), ([5] * 17, "more than the engine's 32")],
)
def test_prompts_that_would_wedge_the_engine_are_refused(graph, prompt, why):
    engine = graph["rollout"].actors[0]
    with pytest.raises(ValueError, match=why):
        ray.get(engine.generate.remote([0], [prompt], [0], 16, 1.0))
    assert len(ray.get(engine.generate.remote([0], [[5]], [0], 4, 1.0)).index) == 1  # and it still answers


def test_more_prompts_than_an_engine_computes_at_once(graph):
    """A prompt that is computed in two parts draws its first token twice, which random generators of CPUs cannot take back."""
    prompts = np.random.default_rng(0).integers(5, 256, (BATCHED // 16, 31)).tolist()
    asked = (list(range(len(prompts))), prompts, list(range(len(prompts))), 1, 1.0)
    rollout = ray.get(graph["rollout"].actors[0].generate.remote(*asked))
    assert rollout.index.tolist() == asked[0]


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
