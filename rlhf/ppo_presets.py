"""What other libraries do by default: `ppo.preset: trl`. Defaults of the section `ppo` under the preset; keys that are given count more.

What follows from other keys (whitening, the KL estimator) is left to them: `rlhf/recipe_ppo.py`.

trl has one Adam for policy and critic and weighs the value loss with 0.1. Here the critic has an optimizer of its own, and Adam's step
does not depend on the scale of the loss: only gradient clipping, which trl does not do, and eps = 1e-8 would notice. So there is no
`value_coef`. What else keeps a run from being trl's own to the last digit: docs/DESIGN.md.
"""

from math import inf

PRESETS: dict[str, dict[str, object]] = {
    "trl": {  # PPOTrainer of 1.12, the last one that had it
        "learning_rate": 3e-6,
        "critic_learning_rate": 3e-6,
        "schedule": "linear",
        "warmup_fraction": 0.0,
        "final_lr_fraction": 0.0,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "max_grad_norm": inf,
        "epochs": 4,
        "temperature": 0.7,
        "kl_coef": 0.05,
        "kl_in": "reward",
        "gamma": 1.0,
        "lam": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "reward_clip": inf,
        "unbiased_whitening": True,
    },
    "verl": {  # its KL is off; 0.001 is its weight once it is on
        "learning_rate": 1e-6,
        "critic_learning_rate": 1e-5,
        "schedule": "linear",
        "warmup_fraction": 0.0,
        "final_lr_fraction": 1.0,
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "rollout_batch": 1024,
        "global_batch": 256,
        "epochs": 1,
        "temperature": 1.0,
        "kl_coef": 0.0,
        "kl_in": "loss",
        "gamma": 1.0,
        "lam": 1.0,
        "policy_loss": "dual_clip",
        "clip_range": 0.2,
        "dual_clip_bound": 3.0,
        "value_clip_range": 0.5,
        "reward_clip": inf,
        "unbiased_whitening": True,
    },
    "openrlhf": {
        "learning_rate": 1e-6,
        "critic_learning_rate": 9e-6,
        "schedule": "cosine",
        "warmup_fraction": 0.03,
        "final_lr_fraction": 0.1,
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "epochs": 1,
        "temperature": 1.0,
        "kl_coef": 0.01,
        "kl_in": "reward",
        "gamma": 1.0,
        "lam": 1.0,
        "clip_range": 0.2,
        "value_clip_range": 0.5,
        "reward_clip": 10.0,
        "unbiased_whitening": False,
    },
}


def told() -> str:
    """What each preset sets, for `roundhouse explain ppo.preset`."""

    def text(value: object) -> str:
        return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value).lower()

    return "\n".join(f"{name:<8} {', '.join(f'{key} {text(value)}' for key, value in of.items())}" for name, of in PRESETS.items())
