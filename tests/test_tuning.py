"""Search: what is sampled and what is refused without Ray; and one search whose trials are real runs."""

import json
import time
from pathlib import Path

import pytest
import ray
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf import tuning
from rlhf.errors import RecipeError
from rlhf.tuning import search


@given(st.floats(1e-6, 1e3), st.floats(1.001, 1e4), st.integers(0, 1000))
def test_samples_stay_within_their_space(low: float, factor: float, seed: int) -> None:
    import numpy as np

    for kind in ("loguniform", "uniform"):
        value = tuning._draw("ppo.kl_coef", f"{kind}({low!r}, {low * factor!r})", np.random.default_rng(seed))
        assert low * 0.999 <= float(value) <= low * factor * 1.001
    assert 2 <= int(tuning._draw("model.layers", "randint(2, 4)", np.random.default_rng(seed))) <= 4
    assert tuning._draw("sft.schedule", "choice(cosine, wsd)", np.random.default_rng(seed)) in ("cosine", "wsd")


@pytest.mark.parametrize(
    ("overrides", "metric", "message"),
    [
        (["ppo.kl_coef=0.1"], "reward/pair_accuracy", "nothing to search"),
        (["ppo.kl_coef=loguniform(0, 1)"], "reward/pair_accuracy", r"two numbers above 0, low first"),
        (["ppo.kl_coef=uniform(1)"], "reward/pair_accuracy", r"write uniform\(low, high\)"),
        (["ppo.kl_koef=uniform(1, 2)"], "reward/pair_accuracy", "kl_coef"),
        (["ppo.kl_coef=uniform(-2, -1)"], "reward/pair_accuracy", "kl_coef"),
        (["ppo.kl_coef=uniform(1, 2)"], "reward/speed", "add --better min or --better max"),
        (["ppo.kl_coef=uniform(1, 2)"], "wall_seconds", "which way"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(recipe_path: Path, overrides: list[str], metric: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        search(recipe_path, overrides, metric, None, 3, 1)


@pytest.mark.slow
def test_a_search_shares_its_data_stops_what_lags_and_repeats_for_nothing(
    ray_session: None, recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate_size": 64}
    pretrain = {"steps": 24, "sequence_length": 16, "global_batch": 4, "validate_every": 4, "checkpoint_every": 1000}
    (tmp_path / "speech2.txt").write_text("".join(f"The {i} citizens speak {i * i} words.\n" for i in range(500)))
    recipe = yaml.safe_load(recipe_path.read_text()) | {
        "cluster": {"workers": 1},
        "tokenizer": {"vocab_size": 300},
        "model": sizes,
        "pretrain": pretrain,
    }
    recipe["data"]["pretrain"] = [f"{tmp_path}/speech.txt", f"{tmp_path}/speech2.txt"]
    for part in ("chat", "pairs", "prompts"):  # a second row each, for the other side of the split
        path = tmp_path / f"{part}.jsonl"
        path.write_text(path.read_text() + path.read_text().replace('"Hi"', '"Good day"'))
    recipe_path.write_text(yaml.safe_dump(recipe))

    asked = ["pretrain.learning_rate=choice(1e-1, 1e-8, 1e-2, 1e-7)"]
    found = search(recipe_path, asked, "pretrain/val_loss", None, 2, 2)
    folder = tmp_path / "runs/tiny/tune"
    assert {t.name: t.values["pretrain.learning_rate"] for t in found} == {"t000": "1e-7", "t001": "1e-2"}
    assert found[0].result < found[1].result, "the held-out text is another one: the larger rate unlearns it"
    assert found[0].state == "made"
    assert all((folder / t.name / "data").is_symlink() for t in found)  # made once
    table = json.loads((folder / "table.json").read_text())
    assert [row["trial"] for row in table["trials"]] == [t.name for t in found]
    assert (folder / "tune.png").stat().st_size > 5000
    assert found[1].state in ("made", "stopped early")
    deadline = time.monotonic() + 20  # what a stopped trial held is free again
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, f"{found[1].state}: {ray.available_resources()} of {ray.cluster_resources()}"
        time.sleep(0.2)
    best = (folder / found[0].name / "pretrain/manifest.json").read_bytes()
    again = search(recipe_path, asked, "pretrain/val_loss", None, 2, 2)
    assert again[0].result == found[0].result
    assert (folder / found[0].name / "pretrain/manifest.json").read_bytes() == best
