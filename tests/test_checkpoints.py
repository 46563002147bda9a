"""A checkpoint is whole or not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cluster import checkpoints


def state(value: float) -> dict:
    return {"model": {"w": torch.full((4, 3), value), "b": torch.arange(3.0) * value}, "optimizer": {"step": torch.tensor(value)}}


def test_round_trip(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "c", 7, state(2.0), {"kl_coef": 0.05, "taken": 7})
    found = state(0.0)
    assert checkpoints.load(tmp_path / "c", 7, found) == {"kl_coef": 0.05, "taken": 7}
    assert torch.equal(found["model"]["w"], state(2.0)["model"]["w"])
    assert torch.equal(found["model"]["b"], state(2.0)["model"]["b"])
    assert found["optimizer"]["step"] == 2.0


def test_nothing_yet(tmp_path: Path) -> None:
    assert checkpoints.steps(tmp_path / "never") == set()


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (3, 10, 200):
        checkpoints.save(tmp_path, step, state(step), {})
    assert checkpoints.steps(tmp_path) == {10, 200}
    assert len(list(tmp_path.iterdir())) == 2
    found = state(0.0)
    checkpoints.load(tmp_path, 10, found)
    assert found["optimizer"]["step"] == 10.0


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 5, state(1.0), {"try": 1})
    checkpoints.save(tmp_path, 5, state(2.0), {"try": 2})
    found = state(0.0)
    assert checkpoints.load(tmp_path, 5, found) == {"try": 2}
    assert found["optimizer"]["step"] == 2.0


def test_a_draft_is_never_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, 1, state(1.0), {})
    real = dcp.save

    def dies_at_the_end(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp, "save", dies_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, 2, state(2.0), {})
    assert checkpoints.steps(tmp_path) == {1}
    assert len(list(tmp_path.iterdir())) == 2, "the draft should be there, and not count"

    monkeypatch.setattr(dcp, "save", real)
    checkpoints.save(tmp_path, 2, state(2.5), {})
    assert checkpoints.steps(tmp_path) == {1, 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


ENDLESS = """
import sys, torch
from pathlib import Path
from cluster import checkpoints
for step in range(1, 10**6):
    checkpoints.save(Path(sys.argv[1]), step, {"w": torch.full((50_000,), float(step))}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("after", [3, 6])
def test_sigkill_leaves_only_whole_checkpoints(tmp_path: Path, after: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        for _ in range(after):
            assert process.stdout.readline().strip()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    steps = checkpoints.steps(tmp_path)
    assert max(steps) >= after
    for step in sorted(steps)[-2:]:
        found = {"w": torch.zeros(50_000)}
        assert checkpoints.load(tmp_path, step, found) == {"step": step}
        assert (found["w"] == step).all()
