"""The four model roles of the actor graph. Each worker is one rank of its role; all ranks are called together.

    policy.log_probs(*rollouts), policy.update(experience, ...), policy.send(bucket)
    reference.log_probs(*rollouts)
    reward.scores(*rollouts)
    critic.values(*rollouts), critic.update(experience, ...)

A scoring call takes the engines' rollouts and returns this rank's share: (sample indices, numbers sample after sample).
Who scores which sample is arithmetic, so the ranks need not talk about it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef

from cluster.groups import Worker
from cluster.hardware import hardware, use_deterministic_kernels
from data.order import sample_index
from data.packing import Sample, balance, pack, uncounted
from rlhf import buckets
from rlhf.adapters import adapter_config, lora_weights, save_merged, with_adapter
from rlhf.experience import Experience, Floats, Ints, Rollout, Scores, align, estimate, merge, samples, together, worths
from rlhf.learner import Learner, Loss, compile_blocks, full_weights, pays_to_compile, shard
from rlhf.loss_weights import varied
from rlhf.losses import clipped_value, kl, policy_loss
from rlhf.memory import Memory, available, estimate_memory, explained
from rlhf.models import Batch, LanguageModel, ScalarModel, load_causal_lm, load_critic, load_reward_model, save_model
from rlhf.offload import offload, restore
from rlhf.recipe import OnPolicyDistill, Ppo, Recipe
from rlhf.shaping import Running
from rlhf.weight_sender import WeightSender

Sums = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Role(Worker):
    """What all four have in common: the recipe and the cutting of a rollout into packed micro-batches."""

    model: torch.nn.Module

    def __init__(self, rank: int, world: int, threads: int, recipe: Recipe, model: Path, opening: int = 0) -> None:
        """opening: with how many tokens all prompts begin (`data.examples.opening`); each micro-batch computes them once."""
        super().__init__(rank, world, threads)
        if recipe.deterministic:
            use_deterministic_kernels()
        self.recipe, self.config, self.path, self.opening = recipe, recipe.ppo, model, opening
        self.device = hardware().device

    def compiles(self, model: torch.nn.Module) -> bool:
        """Whether this role's blocks are compiled: by `ppo.compile`, as if it learned from what the policy learns from. So the reference
        is computed as the policy is, and they agree to the last bit while they have the same weights."""
        config = self.config
        tokens = config.steps * config.epochs * config.samples * (config.max_prompt_tokens + config.max_response_tokens)
        return pays_to_compile(model, tokens / config.groups.policy.workers) if config.compile == "auto" else config.compile

    def frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model that only ever scores, on this rank's device."""
        if self.compiles(model):
            compile_blocks(model)
        return shard(model.to(self.device), self.world).eval()

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
        groups = self.together(rollout)
        packable = samples(rollout, groups=groups)
        per_sample = lengths(rollout)
        mine = self.micro_batches(packable, self.config.micro_batch)
        index: list[int] = []
        values: list[Floats] = []
        with torch.no_grad():
            for some in mine:  # with none of its own, a rank computes the first group for the others' sake
                found = numbers(self.batch([packable[i] for i in some or [0]])).float().cpu().numpy()
                if not some:
                    continue
                ids = [i for group in some for i in groups[group]]
                assert len(found) == per_sample[ids].sum(), "a role must return its numbers for every sample"
                index += rollout.index[ids].tolist()
                values.append(found)
        return np.array(index, np.int64), np.concatenate(values) if values else np.zeros(0, np.float32)

    def micro_batches(self, samples: Sequence[Sample], micro_batch: int) -> list[list[int]]:
        """This rank's micro-batches of them."""
        lengths = [len(sample.tokens) - self.opening for sample in samples]
        return balance(lengths, self.world, micro_batch - self.opening)[self.rank]

    def batch(self, samples: Sequence[Sample]) -> Batch:
        return Batch.of(pack(samples, self.opening), self.device)

    def together(self, rollout: Rollout) -> list[list[int]]:
        """The answers to one prompt are computed as one, as far as a micro-batch holds them."""
        return together(rollout, self.config.samples_per_prompt, self.config.micro_batch)


