"""On-policy distillation: the loss against plain rows, what a worker tells of a step, and the stage itself with real vLLM."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CPU, causal_lm, plain_twin
from transformers import PreTrainedModel

from data.examples import prepare_chat, prepare_prompts
from data.packing import Sample, pack
from data.tokenizers import Tokenizer
from data.tokenizers import train as train_tokenizer
from rlhf import distill
from rlhf.distill import StudentWorker, on_policy_loss, without_engine
from rlhf.distillation import Student, divergence
from rlhf.errors import RecipeError
from rlhf.experience import Rollout, align, samples
from rlhf.models import Batch, save_model
from rlhf.monitoring import Monitor, read_metrics
from rlhf.recipe import OnPolicyDistill, Recipe

VOCAB = 276
PROMPTS, RESPONSES = [3, 1, 6, 2], [5, 9, 1, 4]


def recipe(teacher: Path, **changes: Any) -> Recipe:
    unused = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    settings = {"teacher": str(teacher), "rollout_batch": 8, "global_batch": 8, **changes}
    groups = {"policy": {"workers": 2, "cpus": 0.25}, "rollout": {"cpus": 0.5}}
    sampling = {"max_prompt_tokens": 16, "max_response_tokens": 16, "temperature": 0.7, "groups": groups}
    return Recipe.model_validate({"name": "t", "align": "distill", "data": unused, "ppo": sampling, "distill": settings})


def ragged(seed: int = 0) -> Rollout:
    rng = np.random.default_rng(seed)
    total, answered = sum(PROMPTS) + sum(RESPONSES), sum(RESPONSES)
    return Rollout(
        np.arange(4),
        np.array(PROMPTS),
        np.array(RESPONSES),
        rng.integers(0, VOCAB, total).astype(np.int32),
        np.array([True, False, True, True]),
        np.zeros(answered, np.float32),
        "step-0",
    )


def rows_of(rollout: Rollout) -> list[torch.Tensor]:
    lengths = (rollout.prompt_lengths + rollout.response_lengths).tolist()
    return list(torch.from_numpy(rollout.tokens.astype(np.int64)).split(lengths))


def by_rows(student: PreTrainedModel, teacher: PreTrainedModel, rollout: Rollout, config: OnPolicyDistill) -> list[torch.Tensor]:
    """Divergences of each answer's tokens, one plain forward of either model for every prompt with its answer."""
    found = []
    for row, prompt in zip(rows_of(rollout), PROMPTS, strict=True):
        ours, theirs = (model(input_ids=row[None]).logits[0, prompt - 1 : -1] / config.temperature for model in (student, teacher))
        p, q = theirs.detach().log_softmax(-1), ours.log_softmax(-1)
        if config.divergence == "reverse":
            found.append(F.kl_div(p, q, reduction="none", log_target=True).sum(-1))
        else:
            mean = (config.beta * p.exp() + (1 - config.beta) * q.exp()).log()
            ends = [F.kl_div(mean, of, reduction="none", log_target=True).sum(-1) for of in (p, q)]
            found.append(config.beta * ends[0] + (1 - config.beta) * ends[1])
    return found


@pytest.mark.parametrize("which", ["reverse", "js"])
def test_loss_and_gradients_are_those_of_plain_rows(which: str) -> None:
    """A ragged batch of answers; a conversation of the data beside them counts for the loss and not for the figure."""
    config = OnPolicyDistill(divergence=which, beta=0.3, temperature=1.5)
    rollout, ours, teacher = ragged(), causal_lm(seed=0, vocab_size=VOCAB), causal_lm(seed=1, vocab_size=VOCAB)
    student, knows = plain_twin(ours), plain_twin(teacher)
    model = Student(ours, teacher.requires_grad_(False), config)
    extras = {"own": np.ones(sum(RESPONSES), np.float32), "engine": rollout.log_probs}
    tokens, mask = np.arange(5, 15), np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], bool)  # two turns
    batch = Batch.of(pack([*samples(rollout, extras), without_engine(Sample(tokens, mask))]), CPU)
    value, sums = on_policy_loss(model(batch, 0.7)[:, 1], batch, config.temperature)
    value.backward()
    own = torch.cat(by_rows(student, knows, rollout, config))
    row, counted = torch.from_numpy(tokens)[None], torch.from_numpy(mask)[1:]
    p, q = ((of(input_ids=row).logits[0, :-1] / 1.5).log_softmax(-1)[counted] for of in (knows, student))
    expected = 1.5**2 * (own.sum() + divergence(p.detach(), q, config).sum())
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(sums["divergence"]) == pytest.approx(own.sum().item(), rel=1e-5)
    assert (float(sums["own"]), float(batch.weights.sum())) == (sum(RESPONSES), sum(RESPONSES) + mask.sum())
    gradients = dict(student.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name].grad).norm() < 1e-4 * gradients[name].grad.norm(), name


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["good red blue green grey"] * 50, VOCAB)


