"""The policy's weights into the engines, and the proof that they arrived.

    metrics = sync_weights(graph, recipe, version="step-7")     # {"sync/seconds", "sync/mb_per_s"}
    metrics |= gate(graph, recipe, prompts, step=6)             # {"sync/log_prob_gap", "sync/resyncs"}; TrainingError when they disagree

One flow for all transports, vLLM's own: init (once), start, update for every bucket of 256 MiB, finish. While the engines load a
bucket the policy gathers the next one; two are on their way at most. Where both take turns on the same devices, all buckets are sent before
the first is loaded: each change of turns moves whole models. With `ppo.adapter` the adapter alone goes, in one call.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import RayTaskError

from cluster.deadlines import wait
from cluster.groups import Group
from rlhf.buckets import Spec, plan, size
from rlhf.errors import TrainingError
from rlhf.experience import align, merge
from rlhf.fingerprints import differing
from rlhf.graph import Graph, Prompts
from rlhf.monitoring import say
from rlhf.recipe import Recipe
from rlhf.sampling import sample_seed
from rlhf.weight_sender import ADAPTER, BROADCASTS

# What every engine writes after each sync: 2 tokens to 8 prompts (or one for each rank of the policy), of which it is given 16 tokens
# beyond what they share. 8 tokens to 4 whole prompts of 128 took .35 s of a GRPO step of 5.3, the policy's share .12.
PROBES, PROBE_PROMPT, PROBE_TOKENS = 8, 16, 2
NAMED = 8  # tensors that an error lists


@dataclass(frozen=True)
class Link:
    """What a sending group and the engines have agreed on."""

    members: tuple[Any, ...]  # the actors; when one is replaced the rest must meet anew
    transport: str
    dtype: str  # the engines'
    buckets: list[list[Spec]]


_links: WeakKeyDictionary[Group, Link] = WeakKeyDictionary()  # the latest of each group; it holds while it is that of both


def sync_weights(graph: Graph, recipe: Recipe, version: str, source: str = "policy") -> dict[str, float]:
    """The weights of `source` into every engine, which then calls them `version`. Returns the seconds it took and MB/s of one copy."""
    link, seconds, what = link_to(graph, recipe, source), recipe.cluster.deadline_s, f"weights of {version}"
    sender, rollout = graph[source], graph["rollout"]
    if link.transport == ADAPTER:
        return send_adapter(sender, rollout, version, seconds, what)
    began = time.perf_counter()
    in_turns = sender.turns is not None and sender.turns is rollout.turns
    ahead = [sender.start("send", bucket) for bucket in link.buckets] if in_turns else []
    before: Mapping[str, ObjectRef] = rollout.start("start_weight_update")
    for i, bucket in enumerate(link.buckets):
        sent = ahead[i] if in_turns else sender.start("send", bucket)
        # A broadcast needs both sides in the call; otherwise the engines wait for what the call carries.
        carried = () if link.transport in BROADCASTS else tuple(sent.values())
        arrived = rollout.start("update_weights", bucket, *carried)
        settle(before, seconds, what)
        before = sent | arrived
    settle(before, seconds, what)
    wait(rollout.start("finish_weight_update", version), seconds, what)
    took = time.perf_counter() - began
    return {"sync/seconds": took, "sync/mb_per_s": sum(map(size, link.buckets)) / 1e6 / took}


def send_adapter(sender: Group, rollout: Group, version: str, seconds: float, what: str) -> dict[str, float]:
    """The policy's adapter into every engine, in one call."""
    began = time.perf_counter()
    sent = sender.start("adapter")
    arrived = rollout.start("load_adapter", version, sent[f"{sender.name}[0]"])
    sizes = wait(arrived | sent, seconds, what)
    took = time.perf_counter() - began
    return {"sync/seconds": took, "sync/mb_per_s": sizes["rollout[0]"] / 1e6 / took}


def settle(refs: Mapping[str, ObjectRef], seconds: float, what: str) -> None:
    """As `wait`. When an actor dies in a broadcast, the connections of the others break before Ray tells of it: its name is told first."""
    try:
        wait(refs, seconds, what)
    except RayTaskError:
        for name, ref in refs.items():
            if ray.wait([ref], timeout=2)[0]:
                with suppress(RayTaskError):
                    wait({name: ref}, seconds, what)
        raise


def link_to(graph: Graph, recipe: Recipe, source: str) -> Link:
    """The link from `source` to the engines, made when there is none or when any of their actors is another one."""
    sender, rollout, seconds = graph[source], graph["rollout"], recipe.cluster.deadline_s
    members = (*sender.actors, *rollout.actors)
    latest = _links.get(rollout)
    if latest is not None and latest is _links.get(sender) and latest.members == members:
        return latest
    transport, dtype = wait({"rollout[0]": rollout.actors[0].takes.remote()}, seconds, "weight sync")["rollout[0]"]
    if transport == ADAPTER:
        _links[sender] = _links[rollout] = link = Link(members, transport, dtype, [])
        return link
    first = f"{source}[0]"
    buckets = plan(wait({first: sender.actors[0].specs.remote(dtype)}, seconds, "weight sync")[first])
    host, port = "", 0
    if transport in BROADCASTS:
        host, port = wait({first: sender.actors[0].address.remote(recipe.cluster.ports)}, seconds, "weight sync: find a port")[first]
    parts = recipe.ppo.groups.rollout.tensor_parallel  # of an engine, each of which receives
    world = 1 + parts * len(rollout.actors)
    joining = sender.start("open_transport", transport, host, port, world, seconds)
    for rank in range(len(rollout.actors)):
        init_info = {
            "object_store": {},
            "gloo": {"host": host, "port": port, "rank": 1 + parts * rank, "world": world, "seconds": seconds},
            # vLLM broadcasts a call's tensors in one piece when its buffer is as large as our buckets.
            "nccl": {
                **{"master_address": host, "master_port": port, "rank_offset": 1 + parts * rank, "world_size": world},
                **{"packed": True, "packed_buffer_size_bytes": max(map(size, buckets))},
            },
            "ipc": {"packed": True},
        }[transport]
        joining[f"rollout[{rank}]"] = rollout.ask(rank, "open_transport", init_info)
    wait(joining, seconds, f"weight sync: open {transport}")
    _links[sender] = _links[rollout] = link = Link(members, transport, dtype, buckets)
    return link


