"""The actor graph: every role a group of actors in its own placement group, all there or none.

    with open_graph(recipe, {"rollout": engines(recipe, model, tokenizer), "policy": (PolicyWorker, (recipe, model))}) as graph:
        graph["policy"].start("load", ...)

Which roles there are is up to the stage: PPO opens all five, or four where answers are compared with each other and not with what a
critic expects of them; evaluation opens those that judge, distillation two.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.deadlines import wait
from cluster.groups import Group, Worker
from cluster.placement import Demand, check, place
from data.tokenizers import Tokenizer
from rlhf.recipe import Recipe
from rlhf.rollout import CPU_ENV, ENGINE_ENV, EngineWorker
from rlhf.weight_sender import transport

Role = tuple[type[Worker], tuple[Any, ...]]  # the class of a role's workers and their arguments
Graph = dict[str, Group]
Prompts = list[list[int]]
ROLES = ("policy", "reference", "reward", "critic", "rollout")


def demands(recipe: Recipe, roles: tuple[str, ...] | None = None) -> dict[str, Demand]:
    """What each role asks of the cluster, from `ppo.groups`. Default: all that PPO opens, the critic only if the recipe has one."""
    if roles is None:
        roles = tuple(role for role in ROLES if role != "critic" or recipe.ppo.needs_critic)
    groups = {role: getattr(recipe.ppo.groups, role) for role in roles}
    return {role: Demand(group.workers, group.cpus, group.gpus) for role, group in groups.items()}


def engines(recipe: Recipe, model: Path, tokenizer: Tokenizer) -> Role:
    """vLLM engines for `model`, made for the longest prompt and response that the recipe allows."""
    longest = recipe.ppo.max_prompt_tokens + recipe.ppo.max_response_tokens
    stop = [tokenizer.end_of_turn, tokenizer.end_of_text]
    return EngineWorker, (model, stop, tokenizer.vocab_size, longest, recipe.seed, transport(recipe))


@contextmanager
def open_graph(recipe: Recipe, roles: Mapping[str, Role]) -> Iterator[Graph]:
    """Place and start the groups of `roles`; they end with the block, also when it fails.

    Raises ClusterError with a table when they do not fit, at once when they never will and else after
    `cluster.placement_timeout_s`.
    """
    asked = demands(recipe, tuple(roles))
    check(asked)
    placements = place(asked, recipe.cluster.placement_timeout_s)
    graph: Graph = {}
    try:
        for name, (worker, args) in roles.items():
            graph[name] = Group(
                name,
                worker,
                asked[name],
                placements[name],
                args=args,
                threads=getattr(recipe.ppo.groups, name).threads,
                at_once=2 if worker is EngineWorker else 1,  # an engine takes further prompts while it writes
                env=None if worker is not EngineWorker else ENGINE_ENV if asked[name].gpus else ENGINE_ENV | CPU_ENV,
            )
        starting = {actor: ref for group in graph.values() for actor, ref in group.start("host").items()}
        wait(starting, recipe.cluster.deadline_s, "start the actors")
        for group in graph.values():
            if group.name != "rollout":  # engines work each for itself
                group.connect(recipe.cluster.ports, recipe.cluster.deadline_s)
        yield graph
    finally:
        for group in graph.values():
            group.stop()
