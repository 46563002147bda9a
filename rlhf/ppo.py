"""Stage ppo: policy, reference, reward, critic and vLLM engines, each a group of its own, improve the policy together.

    prompts -> [engines] -> rollouts -> [reference] [reward] [critic] [policy: old log-probs]
            -> advantages -> [policy step] [critic step] -> weights -> [engines] -> gate

`ppo_step` is the whole algorithm on one screen. The controller holds references to what the roles made and a few numbers;
tensors go from role to role through Ray's object store.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster import checkpoints
from cluster.deadlines import wait
from data.examples import Examples
from data.order import batch_indices
from data.tokenizers import load as load_tokenizer
from rlhf.advantages import next_kl_coef
from rlhf.errors import TrainingError
from rlhf.generation import generate
from rlhf.graph import Graph, Prompts, Role, engines, open_graph
from rlhf.monitoring import Monitor
from rlhf.recipe import Ppo, Recipe
from rlhf.roles import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker
from rlhf.sync import gate, refuse_gap, sync_weights


def ppo_step(graph: Graph, recipe: Recipe, prompts: Prompts, step: int, kl_coef: float) -> dict[str, float]:
    """One rollout, its scores, `ppo.epochs` passes over it, new weights in the engines, proof that they arrived."""
    policy, reference, reward, critic = (graph[role] for role in ("policy", "reference", "reward", "critic"))
    seconds, now = recipe.cluster.deadline_s, f"PPO step {step}"

    rollouts = generate(graph, recipe, prompts, step)

    scores = {  # all four at once: each has its own CPUs or GPUs
        "log_probs": policy.start("log_probs", *rollouts),
        "ref_log_probs": reference.start("log_probs", *rollouts),
        "rewards": reward.start("scores", *rollouts),
        "values": critic.start("values", *rollouts),
    }
    for name, refs in scores.items():
        wait(refs, seconds, f"{now}: {name}")

    parts = {name: list(refs.values()) for name, refs in scores.items()}
    experience, facts = critic.actors[0].experience.options(num_returns=2).remote(rollouts, parts, kl_coef)
    metrics = wait({"critic[0]": facts}, seconds, f"{now}: advantages")["critic[0]"]
    refuse_gap(metrics["log_prob_gap"], recipe, f"{now}: the rollout")

    updates = policy.start("update", experience, step) | critic.start("update", experience, step)
    learned = wait(updates, seconds, f"{now}: update")
    metrics |= {f"policy_{name}": value for name, value in learned["policy[0]"].items()}
    metrics |= {f"critic_{name}": value for name, value in learned["critic[0]"].items()}

    metrics |= sync_weights(graph, recipe, version=f"step-{step + 1}")
    return metrics | gate(graph, recipe, prompts, step)


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    """Start the graph, resume where the last checkpoint stands, step, export the policy."""
    config, data = recipe.ppo, inputs["data"]
    tokenizer = load_tokenizer(data / "tokenizer")
    prompts = Examples(data / "prompts", "train")
    seconds, folder = recipe.cluster.deadline_s, out.resolve() / "checkpoints"
    sft, reward_model = (inputs[stage].resolve() / "model" for stage in ("sft", "reward"))
    updates = config.steps * config.epochs * -(-config.rollout_batch // config.global_batch)
    roles: dict[str, Role] = {
        "rollout": engines(recipe, sft, tokenizer),
        "policy": (PolicyWorker, (recipe, sft)),
        "reference": (ReferenceWorker, (recipe, sft)),
        "reward": (RewardWorker, (recipe, reward_model)),
        "critic": (CriticWorker, (recipe, reward_model)),
    }
    with open_graph(recipe, roles) as graph:
        loading = graph["reference"].start("load") | graph["reward"].start("load")
        for role in ("policy", "critic"):
            loading |= graph[role].start("load", updates, folder / role)
        wait(loading | graph["rollout"].start("ready"), seconds, "load the models")

        start = max(checkpoints.steps(folder / "policy") & checkpoints.steps(folder / "critic"), default=0)
        if start:
            wait(graph["policy"].start("resume", start) | graph["critic"].start("resume", start), seconds, "resume")
        sync_weights(graph, recipe, version=f"step-{start}")
        gate(graph, recipe, [prompts[0]["prompt"].tolist()], start)

        kl_coef = kl_coef_after(start, config, out)
        for step in range(start, config.steps):
            ids = batch_indices(recipe.seed, step, config.rollout_batch, len(prompts), prompts.manifest_hash)
            batch = [prompts[int(i)]["prompt"].tolist() for i in ids]
            metrics = ppo_step(graph, recipe, batch, step, kl_coef)
            kl_coef = next_kl_coef(kl_coef, metrics["kl"], config)
            done = step + 1
            monitor.log(done, metrics)
            monitor.progress(done, config.steps, f"reward {metrics['reward']:.3f}  kl {metrics['kl']:.2f}")
            if done % config.checkpoint_every == 0 or done == config.steps:
                wait(graph["policy"].start("save", done) | graph["critic"].start("save", done), seconds, "save")
        wait(graph["policy"].start("export", out.resolve() / "model", data.resolve() / "tokenizer"), seconds, "export")
    for name, value in totals(out).items():
        monitor.result(name, value)


def kl_coef_after(step: int, config: Ppo, out: Path) -> float:
    """The KL weight that follows step `step`: a resumed run goes on where its curve stands, to the same bit.

    Raises TrainingError when the curve does not reach the checkpoint.
    """
    if not step or config.kl_target is None:
        return config.kl_coef
    for row in curve(out):
        if row["step"] == step:
            return next_kl_coef(row["ppo/kl_coef"], row["ppo/kl"], config)
    raise TrainingError(
        f"{out / 'metrics.jsonl'} has no step {step}, where the checkpoint stands; remove {out / 'checkpoints'} to start anew"
    )


def curve(out: Path) -> list[dict[str, float]]:
    """The rows of the run so far, one per step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def totals(out: Path) -> dict[str, float]:
    """The run's final figures, read from its curves: they are whole even when the run was resumed."""
    rows = curve(out)
    last = rows[-max(1, len(rows) // 10) :]

    def column(name: str, of: Sequence[dict[str, float]]) -> list[float]:
        return [row[name] for row in of]

    gaps = column("ppo/log_prob_gap", rows) + column("sync/log_prob_gap", rows)
    return {
        "steps": len(rows),
        "log_prob_gap_max": max(gaps),
        "reward_first": rows[0]["ppo/reward"],
        "reward_last": float(np.mean(column("ppo/reward", last))),
        "kl_last": float(np.mean(column("ppo/kl", last))),
    }
