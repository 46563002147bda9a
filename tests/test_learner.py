"""The learner against a loop that anyone would write, against itself in other cuts, and on two ranks."""

import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tiny import batch_of, causal_lm, plain_twin, sequences

from cluster import checkpoints
from data.packing import balance
from rlhf.buckets import gather, plan, shards, size, specs, unpack
from rlhf.errors import NotFinite, TrainingError
from rlhf.learner import Learner, full_weights
from rlhf.losses import cross_entropy
from rlhf.models import Batch, LanguageModel
from rlhf.optimizers import learning_rate, orthogonal
from rlhf.recipe import Optimizer, Pretrain

CONFIG = Optimizer(learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5, warmup_fraction=0.1)

MUON = CONFIG.model_copy(update={"optimizer": "muon"})


def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return cross_entropy(model(batch), batch.weights), {"tokens": batch.weights.sum()}


def learner(steps: int, config: Optimizer = CONFIG, **changes: object) -> Learner:
    return Learner(LanguageModel(causal_lm(**changes)), config, steps)


def step_tokens(step: int, count: int = 8) -> list[np.ndarray]:
    """The same ragged samples for the same step in every process; the text is easy, so that the loss falls."""
    lengths = np.random.default_rng(step).integers(2, 12, count).tolist()
    return [t % 7 for t in sequences(lengths, seed=step)]


def flat(learner: Learner) -> torch.Tensor:
    return torch.cat([t.detach().flatten().clone() for t in learner.model.parameters()])


# ---------------------------------------------------------------------------------------- one process


def test_equals_a_plain_loop() -> None:
    """100 steps of plain transformers, one row after another, torch's unfused AdamW, clipping and schedule by hand: the same
    curve to 1e-4 at every step."""
    ours, twin = learner(100), plain_twin(causal_lm())
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    losses = []
    for step in range(100):
        tokens = step_tokens(step)
        metrics = ours.step([batch_of(tokens[:5]), batch_of(tokens[5:])], loss)

        total = torch.zeros(())
        for t in tokens:
            ids = torch.from_numpy(t)
            total = total + F.cross_entropy(twin(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        mean = total / sum(len(t) - 1 for t in tokens)
        adam.zero_grad()
        mean.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in twin.parameters()))
        for p in twin.parameters():
            p.grad *= min(1.0, 0.5 / (norm + 1e-6))
        rate = 3e-3 * (step + 1) / 11 if step < 10 else 3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 89)) / 2)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()

        assert metrics["loss"] == pytest.approx(mean.item(), abs=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert metrics["learning_rate"] == pytest.approx(rate, rel=1e-9)
        assert metrics["tokens"] == 1.0
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0] - 0.5, "it should have learned something"
    for p, q in zip(ours.model.inner.parameters(), twin.parameters(), strict=True):
        assert (p - q).norm() < 1e-4 * q.norm()


def test_fused_adam_equals_the_unfused_to_1e_6() -> None:
    """The same gradients: only the optimizer's kernel differs."""
    ours, theirs = learner(20), learner(20)
    groups = [{**g, "params": g["params"]} for g in theirs.optimizers[0].param_groups]
    adam = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], lr=0.0, betas=(0.9, 0.95), eps=1e-8, foreach=False
    )
    theirs.optimizers = [adam]
    assert not adam.param_groups[0]["fused"]
    for step in range(20):
        batch = batch_of(step_tokens(step))
        ours.step([batch], loss)
        theirs.step([batch], loss)
    torch.testing.assert_close(flat(ours), flat(theirs), atol=1e-6, rtol=1e-6)


