"""The policy's weights into the engines, and the proof that they arrived.

sync_weights(graph, recipe, version="step-7")
gap = gate(graph, recipe, prompts, step=6)            # nats; TrainingError when engine and policy disagree
"""

import numpy as np

from cluster.deadlines import wait
from rlhf.errors import TrainingError
from rlhf.experience import align, merge
from rlhf.generation import sample_seed
from rlhf.graph import Graph, Prompts
from rlhf.recipe import Recipe

PROBES, PROBE_TOKENS = 4, 8  # what every engine writes after each sync


def sync_weights(graph: Graph, recipe: Recipe, version: str) -> None:
    """Policy -> object store -> every engine. All ranks of a sharded policy gather, rank 0's copy is sent."""
    weights = graph["policy"].start("weights")
    arrived = graph["rollout"].start("update_weights", version, weights["policy[0]"])
    wait(arrived, recipe.cluster.deadline_s, f"weights of {version}")


def gate(graph: Graph, recipe: Recipe, prompts: Prompts, step: int) -> float:
    """Do engines and policy agree? Every engine answers a few prompts; its log-probabilities against the policy's.

    Returns the largest difference in nats. Raises TrainingError above `ppo.log_prob_gap_limit`.
    """
    prompts = prompts[:PROBES]
    seconds, gaps = recipe.cluster.deadline_s, []
    seeds = [sample_seed(recipe.seed, -1 - i) for i in range(len(prompts))]
    for rank in range(len(graph["rollout"].actors)):
        answers = graph["rollout"].ask(rank, "generate", range(len(prompts)), prompts, seeds, PROBE_TOKENS, recipe.ppo.temperature)
        checked = wait(graph["policy"].start("log_probs", answers), seconds, f"gate of rollout[{rank}]")
        rollout = merge(list(wait({f"rollout[{rank}]": answers}, seconds, "gate").values()))
        ours = align(list(checked.values()), rollout.response_lengths)
        gaps.append(float(np.abs(ours - rollout.log_probs).max()))
        refuse_gap(gaps[-1], recipe, f"PPO step {step}: rollout[{rank}] after the weight sync")
    return max(gaps)


def refuse_gap(gap: float, recipe: Recipe, where: str) -> None:
    """Raises TrainingError when `gap` is not within the limit: training on such samples would go wrong silently."""
    limit = recipe.ppo.log_prob_gap_limit or (0.2 if recipe.ppo.groups.policy.gpus else 1e-3)
    if not gap <= limit:  # NaN is refused too
        raise TrainingError(
            f"{where}: engine and policy differ by {gap:.2g} nats per token, more than {limit:g} (ppo.log_prob_gap_limit). "
            "The engine does not run the policy's weights. The last checkpoint stands"
        )