def _one_each(rollout: Rollout) -> Ints:
    return np.ones(len(rollout.index), np.int64)


def _per_response_token(rollout: Rollout) -> Ints:
    return rollout.response_lengths


class ReferenceWorker(WeightSender, Role):
    """The frozen model that KL is measured against."""

    def load(self) -> None:
        self.model = self.frozen(LanguageModel(load_causal_lm(self.path)))

    def log_probs(self, *rollouts: Rollout) -> Scores:
        """log pi_ref of every response token."""
        return self.score(rollouts, lambda batch: self.model(batch, self.config.temperature), _per_response_token)

    @property
    def network(self) -> torch.nn.Module:
        return self.model


class RewardWorker(Role):
    """The reward model: each head's score of every response, read at its last token."""

    def load(self) -> None:
        self.model = self.frozen(ScalarModel(load_reward_model(self.path)))

    def scores(self, *rollouts: Rollout) -> Scores:
        heads = self.recipe.reward.heads

        def of_heads(batch: Batch) -> torch.Tensor:
            rewards: torch.Tensor = self.model(batch, each_head=True)[batch.last_of_texts]
            return rewards.flatten()

        return self.score(rollouts, of_heads, lambda of: heads * _one_each(of))


class LearningRole(Role):
    """A role that learns: its learner, its checkpoints and the loop over a rollout's mini-batches."""

    learner: Learner
    checkpoints: Path
    group = "policy"
    memory: tuple[Memory, int] | None = None  # what this rank needs, and what was free before its first step

    def held(self) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]] | None:
        return (self.learner.model, self.learner.optimizers) if hasattr(self, "learner") else None

    def learning(self, model: torch.nn.Module, steps: int, learning_rate: float | None = None) -> Learner:
        return Learner(model, self.config.model_copy(update={"compile": self.compiles(model)}), steps, learning_rate)

    def save(self, step: int) -> None:
        self.learner.save(self.checkpoints, step)

    def resume(self, step: int) -> None:
        self.learner.load(self.checkpoints, step)

    def prompts(self, rollout: Rollout, extras: dict[str, Floats], weights: Floats) -> list[list[Sample]]:
        """Packable samples by the prompt that they answer; one holds as many answers as a micro-batch does. Prompts none of whose answers
        count are left out, unless that leaves none."""
        groups = self.together(rollout)
        found: dict[int, list[Sample]] = {}
        for group, sample in zip(groups, samples(rollout, extras, weights, groups), strict=True):
            found.setdefault(int(rollout.index[group[0]]) // self.config.samples_per_prompt, []).append(sample)
        of_prompts = list(found.values())
        return [some for some in of_prompts if any(sample.weights.any() for sample in some)] or of_prompts

    def learn(self, units: list[list[Sample]], size: int, step: int, loss: Loss, settings: Ppo | OnPolicyDistill) -> dict[str, float]:
        """`epochs` passes over the units, `size` of them an optimizer step; returns the mean of each metric, and of the first optimizer
        step its `ratio_error`."""
        told = self._memory_told(units, loss, settings)
        with explained(*told):
            history = [self.learner.step(batches, loss) for batches in self.mini_batches(units, size, step, settings)]
        first = {name: history[0][name] for name in ("ratio_error",) if name in history[0]}
        return {name: float(np.mean([metrics[name] for metrics in history])) for name in history[0]} | first

    def mini_batches(self, units: list[list[Sample]], size: int, step: int, settings: Ppo | OnPolicyDistill) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step; one that holds all units has the same objects in every pass."""
        n = len(units)
        batches: list[Batch] = []
        for epoch in range(settings.epochs):
            order = sample_index(self.recipe.seed, step * settings.epochs + epoch, np.arange(n), n, "ppo")
            for start in range(0, n, size):
                if size < n or not batches:
                    mine = [sample for i in order[start : start + size] for sample in units[i]]
                    shares = self.micro_batches(mine, settings.micro_batch)
                    batches = [self.batch([mine[i] for i in share] or [uncounted(mine[0])]) for share in shares]
                yield batches

    def _memory_told(self, units: list[list[Sample]], loss: Loss, settings: Ppo | OnPolicyDistill) -> tuple[Any, ...]:
        """What `explained` needs to say why memory ran out. Estimated once, before the optimizer has states; all ranks take part."""
        of_all = sorted((sample for unit in units for sample in unit), key=lambda sample: len(sample.tokens))
        if self.memory is None:
            self.memory = estimate_memory(self.learner, loss, Batch.of(pack(of_all[:1]), self.device)), available()
        stage = "distill" if isinstance(settings, OnPolicyDistill) else "ppo"
        return stage, *self.memory, settings.micro_batch, len(of_all[-1].tokens), self.world, f"ppo.groups.{self.group}.workers"


class PolicyWorker(WeightSender, LearningRole):
    """The model that learns to please the reward model."""

    def load(self, steps: int, checkpoints: Path) -> None:
        """`steps`: optimizer steps of the whole run."""
        model, adapter = load_causal_lm(self.path), self.config.adapter
        if adapter.method == "lora":
            model = with_adapter(model, adapter, self.recipe.seed)
        self.learner = self.learning(LanguageModel(model), steps)
        self.checkpoints = checkpoints

    def log_probs(self, *rollouts: Rollout) -> Scores:
        """log pi of every response token, by the weights as they are now."""
        self.learner.model.eval()
        return self.score(rollouts, lambda batch: self.learner.model(batch, self.config.temperature), _per_response_token)

    def equal_groups(self, rollouts: list[ObjectRef], rewards: list[ObjectRef], running: Running) -> int:
        """How many prompts have answers that are all worth the same. Called on rank 0 alone."""
        rollout = merge(ray.get(rollouts))
        scores = align(ray.get(rewards), self.recipe.reward.heads * _one_each(rollout))
        # Normalising moves all scores alike: which are equal it does not change, so these need not be counted yet.
        return int((~varied(worths(rollout, scores, self.config, running), self.config.samples_per_prompt)).sum())

    def experience(
        self,
        rollouts: list[ObjectRef],
        parts: dict[str, list[ObjectRef]],
        running: Running,
        greedy: list[ObjectRef],
    ) -> tuple[Experience, dict[str, float]]:
        """From the roles' shares to what the update needs, and the step's figures. Called on rank 0 alone.

        parts: `log_probs`, `rewards`, and perhaps `ref_log_probs`, `values` or `baselines`, one share per rank of the role;
        `baselines` are of the rollouts in `greedy`.
        """
        rollout, compared = merge(ray.get(rollouts)), merge(ray.get(greedy)) if greedy else None
        found = {}
        for name, shares in parts.items():
            lengths = rollout.response_lengths
            if name in ("rewards", "baselines"):
                judged = compared if name == "baselines" and compared is not None else rollout
                lengths = self.recipe.reward.heads * _one_each(judged)
            found[name] = align(ray.get(shares), lengths)
        return estimate(rollout, found, self.config, running, compared)

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """With `one_pass` also `log_prob_gap`: how far this rank's log-probabilities, in the first pass, are from the engine's."""
        names = ("log_probs", "ref_log_probs", "advantages", "shares")
        extras = {name: values for name in names if (values := getattr(experience, name)) is not None}
        gaps = [0.0]
        loss = partial(policy_objective, config=self.config, kl_coef=experience.kl_coef, first={}, gaps=gaps)
        prompts = self.prompts(experience.rollout, extras, experience.weights)
        figures = self.learn(prompts, self.config.prompts_at_once, step, loss, self.config)
        return figures | ({"log_prob_gap": float(np.max(gaps))} if self.config.one_pass else {})  # NaN stays NaN

    @property
    def network(self) -> torch.nn.Module:
        return self.learner.model

    def export(self, out: Path, tokenizer: Path) -> None:
        """Write the model as a transformers directory."""
        from data.tokenizers import load

        state = full_weights(self.learner.model)
        if self.rank == 0:
            save = partial(save_merged, self.path) if self.config.adapter.method == "lora" else save_model
            save(self.learner.model.inner, state, load(tokenizer), out)

    def adapter(self) -> tuple[Any, dict[str, np.ndarray]] | None:
        """On rank 0: peft's configuration of the adapter, and its weights. Some MB, which travel in one call."""
        shards = {name: t for name, t in buckets.shards(self.learner.model).items() if ".lora_" in name}
        thin = lora_weights({name: buckets.whole(t).detach().float().cpu() for name, t in shards.items()})
        return (adapter_config(self.learner.model.inner), {name: t.numpy() for name, t in thin.items()}) if self.rank == 0 else None


class CriticWorker(LearningRole):
    """The value model: what reward a state still promises. It starts as the reward model, or as the SFT model with a head of zeros."""

    group = "critic"

    def load(self, steps: int, checkpoints: Path) -> None:
        critic = ScalarModel(load_critic(self.path))
        self.learner = self.learning(critic, steps, self.config.critic_learning_rate)
        self.checkpoints = checkpoints

    def values(self, *rollouts: Rollout) -> Scores:
        """V of the state before every response token, that is at the token before it."""
        self.learner.model.eval()
        return self.score(rollouts, lambda batch: self.learner.model(batch)[batch.before], _per_response_token)

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        values, returns = experience.values, experience.returns
        assert values is not None
        assert returns is not None
        extras = {"values": values, "returns": returns}
        counted = (experience.weights > 0).astype(np.float32)  # every token of a critic counts the same
        prompts = self.prompts(experience.rollout, extras, counted)
        return self.learn(prompts, self.config.prompts_at_once, step, partial(value_objective, config=self.config), self.config)


def policy_objective(
    model: torch.nn.Module, batch: Batch, config: Ppo, kl_coef: float, first: dict[Batch, torch.Tensor], gaps: list[float]
) -> Sums:
    """sum_t share_t (policy loss + kl_coef KL(pi || pi_ref) - entropy_coef entropy)_t over the counted response tokens.

    With `one_pass` the old log-probabilities are those of the batch's first pass, which are kept in `first`; how far the engine's are from
    them is added to `gaps` in that pass.
    """
    at = {name: values[batch.rows] for name, values in batch.extras.items()}
    found = model(batch, config.temperature, config.entropy_coef > 0)
    now = found[:, 0] if config.entropy_coef else found
    if config.one_pass:
        if batch not in first:
            first[batch] = now.detach()
            gaps.append(float(((first[batch] - at["log_probs"]) * (batch.weights > 0)).abs().max()))
        at["log_probs"] = first[batch]
    terms, clipped = policy_loss(now, at["log_probs"], at["advantages"], batch.owners, config)
    figures = {"clip_fraction": clipped.float(), "update_kl": kl(at["log_probs"] - now, "k3")}
    figures["ratio_error"] = (now - at["log_probs"]).detach().expm1().abs()  # 0 before the first optimizer step, up to rounding
    if kl_coef:
        apart = kl(now - at["ref_log_probs"], config.kl_estimator)
        terms, figures["reference_kl"] = terms + kl_coef * apart, apart
    if config.entropy_coef:
        terms, figures["entropy"] = terms - config.entropy_coef * found[:, 1], found[:, 1]
    return (at["shares"] * terms).sum(), {name: (batch.weights * value.detach()).sum() for name, value in figures.items()}


def value_objective(model: torch.nn.Module, batch: Batch, config: Ppo) -> Sums:
    """sum_t of the clipped value loss over the counted response tokens; the value is that of the state before the token."""
    now, old, returns = model(batch)[batch.before], batch.extras["values"][batch.rows], batch.extras["returns"][batch.rows]
    terms, clipped = clipped_value(now, old, returns, config.value_clip_range)
    return terms.sum(), {"clip_fraction": clipped.float().sum()}