def test_muon_moves_the_matrices_of_the_blocks_and_adam_the_rest() -> None:
    """One step by hand: momentum of the first gradient, its nearest orthogonal matrix by SVD, decay; and the loss falls."""
    ours, by_adam = learner(30, MUON), learner(30)
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    gradients: dict[str, torch.Tensor] = {}
    for name, p in ours.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    metrics = ours.step([batch_of(step_tokens(0))], loss)
    by_adam.step([batch_of(step_tokens(0))], loss)
    adams = dict(by_adam.model.named_parameters())
    rate = metrics["learning_rate"]
    for name, p in ours.model.named_parameters():
        if ".layers." in name and p.ndim == 2:
            u, _, v = torch.linalg.svd(gradients[name].double(), full_matrices=False)
            change = (before[name] * (1 - rate * 0.1) - p.detach()).double() / (rate * 0.2 * math.sqrt(max(p.shape)))
            along = u.T @ change @ v.T  # diagonal, with singular values of an almost orthogonal matrix
            strong = gradients[name].double().norm() * 1e-2 < torch.linalg.svdvals(gradients[name].double())
            assert ((along.diagonal()[strong] > 0.65) & (along.diagonal()[strong] < 1.25)).all(), name
            assert (along - along.diagonal().diag()).abs().max() < 0.02, name
        else:
            torch.testing.assert_close(p, adams[name], atol=1e-7, rtol=1e-6)
    losses = [ours.step([batch_of(step_tokens(s))], loss)["loss"] for s in range(1, 20)]
    assert losses[-1] < losses[0] - 0.5


