"""dpo, ipo, simpo and kto: formulas in numpy, packed rankings against plain rows, and the stage itself on rankings it has to learn."""

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tiny import CPU, causal_lm, plain_twin
from transformers import PreTrainedModel

from data.examples import Examples, prepare_preferences
from data.packing import Sample, pack, uncounted
from data.tokenizers import Tokenizer
from data.tokenizers import train as train_tokenizer
from rlhf.losses import dpo, ipo, kto, simpo
from rlhf.models import Batch, LanguageModel, save_model
from rlhf.preference import PER_TOKEN, preference_loss, task, units
from rlhf.recipe import Preference, Recipe
from rlhf.training import batch_of, plan, worker

METHODS = ("dpo", "ipo", "simpo", "kto")
WORDS = ("red", "blue", "green", "grey")
SETTINGS = {"dpo": {}, "ipo": {"beta": 0.5}, "simpo": {"beta": 2.0}, "kto": {}}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8), st.floats(0.05, 3), st.floats(0, 2), st.floats(0, 5))
def test_formulas(values: list[float], beta: float, margin: float, level: float) -> None:
    leads = np.array(values)
    desirable = np.arange(len(values)) % 2 == 0
    given_leads = torch.tensor(leads)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return np.exp(-np.logaddexp(0, -x))

    def close(found: torch.Tensor, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)

    close(dpo(given_leads, beta), np.logaddexp(0, -beta * leads))
    close(ipo(given_leads, beta), (leads - 0.5 / beta) ** 2)
    close(simpo(given_leads, beta, margin), np.logaddexp(0, margin - beta * leads))
    expected = np.where(desirable, 1 - sigmoid(beta * (leads - level)), 1 - sigmoid(beta * (level - leads)))
    close(kto(given_leads, torch.tensor(desirable), torch.tensor(level, dtype=torch.float64), beta), expected)


def ranking(rng: np.random.Generator, scores: list[float], foreign: bool) -> Sample:
    prompt = rng.integers(1, 64, rng.integers(1, 5))
    answers = [rng.integers(1, 64, rng.integers(1, 6)) for _ in range(len(scores) + foreign)]
    lengths = [len(prompt), *map(len, answers)]
    ends = np.cumsum(lengths)
    weights, at_ends, known = np.zeros((3, ends[-1]), np.float32)
    weights[lengths[0] :] = 1 / (ends[-1] - lengths[0])
    at_ends[ends[1:] - 1] = [*scores, *[np.nan] * foreign]
    known[ends[1:] - 1] = rng.normal(-4.0, 2.0, len(answers))
    return Sample(np.concatenate([prompt, *answers]), weights, {"scores": at_ends, "reference": known}, lengths, prefix=True)


def by_rows(model: PreTrainedModel, rankings: list[Sample], config: Preference) -> torch.Tensor:
    """The loss by one plain forward for every prompt with an answer, pair by pair as the papers have it."""
    ratios: list[list[torch.Tensor]] = []
    scores: list[np.ndarray] = []
    for sample in rankings:
        cuts = np.cumsum(sample.lengths)[:-1]
        prompt, *answers = np.split(sample.tokens, cuts)
        known = [x[-1] for x in np.split(sample.extras["reference"], cuts)[1:]]
        scores.append(np.array([x[-1] for x in np.split(sample.extras["scores"], cuts)[1:]]))
        ratios.append([])
        for answer, of_reference in zip(answers, known, strict=True):
            row = torch.from_numpy(np.concatenate([prompt, answer]))
            found = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[len(prompt) - 1 :, 0]
            ratio = found.sum() - float(of_reference)
            ratios[-1].append(ratio / len(answer) if config.method in PER_TOKEN else ratio)
    total = torch.zeros(())
    level = torch.zeros(())
    if config.method == "kto":
        level = torch.stack([r[-1] for r in ratios]).mean().clamp(min=0).detach()
    for of_one, their in zip(ratios, scores, strict=True):
        terms = []
        if config.method == "kto":
            for ratio, score in zip(of_one, their, strict=True):
                if not np.isnan(score) and score != np.nanmean(their):
                    sign, weight = (1, config.desirable_weight) if score > np.nanmean(their) else (-1, config.undesirable_weight)
                    terms.append(weight * (1 - torch.sigmoid(sign * config.beta * (ratio - level))))
        else:
            for a, b in combinations(range(len(their)), 2):
                if their[a] > their[b]:
                    lead = of_one[a] - of_one[b]
                    logit = config.beta * lead - (config.simpo_margin if config.method == "simpo" else 0)
                    terms.append((lead - 0.5 / config.beta) ** 2 if config.method == "ipo" else -torch.nn.functional.logsigmoid(logit))
        total = total + torch.stack(terms).mean()
    return total


