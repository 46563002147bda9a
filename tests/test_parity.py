"""Losses, and a step of PPO, against TRL's on the same models and tokens: by its own code after `make peers`, by its figures everywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ppo_parity
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


# What TRL 1.12's PPOTrainer wrote and computed in a step on `ppo_parity.prepare`: answers, scores, and L2 norms of the rest.
PROMPTS = [0, 5, 1, 6, 3, 4, 2, 7]  # in the order in which TRL took them
ANSWERS = [
    [308, 25, 208, 183, 289, 15, 102, 275, 63, 125, 139, 211],
    [92, 287, 297, 144, 110, 155, 299, 216, 281, 294, 243, 165],
    [180, 82, 263, 146, 261, 303, 54, 68, 288, 1, 192, 273],
    [52, 157, 78, 202, 208, 50, 237, 300, 257, 213, 277, 2],
    [291, 230, 222, 318, 38, 171, 114, 255, 122, 190, 103, 291],
    [56, 282, 40, 59, 272, 314, 194, 318, 154, 306, 113, 52],
    [319, 253, 238, 225, 117, 272, 138, 220, 55, 16, 48, 317],
    [198, 17, 91, 49, 263, 138, 3, 48, 158, 103, 225, 65],
]
SCORES = [0.3833786, -0.5091766, 0.4832308, 0.0763502, 0.7663645, 0.6431912, -0.3130198, -0.2382486]
BIAS = "gradients/value/score.bias"  # our critic's head has one
NORMS = {
    "kl": 8.407495498657227,
    "log_probs": 52.71931451732819,
    "ref_log_probs": 59.62221228450788,
    "values": 4.4115234614152,
    "advantages": 9.746794735858979,
    "returns": 4.304789001198583,
    "gradients/policy": 2.814659316262285,
    "gradients/value": 0.1643725819703674 / ppo_parity.VALUE_COEF,
}


def test_a_ppo_step_is_what_trl_reported(tmp_path: Path) -> None:
    prompts, pad = ppo_parity.prepare(tmp_path)
    queries = [[pad] * (8 - len(prompts[i])) + prompts[i] for i in PROMPTS]
    given = {"queries": np.array(queries), "responses": np.array(ANSWERS), "log_probs": np.zeros((len(ANSWERS), ppo_parity.RESPONSE))}
    found = ppo_parity.ours(tmp_path, ppo_parity.rollout_of(given, pad))
    assert found["scores"] == pytest.approx(SCORES, abs=2e-6)
    for name, norm in NORMS.items():
        parts = [found[name]] if name in found else [v for key, v in found.items() if key.startswith(f"{name}/") and key != BIAS]
        assert np.sqrt(sum((part.astype(np.float64) ** 2).sum() for part in parts)) == pytest.approx(norm, rel=1e-5), name


@pytest.mark.skipif(not PEERS.exists(), reason="TRL is not installed: `make peers` puts it into .venv-peers")
def test_a_ppo_step_is_trls() -> None:
    assert max(row["difference"] for row in ppo_parity.compare()) < 1e-4
