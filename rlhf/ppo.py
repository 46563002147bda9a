"""Stage ppo: policy, reference, reward, perhaps critic, and vLLM engines, each a group of its own, improve the policy together.

    prompts -> [engines] -> rollouts -> [reference] [reward] [critic] [policy: old log-probs]
            -> advantages -> [policy step] [critic step] -> weights -> [engines] -> gate

`ppo_step` is the whole algorithm on one screen, whatever its advantages and losses: those are pure functions (`advantages.py`,
`shaping.py`, `losses.py`, `loss_weights.py`) that `ppo.advantage`, `ppo.policy_loss` and their like choose. The controller holds
references to what the roles made and a few numbers; tensors go from role to role through Ray's object store.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray import ObjectRef

from cluster import checkpoints
from cluster.connect import object_store_bytes
from cluster.deadlines import wait
from cluster.groups import Group
from data.examples import Examples, opening
from data.order import batch_indices
from data.tokenizers import load as load_tokenizer
from rlhf import timeline
from rlhf.errors import TrainingError
from rlhf.generation import generate
from rlhf.graph import Graph, Prompts, Role, ask_all, engines, open_graph
from rlhf.health import monotony
from rlhf.monitoring import Monitor
from rlhf.recipe import Ppo, Recipe
from rlhf.roles import CriticWorker, PolicyWorker, ReferenceWorker
from rlhf.sampling import Sampling, wanted
from rlhf.shaping import Running, after, begin, replay
from rlhf.stream import Flow, Scorer, stream
from rlhf.sync import gate, refuse_gap, sync_weights
from rlhf.verifier import held_out, judge


def ppo_step(graph: Graph, recipe: Recipe, prompts: Prompts, step: int, running: Running) -> dict[str, float]:
    """One rollout, its scores, `ppo.epochs` passes over it, new weights in the engines, proof that they arrived.

    prompts: `rollout_batch`, and `spare_prompts` further ones.
    """
    policy, config = graph["policy"], recipe.ppo
    seconds, now = recipe.cluster.deadline_s, f"PPO step {step}"

    def answers(of: slice, each: int, judges: dict[str, Scorer], temperature: float) -> Flow:
        asked, sampling = wanted(prompts, recipe.seed, step, each)[of], Sampling.of(config, temperature)
        return stream(graph["rollout"], asked, sampling, judges, seconds=seconds, what=f"{now}: rollout")

    asked, rollout = 0, Flow()
    for _ in range(1 + config.refills):  # the rollout; then further prompts for groups that are dropped
        missing = config.rollout_batch - asked + equal_groups(graph, recipe, rollout, running)
        if missing:
            rollout += answers(slice(asked, asked + missing), config.samples_per_prompt, scorers(graph, config), config.temperature)
            asked += missing
    greedy = Flow()
    if config.advantage == "remax":
        greedy = answers(slice(asked), 1, {"baselines": scorer(graph["reward"], "scores", config)}, temperature=0.0)

    parts = rollout.scores | greedy.scores
    experience, facts = policy.actors[0].call.options(num_returns=2).remote("experience", rollout.rollouts, parts, running, greedy.rollouts)
    metrics = wait({"policy[0]": facts}, seconds, f"{now}: advantages")["policy[0]"]
    refuse_gap(metrics["log_prob_gap"], recipe, f"{now}: the rollout")

    learning = {role: graph[role].start("update", experience, step) for role in learners(graph)}
    learned = wait(learning["policy"], seconds, f"{now}: update")
    if config.one_pass:  # the first to know
        metrics["log_prob_gap"] = float(np.max([figures["log_prob_gap"] for figures in learned.values()]))
        refuse_gap(metrics["log_prob_gap"], recipe, f"{now}: the rollout")
    # The engines need nothing of the critic, which may still be learning.
    metrics |= sync_weights(graph, recipe, version=f"step-{step + 1}") | {"prompts": asked}
    metrics |= gate(graph, recipe, prompts, step)
    for role, calls in learning.items():
        figures = wait(calls, seconds, f"{now}: update")[f"{role}[0]"]
        metrics |= {f"{role}_{name}": value for name, value in figures.items() if name != "log_prob_gap"}
    return metrics


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    """Start the graph, resume where the last checkpoint stands, step, export the policy."""
    config, data = recipe.ppo, inputs["data"]
    tokenizer = load_tokenizer(data / "tokenizer")
    prompts, unseen = Examples(data / "prompts", "train"), held_out(data, recipe.evaluate.prompts)
    seconds, folder = recipe.cluster.deadline_s, out.resolve() / "checkpoints"
    sft, begin_alike = inputs["sft"].resolve() / "model", opening(data / "prompts")
    if begin_alike:
        monitor.say(f"all prompts begin with the same {begin_alike} tokens, which a micro-batch computes once")
    updates = config.steps * config.epochs * -(-config.samples // config.global_batch)
    roles: dict[str, Role] = {
        "rollout": engines(recipe, sft, tokenizer, config.adapter),
        "policy": (PolicyWorker, (recipe, sft, begin_alike)),
        "reward": judge(recipe, inputs, begin_alike),
    }
    if config.needs_reference:
        roles["reference"] = (ReferenceWorker, (recipe, sft, begin_alike))
    if config.needs_critic:
        roles["critic"] = (CriticWorker, (recipe, inputs["reward"].resolve() / "model" if recipe.has_reward_model else sft, begin_alike))
    with open_graph(recipe, roles) as graph:
        loading = graph["rollout"].start("ready")
        for role in (role for role in roles if role != "rollout"):
            loading |= graph[role].start("load", *((updates, folder / role) if role in learners(graph) else ()))
        wait(loading, seconds, "load the models")

        start = max(set.intersection(*(checkpoints.steps(folder / role) for role in learners(graph))), default=0)
        if start:
            wait(start_learners(graph, "resume", start), seconds, "resume")
        sync_weights(graph, recipe, version=f"step-{start}")
        gate(graph, recipe, [prompts[0]["prompt"].tolist()], start)

        running, equal = running_after(start, config, out), 0
        for step in range(start, config.steps):
            order = (config.rollout_batch, prompts.manifest_hash), (config.spare_prompts, f"{prompts.manifest_hash} spare")
            ids = [int(i) for many, key in order for i in batch_indices(recipe.seed, step, many, len(prompts), key)]
            batch = [prompts[i]["prompt"].tolist() for i in ids]
            began = time.time()
            metrics = ppo_step(graph, recipe, batch, step, running)
            metrics |= who_waited(graph, recipe, out, began, step + 1) | who_holds(graph, recipe)
            running = after(running, metrics.get("kl", 0.0), metrics["reward"], metrics["reward_sd"], config)
            done = step + 1
            if config.validate_every and (done % config.validate_every == 0 or done == config.steps):
                metrics["held_out_reward"] = held_out_reward(graph, recipe, unseen)
            monitor.log(done, metrics)
            equal = equal + 1 if metrics["reward_sd"] == 0 else 0
            if warning := monotony(equal, metrics["reward"]):
                monitor.say(f"step {done}: {warning}")
            apart = f"  kl {metrics['kl']:.2f}" if "kl" in metrics else ""
            monitor.progress(done, config.steps, f"reward {metrics['reward']:.3f}{apart}")
            if done % config.checkpoint_every == 0 or done == config.steps:
                wait(start_learners(graph, "save", done), seconds, "save")
        wait(graph["policy"].start("export", out.resolve() / "model", data.resolve() / "tokenizer"), seconds, "export")
    for name, value in totals(out).items():
        monitor.result(name, value)


def equal_groups(graph: Graph, recipe: Recipe, rollout: Flow, running: Running) -> int:
    """How many prompts of the rollout are to be dropped, for their answers are all worth the same."""
    if not recipe.ppo.drop_equal_groups or not rollout.rollouts:
        return 0
    found = graph["policy"].ask(0, "equal_groups", rollout.rollouts, rollout.scores["rewards"], running)
    dropped: int = wait({"policy[0]": found}, recipe.cluster.deadline_s, "equal groups")["policy[0]"]
    return dropped


def held_out_reward(graph: Graph, recipe: Recipe, prompts: Prompts) -> float:
    """The mean reward of one answer to each of these prompts, by the weights as they are now; each time by the same seeds."""
    what, seconds = "held-out prompts", recipe.cluster.deadline_s
    found = wait(graph["reward"].start("scores", *generate(graph, recipe, prompts, 0)), seconds, what)
    return float(np.mean(np.concatenate([values for _, values in found.values()])))


def who_waited(graph: Graph, recipe: Recipe, out: Path, began: float, step: int) -> dict[str, float]:
    """Write the step's trace; the share of its time in which each role did nothing, and its seconds."""
    spans, ended = timeline.collect(graph, recipe.cluster.deadline_s), time.time()
    timeline.write_trace(spans, began, ended, out / "timeline", step)
    shares = timeline.idle_shares(spans, began, ended)
    return {f"ppo/idle_share/{role}": share for role, share in shares.items()} | {"seconds": ended - began}