@pytest.mark.parametrize("method", METHODS)
def test_packed_rankings_equal_rows_of_their_own(method: str) -> None:
    """Values and gradients; a tie, an answer at the mean, and an idle rank's ranking among them."""
    config = Preference(method=method, beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    rng, foreign = np.random.default_rng(1), method == "kto"
    rankings = [ranking(rng, scores, foreign) for scores in ([2.0, 0.0], [3.0, 1.0, 1.0], [4.0, 2.0, 0.0])]
    ours = causal_lm()
    theirs = plain_twin(ours)
    model = LanguageModel(ours)
    batch = Batch.of(pack(rankings), CPU)
    value, sums = preference_loss(model, batch, config)
    value.backward()
    expected = by_rows(theirs, rankings, config)
    expected.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(batch.weights.sum()) == pytest.approx(3, rel=1e-6)
    assert float(sums["better_log_ratio"] - sums["worse_log_ratio"]) != 0
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - gradients[name].grad).norm() < 1e-4 * gradients[name].grad.norm() + 1e-7, name

    ours.zero_grad()
    nothing, sums = preference_loss(model, Batch.of(pack([uncounted(rankings[0])]), CPU), config)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert all(float(x) == 0 for x in sums.values())
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


@pytest.fixture(scope="module")
def made(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A run's data and sft: asked for a colour, people like answers with more `good`."""
    folder = tmp_path_factory.mktemp("preference")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(160):
        words = [[*["good"] * n, *rng.choice(WORDS, 5 - n)] for n in (4, 2, 0)[: 2 + i % 2]]
        ranked = [" ".join(rng.permutation(w)) for w in words]
        lines.append({"messages": [{"role": "user", "content": f"{rng.choice(WORDS)} {i}"}], "ranked": ranked})
    (folder / "rankings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = train_tokenizer(["good red blue green grey"] * 50, 276)
    tokenizer.save(folder / "data" / "tokenizer")
    limits = {"max_tokens": 64, "validation_fraction": 0.2, "max_broken_fraction": 0.0}
    prepare_preferences([folder / "rankings.jsonl"], tokenizer, folder / "data" / "preferences", **limits)
    model = causal_lm(vocab_size=tokenizer.vocab_size)
    save_model(model, model.state_dict(), tokenizer, folder / "sft" / "model")
    return folder, tokenizer


def recipe(method: str, **changes: Any) -> Recipe:
    settings = {"method": method, "epochs": 4, "global_batch": 16, "learning_rate": 3e-3, "validate_every": 1000, **SETTINGS[method]}
    unused = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    return Recipe.model_validate(
        {"name": "t", "align": "preference", "data": unused, "reward": {"max_tokens": 64}, "preference": settings | changes}
    )


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_what_people_prefer(method: str, made: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    folder, _ = made
    reports: list[dict[str, Any]] = []
    inputs = {"data": str(folder / "data"), "sft": str(folder / "sft")}
    plain = recipe(method).model_dump(mode="json")
    worker({"stage": "preference", "task": task, "recipe": plain, "inputs": inputs, "out": str(tmp_path)}, reports.append)
    found = reports[-1]["results"]
    assert found["pair_accuracy"] > 0.9
    assert found["better_log_ratio"] > found["worse_log_ratio"]
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert any("reference" in r.get("text", "") for r in reports) == (method != "simpo")
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    before = {"dpo": np.log(2), "ipo": 1.0, "kto": 0.5}  # nothing has moved: policy and reference say the same
    if method in before:
        assert first["preference/loss"] == pytest.approx(before[method], rel=1e-4)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_is_the_sft_model_whoever_reads(method: str, made: tuple[Path, Tokenizer]) -> None:
    """Every answer's log-probability by itself; and two ranks share the rankings without overlap."""
    folder, _ = made
    asked = recipe(method, micro_batch=200)
    found = task(asked, {name: folder / name for name in ("data", "sft")}, lambda values: None)
    model = found.model()
    rankings = Examples(folder / "data" / "preferences", "train")
    with torch.no_grad():
        for i in (0, 7, len(rankings) - 1):
            (sample,) = found.train.get(i)
            prompt, *answers = np.split(sample.tokens, np.cumsum(sample.lengths)[:-1])
            ends = np.cumsum(sample.lengths)[1:] - 1
            for answer, known in zip(answers, sample.extras["reference"][ends], strict=True):
                row = np.concatenate([prompt, answer])
                weights = (np.arange(len(row)) >= len(prompt)).astype(np.float32)
                assert float(model(Batch.of(pack([Sample(row, weights)]), CPU)).sum()) == pytest.approx(known, abs=1e-4)
            assert len(answers) == len(rankings[i]["answers"]) + (method == "kto")
    shares = plan(units(rankings, asked.preference, 64), range(32), 2, 200)
    assert sorted(i for of_rank in shares for some in of_rank for i in some) == list(range(32))
    assert batch_of(found.train, [], 3, CPU).rows.numel() == 0
