"""Recipes: what is wrong is said at once, with line and nearest key; what is right survives writing out."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf import recipe_file, recipe_keys
from rlhf.errors import RecipeError
from rlhf.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent


NAMES = st.sampled_from(["ppo", "data", "model", "init", "sft", "heads", "groups"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_written_out_whole(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("pretrain", "sft"):  # some start from what the quickstart made
        (tmp_path / "runs" / "quickstart" / stage / "model").mkdir(parents=True)
    recipe = recipe_file.load(path)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(recipe_file.resolved(recipe))
    assert recipe_file.load(copy) == recipe
    assert yaml.safe_load(copy.read_text())["ppo"]["kl_coef"] == recipe.ppo.kl_coef  # defaults are in it


def test_overrides(recipe_path: Path) -> None:
    recipe = recipe_file.load(recipe_path, ["ppo.kl_coef=3e-1", "ppo.groups.rollout.threads=3", "pretrain.steps=7", "name=other"])
    assert (recipe.ppo.kl_coef, recipe.ppo.groups.rollout.threads, recipe.pretrain.steps, recipe.name) == (0.3, 3, 7, "other")
    assert recipe.ppo.groups.policy.threads == 1
    assert recipe_file.load(recipe_path, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("ppo.kl_coeff", "ppo.kl_coef"),
        ("ppo.clip", "ppo.clip_range"),
        ("sft.lr", "sft.learning_rate"),
        ("learning_rate", "learning_rate"),
        ("ppo.groups.polcy", "ppo.groups.policy"),
        ("pretrain.kl_coef", "ppo.kl_coef"),
        ("modell", "model"),
    ],
)
def test_unknown_key_names_the_nearest(recipe_path: Path, key: str, nearest: str) -> None:
    message = complaint(recipe_path, f"{key}=1")
    assert f"{key} is no key" in message
    assert nearest in message.partition("did you mean")[2]


def test_unknown_key_names_its_line(recipe_path: Path, recipe_text: str) -> None:
    recipe_path.write_text(recipe_text + "ppo:\n  epochs: 1\n  kl_coeff: 0.1\n")
    line = recipe_path.read_text().splitlines().index("  kl_coeff: 0.1") + 1
    assert complaint(recipe_path) == f"{recipe_path} line {line}: ppo.kl_coeff is no key of a recipe; did you mean ppo.kl_coef?"


def test_everything_wrong_is_said_at_once(recipe_path: Path, recipe_text: str, tmp_path: Path) -> None:
    text = recipe_text.replace("steps: 3", "steps: many\n  stepz: 3")
    text = text.replace(f"{tmp_path}/chat.jsonl", f"{tmp_path}/chatt.jsonl, sotu:chat")
    recipe_path.write_text(text + "model: {heads: 0}\n")
    message = complaint(recipe_path, "ppo.gamma=1.5", f"model.init={tmp_path}/nowhere", "cluster=3")
    for part in (
        "pretrain.steps should be a valid integer, got 'many'",
        "pretrain.stepz is no key of a recipe; did you mean pretrain.steps?",
        f"no such file: {tmp_path}/chatt.jsonl; did you mean {tmp_path}/chat.jsonl?",
        "sotu holds text, not 'chat'",
        "override ppo.gamma=1.5: ppo.gamma should be less than or equal to 1, got 1.5",
        f"model.init is no directory: {tmp_path}/nowhere",
        "model.heads would have no effect: model.init brings a model of its own",
        "cluster is a section with keys of its own",
    ):
        assert part in message, message
    assert message.splitlines()[0] == f"{recipe_path} has {len(message.splitlines()) - 1} problems:"


def test_sections_that_disagree(recipe_path: Path) -> None:
    message = complaint(recipe_path, "pretrain.sequence_length=600", "ppo.global_batch=128")
    assert "override pretrain.sequence_length=600: pretrain.sequence_length = 600 is longer than model.max_positions = 512" in message
    assert "override ppo.global_batch=128: ppo.global_batch = 128 is larger than ppo.rollout_batch = 64" in message
    assert "override cluster.ports=[5, 6]: cluster.ports must be" in complaint(recipe_path, "cluster.ports=[5, 6]")


def test_key_without_effect(recipe_path: Path) -> None:
    message = complaint(recipe_path, "tokenizer.encoding=gpt2", "tokenizer.vocab_size=5000")
    assert "tokenizer.vocab_size would have no effect" in message
    recipe = recipe_file.load(recipe_path, ["tokenizer.encoding=gpt2"])
    assert "vocab_size" not in recipe_file.resolved(recipe)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [b\nc: d", "line 2: this is not YAML"),
        ("- a", "a recipe is a mapping of keys, this is a list"),
        ("", "name is missing and has no default"),
        ("name: a\nname: b\n", "name stands twice"),
        ("name: &a [*a]", "not YAML"),
        ("name: 2001-99-99", "not YAML"),
        ("name: a\0b", "not YAML"),
        ("name: 'a b'\n", "name should match pattern"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert what in complaint(path)


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("name: a")
    assert f"did you mean {tmp_path}/quickstart.yaml?" in complaint(tmp_path / "quickstrat.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    assert "cannot read the recipe" in complaint(tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["ppo", "ppo.kl_coef:3", "=3", "a b=3", "ppo.kl_coef=[1"])
def test_overrides_that_are_none(recipe_path: Path, override: str) -> None:
    assert repr(override) in complaint(recipe_path, override)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=JUNK)
def test_any_content_loads_or_explains_itself(recipe_path: Path, recipe_text: str, junk: object) -> None:
    values = yaml.safe_load(recipe_text)
    values = {**values, **junk} if isinstance(junk, dict) else {**values, "model": junk}
    recipe_path.write_text(yaml.safe_dump(values))
    try:
        outcome = recipe_file.load(recipe_path)
    except RecipeError as error:
        outcome = str(error)
    assert isinstance(outcome, Recipe) or outcome.startswith(str(recipe_path))


def test_explain_knows_every_key() -> None:
    keys = recipe_keys.all_keys()
    assert all(k.meaning for k in keys.values())
    kl = recipe_keys.explain("ppo.kl_coef")[0]
    assert (kl.default, kl.unit, kl.limits) == ("0.05", "reward per nat", ">= 0")
    assert "arXiv:1909.08593" in kl.source
    assert [k.name for k in recipe_keys.explain("ppo.groups")][:2] == ["ppo.groups", "ppo.groups.policy"]
    assert "pretrain.learning_rate" in keys
    assert keys["pretrain.learning_rate"].default == "0.003"  # the section's own default, not the shared one
    with pytest.raises(RecipeError, match=r"did you mean ppo\.kl_coef"):
        recipe_keys.explain("ppo.klcoef")


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["ppo.groups.policy.gpus=1.5"], "ppo.groups.policy.gpus = 1.5: an actor has a part of one GPU, or whole ones"),
        (["ppo.groups.policy.workers=8", "ppo.groups.policy.nodes=3"], "ppo.groups.policy.nodes = 3 must divide workers = 8"),
        (["ppo.groups.rollout.gpus=2"], "ppo.groups.rollout.gpus = 2 must equal tensor_parallel = 1"),
        (["ppo.groups.rollout.gpus=1", "ppo.groups.rollout.tensor_parallel=2"], "gpus = 1 must equal tensor_parallel = 2"),
        (["ppo.groups.rollout.tensor_parallel=3"], "ppo.groups.rollout.tensor_parallel = 3 must divide model.heads = 4"),
        (["ppo.groups.policy.tensor_parallel=2"], "ppo.groups.policy.tensor_parallel is no key of a recipe"),
        (["ppo.colocate=[[policy, judge]]"], "ppo.colocate should be 'policy', 'reference'"),
        (["ppo.colocate=[[policy]]"], "ppo.colocate"),
        (["ppo.colocate=[[policy, critic], [critic, reward]]"], "ppo.colocate names critic twice: a role is in one place"),
        (["ppo.colocate=[[policy, critic]]", "ppo.groups.policy.workers=2"], "workers x cpus (policy 2 x 1, critic 1 x 1)"),
        (["ppo.colocate=[[policy, critic]]", "ppo.groups.policy.gpus=1"], "whole GPUs, or none of them any (policy 1 x 1, critic 1 x 0)"),
    ],
)
def test_groups_that_cannot_be(recipe_path: Path, overrides: list[str], what: str) -> None:
    assert what in complaint(recipe_path, *overrides)


def test_groups_that_share(recipe_path: Path) -> None:
    gpus = [f"ppo.groups.{role}.gpus=1" for role in ("policy", "reference", "reward", "critic")]
    four = [f"ppo.groups.{role}.workers=4" for role in ("policy", "reference", "reward", "critic")]
    engines = ["ppo.groups.rollout.gpus=2", "ppo.groups.rollout.tensor_parallel=2", "ppo.groups.rollout.workers=2"]
    recipe = recipe_file.load(recipe_path, [*gpus, *four, *engines, "ppo.colocate=[[policy, reference], [rollout, reward]]"])
    assert recipe.ppo.colocate == [["policy", "reference"], ["rollout", "reward"]]
    assert recipe.ppo.groups.rollout.demand.width == 2
