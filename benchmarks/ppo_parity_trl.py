"""TRL's side of `benchmarks.ppo_parity`, run by .venv-peers with TRL 1.12 on the path: one step of its PPOTrainer, noted on its way.

    ppo_parity_trl.py FOLDER         # reads asked.json, policy/, reference/, value/, reward/; writes theirs.npz and *.safetensors

Nothing is changed in what it computes: functions of its module are wrapped to keep what went in and came out, and the optimizer's step
to keep the gradients.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Notes:
    """The calls of a function of TRL's module, in order: ((arguments), result)."""

    def __init__(self, name: str) -> None:
        self.calls: list[tuple[tuple[Any, ...], Any]] = []
        original = getattr(ppo_trainer, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            given = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
            found = original(*args, **kwargs)
            kept = tuple(f.clone() for f in found) if isinstance(found, tuple) else found.clone()
            self.calls.append((given, kept))
            return found

        setattr(ppo_trainer, name, noted)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    set_seed(0)
    asked = json.loads((folder / "asked.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    prompts = asked["prompts"]

    def causal(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    def scalar(name: str) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder / name, num_labels=1, dtype=torch.float32)

    config = PPOConfig(
        output_dir=str(folder / "out"),
        learning_rate=asked["rate"],
        per_device_train_batch_size=len(prompts),
        num_ppo_epochs=1,
        total_episodes=len(prompts),
        response_length=asked["response"],
        temperature=0.7,
        local_rollout_forward_batch_size=len(prompts),
        num_sample_generations=0,
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    data = Dataset.from_list([{"input_ids": prompt} for prompt in prompts])
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=causal("policy"),
        ref_model=causal("reference"),
        reward_model=scalar("reward"),
        value_model=scalar("value"),
        train_dataset=data,
        eval_dataset=data,
    )
    written, log_probs, whitened, rewards = (
        Notes(name) for name in ("batch_generation", "selective_log_softmax", "masked_whiten", "get_reward")
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    networks = {"policy": model.policy, "value": model.value_model}
    step = trainer.optimizer.step

    def keep_gradients(*args: Any, **kwargs: Any) -> Any:
        for name, network in networks.items():
            gradients = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
            save_file(gradients, folder / f"gradients-{name}.safetensors")
        return step(*args, **kwargs)

    trainer.optimizer.step = keep_gradients
    trainer.train()
    for name, network in networks.items():
        save_file({key: p.detach().clone() for key, p in network.named_parameters()}, folder / f"weights-{name}.safetensors")

    (_, queries, *_), (both, _) = written.calls[0]
    context = queries.shape[1]
    policy, reference = (found for _, found in log_probs.calls[:2])
    values = rewards.calls[0][1][0][:, context - 1 : -1].squeeze(-1)
    (advantages, _), white = whitened.calls[0]
    np.savez(
        folder / "theirs.npz",
        queries=queries.numpy(),
        responses=both[:, context:].numpy(),
        log_probs=policy.numpy(),
        ref_log_probs=reference.numpy(),
        values=values.numpy(),
        scores=rewards.calls[1][1][1].numpy(),
        kl=(policy - reference).sum(1).mean().numpy(),
        advantages=white.numpy(),
        returns=(advantages + values).numpy(),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