def gate(graph: Graph, recipe: Recipe, prompts: Prompts, step: int) -> dict[str, float]:
    """Do engines and policy agree? Every engine answers a few prompts; its log-probabilities against the policy's.

    Above `ppo.log_prob_gap_limit` the weights are sent once more. Returns the largest difference in nats and the number of such
    resyncs. Raises TrainingError, naming the tensors that differ, when an engine still disagrees.
    """
    found, version = gaps(graph, recipe, prompts)
    engine = farthest(found)
    if found[engine] <= limit(recipe):
        return {"sync/log_prob_gap": found[engine], "sync/resyncs": 0.0}
    say(f"  ppo       step {step}: {engine} is {found[engine]:.2g} nats off the policy after {version}; its weights are sent once more")
    sync_weights(graph, recipe, version)
    found, _ = gaps(graph, recipe, prompts)
    engine = farthest(found)
    if not found[engine] <= limit(recipe):  # NaN is refused too
        where = f"PPO step {step}: {engine} after the weight sync and one more try"
        refuse_gap(found[engine], recipe, where, differences(graph, recipe, engine))
    return {"sync/log_prob_gap": found[engine], "sync/resyncs": 1.0}


def gaps(graph: Graph, recipe: Recipe, prompts: Prompts) -> tuple[dict[str, float], str]:
    """Largest difference in nats by engine, and the version of their weights. One call to each engine and one to the policy."""
    seconds = recipe.cluster.deadline_s
    n = max(PROBES, len(graph["policy"].actors))  # every rank of a sharded policy needs a sample to take part with
    prompts = beginnings([prompts[i % len(prompts)] for i in range(n)])
    seeds = [sample_seed(recipe.seed, -1 - i) for i in range(n)]
    answers = {}
    for rank in range(len(graph["rollout"].actors)):
        index, sampling = range(rank * n, rank * n + n), (min(PROBE_TOKENS, recipe.ppo.max_response_tokens), recipe.ppo.temperature)
        answers[f"rollout[{rank}]"] = graph["rollout"].ask(rank, "generate", index, prompts, seeds, *sampling)
    written = wait(answers, seconds, "gate")
    checked = wait(graph["policy"].start("log_probs", *answers.values()), seconds, "gate")
    rollout = merge(list(written.values()))
    apart = np.abs(align(list(checked.values()), rollout.response_lengths) - rollout.log_probs)
    ends = np.cumsum([part.response_lengths.sum() for part in written.values()])
    return {engine: float(part.max()) for engine, part in zip(written, np.split(apart, ends[:-1]), strict=True)}, rollout.version


def beginnings(prompts: Prompts) -> list[list[int]]:
    """Of each prompt what all of these share, in which lies the opening that roles compute once, and `PROBE_PROMPT` tokens more."""
    shared = next((i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1), min(map(len, prompts)))
    return [list(prompt[: shared + PROBE_PROMPT]) for prompt in prompts]


def differences(graph: Graph, recipe: Recipe, engine: str) -> str:
    """A sentence on which weights of `engine` are not the policy's."""
    link, seconds = _links[graph["rollout"]], recipe.cluster.deadline_s
    if link.transport == ADAPTER:
        return "It was given the adapter; its other weights are those that it started with"
    ours = wait(graph["policy"].start("fingerprints", link.dtype), seconds, "compare weights")["policy[0]"]
    rank = int(engine.removeprefix("rollout[").removesuffix("]"))
    asked = graph["rollout"].ask(rank, "fingerprints", [spec for spec, _ in ours])
    theirs = wait({engine: asked}, seconds, "compare weights")[engine]
    names = differing({spec.name: mine for spec, mine in ours}, theirs)
    unseen = len(ours) - len(theirs)
    hidden = f"; {unseen} of {len(ours)} tensors could not be compared" if unseen else ""
    if not names:
        return f"All {len(theirs)} tensors that were compared are equal{hidden}: the two compute differently with the same weights"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} of {len(ours)} tensors differ: {', '.join(names[:NAMED])}{more}{hidden}"


def limit(recipe: Recipe) -> float:
    """How far engine and policy may be apart, in nats per token."""
    return recipe.ppo.log_prob_gap_limit or (0.2 if recipe.ppo.groups.policy.gpus else 1e-3)


def farthest(found: Mapping[str, float]) -> str:
    """The engine with the largest gap; a NaN is larger than any."""
    return max(found, key=lambda engine: np.nan_to_num(found[engine], nan=np.inf))


def refuse_gap(gap: float, recipe: Recipe, where: str, why: str = "The engine does not run the policy's weights") -> None:
    """Raises TrainingError when `gap` is not within the limit: training on such samples would go wrong silently."""
    if not gap <= limit(recipe):  # NaN is refused too
        raise TrainingError(
            f"{where}: engine and policy differ by {gap:.2g} nats per token, more than {limit(recipe):g} (ppo.log_prob_gap_limit). "
            f"{why}. The last checkpoint stands"
        )
