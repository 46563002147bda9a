"""One PPO step by TRL's PPOTrainer and by our roles, on the same rollouts: scores, KL, advantages, returns and the new weights.

    make peers                                             # .venv-peers: TRL 1.12, the last one that has a PPOTrainer
    python -m benchmarks.ppo_parity --json parity.json

TRL's side is `PPOTrainer.train` as it stands (`ppo_parity_trl.py`): it writes the answers itself, 12 tokens to prompts of 2 to 6, and its
first step is noted on its way. Ours is what the graph runs, in this process, with `ppo.preset: trl`: `log_probs`, `scores` and `values` of
the roles, `estimate`, and the updates of policy and critic.

What of TRL had to be matched, and how:

- One Adam for both networks, the value loss times 0.1: a step of Adam does not depend on a loss's scale, up to eps. Gradients are
  compared with that factor, and the change of a weight where eps is nothing beside the gradient.
- Whitening over the response tokens with an unbiased variance, no gradient clipping, constant betas, linear schedule: the preset.
- Our critic's head has a bias, from 0; it moves as all weights do and is not compared.
- Temperature + 1e-7: not matched, no difference of 1e-6.
- Answers of fixed length. Of one that ends itself TRL places the score at the position after its end token, where it reads and learns
  one more value; ours is at the end token. No key brings that back.
"""

import argparse
import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.contest import PEERS, needs_peers, peer
from benchmarks.loss_parity import model_of
from data.tokenizers import train as train_tokenizer
from rlhf.experience import Rollout, align, estimate
from rlhf.learner import full_weights
from rlhf.models import save_model
from rlhf.recipe import Recipe
from rlhf.roles import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker, Role
from rlhf.shaping import begin

RESPONSE, SAMPLES, RATE, VALUE_COEF = 12, 8, 3e-6, 0.1
SMALL = 2e-4  # Adam's first step is rate x g / (|g| + 1e-8): from here on eps, which knows the factor of the loss, is below 5e-5 of it


def prepare(folder: Path) -> tuple[list[list[int]], int]:
    """policy/, reference/, value/, reward/: tiny Llamas; asked.json. Returns the prompts and the id that pads."""
    tokenizer = train_tokenizer(["one word is not much of a text"], 261)
    kinds = {"policy": 1, "reference": 3, "value": 4, "reward": 2}
    for name, seed in kinds.items():
        scalar = name in ("value", "reward")
        model = model_of(
            AutoModelForSequenceClassification if scalar else AutoModelForCausalLM, seed, **{"num_labels": 1} if scalar else {}
        )
        model.config.pad_token_id = tokenizer.end_of_text
        save_model(model, model.state_dict(), tokenizer, folder / name)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 256, n).tolist() for n in rng.integers(2, 7, SAMPLES)]
    told = {"prompts": prompts, "response": RESPONSE, "rate": RATE, "pad": tokenizer.end_of_text}
    (folder / "asked.json").write_text(json.dumps(told))
    return prompts, tokenizer.end_of_text


