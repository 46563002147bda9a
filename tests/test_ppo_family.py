"""Whole runs of the ppo stage on a tiny graph, real engines included: without a critic, and resumed from the curve."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import tokenizers
from data.examples import prepare_prompts
from rlhf.graph import demands
from rlhf.models import load_reward_model, new_causal_lm, save_model
from rlhf.monitoring import Monitor
from rlhf.ppo import curve, run
from rlhf.recipe import Model, Recipe

pytestmark = pytest.mark.slow

SIZES = Model(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=64, max_positions=128)


@pytest.fixture(scope="module")
def made(ray_session, tmp_path_factory) -> dict[str, Path]:
    """What the stages before ppo leave: a tokenizer and prompts, an SFT model, a reward model that likes some answers more."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = tokenizers.train(["the quick brown fox jumps over the lazy dog " * 20], 270)
    lines = [{"messages": [{"role": "user", "content": f"the {a} {b} dog"}]} for a in ("quick", "lazy", "brown") for b in ("fox", "over")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    tokenizer.save(folder / "data" / "tokenizer")
    limits = {"max_tokens": 48, "validation_fraction": 0.1, "max_broken_fraction": 0.0}
    prepare_prompts([folder / "prompts.jsonl"], tokenizer, folder / "data" / "prompts", **limits)
    model = new_causal_lm(SIZES, tokenizer.vocab_size, tokenizer.end_of_text, seed=7)
    save_model(model, model.state_dict(), tokenizer, folder / "sft" / "model")
    judge = load_reward_model(folder / "sft" / "model")
    torch.nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(0))
    save_model(judge, judge.state_dict(), tokenizer, folder / "reward" / "model")
    return {stage: folder / stage for stage in ("data", "sft", "reward")}


def train(recipe: Recipe, made: dict[str, Path], out: Path) -> list[dict[str, float]]:
    out.mkdir(exist_ok=True)
    with Monitor("ppo", out) as monitor:
        run(recipe, made, out, monitor)
    of_the_machine = ("time", "seconds", "mb_per_s", "idle_share", "memory_gib")
    return [{k: v for k, v in row.items() if not any(name in k for name in of_the_machine)} for row in curve(out)]


def recipe_of(**ppo: object) -> Recipe:
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    roles = ("policy", "reference", "reward", "rollout", "critic")
    groups = {role: {"cpus": 0.4} for role in roles}
    shared = {"steps": 2, "epochs": 1, "checkpoint_every": 1, "learning_rate": 1e-3, "max_response_tokens": 8, "groups": groups}
    return Recipe(name="test", data=sources, cluster={"placement_timeout_s": 120}, ppo=shared | ppo)


def test_grpo_needs_no_critic_and_resumes_to_the_same_bits(ray_session, made, tmp_path):
    """Two steps; then the second one again, from the first one's checkpoint and the curve alone."""
    recipe = recipe_of(
        advantage="grpo",
        samples_per_prompt=4,
        rollout_batch=4,
        global_batch=8,
        kl_in="loss",
        kl_target=0.5,
        kl_horizon=16,
        entropy_coef=0.01,
        normalize_rewards=True,
        aggregation="sequence_mean",
    )
    assert set(demands(recipe)) == {"policy", "reference", "reward", "rollout"}
    rows = train(recipe, made, tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "whole" / "checkpoints").iterdir()) == ["policy"]
    assert not any("critic" in name or "value" in name for row in rows for name in row)
    assert all(row["ppo/reward_sd"] > 0 and row["ppo/policy_grad_norm"] > 0 and row["ppo/policy_entropy"] > 0 for row in rows)
    assert rows[1]["ppo/kl_coef"] != rows[0]["ppo/kl_coef"]
    assert rows[1]["ppo/kl"] > rows[0]["ppo/kl"] == pytest.approx(0, abs=1e-4)
    learned, before = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", made["sft"]))
    assert any(not torch.equal(learned[name], before[name]) for name in before)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "policy" / "step_00000002")
    assert train(recipe, made, again) == rows
    assert (again / "model" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()


def test_greedy_baselines(ray_session, made, tmp_path):
    recipe = recipe_of(steps=1, rollout_batch=4, global_batch=4, advantage="remax", policy_loss="cispo")
    (row,) = train(recipe, made, tmp_path / "out")
    assert row["ppo/policy_grad_norm"] > 0
    assert "ppo/critic_loss" not in row
    assert "critic" not in demands(recipe)


def test_prompts_take_the_place_of_equal_groups(ray_session, made, tmp_path):
    """Scores that are clipped to their sign: about half of the groups are worth the same."""
    keys = {"advantage": "grpo", "samples_per_prompt": 2, "rollout_batch": 8, "global_batch": 16, "drop_equal_groups": True, "refills": 1}
    recipe = recipe_of(**keys, reward_clip=1e-6)
    rows = train(recipe, made, tmp_path / "out")
    assert max(row["ppo/prompts"] for row in rows) > 8
    for row in rows:
        different = row["ppo/counted"] * row["ppo/prompts"]
        assert different == pytest.approx(round(different))
        assert different <= 8 <= row["ppo/prompts"] <= 16


def test_an_adapter_alone_goes_to_the_engines(ray_session, made, tmp_path):
    recipe = recipe_of(
        advantage="grpo", samples_per_prompt=4, rollout_batch=2, global_batch=8, learning_rate=1e-2, adapter={"method": "lora", "rank": 4}
    )
    rows = train(recipe, made, tmp_path / "out")
    assert all(row["sync/log_prob_gap"] < 1e-4 and row["ppo/log_prob_gap"] < 1e-4 for row in rows)
    # Of eight short answers k1 may be negative.
    assert abs(rows[1]["ppo/kl"]) > 1e-3 > 1e-4 > abs(rows[0]["ppo/kl"]), "the engines answer with what was learned"
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in adapter)
    merged, before = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "out", made["sft"]))
    name = "model.layers.0.mlp.down_proj"
    thin = [adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA"]
    torch.testing.assert_close(merged[f"{name}.weight"], before[f"{name}.weight"] + 16 / 4 * thin[0] @ thin[1])


@pytest.mark.parametrize(
    "keys", [{"advantage": "grpo", "samples_per_prompt": 8, "rollout_batch": 4}, {"rollout_batch": 32, "critic_learning_rate": 3e-3}]
)
def test_answers_become_what_a_function_of_the_users_asks_for(ray_session, made, tmp_path, keys):
    """From 1 token in 10 to more than half of them, without a reward model; the critic starts from the SFT model."""
    (tmp_path / "mine.py").write_text(
        "def small(prompts, responses, answers):\n    return [sum('a' <= c <= 'z' for c in r) / 8 for r in responses]\n"
    )
    recipe = recipe_of(**keys, steps=10, global_batch=16, learning_rate=1e-2, kl_coef=0, reward_function=f"{tmp_path}/mine.py:small")
    rows = train(recipe, {stage: made[stage] for stage in ("data", "sft")}, tmp_path / "out")
    assert rows[0]["ppo/reward"] < 0.3
    assert rows[-1]["ppo/reward"] > 0.5
    assert not any("reference" in name or name == "ppo/kl" for name in rows[0]), "a KL without weight needs no reference"
