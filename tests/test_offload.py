"""Weights and optimizer states leave the device and come back to the same bits, whole or sharded over two ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import batch_of, causal_lm, sequences

from rlhf.learner import Learner, full_weights
from rlhf.losses import cross_entropy
from rlhf.models import Batch, LanguageModel
from rlhf.offload import offload, restore
from rlhf.recipe import Optimizer


def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return cross_entropy(model(batch), batch.weights), {}


def trained(moves: bool, optimizer: str) -> dict[str, torch.Tensor]:
    """The weights after three steps. With `moves`, everything goes elsewhere and back after each of them."""
    learner = Learner(LanguageModel(causal_lm()), Optimizer(learning_rate=3e-3, optimizer=optimizer), 3)
    for step in range(3):
        learner.step([batch_of([t % 7 for t in sequences([9, 5, 7], seed=step)])], loss)
        if moves:
            known = [id(p) for p in learner.model.parameters()]
            offload(learner.model, learner.optimizers)
            # There is one device here, and `to` returns what is there already. Between two of them every tensor is a new one:
            learner.model._apply(torch.clone)
            restore(learner.model, learner.optimizers, torch.device("cpu"))
            assert known == [id(p) for p in learner.model.parameters()], "the optimizer would step what nobody uses"
    return full_weights(learner.model)


def on_two_ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {(moves, optimizer): trained(moves, optimizer) for moves in (False, True) for optimizer in ("adamw", "muon")}
        if rank == 0:
            torch.save(found, folder / "found.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("by_two")
    mp.spawn(on_two_ranks, args=(folder,), nprocs=2)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_learner_that_was_away_learns_the_same(optimizer: str, by_two: dict) -> None:
    for stayed, moved in (
        (trained(False, optimizer), trained(True, optimizer)),
        (by_two[False, optimizer], by_two[True, optimizer]),
    ):
        assert stayed.keys() == moved.keys()
        assert all(torch.equal(stayed[name], moved[name]) for name in stayed)


def test_all_that_lies_on_the_device_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the narrowest stand-in for a second device: a note of what is sent to it."""
    learner = Learner(LanguageModel(causal_lm()), Optimizer(learning_rate=3e-3), 1)
    learner.step([batch_of(sequences([9, 5, 7], seed=0))], loss)
    states = [t for o in learner.optimizers for state in o.state.values() for t in state.values()]
    assert len(states) == 3 * len(list(learner.model.parameters()))  # two moments and the step
    lying = {t.data_ptr() for t in (*learner.model.parameters(), *learner.model.buffers(), *states)}
    sent: list[tuple[int, str]] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, target: object, *args: object, **kwargs: object) -> torch.Tensor:
        sent.append((tensor.data_ptr(), str(target)))
        return to(tensor, target, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", noted)
        offload(learner.model, learner.optimizers)
    assert {where for where, _ in sent} == lying
    assert {device for _, device in sent} == {"cpu"}