def theirs(folder: Path) -> dict[str, np.ndarray]:
    """What TRL noted, in its order: prompts, answers and scores [n]; what it computed of every token [n, 12]; gradients and weights."""
    peer("ppo_parity_trl.py", folder, python_path=str(PEERS.parent.parent / "trl-1.12"))
    with np.load(folder / "theirs.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    for name in ("policy", "value"):
        for part in ("weights", "gradients"):
            found |= {f"{part}/{name}/{key}": t.numpy() for key, t in load_file(folder / f"{part}-{name}.safetensors").items()}
    return found


def rollout_of(found: dict[str, np.ndarray], pad: int) -> Rollout:
    """TRL's padded rows as our flat ones."""
    prompts = [[int(t) for t in row if t != pad] for row in found["queries"]]
    tokens = [np.array([*prompt, *answer]) for prompt, answer in zip(prompts, found["responses"], strict=True)]
    n = len(prompts)
    return Rollout(
        np.arange(n),
        np.array([len(prompt) for prompt in prompts]),
        np.full(n, RESPONSE),
        np.concatenate(tokens).astype(np.int32),
        np.zeros(n, bool),
        found["log_probs"].astype(np.float32).ravel(),
        "step-0",
    )


def recipe() -> Recipe:
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    batch = {"rollout_batch": SAMPLES, "global_batch": SAMPLES, "epochs": 1}
    ppo = {"preset": "trl", "steps": 1, "max_response_tokens": RESPONSE, "max_prompt_tokens": 8, **batch}
    return Recipe.model_validate({"name": "parity", "data": sources, "ppo": ppo})


def ours(folder: Path, rollout: Rollout) -> dict[str, np.ndarray]:
    """The same figures by our roles."""
    asked = recipe()

    def role(kind: type[Role], name: str) -> Any:
        return kind(0, 1, 1, asked, folder / name)

    policy, critic = role(PolicyWorker, "policy"), role(CriticWorker, "value")
    reference, reward = role(ReferenceWorker, "reference"), role(RewardWorker, "reward")
    for learns in (policy, critic):
        learns.load(1, folder)
    reference.load()
    reward.load()
    lengths = rollout.response_lengths
    found = {"log_probs": policy.log_probs(rollout), "ref_log_probs": reference.log_probs(rollout), "values": critic.values(rollout)}
    known = {name: align([scores], lengths) for name, scores in found.items()}
    known["rewards"] = align([reward.scores(rollout)], np.ones_like(lengths))
    experience, facts = estimate(rollout, known, asked.ppo, begin(asked.ppo))
    answer = {name: known[name].reshape(-1, RESPONSE) for name in ("log_probs", "ref_log_probs", "values")}
    answer |= {"scores": known["rewards"], "kl": np.array(facts["kl"])}
    answer |= {"advantages": experience.advantages.reshape(-1, RESPONSE), "returns": experience.returns.reshape(-1, RESPONSE)}  # type: ignore[union-attr]
    for name, learns in (("policy", policy), ("value", critic)):
        gradients: dict[str, np.ndarray] = {}
        for parameter_name, parameter in learns.learner.model.inner.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(keep, gradients, parameter_name))
        learns.update(experience, 0)
        answer |= {f"gradients/{name}/{key}": g for key, g in gradients.items()}
        answer |= {f"weights/{name}/{key}": t.numpy() for key, t in full_weights(learns.learner.model).items()}
    return answer


def keep(gradients: dict[str, np.ndarray], name: str, parameter: torch.Tensor) -> None:
    gradients[name] = parameter.grad.numpy().copy()  # type: ignore[union-attr]


def compare() -> list[dict[str, Any]]:
    """Rows of {"what", "difference"}: the largest, relative to the larger of 1 and the largest entry; of gradients relative to the largest
    entry of their parameter; of weights' changes relative to the learning rate."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, pad = prepare(folder)
        trl = theirs(folder)
        own = ours(folder, rollout_of(trl, pad))
        before = {kind: load_file(folder / kind / "model.safetensors") for kind in ("policy", "value")}
    rows = []
    for what in ("log_probs", "ref_log_probs", "values", "scores", "kl", "advantages", "returns"):
        rows.append({"what": what, "difference": float(np.abs(own[what] - trl[what]).max() / max(1.0, np.abs(trl[what]).max()))})
    for kind, factor in (("policy", 1.0), ("value", VALUE_COEF)):
        gradients, changes = [0.0], [0.0]
        for key, weights in before[kind].items():
            mine, their = own[f"gradients/{kind}/{key}"] * factor, trl[f"gradients/{kind}/{key}"]
            gradients.append(float(np.abs(mine - their).max() / np.abs(their).max()))
            large = np.abs(their) > SMALL
            moved = [(of[f"weights/{kind}/{key}"] - weights.numpy())[large] / RATE for of in (own, trl)]
            changes.append(float(np.abs(moved[0] - moved[1]).max(initial=0.0)))
        for what, differences in (("gradients", gradients), ("change of weights", changes)):
            rows.append({"what": f"{kind}: {what}", "difference": max(differences)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    needs_peers()
    torch.set_num_threads(1)
    rows = compare()
    table = Table("of a step", "largest difference from TRL 1.12")
    for row in rows:
        table.add_row(row["what"], f"{row['difference']:.1e}")
    Console().print(table)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")
    if not all(math.isfinite(row["difference"]) for row in rows):
        raise SystemExit("a difference is no number")


if __name__ == "__main__":
    main()