def test_orthogonal_of_tall_wide_and_nothing() -> None:
    for shape in ((12, 5), (5, 12), (6, 6)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.65
        assert values.max() < 1.25
    assert not orthogonal(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("kept", ["full", "selective"])
def test_activation_checkpointing_changes_nothing_but_memory(kept: str) -> None:
    plain, lean = learner(5), learner(5, CONFIG.model_copy(update={"activation_checkpointing": kept}))
    held = []
    for one in (plain, lean):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            one.model.train()
            loss(one.model, batch_of(step_tokens(0)))
        held.append(sum(sizes))
    assert held[1] < 0.8 * held[0] or kept == "selective"  # what a selective context keeps is not a saved tensor of autograd
    for step in range(3):
        batch = batch_of(step_tokens(step))
        assert plain.step([batch], loss)["loss"] == pytest.approx(lean.step([batch], loss)["loss"], rel=1e-6)
    torch.testing.assert_close(flat(plain), flat(lean), atol=1e-6, rtol=1e-5)


def test_eight_at_once_equal_one_eight_times() -> None:
    at_once, one_by_one = learner(5), learner(5)
    for step in range(5):
        tokens = step_tokens(step)
        a = at_once.step([batch_of(tokens)], loss)
        b = one_by_one.step([batch_of([t]) for t in tokens], loss)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    # Adam divides by the gradient's own size: where that is rounding noise, so is the step.
    torch.testing.assert_close(flat(at_once), flat(one_by_one), atol=5e-5, rtol=1e-4)


def test_weights_count_over_the_whole_batch() -> None:
    """Twice the weight is twice the loss over twice the count: nothing changes; and weights of zero teach nothing."""
    tokens = step_tokens(0)
    plain, doubled, half = learner(1), learner(1), learner(1)
    a = plain.step([batch_of(tokens)], loss)
    b = doubled.step([batch_of(tokens, [np.full(len(t), 2.0, np.float32) for t in tokens])], loss)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    torch.testing.assert_close(flat(plain), flat(doubled), atol=1e-6, rtol=1e-6)
    silent = [np.full(len(t), float(i < 4), np.float32) for i, t in enumerate(tokens)]
    c, d = half.step([batch_of(tokens, silent)], loss), learner(1).step([batch_of(tokens[:4])], loss)
    assert c["loss"] == pytest.approx(d["loss"], rel=1e-6)


def test_a_micro_batch_that_counts_nothing() -> None:
    tokens = step_tokens(0)
    idle = batch_of(tokens[:1], [np.zeros(len(tokens[0]), np.float32)])
    a, b = learner(1), learner(1)
    assert a.step([batch_of(tokens), idle], loss)["loss"] == pytest.approx(b.step([batch_of(tokens)], loss)["loss"])
    assert torch.equal(flat(a), flat(b))


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_a_batch_that_teaches_nothing_moves_nothing(config: Optimizer) -> None:
    """Not even by the momentum and the decay of the steps before."""
    ours = learner(5, config)
    ours.step([batch_of(step_tokens(0))], loss)
    before = flat(ours)
    metrics = ours.step([batch_of(step_tokens(1))], lambda model, batch: (loss(model, batch)[0] * 0, {}))
    assert metrics["grad_norm"] == 0
    assert torch.equal(flat(ours), before)
    ours.step([batch_of(step_tokens(2))], loss)
    assert not torch.equal(flat(ours), before)


def test_layer_norms_add_up_to_the_gradients_norm() -> None:
    ours = learner(5)
    metrics = ours.step([batch_of(step_tokens(0))], loss)
    assert list(ours.layer_norms) == ["embed_tokens", "layers.0", "layers.1", "norm"]
    assert metrics["grad_norm"] == pytest.approx(math.hypot(*ours.layer_norms.values()))


def test_the_layer_and_the_micro_batch_that_broke_are_named() -> None:
    """An activation of the second block overflows on one token, which only the second micro-batch holds; nothing is learned."""
    ours, tokens = learner(5), [np.array([1, 2, 3, 4]), np.array([1, 9, 3, 4])]

    def overflow(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output * torch.where(batch_in_work.tokens == 9, math.inf, 1.0)[None, :, None]

    def watched(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nonlocal batch_in_work
        batch_in_work = batch
        return loss(model, batch)

    batch_in_work = batch_of(tokens)
    ours.model.inner.model.layers[1].mlp.register_forward_hook(overflow)
    before = flat(ours)
    with pytest.raises(NotFinite, match=r"step 0: .* begins in layers\.1\.") as caught:
        ours.step([batch_of([t]) for t in tokens], watched)
    assert caught.value.places == [(0, 1)]
    assert torch.equal(flat(ours), before)


def test_a_gradient_that_is_not_finite_is_traced_to_its_layer() -> None:
    ours = learner(5)
    ours.model.inner.model.layers[0].mlp.down_proj.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(NotFinite, match=r"begins in the gradient of layers\.0"):
        ours.step([batch_of(step_tokens(0))], loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_spares_the_weights(bad: float) -> None:
    ours = learner(5)
    ours.step([batch_of(step_tokens(0))], loss)
    before = flat(ours)

    def poisoned(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value, further = loss(model, batch)
        return value * bad, further

    with pytest.raises(TrainingError, match=r"step 1: the loss is (nan|inf); what is not finite begins in the loss"):
        ours.step([batch_of(step_tokens(1))], poisoned)
    assert torch.equal(flat(ours), before)
    assert ours.taken == 1


def test_evaluate_sums_and_learns_nothing() -> None:
    ours, tokens = learner(1), step_tokens(0)
    before = flat(ours)
    sums = ours.evaluate([batch_of(tokens[:3]), batch_of(tokens[3:])], loss)
    whole = ours.evaluate([batch_of(tokens)], loss)
    assert sums["count"] == whole["count"] == sum(len(t) - 1 for t in tokens)
    assert sums["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert sums["loss"] / sums["count"] == pytest.approx(ours.step([batch_of(tokens)], loss)["loss"], rel=1e-5)
    assert not torch.equal(flat(ours), before)


@pytest.mark.parametrize("steps", [1, 2, 10, 400])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_schedule(steps: int, warmup: float, final: float) -> None:
    config = Optimizer(warmup_fraction=warmup, final_lr_fraction=final)
    rates = [learning_rate(s, steps, 2.0, config) for s in range(steps)]
    ramp = round(warmup * steps)
    assert all(0 < r <= 2.0 for r in rates[:-1])
    assert all(a < b for a, b in pairwise(rates[: ramp + 1])), "warm-up ascends"
    assert all(a >= b for a, b in pairwise(rates[ramp:])), "then it descends"
    if ramp < steps:
        assert rates[ramp] == pytest.approx(2.0)
    if ramp < steps - 1:
        assert rates[-1] == pytest.approx(2.0 * final)
    if steps == 400 and warmup == 0.05:
        assert rates[0] == pytest.approx(2.0 / 21)
        assert rates[20 + 190 - 1] == pytest.approx(2.0 * (final + (1 - final) / 2), rel=0.01)


def test_own_peak_replaces_the_recipes() -> None:
    ours = Learner(LanguageModel(causal_lm()), CONFIG, 10, learning_rate=0.5)
    assert ours.step([batch_of(step_tokens(0))], loss)["learning_rate"] == pytest.approx(0.25)


@pytest.mark.parametrize("tie", [True, False])
def test_resume_is_exact(tie: bool, tmp_path: Path) -> None:
    through = learner(6, tie_embeddings=tie)
    for step in range(3):
        through.step([batch_of(step_tokens(step))], loss)
    through.save(tmp_path, 3)
    again = learner(6, tie_embeddings=tie, seed=1)
    again.load(tmp_path, 3)
    assert again.taken == 3
    assert torch.equal(flat(again), flat(through))
    for step in range(3, 6):
        a, b = through.step([batch_of(step_tokens(step))], loss), again.step([batch_of(step_tokens(step))], loss)
        assert a == b
    assert torch.equal(flat(again), flat(through))


@pytest.mark.parametrize("tie", [True, False])
def test_weights_are_transformers_own(tie: bool) -> None:
    ours = learner(1, tie_embeddings=tie)
    weights = full_weights(ours.model)
    assert ("lm_head.weight" in weights) is not tie
    twin = causal_lm(seed=1, tie_embeddings=tie)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert (set(missing), set(unexpected)) == ({"lm_head.weight"} if tie else set(), set())
    for ours_, theirs in zip(ours.model.inner.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours_, theirs)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
def test_compiled_blocks_give_the_same_curve() -> None:
    """Ragged steps of ever other lengths, by the same programs."""
    plain, compiled = learner(8), learner(8, CONFIG.model_copy(update={"compile": True}))
    for step in range(8):
        batch = [batch_of(step_tokens(step))]
        assert compiled.step(batch, loss)["loss"] == pytest.approx(plain.step(batch, loss)["loss"], rel=1e-5)
    assert (flat(plain) - flat(compiled)).norm() < 1e-3 * flat(plain).norm()  # Adam makes a step of a gradient's last bit


def test_embeddings_learn_alone_first_and_a_restart_knows_it(tmp_path: Path) -> None:
    config = Pretrain(**(CONFIG.model_dump() | {"embeddings_only_steps": 4}))

    def moved(before: dict[str, torch.Tensor], of: Learner) -> set[str]:
        return {name for name, t in full_weights(of.model).items() if not torch.equal(before[name], t)}

    ours = learner(8, config, tie_embeddings=False)
    before = {name: t.clone() for name, t in full_weights(ours.model).items()}
    for step in range(3):
        ours.step([batch_of(step_tokens(step))], loss)
    assert moved(before, ours) == {"model.embed_tokens.weight", "lm_head.weight"}
    ours.save(tmp_path, 3)
    again = learner(8, config, seed=1, tie_embeddings=False)
    again.load(tmp_path, 3)
    again.step([batch_of(step_tokens(3))], loss)
    assert moved(before, again) == {"model.embed_tokens.weight", "lm_head.weight"}
    again.step([batch_of(step_tokens(4))], loss)
    assert moved(before, again) == set(before)


# ---------------------------------------------------------------------------------------- two ranks


def share(step: int, rank: int, world: int) -> list[Batch]:
    tokens = step_tokens(step)
    plan = balance([len(t) for t in tokens], world, budget=24)
    return [batch_of([tokens[i] for i in ids]) for ids in plan[rank]]


def two_ranks(rank: int, folder: Path) -> None:
    """What each of the two processes does: three steps, a checkpoint, one more step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        ours = learner(6)
        history = [ours.step(share(s, rank, 2), loss) for s in range(3)]
        ours.save(folder / "checkpoints", 3)
        history.append(ours.step(share(3, rank, 2), loss))
        sums = ours.evaluate(share(4, rank, 2), loss)
        before = full_weights(ours.model)
        mine = shards(ours.model)
        cut = plan(specs(mine, "float32"), limit=20_000)
        sent = [(bucket, gather(mine, bucket, None if rank else torch.empty(size(bucket), dtype=torch.uint8))) for bucket in cut]
        in_buckets = {name: t.clone() for bucket, packed in sent if packed is not None for name, t in unpack(packed, bucket)}

        def poisoned_on_one_rank(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value, further = loss(model, batch)
            return value * (math.nan if rank else 1.0), further

        stopped = False
        try:
            ours.step(share(4, rank, 2), poisoned_on_one_rank)
        except TrainingError:
            stopped = True
        after = full_weights(ours.model)
        by_muon = learner(6, MUON)
        muon = [by_muon.step(share(s, rank, 2), loss) for s in range(3)]
        by_muon.save(folder / "muon", 3)
        muon.append(by_muon.step(share(3, rank, 2), loss))
        more = {"muon": muon, "muon_weights": full_weights(by_muon.model), "in_buckets": in_buckets, "buckets": len(cut)}
        torch.save(
            {**more, "history": history, "sums": sums, "stopped": stopped, "weights": before, "after": after}, folder / f"rank{rank}.pt"
        )
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[int], dict]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(two_ranks, args=(folder,), nprocs=2)
    return folder, lambda rank: torch.load(folder / f"rank{rank}.pt", weights_only=True)


def test_two_ranks_equal_one(by_two: tuple[Path, Callable[[int], dict]]) -> None:
    _, result = by_two
    alone = learner(6)
    for step, (first, second) in enumerate(zip(result(0)["history"], result(1)["history"], strict=True)):
        metrics = alone.step(share(step, 0, 1), loss)
        assert first == second, "both ranks report the same"
        for name in metrics:
            assert first[name] == pytest.approx(metrics[name], rel=1e-4), name
    expected = full_weights(alone.model)
    assert result(0)["weights"].keys() == expected.keys()
    for name, tensor in result(0)["weights"].items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)
    sums = alone.evaluate(share(4, 0, 1), loss)
    assert result(0)["sums"] == pytest.approx(sums, rel=1e-4)


def test_weights_gathered_in_buckets_are_the_whole_weights(by_two: tuple[Path, Callable[[int], dict]]) -> None:
    """Between two steps, when a forward pass has left the model whole on every rank."""
    _, result = by_two
    first = result(0)
    assert first["buckets"] > 3
    assert list(first["in_buckets"]) == list(first["weights"])
    for name, tensor in first["weights"].items():
        assert torch.equal(first["in_buckets"][name], tensor), name


def test_muon_on_two_ranks_equals_one(by_two: tuple[Path, Callable[[int], dict]]) -> None:
    """Each rank holds half of a matrix, and orthogonalises all of it."""
    folder, result = by_two
    alone, resumed = learner(6, MUON), learner(6, MUON, seed=1)
    for step, metrics in enumerate(result(0)["muon"]):
        assert alone.step(share(step, 0, 1), loss)["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    resumed.load(folder / "muon", 3)
    resumed.step(share(3, 0, 1), loss)
    for model in (alone.model, resumed.model):
        for name, tensor in full_weights(model).items():
            torch.testing.assert_close(result(0)["muon_weights"][name], tensor, atol=1e-4, rtol=1e-3)


def test_one_rank_continues_what_two_began(by_two: tuple[Path, Callable[[int], dict]]) -> None:
    folder, result = by_two
    assert checkpoints.steps(folder / "checkpoints") == {3}
    alone = learner(6, seed=1)
    alone.load(folder / "checkpoints", 3)
    assert alone.taken == 3
    metrics = alone.step(share(3, 0, 1), loss)
    assert metrics["loss"] == pytest.approx(result(0)["history"][3]["loss"], rel=1e-5)
    for name, tensor in full_weights(alone.model).items():
        torch.testing.assert_close(tensor, result(0)["weights"][name], atol=1e-4, rtol=1e-4)


def test_a_nan_on_one_rank_stops_both(by_two: tuple[Path, Callable[[int], dict]]) -> None:
    _, result = by_two
    assert [result(rank)["stopped"] for rank in (0, 1)] == [True, True]
    for name, tensor in result(0)["weights"].items():
        assert torch.equal(result(0)["after"][name], tensor)
