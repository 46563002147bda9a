"""Stage distill: learn a teacher's distributions over one's own answers (on-policy distillation). In the place of ppo.

    roundhouse run recipes/on_policy_distill.yaml

    prompts -> [engines: the student's answers] -> [student and teacher: divergence on their tokens, learn] -> weights -> [engines] -> gate

What a model learns from the data it learns where the data goes; its own answers lead elsewhere, and there nobody has told it anything.
The teacher says at each of the student's own tokens what it would have written (Agarwal et al. 2023, arXiv:2306.13649: GKD). As there,
nothing is learned through the sampling. Only response tokens count. With `on_policy_fraction` below 1 the rest of each step's samples
are the data's conversations.

Figures per step: `divergence` from the teacher on the step's own answers, nats per token, measured while learning from them;
`log_prob_gap`, `response_tokens`, `unfinished` as in ppo.
"""

from pathlib import Path

import numpy as np
import torch

from cluster import checkpoints
from cluster.deadlines import wait
from data.examples import Examples
from data.order import batch_indices
from data.packing import Sample
from data.tokenizers import load as load_tokenizer
from rlhf.distillation import Student, load_teacher
from rlhf.experience import Floats, Ints, Rollout, Scores, merge, samples
from rlhf.generation import generate
from rlhf.graph import Graph, Prompts, Role, engines, open_graph
from rlhf.learner import Learner
from rlhf.models import Batch, load_causal_lm
from rlhf.monitoring import Monitor
from rlhf.ppo import curve
from rlhf.preflight import teachers
from rlhf.recipe import Recipe
from rlhf.roles import PolicyWorker, Sums
from rlhf.sync import gate, refuse_gap, sync_weights


class StudentWorker(PolicyWorker):
    """The model that learns, its teacher whole beside it on every rank."""

    def __init__(self, rank: int, world: int, threads: int, recipe: Recipe, model: Path, teacher: Path, tokenizer: Path) -> None:
        super().__init__(rank, world, threads, recipe, model)
        self.teacher, self.tokenizer = teacher, tokenizer

    def load(self, steps: int, checkpoints: Path) -> None:
        """`steps`: optimizer steps of the whole run. Raises RecipeError for a teacher of another vocabulary."""
        student, settings = load_causal_lm(self.path), self.recipe.distill
        teacher = load_teacher("distill.teacher", self.teacher, student, load_tokenizer(self.tokenizer))
        self.learner = Learner(Student(student, teacher, settings), settings, steps)
        self.checkpoints = checkpoints

    def log_probs(self, *rollouts: Rollout) -> Scores:
        """log pi of every response token, by the weights as they are now. The teacher reads along: of the gate's few tokens."""
        self.learner.model.eval()
        return self.score(rollouts, lambda batch: self.learner.model(batch, self.config.temperature)[:, 0], _response_lengths)

    def distill(self, step: int, conversations: list[Sample], *rollouts: Rollout) -> dict[str, float]:
        """Learn from the engines' rollouts, and from conversations of the data; returns the step's figures.

        `log_prob_gap` is that of this rank's tokens in the first mini-batch, before the weights move: no pass of its own.
        """
        rollout, settings = merge(rollouts), self.recipe.distill
        own = {"own": np.ones_like(rollout.log_probs), "engine": rollout.log_probs}
        mixed = samples(rollout, own) + [without_engine(sample) for sample in conversations]
        before, gaps = self.learner.taken, [0.0]

        def loss(model: torch.nn.Module, batch: Batch) -> Sums:
            log_probs, apart = model(batch, self.config.temperature).unbind(-1)
            if self.learner.taken == before:
                gaps.extend(((log_probs.detach() - batch.extras["engine"][batch.rows]) * batch.extras["own"][batch.rows]).abs().tolist())
            return on_policy_loss(apart, batch, settings.temperature)

        found = self.learn([[sample] for sample in mixed], settings.global_batch, step, loss, settings)
        found["divergence"] /= found.pop("own")
        return found | {
            "log_prob_gap": float(np.max(gaps)),  # NaN stays NaN
            "response_tokens": float(rollout.response_lengths.mean()),
            "unfinished": float(1 - rollout.finished.mean()),
        }