@pytest.fixture(scope="module")
def made(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's data and sft, and a teacher: two fresh models."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer.save(folder / "data" / "tokenizer")
    for seed, name in enumerate(("sft", "teacher")):
        model = causal_lm(seed, VOCAB, hidden_size=64, heads=2, kv_heads=1)  # heads of 32: vLLM has kernels for them
        save_model(model, {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, tokenizer, folder / name / "model")
    return folder


def student_worker(folder: Path, asked: Recipe, checkpoints: Path) -> StudentWorker:
    worker = StudentWorker(0, 1, 1, asked, folder / "sft" / "model", folder / "teacher" / "model", folder / "data" / "tokenizer")
    worker.load(8, checkpoints)
    return worker


def test_a_worker_tells_divergence_and_gap_of_the_weights_that_wrote(made: Path, tmp_path: Path) -> None:
    """Engines whose log-probabilities are off by 0.25 at one token; in the second epoch the weights have moved and nothing is compared."""
    asked = recipe(made / "teacher" / "model", epochs=2, learning_rate=1e-3)
    worker = student_worker(made, asked, tmp_path)
    plain, knows = plain_twin(worker.learner.model.inner), plain_twin(worker.learner.model.teacher[0])
    rollout = ragged()
    with torch.no_grad():
        logits = [plain(input_ids=row[None]).logits[0, :-1] / 0.7 for row in rows_of(rollout)]
        told = [of.log_softmax(-1).gather(1, row[1:, None])[:, 0] for of, row in zip(logits, rows_of(rollout), strict=True)]
        apart = torch.cat(by_rows(plain, knows, rollout, asked.distill))
    rollout.log_probs[:] = torch.cat([found[prompt - 1 :] for found, prompt in zip(told, PROMPTS, strict=True)]).numpy()
    np.testing.assert_allclose(align([worker.log_probs(rollout)], rollout.response_lengths), rollout.log_probs, atol=1e-4)
    first = worker.distill(0, [], rollout)
    assert first["log_prob_gap"] < 1e-4
    assert first["response_tokens"] == np.mean(RESPONSES)
    assert first["unfinished"] == 0.25
    assert 0.9 * apart.mean().item() < first["divergence"] < apart.mean().item()  # mean of before and after one optimizer step
    assert first["loss"] == pytest.approx(first["divergence"], rel=1e-5)
    off = Rollout(**{**vars(rollout), "log_probs": align([worker.log_probs(rollout)], rollout.response_lengths)})
    off.log_probs[7] += 0.25
    conversations = [Sample(np.arange(5, 15), np.ones(10, bool))]
    second = worker.distill(1, conversations, off)
    assert second["log_prob_gap"] == pytest.approx(0.25, abs=1e-4)
    assert second["divergence"] < first["divergence"]
    assert second["divergence"] != pytest.approx(second["loss"], rel=1e-3)  # the conversation is in the loss alone
    off.log_probs[3] = np.nan
    assert np.isnan(worker.distill(2, conversations, off)["log_prob_gap"])


def test_a_teacher_of_another_vocabulary_is_refused(made: Path, tmp_path: Path) -> None:
    other = causal_lm(vocab_size=300)
    other.save_pretrained(tmp_path / "teacher")
    worker = StudentWorker(0, 1, 1, recipe(made), made / "sft" / "model", tmp_path / "teacher", made / "data" / "tokenizer")
    with pytest.raises(RecipeError, match=r"distill\.teacher .*: it knows 300 tokens and the student 276"):
        worker.load(8, tmp_path)


@pytest.fixture(scope="module")
def prepared(ray_session: None, made: Path, tokenizer: Tokenizer) -> Path:
    rng, words = np.random.default_rng(0), ("red", "blue", "green", "grey")
    asked = [{"role": "user", "content": f"{a} {b}"} for a in words for b in words]
    answers = [{"role": "assistant", "content": " ".join(rng.choice(words, 4))} for _ in asked]
    (made / "prompts.jsonl").write_text("".join(json.dumps({"messages": [q]}) + "\n" for q in asked))
    (made / "chat.jsonl").write_text("".join(json.dumps({"messages": [q, a]}) + "\n" for q, a in zip(asked, answers, strict=True)))
    limits = {"validation_fraction": 0.2, "max_broken_fraction": 0.0}
    prepare_prompts([made / "prompts.jsonl"], tokenizer, made / "data" / "prompts", max_tokens=16, **limits)
    prepare_chat([made / "chat.jsonl"], tokenizer, made / "data" / "sft", max_tokens=64, **limits)
    return made


@pytest.mark.slow
def test_the_stage_comes_near_its_teacher_and_resumes_to_the_same_weights(prepared: Path, tmp_path: Path) -> None:
    """24 answers of its own and 8 conversations of the data in each step; two ranks learn."""
    settings = {
        "on_policy_fraction": 0.75,
        "steps": 15,
        "rollout_batch": 32,
        "global_batch": 16,
        "learning_rate": 1e-2,
        "final_lr_fraction": 1,
        "checkpoint_every": 8,
    }
    asked = recipe(prepared / "teacher" / "model", **settings)
    inputs = {name: prepared / name for name in ("data", "sft")}

    def go(out: Path) -> bytes:
        out.mkdir(exist_ok=True)
        with Monitor("distill", out) as monitor:
            distill.run(asked, inputs, out, monitor)
        return (out / "model" / "model.safetensors").read_bytes()

    made = go(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 15
    found = read_metrics(tmp_path / "whole")
    assert found["distill/divergence_last"] < 0.5 * found["distill/divergence_first"]
    assert found["distill/log_prob_gap_max"] < 1e-4
    assert all(0 <= row["distill/unfinished"] <= 1 <= row["distill/response_tokens"] <= 16 for row in rows)

    # As a kill after step 10 leaves it: the last checkpoint is that of step 8, the curve goes on a little.
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step_00000008", half / "checkpoints" / "step_00000008")
    (half / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    assert go(half) == made
    again = [json.loads(line) for line in (half / "metrics.jsonl").read_text().splitlines()]
    clock = {"time": 0, "sync/seconds": 0, "sync/mb_per_s": 0}
    assert [row | clock for row in again] == [row | clock for row in rows]
