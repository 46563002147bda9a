"""The command line as a user meets it: exit codes, one clear message, nothing heavy imported for a mistake."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def roundhouse(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "rlhf.cli", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def mistake(*arguments: str, cwd: Path = ROOT) -> str:
    """The message of a command that must end with exit code 2 and without a traceback."""
    done = roundhouse(*arguments, cwd=cwd)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_help_is_quick_and_light() -> None:
    code = "import sys, rlhf.cli; print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
    since = time.monotonic()
    shown = roundhouse("--help")
    assert time.monotonic() - since < 5
    assert shown.returncode == 0
    for command in ("run", "submit", "explain", "status", "chat", "data"):
        assert command in shown.stdout


def test_explain() -> None:
    shown = roundhouse("explain", "ppo.kl_coef").stdout
    for part in ("ppo.kl_coef", "reward per nat", "0.05", ">= 0", "arXiv:1909.08593"):
        assert part in shown
    assert "ppo.groups.policy.gpus" in roundhouse("explain", "ppo.groups.policy").stdout
    assert "evaluate" in roundhouse("explain").stdout
    assert mistake("explain", "ppo.klcoef") == "error ppo.klcoef is no key of a recipe; did you mean ppo.kl_coef?\n"


def test_data_list() -> None:
    shown = roundhouse("data", "list")
    assert shown.returncode == 0
    for name in ("sotu", "chatterbot", "rated-snippets"):
        assert name in shown.stdout
    assert "sotu" in mistake("data", "get", "sotuu")


def test_data_export_and_vocab_report_tell_what_they_cannot(tmp_path: Path) -> None:
    assert "--to hf: the one other format is megatron" in mistake("data", "export", "nowhere", str(tmp_path), "--to", "hf")
    assert "no manifest.json" in mistake("data", "export", str(tmp_path), str(tmp_path / "out"))
    assert "no encoding is called 'gpt5'" in mistake("data", "vocab-report", str(tmp_path / "x.txt"), "--tokenizers", "gpt5")


def test_mistakes_in_a_recipe(recipe_path: Path, tmp_path: Path) -> None:
    message = mistake("run", str(recipe_path), "ppo.kl_coeff=1", "pretrain.steps=none", "data.sft=[nowhere.jsonl]")
    assert message.startswith(f"error {recipe_path} has 3 problems:\n")
    assert not (tmp_path / "runs").exists()
    assert "there is no stage 'sfft'" in mistake("run", str(recipe_path), "--only", "sfft")
    assert "no run at" in mistake("status", str(tmp_path / "runs"))
    assert "No such command" in roundhouse("rum").stderr


def test_model_directories_that_cannot_work(recipe_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    options = ("run", str(recipe_path), f"model.init={model}", "tokenizer.encoding=model")
    message = mistake(*options)
    for missing in ("no config.json", "no weights", "no tokenizer.json"):
        assert missing in message
    (model / "config.json").write_text('{"vocab_size": 300, "max_position_embeddings": 128}')
    (model / "model.safetensors").write_bytes(b"")
    (model / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 299}}, "added_tokens": [{"id": 300}]}')
    message = mistake(*options)
    assert f"has 301 tokens, but {model} has embeddings for 300 only" in message
    assert f"pretrain.sequence_length = 256 is longer than the 128 positions of {model}" in message
    message = mistake("run", str(recipe_path), f"model.init={model}", "tokenizer.vocab_size=4096", "pretrain.sequence_length=64")
    assert "tokenizer.encoding = train has 4096 tokens" in message


def test_runs_dir_that_cannot_be_written(recipe_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is a file, not a folder" in mistake("run", str(recipe_path), f"runs_dir={tmp_path}/file/runs")


def test_submit_refuses_before_it_connects(recipe_path: Path, tmp_path: Path) -> None:
    assert "lies outside of" in mistake("submit", str(recipe_path), cwd=ROOT)
    nobody = "http://127.0.0.1:1"
    assert f"no Ray dashboard answers at {nobody}" in mistake("submit", recipe_path.name, "--address", nobody, cwd=tmp_path)


def test_faults_of_ours_keep_their_traceback(tmp_path: Path) -> None:
    code = "import rlhf.recipe_file as f, rlhf.cli as c, sys; f.load = lambda *a: 1 / 0; sys.argv[1:] = ['run', 'x.yaml']; c.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("wrapped", [False, True])
def test_user_errors_from_a_worker_are_found(wrapped: bool) -> None:
    from data.errors import DataError
    from rlhf.errors import user_error

    error: Exception = DataError("speech.txt is empty")
    if wrapped:
        outer = RuntimeError("a worker failed")
        outer.worker_failures = {0: error}  # type: ignore[attr-defined]
        error = outer
    assert str(user_error(error)) == "speech.txt is empty"
    assert user_error(KeyError("x")) is None
