"""The four model roles of the actor graph. Each worker is one rank of its role; all ranks are called together.

    policy.log_probs(*rollouts), policy.update(experience, ...), policy.weights()
    reference.log_probs(*rollouts)
    reward.scores(*rollouts)
    critic.values(*rollouts), critic.update(experience, ...)

A scoring call takes the engines' rollouts and returns this rank's share: (sample indices, numbers sample after sample).
Who scores which sample is arithmetic, so the ranks need not talk about it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef

from cluster.groups import Worker
from cluster.hardware import hardware, use_deterministic_kernels
from data.order import sample_index
from data.packing import balance, pack
from rlhf.experience import Experience, Floats, Ints, Rollout, Scores, align, estimate, merge, samples
from rlhf.learner import Learner, Loss, full_weights, shard
from rlhf.losses import clipped_policy, clipped_value
from rlhf.models import Batch, LanguageModel, ScalarModel, load_causal_lm, load_critic, load_reward_model, save_model
from rlhf.offload import offload, restore
from rlhf.recipe import Recipe

Weights = dict[str, np.ndarray[Any, Any]]
Sums = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Role(Worker):
    """What all four have in common: the recipe and the cutting of a rollout into packed micro-batches."""

    model: torch.nn.Module

    def __init__(self, rank: int, world: int, threads: int, recipe: Recipe, model: Path) -> None:
        super().__init__(rank, world, threads)
        if recipe.deterministic:
            use_deterministic_kernels()
        self.recipe, self.config, self.path = recipe, recipe.ppo, model
        self.device = hardware().device

    def held(self) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]] | None:
        """What lies on the device: a model and what optimizes it. None before `load`."""
        return (self.model, []) if hasattr(self, "model") else None

    def sleep(self) -> None:
        if held := self.held():
            offload(*held)

    def wake(self) -> None:
        if held := self.held():
            restore(*held, self.device)

    def score(self, rollouts: tuple[Rollout, ...], numbers: Callable[[Batch], torch.Tensor], lengths: Callable[[Rollout], Ints]) -> Scores:
        """`numbers` of this rank's samples; a micro-batch of them holds `lengths` numbers per sample, sample after sample."""
        rollout = merge(rollouts)
        packable = samples(rollout)
        per_sample = lengths(rollout)
        mine = balance([len(s.tokens) for s in packable], self.world, self.config.micro_batch)[self.rank]
        index: list[int] = []
        values: list[Floats] = []
        with torch.no_grad():
            for ids in mine:
                found = numbers(Batch.of(pack([packable[i] for i in ids]), self.device)).float().cpu().numpy()
                assert len(found) == per_sample[ids].sum(), "a role must return its numbers for every sample"
                index += ids
                values.append(found)
        return np.array(index, np.int64), np.concatenate(values) if values else np.zeros(0, np.float32)


def gathered(model: torch.nn.Module, rank: int) -> Weights:
    """The whole model as numpy arrays in transformers' names, on rank 0; {} on the others. All ranks call it."""
    state = full_weights(model)
    return {name: tensor.numpy() for name, tensor in state.items()} if rank == 0 else {}


def _one_each(rollout: Rollout) -> Ints:
    return np.ones(len(rollout.index), np.int64)


def _per_response_token(rollout: Rollout) -> Ints:
    return rollout.response_lengths


class ReferenceWorker(Role):
    """The frozen model that KL is measured against."""

    def load(self) -> None:
        self.model = shard(LanguageModel(load_causal_lm(self.path)).to(self.device), self.world).eval()

    def log_probs(self, *rollouts: Rollout) -> Scores:
        """log pi_ref of every response token."""
        return self.score(rollouts, lambda batch: self.model(batch, self.config.temperature), _per_response_token)

    def weights(self) -> Weights:
        return gathered(self.model, self.rank)


class RewardWorker(Role):
    """The reward model: one score per response, read at its last token."""

    def load(self) -> None:
        self.model = shard(ScalarModel(load_reward_model(self.path)).to(self.device), self.world).eval()

    def scores(self, *rollouts: Rollout) -> Scores:
        return self.score(rollouts, lambda batch: self.model(batch)[batch.last], _one_each)


