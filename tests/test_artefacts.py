"""Artefacts and the pipeline over them, with stages that cost nothing: what is skipped, resumed, made again, and never mistaken."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import artefacts, monitoring, pipeline, recipe_file
from rlhf.artefacts import Identity
from rlhf.errors import RecipeError
from rlhf.monitoring import Monitor
from rlhf.recipe import Recipe

STAGES = ("data", "pretrain", "sft", "reward", "ppo", "evaluate")
ROOT = Path(__file__).resolve().parent.parent


class Stages:
    """Fake stages: each notes that it ran and what it found, and can be told to fail."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.found: dict[str, bool] = {}
        self.fails: set[str] = set()

    def __call__(self, stage: str) -> pipeline.StageFunction:
        def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
            assert all((p / "manifest.json").exists() for p in inputs.values())
            self.ran.append(stage)
            self.found[stage] = (out / "checkpoint").exists()
            (out / "checkpoint").write_text("half way")
            if stage in self.fails:
                raise RuntimeError("power cut")
            monitor.result("score", 1.5)
            (out / "model").write_text(stage)

        return run


@pytest.fixture
def go(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], Stages]]:
    """Run the pipeline on fake stages, without Ray and without a report; returns the stages that ran."""
    from contextlib import nullcontext

    stages = Stages()
    monkeypatch.setattr(pipeline, "connect", lambda address: nullcontext())
    monkeypatch.setattr(pipeline, "_check_room", lambda recipe, stages: None)
    monkeypatch.setattr(pipeline, "_finish", lambda run_dir, ran: None)

    def run(*overrides: str, **part: str) -> tuple[list[str], Stages]:
        stages.ran = []
        pipeline.run(recipe_file.load(recipe_path, list(overrides)), **part, function_of=stages)
        return stages.ran, stages

    run.stages = stages  # type: ignore[attr-defined]
    return run