def on_policy_loss(apart: torch.Tensor, batch: Batch, temperature: float) -> Sums:
    """temperature^2 x divergence over all that counts (the square as in `distillation_loss`); and, to be told, the sums over the model's
    own tokens alone. `apart`: float32 [R], in nats."""
    own = batch.extras["own"][batch.rows]
    value = temperature**2 * (apart * batch.weights).sum()
    return value, {"divergence": (apart.detach() * own).sum(), "own": own.sum()}


def without_engine(sample: Sample) -> Sample:
    """A conversation of the data beside the model's own answers: no engine has written it."""
    nothing: Floats = np.zeros(len(sample.tokens), np.float32)
    return Sample(sample.tokens, sample.weights, {"own": nothing, "engine": nothing})


def _response_lengths(rollout: Rollout) -> Ints:
    return rollout.response_lengths


def distill_step(graph: Graph, recipe: Recipe, prompts: Prompts, conversations: list[Sample], step: int) -> dict[str, float]:
    """One rollout, `distill.epochs` passes over it, new weights in the engines, proof that they arrived."""
    seconds, now = recipe.cluster.deadline_s, f"distill step {step}"
    rollouts = generate(graph, recipe, prompts, step)
    learned = wait(graph["policy"].start("distill", step, conversations, *rollouts), seconds, f"{now}: update")
    metrics: dict[str, float] = learned["policy[0]"]
    metrics["log_prob_gap"] = float(np.max([of_rank["log_prob_gap"] for of_rank in learned.values()]))
    refuse_gap(metrics["log_prob_gap"], recipe, f"{now}: the rollout")
    metrics |= sync_weights(graph, recipe, version=f"step-{step + 1}")
    metrics |= gate(graph, recipe, prompts, step)
    return metrics


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    """Start engines and student, resume where the last checkpoint stands, step, export the student."""
    config, data, folder = recipe.distill, inputs["data"].resolve(), out.resolve() / "checkpoints"
    prompts, conversations = (Examples(data / name, "train") for name in ("prompts", "sft"))
    own = max(1, round(config.on_policy_fraction * config.rollout_batch))
    updates = config.steps * config.epochs * -(-config.rollout_batch // config.global_batch)
    seconds, sft = recipe.cluster.deadline_s, inputs["sft"].resolve() / "model"
    _, teacher = teachers(recipe)["distill"]
    roles: dict[str, Role] = {
        "rollout": engines(recipe, sft, load_tokenizer(data / "tokenizer")),
        "policy": (StudentWorker, (recipe, sft, teacher.resolve(), data / "tokenizer")),
    }

    def chosen(of: Examples, step: int, count: int) -> list[int]:
        return batch_indices(recipe.seed, step, count, len(of), of.manifest_hash).tolist()

    with open_graph(recipe, roles) as graph:
        wait(graph["policy"].start("load", updates, folder) | graph["rollout"].start("ready"), seconds, "load the models")
        start = max(checkpoints.steps(folder), default=0)
        if start:
            wait(graph["policy"].start("resume", start), seconds, "resume")
        sync_weights(graph, recipe, version=f"step-{start}")

        for step in range(start, config.steps):
            asked = [prompts[i]["prompt"].tolist() for i in chosen(prompts, step, own)]
            rows = [conversations[i] for i in chosen(conversations, step, config.rollout_batch - own)]
            metrics = distill_step(graph, recipe, asked, [Sample(row["tokens"], row["mask"]) for row in rows], step)
            done = step + 1
            monitor.log(done, metrics)
            monitor.progress(done, config.steps, f"divergence {metrics['divergence']:.3f}  tokens {metrics['response_tokens']:.0f}")
            if done % config.checkpoint_every == 0 or done == config.steps:
                wait(graph["policy"].start("save", done), seconds, "save")
        wait(graph["policy"].start("export", out.resolve() / "model", data / "tokenizer"), seconds, "export")
    for name, value in totals(out).items():
        monitor.result(name, value)


def totals(out: Path) -> dict[str, float]:
    """The run's final figures, read from its curves: they are whole even when the run was resumed."""
    rows = curve(out)
    last = rows[-max(1, len(rows) // 10) :]
    return {
        "steps": len(rows),
        "log_prob_gap_max": max(row[name] for row in rows for name in ("distill/log_prob_gap", "sync/log_prob_gap")),
        "divergence_first": rows[0]["distill/divergence"],
        "divergence_last": float(np.mean([row["distill/divergence"] for row in last])),
    }
