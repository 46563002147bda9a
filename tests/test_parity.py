"""Our losses against TRL 1.16's on the same models and tokens: by its own code after `make peers`, by its figures everywhere."""

import pytest
import torch

from benchmarks.contest import PEERS
from benchmarks.loss_parity import CASES, compare, models, ours, rankings

# What TRL 1.16 (torch 2.13, transformers 5.19, CPU, fp32) says of `models()` and `rankings()`: the loss, and the L2 norm of all gradients.
TRL = {
    "dpo": (0.6766781210899353, 0.868553116556421),
    "ipo": (1.0508068799972534, 10.866415813968684),
    "simpo": (1.1383602619171143, 6.517349365083501),
    "kto": (0.5242245197296143, 0.2232565134689693),
    "reward": (0.6203705072402954, 3.3954447418637725),
    "reward, margin and centring": (1.0337921380996704, 4.60841184689915),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_that_trl_reported(name: str) -> None:
    """Up to what another machine's fp32 sums may differ by."""
    value, gradients = ours(CASES[name], models(), rankings())
    norm = float(torch.cat([torch.from_numpy(g).flatten().double() for g in gradients.values()]).norm())
    assert value == pytest.approx(TRL[name][0], rel=3e-6)
    assert norm == pytest.approx(TRL[name][1], rel=1e-5)


@pytest.mark.skipif(not PEERS.exists(), reason="TRL is not installed: `make peers` puts it into .venv-peers")
def test_losses_and_gradients_are_trls() -> None:
    rows = compare()
    assert [row["loss"] for row in rows] == list(CASES)
    for row in rows:
        assert row["difference"] <= 1e-6, row
        assert row["gradient"] <= 1e-5, row
        assert row["trl"] == pytest.approx(TRL[row["loss"]][0], rel=3e-6), "TRL's figures above are of another version"