class LearningRole(Role):
    """A role that learns: its learner, its checkpoints and the loop over a rollout's mini-batches."""

    learner: Learner
    checkpoints: Path

    def held(self) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]] | None:
        return (self.learner.model, self.learner.optimizers) if hasattr(self, "learner") else None

    def save(self, step: int) -> None:
        self.learner.save(self.checkpoints, step)

    def resume(self, step: int) -> None:
        self.learner.load(self.checkpoints, step)

    def learn(self, experience: Experience, step: int, extras: dict[str, Floats], loss: Loss) -> dict[str, float]:
        """`epochs` passes over the rollout in mini-batches of `global_batch` samples; returns the mean of each metric."""
        packable = samples(experience.rollout, extras)
        n, size, history = len(packable), self.config.global_batch, []
        for epoch in range(self.config.epochs):
            order = sample_index(self.recipe.seed, step * self.config.epochs + epoch, np.arange(n), n, "ppo")
            for start in range(0, n, size):
                ids = order[start : start + size]
                shares = balance([len(packable[i].tokens) for i in ids], self.world, self.config.micro_batch)[self.rank]
                batches = [Batch.of(pack([packable[ids[i]] for i in share]), self.device) for share in shares]
                history.append(self.learner.step(batches, loss))
        return {name: float(np.mean([metrics[name] for metrics in history])) for name in history[0]}


class PolicyWorker(LearningRole):
    """The model that learns to please the reward model."""

    def load(self, steps: int, checkpoints: Path) -> None:
        """`steps`: optimizer steps of the whole run."""
        self.learner = Learner(LanguageModel(load_causal_lm(self.path)), self.config, steps)
        self.checkpoints = checkpoints

    def log_probs(self, *rollouts: Rollout) -> Scores:
        """log pi of every response token, by the weights as they are now."""
        self.learner.model.eval()
        return self.score(rollouts, lambda batch: self.learner.model(batch, self.config.temperature), _per_response_token)

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        def loss(model: torch.nn.Module, batch: Batch) -> Sums:
            now = model(batch, self.config.temperature)
            old, advantages = batch.extras["log_probs"][batch.rows], batch.extras["advantages"][batch.rows]
            value, clipped, moved = clipped_policy(now, old, advantages, self.config.clip_range)
            return value, {"clip_fraction": clipped, "update_kl": moved}

        extras = {"log_probs": experience.log_probs, "advantages": experience.advantages}
        return self.learn(experience, step, extras, loss)

    def weights(self) -> Weights:
        return gathered(self.learner.model, self.rank)

    def export(self, out: Path, tokenizer: Path) -> None:
        """Write the model as a transformers directory."""
        from data.tokenizers import load

        state = full_weights(self.learner.model)
        if self.rank == 0:
            save_model(self.learner.model.inner, state, load(tokenizer), out)


class CriticWorker(LearningRole):
    """The value model: what reward a state still promises. It starts as the reward model."""

    def load(self, steps: int, checkpoints: Path) -> None:
        critic = ScalarModel(load_critic(self.path))
        self.learner = Learner(critic, self.config, steps, learning_rate=self.config.critic_learning_rate)
        self.checkpoints = checkpoints

    def values(self, *rollouts: Rollout) -> Scores:
        """V of the state before every response token, that is at the token before it."""
        self.learner.model.eval()
        return self.score(rollouts, lambda batch: self.learner.model(batch)[batch.before], _per_response_token)

    def experience(
        self, rollouts: list[ObjectRef], parts: dict[str, list[ObjectRef]], kl_coef: float
    ) -> tuple[Experience, dict[str, float]]:
        """From the roles' shares to what the update needs, and the step's figures. Called on rank 0 alone.

        parts: `log_probs`, `ref_log_probs`, `rewards`, `values`, one share per rank of the role.
        """
        rollout = merge(ray.get(rollouts))
        one_each, lengths = np.ones_like(rollout.index), rollout.response_lengths
        found = {name: align(ray.get(shares), one_each if name == "rewards" else lengths) for name, shares in parts.items()}
        return estimate(rollout, found, self.config, kl_coef)

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        def loss(model: torch.nn.Module, batch: Batch) -> Sums:
            now = model(batch)[batch.before]
            old, returns = batch.extras["values"][batch.rows], batch.extras["returns"][batch.rows]
            value, clipped = clipped_value(now, old, returns, self.config.value_clip_range)
            return value, {"clip_fraction": clipped}

        return self.learn(experience, step, {"values": experience.values, "returns": experience.returns}, loss)