def test_second_run_skips_everything_and_needs_no_ray(go, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert go()[0] == list(STAGES)
    monkeypatch.setattr(pipeline, "connect", lambda address: pytest.fail("connected for nothing"))
    assert go()[0] == []
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert summary["pretrain/score"] == 1.5
    assert summary["wall_seconds"] == pytest.approx(sum(summary[f"{s}/wall_seconds"] for s in STAGES), abs=0.01)
    assert recipe_file.load(tmp_path / "runs/tiny/recipe.yaml").name == "tiny"


@pytest.mark.parametrize(
    ("override", "ran"),
    [
        ("ppo.kl_coef=0.2", ["ppo", "evaluate"]),
        ("reward.epochs=2", ["reward", "ppo", "evaluate"]),
        ("pretrain.steps=4", ["pretrain", "sft", "reward", "ppo", "evaluate"]),
        ("tokenizer.vocab_size=500", list(STAGES)),
        ("evaluate.samples=3", ["evaluate"]),
        ("align=preference", ["preference", "evaluate"]),
        ("preference.method=kto", []),  # not in this line
        ("distill.teacher=nowhere", []),
        ("cluster.workers=1", []),  # where it runs does not change what comes out
        ("ppo.groups.policy.cpus=0.5", []),
        ("ppo.colocate=[[policy, reference]]", []),
        ("pretrain.checkpoint_every=1", []),
        ("data.cache_dir=elsewhere", []),
    ],
)
def test_a_change_reaches_exactly_what_depends_on_it(go, override: str, ran: list[str]) -> None:
    go()
    assert go(override)[0] == ran
    assert go(override)[0] == []


def test_changing_back_costs_nothing(go, tmp_path: Path) -> None:
    go()
    go("reward.epochs=2")
    assert go()[0] == []
    assert len(list((tmp_path / "runs/tiny/.previous").iterdir())) == 3  # those of the other recipe, kept in turn
    assert go("reward.epochs=2")[0] == []


def test_both_ways_of_aligning_live_in_one_run(go, tmp_path: Path) -> None:
    go()
    go("align=preference")
    assert "preference/score" in json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert go("align=preference", only="preference")[0] == []
    with pytest.raises(RecipeError, match=r"no stage 'ppo'.*preference, evaluate; align=ppo puts it into the line"):
        go("align=preference", only="ppo")
    assert go()[0] == []


def test_distill_depends_on_its_teachers_files_and_on_how_answers_are_sampled(go, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "model.safetensors"):
        (teacher / name).write_text("{}")
    go()
    asked = ("align=distill", f"distill.teacher={teacher}")
    with pytest.raises(RecipeError, match=r"align = distill needs distill\.teacher"):
        go("align=distill")
    assert go(*asked)[0] == ["distill", "evaluate"]
    assert go(*asked, "ppo.kl_coef=0.2", "ppo.groups.policy.cpus=0.5", "distill.checkpoint_every=3")[0] == []
    assert go(*asked, "ppo.temperature=0.7")[0] == ["distill", "evaluate"]
    assert go(*asked, "ppo.temperature=0.7", f"distill.teacher={teacher}/../teacher")[0] == []  # the same files
    (teacher / "model.safetensors").write_text("others")
    assert go(*asked, "ppo.temperature=0.7")[0] == ["distill", "evaluate"]
    (teacher / "config.json").unlink()
    with pytest.raises(RecipeError, match=r"distill\.teacher: .*teacher has no config.json"):
        go(*asked)


def test_one_previous_version_of_a_stage_is_kept(go, tmp_path: Path) -> None:
    for epochs in (1, 2, 3):
        go(f"reward.epochs={epochs}")
    kept = sorted(p.name.partition("-")[0] for p in (tmp_path / "runs/tiny/.previous").iterdir())
    assert kept == ["evaluate", "ppo", "reward"]
    assert go("reward.epochs=2")[0] == []  # the last but one
    assert go("reward.epochs=1")[0] == ["reward", "ppo", "evaluate"]


def test_changed_input_file(go, tmp_path: Path) -> None:
    go()
    (tmp_path / "speech.txt").write_text("Other words.\n")
    assert go()[0] == list(STAGES)
    os.utime(tmp_path / "speech.txt")  # touched, not changed
    assert go()[0] == []


def test_failed_stage_resumes_with_its_checkpoints(go, tmp_path: Path) -> None:
    go.stages.fails = {"sft"}
    with pytest.raises(RuntimeError, match="power cut"):
        go()
    assert not (tmp_path / "runs/tiny/sft/manifest.json").exists()
    go.stages.fails = set()
    ran, stages = go()
    assert ran == ["sft", "reward", "ppo", "evaluate"]
    assert stages.found["sft"]
    assert not stages.found["reward"]


def test_checkpoints_of_another_recipe_are_not_resumed(go) -> None:
    go.stages.fails = {"sft"}
    with pytest.raises(RuntimeError):
        go()
    go.stages.fails = set()
    ran, stages = go("sft.epochs=1")
    assert ran[0] == "sft"
    assert not stages.found["sft"]


def test_removed_directory_is_made_again_with_all_that_stands_on_it(go, tmp_path: Path) -> None:
    import shutil

    go()
    shutil.rmtree(tmp_path / "runs/tiny/reward")
    assert go()[0] == ["reward", "ppo", "evaluate"]
    assert go()[0] == []


def test_only_from_and_until(go) -> None:
    with pytest.raises(RecipeError, match="data is not made yet; pretrain is not made yet"):
        go(only="sft")
    go()
    assert go("reward.epochs=2", "pretrain.steps=4", only="pretrain")[0] == ["pretrain"]
    with pytest.raises(RecipeError, match=r"sft is out of date"):
        go("reward.epochs=2", "pretrain.steps=4", start="reward")
    go()
    assert go("reward.epochs=2", start="reward")[0] == ["reward", "ppo", "evaluate"]
    with pytest.raises(RecipeError, match="no stage 'rewards'"):
        go(start="rewards")
    assert go("reward.epochs=3", "ppo.steps=9", start="reward", until="reward")[0] == ["reward"]
    assert go("pretrain.steps=5", until="sft")[0] == ["pretrain", "sft"]
    with pytest.raises(RecipeError, match="one or the other"):
        go(only="sft", start="sft")
    with pytest.raises(RecipeError, match="pretrain comes before sft"):
        go(start="sft", until="pretrain")


def test_line_says_why_a_stage_runs_again(go, capsys: pytest.CaptureFixture[str]) -> None:
    go()
    capsys.readouterr()
    go("ppo.kl_coef=0.2")
    out = capsys.readouterr().out
    assert "ppo.kl_coef 0.05 -> 0.2" in out
    assert "up to date" in out.splitlines()[1]
    assert "score 1.5" in out


# ------------------------------------------------------------------------------------------------ markers and locks


@given(cut=st.integers(0, 400), name=st.sampled_from(["manifest.json", "started.json"]))
def test_half_written_marker_is_never_a_whole_directory(tmp_path_factory: pytest.TempPathFactory, cut: int, name: str) -> None:
    out = tmp_path_factory.mktemp("run") / "pretrain"
    identity = Identity("pretrain", {"seed": 0}, {}, {})
    artefacts.prepare(out, identity)
    artefacts.commit(out, identity, 1.0)
    assert artefacts.state(out, identity) == "made"
    whole = (out / "manifest.json").read_bytes()
    (out / "manifest.json").unlink()
    (out / name).write_bytes(whole[: min(cut, len(whole) - 2)])
    assert artefacts.state(out, identity) != "made"


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4),
)
def test_hash_is_equal_exactly_when_the_things_are(a: dict[str, object], b: dict[str, object]) -> None:
    shuffled = dict(reversed(a.items()))
    assert Identity("sft", a, {}, {}).hash == Identity("sft", shuffled, {}, {}).hash
    assert (Identity("sft", a, {}, {}).hash == Identity("sft", b, {}, {}).hash) == (a == b)
    assert Identity("sft", a, {}, {}).hash != Identity("ppo", a, {}, {}).hash


