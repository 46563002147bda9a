"""Prompts to the engines, rollouts back: the controller's side of the rollout group.

rollouts = generate(graph, recipe, prompts, step)     # references, one per engine
"""

from ray import ObjectRef

from cluster.deadlines import wait
from rlhf.graph import Graph, Prompts
from rlhf.recipe import Recipe


def generate(graph: Graph, recipe: Recipe, prompts: Prompts, step: int) -> list[ObjectRef]:
    """References to one rollout per engine. Prompts go round the engines; a sample's seed is arithmetic, so who writes it
    changes nothing."""
    engines, config = graph["rollout"], recipe.ppo
    count = len(engines.actors)
    rollouts = {}
    for rank in range(min(count, len(prompts))):
        index = list(range(rank, len(prompts), count))
        seeds = [sample_seed(recipe.seed, step * len(prompts) + i) for i in index]
        mine = [prompts[i] for i in index]
        rollouts[f"rollout[{rank}]"] = engines.ask(rank, "generate", index, mine, seeds, config.max_response_tokens, config.temperature)
    wait(rollouts, recipe.cluster.deadline_s, f"PPO step {step}: rollout")
    return list(rollouts.values())


def sample_seed(seed: int, number: int) -> int:
    """The sampling seed of the run's sample `number`; runs with neighbouring seeds share none."""
    return (seed * 1_000_000_007 + number) % 2**31
