"""The same losses by us and by TRL 1.16, on the same models and tokens: values and gradients.

    make peers                                             # .venv-peers: TRL
    python -m benchmarks.loss_parity --json parity.json

Ours is what the stages run: `preference_loss` and `ranking_loss` on packed batches that their `units` make, prompts shared. TRL's is
its own trainers' collators and `compute_loss` on padded rows (`loss_parity_trl.py`). All weights and tokens come from numpy's
default_rng, so that `tests/test_parity.py` can hold us against TRL's figures where TRL is not installed.

What of TRL 1.16 had to be matched:

- DPO's `sigmoid`: whole answers, mean over pairs. Nothing to match.
- IPO: log-ratios per answer token, not of whole answers as eq. 17 of the paper reads; TRL asked its authors. We do the same.
- SimPO lives in `trl.experimental.cpo` as loss_type="simpo" with cpo_alpha=0 (otherwise cross-entropy is added). The margin is divided
  by beta and multiplied by it again, so `simpo_gamma` is our `simpo_margin`; the paper's gamma / beta ratio is not what it takes.
- KTO: the level is the mean log-ratio of answers to other prompts, one per row, and a pair is two rows. Ours is one per ranking, so
  both rows get the same one. TRL takes the answer of the row before, in the order of the file; we take the next ranking's best. Both
  leave the level without gradient and cut it at 0. TRL averages it over devices before; ours is that of one micro-batch of one rank.
- Reward: `margin` is subtracted as it stands, so it is our margin_coef x gap. `center_rewards_coefficient` times the mean of
  (sum of a pair's rewards) squared: as ours.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from benchmarks.contest import needs_peers, peer
from data.packing import pack
from data.tokenizers import train as train_tokenizer
from rlhf import preference, reward
from rlhf.attention import PACKED
from rlhf.models import Batch, LanguageModel, ScalarModel, save_model
from rlhf.recipe import Preference, Reward

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo", "beta": 0.1},
    "ipo": {"method": "ipo", "beta": 0.5},
    "simpo": {"method": "simpo", "beta": 2.0, "margin": 1.0},
    "kto": {"method": "kto", "beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.8},
    "reward": {"method": "reward", "margin_coef": 0.0, "center_coef": 0.0},
    "reward, margin and centring": {"method": "reward", "margin_coef": 0.3, "center_coef": 0.01},
}
VOCABULARY, LONGEST, PAIRS = 320, 64, 8
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rankings:
    """What the stages' `units` ask of `data.examples.Examples`, in memory."""

    rows: list[dict[str, Any]]
    manifest_hash: str = "parity"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]

    def lengths(self, column: str) -> np.ndarray:
        return np.array([sum(map(len, row[column])) if column == "answers" else len(row[column]) for row in self.rows])

    def source(self, i: int) -> list[str]:
        return [f"pair {i}"]


def rankings(seed: int = 0) -> Rankings:
    """Pairs of random answers to random prompts, of different lengths, with the gap that people saw between them."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> np.ndarray:
        return rng.integers(1, 256, rng.integers(1, most + 1))

    def pair() -> dict[str, Any]:
        return {"prompt": words(8), "answers": [words(10), words(10)], "scores": [float(rng.integers(1, 4)), 0.0]}

    return Rankings([pair() for _ in range(PAIRS)])


def model_of(factory: Any, seed: int, **changes: Any) -> PreTrainedModel:
    """A tiny Llama whose weights numpy has drawn; norms near 1, everything else near 0."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        pad_token_id=0,
        **changes,
    )
    model = factory.from_config(config, attn_implementation=PACKED)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.from_numpy((p.ndim == 1) + 0.1 * rng.normal(size=tuple(p.shape))))
    return model


def models() -> dict[str, PreTrainedModel]:
    return {
        "policy": model_of(AutoModelForCausalLM, 1),
        "reference": model_of(AutoModelForCausalLM, 3),
        "reward": model_of(AutoModelForSequenceClassification, 2, num_labels=1),
    }


def ours(case: dict[str, Any], found: dict[str, PreTrainedModel], of: Rankings) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients by parameter), as one rank would step: the sum over rankings by their number."""
    if case["method"] == "reward":
        model, units = found["reward"], reward.units(of)
        batch = batch_of(units)
        config = Reward(margin_coef=case["margin_coef"], center_coef=case["center_coef"])
        value, _ = reward.ranking_loss(ScalarModel(model), batch, config, wide=1.0)
    else:
        model = found["policy"]
        settings = {name: value for name, value in case.items() if name != "margin"}
        asked = Preference(**settings, simpo_margin=case.get("margin", 0.0))
        known = None
        if case["method"] != "simpo":
            plain = batch_of(preference.units(of, asked, LONGEST))
            with torch.no_grad():
                whole, tokens = preference.segment_log_probs(LanguageModel(found["reference"])(plain), plain)
            known = whole[tokens > 0].numpy()
        batch = batch_of(preference.units(of, asked, LONGEST, known))
        value, _ = preference.preference_loss(LanguageModel(model), batch, asked)
    value = value / batch.weights.sum()
    model.zero_grad()
    value.backward()
    return float(value.detach()), {name: p.grad.numpy() for name, p in model.named_parameters()}


def batch_of(units: Any) -> Batch:
    return Batch.of(pack([s for i in range(PAIRS) for s in units.get(i)]), CPU)


def theirs(found: dict[str, PreTrainedModel], of: Rankings, folder: Path) -> dict[str, np.ndarray]:
    """TRL's losses (CASE) and gradients (CASE/PARAMETER), by a process of .venv-peers."""
    tokenizer = train_tokenizer(["one word is not much of a text"], 261)
    for name, model in found.items():
        save_model(model, model.state_dict(), tokenizer, folder / name)
    rows = []
    for i, row in enumerate(of.rows):
        chosen, rejected = (answer.tolist() for answer in row["answers"])
        foreign = of.rows[(i + 1) % PAIRS]["answers"][0].tolist()
        rows.append({"prompt": row["prompt"].tolist(), "chosen": chosen, "rejected": rejected, "foreign": foreign, "gap": row["scores"][0]})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "cases.json").write_text(json.dumps(CASES))
    peer("loss_parity_trl.py", folder)
    with np.load(folder / "theirs.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def compare() -> list[dict[str, Any]]:
    """Per case: both values, their difference relative to the larger of 1 and TRL's, and the largest difference of a parameter's gradient
    relative to that gradient's largest entry."""
    found, of = models(), rankings()
    with tempfile.TemporaryDirectory() as name:
        trl = theirs(found, of, Path(name))
    rows = []
    for name, case in CASES.items():
        value, gradients = ours(case, found, of)
        apart = {key: np.abs(g - trl[f"{name}/{key}"]).max() / max(np.abs(g).max(), 1e-12) for key, g in gradients.items()}
        worst = max(apart, key=lambda key: apart[key])
        other = float(trl[name])
        apart_by = abs(value - other) / max(1.0, abs(other))
        rows.append({"loss": name, "ours": value, "trl": other, "difference": apart_by, "gradient": float(apart[worst]), "where": worst})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    needs_peers()
    torch.set_num_threads(1)
    rows = compare()
    table = Table("loss", "ours", "TRL 1.16", "difference", "largest relative difference of a gradient", "in")
    for row in rows:
        value = [f"{row[name]:.9f}" for name in ("ours", "trl")]
        table.add_row(row["loss"], *value, f"{row['difference']:.1e}", f"{row['gradient']:.1e}", row["where"])
    Console().print(table)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