def test_digest_sees_content_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = artefacts.digest(folder)
    (folder / "config.json").write_text("{ }")
    assert artefacts.digest(folder) != first
    (folder / "config.json").write_text("{}")
    assert artefacts.digest(folder) == first
    (folder / "config.json").rename(folder / "other.json")
    assert artefacts.digest(folder) != first


KILLED = """
import sys, time
from contextlib import nullcontext
from rlhf import cli, pipeline
def stage(name):
    def run(recipe, inputs, out, monitor):
        (out / "checkpoint").write_text("half way")
        if name == "sft":
            print("in sft", flush=True)
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                raise KeyboardInterrupt  # as Ray does it: which signal it was is lost on the way
        (out / "model").write_text(name)
    return run
whole = pipeline.run
pipeline.run = lambda recipe, **part: whole(recipe, **part, function_of=stage)
pipeline.connect = lambda address: nullcontext()
pipeline._check_room = lambda recipe, stages: None
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_driver_leaves_a_half_stage_and_a_free_lock(go, recipe_path: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", KILLED, "run", str(recipe_path)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests that run in the background are started deaf to it
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert driver.stdout is not None
    while "in sft" not in (line := driver.stdout.readline()):
        assert line, driver.communicate()
    with pytest.raises(RecipeError, match=f"in use by pid {driver.pid} "):
        go()
    driver.send_signal(number)
    out, err = driver.communicate(timeout=30)
    assert driver.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], err
    if number != signal.SIGKILL:
        assert "sft       stopped" in out
        assert err == "stopped; the same command resumes where it was\n"
    assert not (tmp_path / "runs/tiny/sft/manifest.json").exists()
    ran, stages = go()
    assert ran == ["sft", "reward", "ppo", "evaluate"]
    assert stages.found["sft"]


# ------------------------------------------------------------------------------------------------ monitor


def test_metrics_of_a_resumed_stage_never_fold_back(tmp_path: Path) -> None:
    for first, last in ((0, 5), (3, 6)):
        with Monitor("sft", tmp_path) as monitor:
            for step in range(first, last):
                monitor.log(step, {"loss": step + first / 10, "sync/gap": 0.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "sft/lo')  # a kill in the middle of a line
    with Monitor("sft", tmp_path) as monitor:
        monitor.log(6, {"loss": float("nan")})
        monitor.result("val_loss", 2.5)
        monitor.result("sync/gap_max", 0.1)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [r["sft/loss"] for r in rows] == [0.0, 1.0, 2.0, 3.3, 4.3, 5.3, None]
    assert "sync/gap" in rows[0]
    assert monitoring.read_metrics(tmp_path) == {"sft/val_loss": 2.5, "sync/gap_max": 0.1}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.step for e in events.Scalars("sft/loss")] == [0, 1, 2, 3, 4, 5, 6]


def test_progress_without_a_terminal_is_a_few_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Monitor("pretrain", tmp_path) as monitor:
        for step in range(1, 1001):
            clock[0] += 0.5
            monitor.progress(step, 1000, f"loss {step}")
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 10
    assert lines[-1].split() == ["pretrain", "1000/1000", "loss", "1000"]
