"""The actor graph: every role a group of actors in its own placement group, all there or none.

    with open_graph(recipe, {"rollout": engines(recipe, model, tokenizer), "policy": (PolicyWorker, (recipe, model))}) as graph:
        graph["policy"].start("load", ...)

Which roles there are is up to the stage: PPO opens all five, or four where answers are compared with each other and not with what a
critic expects of them; evaluation opens those that judge, distillation two. Roles of a `ppo.colocate` set share one placement group and
take turns on its devices (`cluster/groups.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import ObjectRef

from cluster.groups import Group, Worker, begin
from cluster.placement import Demand, check, place
from data.tokenizers import Tokenizer
from rlhf.recipe import Recipe
from rlhf.recipe_ppo import PolicyAdapter
from rlhf.rollout import EngineWorker, engine_env
from rlhf.weight_sender import ADAPTER, transport

Role = tuple[type[Worker], tuple[Any, ...]]  # the class of a role's workers and their arguments
Graph = dict[str, Group]
Prompts = list[list[int]]
ROLES = ("policy", "reference", "reward", "critic", "rollout")
EVALUATED = ("policy", "reference", "reward", "rollout")  # evaluation opens these, whatever PPO opens


def demands(recipe: Recipe, roles: tuple[str, ...] | None = None) -> dict[str, Demand]:
    """What each role asks of the cluster, from `ppo.groups`. Default: all that PPO opens, critic and reference only if it needs them."""
    if roles is None:
        spared = {"critic": not recipe.ppo.needs_critic, "reference": not recipe.ppo.needs_reference}
        roles = tuple(role for role in ROLES if not spared.get(role))
    return {role: getattr(recipe.ppo.groups, role).demand for role in roles}


def engines(recipe: Recipe, model: Path, tokenizer: Tokenizer, adapter: PolicyAdapter | None = None) -> Role:
    """vLLM engines for `model`, made for the longest prompt and response that the recipe allows. With an `adapter` that learns, new weights
    are adapters of this rank, and the engines' own stay."""
    longest = recipe.ppo.max_prompt_tokens + recipe.ppo.max_response_tokens
    stop, config = [tokenizer.end_of_turn, tokenizer.end_of_text], recipe.ppo
    thin = adapter is not None and adapter.method == "lora"
    how = ADAPTER if thin else transport(recipe)
    parts = (config.groups.rollout.tensor_parallel, shares_devices(recipe, "rollout"), adapter.rank if adapter and thin else 0)
    return EngineWorker, (model, stop, tokenizer.vocab_size, longest, recipe.seed, how, *parts)


def shares_devices(recipe: Recipe, role: str) -> bool:
    return any(role in names for names in recipe.ppo.colocate)


def ask_all(graph: Graph, method: str) -> dict[str, ObjectRef]:
    """Call `method` of every actor, whether it is awake or not: for what needs no device and is no work of the role."""
    return {f"{group.name}[{rank}]": getattr(actor, method).remote() for group in graph.values() for rank, actor in enumerate(group.actors)}


@contextmanager
def open_graph(recipe: Recipe, roles: Mapping[str, Role]) -> Iterator[Graph]:
    """Place and start the groups of `roles`; they end with the block, also when it fails.

    Raises ClusterError with a table when they do not fit, at once when they never will and else after
    `cluster.placement_timeout_s`.
    """
    asked = demands(recipe, tuple(roles))
    check(asked, recipe.ppo.colocate)
    rooms = place(asked, recipe.cluster.placement_timeout_s, recipe.ppo.colocate)
    graph: Graph = {}
    try:
        for name, (worker, args) in roles.items():
            graph[name] = Group(
                name,
                worker,
                asked[name],
                rooms[name],
                args=args,
                threads=getattr(recipe.ppo.groups, name).threads,
                # An engine takes further prompts while it writes; where it shares its devices it is given all at once, and calls queue.
                beside=name == "rollout" and not shares_devices(recipe, name),
                env=engine_env(on_gpu=asked[name].gpus > 0) if name == "rollout" else None,
            )
        begin(list(graph.values()), recipe.cluster.deadline_s)
        for group in graph.values():
            if group.name != "rollout":  # engines work each for itself
                group.connect(recipe.cluster.ports, recipe.cluster.deadline_s)
        yield graph
    finally:
        for group in graph.values():
            group.stop()
