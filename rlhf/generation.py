"""Prompts to the engines, rollouts back: the controller's side of the rollout group.

rollouts = generate(graph, recipe, prompts, step)     # references, one per engine
"""

from ray import ObjectRef

from cluster.deadlines import wait
from rlhf.graph import Graph, Prompts
from rlhf.recipe import Recipe
from rlhf.sampling import sample_seed


def generate(graph: Graph, recipe: Recipe, prompts: Prompts, step: int, each: int = 1, temperature: float | None = None) -> list[ObjectRef]:
    """References to one rollout per engine: `each` answers to every prompt, samples p * each ... of the step are those to prompt p.

    Prompts go round the engines, all answers to one of them come from the same, which computes it once. A sample's seed is
    arithmetic, so who writes it changes nothing. `temperature` replaces the recipe's; 0 takes the likeliest token each time.
    """
    engines, config = graph["rollout"], recipe.ppo
    heat, count = config.temperature if temperature is None else temperature, len(engines.actors)
    rollouts = {}
    for rank in range(min(count, len(prompts))):
        index = [p * each + k for p in range(rank, len(prompts), count) for k in range(each)]
        seeds = [sample_seed(recipe.seed, step * len(prompts) * each + i) for i in index]
        mine = [prompts[i // each] for i in index]
        rollouts[f"rollout[{rank}]"] = engines.ask(rank, "generate", index, mine, seeds, config.max_response_tokens, heat)
    wait(rollouts, recipe.cluster.deadline_s, f"step {step}: rollout")
    return list(rollouts.values())