def who_holds(graph: Graph, recipe: Recipe) -> dict[str, float]:
    """GiB that each role's actors hold, and what stands in Ray's object store: flat in a long run, or something leaks."""
    held = Counter({"object_store": object_store_bytes()})
    for actor, size in wait(ask_all(graph, "memory_held"), recipe.cluster.deadline_s, "memory").items():
        held[timeline.role_of(actor)] += size
    return {f"ppo/memory_gib/{role}": size / 2**30 for role, size in held.items()}


def scorers(graph: Graph, config: Ppo) -> dict[str, Scorer]:
    """Who says what of every answer, at once with the others and while further answers are being written."""
    methods = {"log_probs": ("policy", "log_probs"), "rewards": ("reward", "scores")}
    if config.one_pass:
        del methods["log_probs"]
    if "reference" in graph:
        methods["ref_log_probs"] = ("reference", "log_probs")
    if "critic" in graph:
        methods["values"] = ("critic", "values")
    return {name: scorer(graph[role], method, config) for name, (role, method) in methods.items()}


def scorer(group: Group, method: str, config: Ppo) -> Scorer:
    # Many ranks score a few thousand tokens each at a time: full micro-batches for all of them would come when the rollout is over.
    return Scorer(group, method, config.micro_batch * max(1, group.demand.workers // 4))


def learners(graph: Graph) -> list[str]:
    """The roles that learn."""
    return [role for role in ("policy", "critic") if role in graph]


def start_learners(graph: Graph, method: str, *args: Any) -> dict[str, ObjectRef]:
    """Call `method` on all actors of the roles that learn."""
    return {name: ref for role in learners(graph) for name, ref in graph[role].start(method, *args).items()}


def running_after(step: int, config: Ppo, out: Path) -> Running:
    """What step `step` + 1 needs to know of those before it: a resumed run goes on where its curve stands, to the same bit.

    Raises TrainingError when the curve does not reach the checkpoint.
    """
    if not step or (config.kl_target is None and not config.normalize_rewards):
        return begin(config)
    rows = [row for row in curve(out) if row["step"] <= step]
    if [row["step"] for row in rows] != list(range(1, step + 1)):
        raise TrainingError(
            f"{out / 'metrics.jsonl'} does not hold the steps 1 to {step}, where the checkpoint stands; "
            f"remove {out / 'checkpoints'} to start anew"
        )
    return replay(rows, config)


def curve(out: Path) -> list[dict[str, float]]:
    """The rows of the run so far, one per step."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one short


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
    } | ({"kl_last": float(np.mean(column("ppo/kl", last)))} if "ppo/kl" in rows[-1] else {})
