"""Who gets which CPUs and GPUs: checked before anything starts, waited for with a deadline.

    demands = {"policy": Demand(workers=8, cpus=1, gpus=1), "rollout": Demand(workers=4, cpus=2, gpus=2)}
    check(demands)                              # ClusterError with a table when they can never fit
    rooms = place(demands, seconds=30)          # {"policy": Room, "rollout": Room}
    place(demands, 30, [["policy", "rollout"]]) # the same, on the same GPUs in turn

Amounts are Ray's: a group may ask for half a core. Which node a bundle goes to is decided in `cluster/plan.py` and told to Ray
by label, so that what was checked is what happens.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

import ray
from ray._private.client_mode_hook import client_mode_wrap
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.errors import ClusterError
from cluster.plan import Amounts, Demand, Pool, homeless, per_bundle, plan, pools_of

__all__ = ["Demand", "Room", "check", "place"]

SETTLING_SECONDS = 5.0  # Ray places what it has room for in 0.02 s; later than this, somebody else was quicker: plan again
GPU, CPU = "GPU", "CPU"


@dataclass(frozen=True)
class Room:
    """Where the actors of one group go, and what Ray counts for each of them."""

    group: PlacementGroup
    host: str  # the group that has one actor per bundle, which holds the bundle's GPUs; the others of its set use the same
    per_bundle: int  # actors of this group in a bundle: 0..n-1 are in the first one
    cpus: float
    gpus: float


def check(demands: Mapping[str, Demand], colocate: Sequence[Sequence[str]] = ()) -> None:
    """Do all demands fit the cluster at once, were it empty?

    Raises ClusterError with a table of who wants what and what there is.
    """
    pools = pools_of(demands, colocate)
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    if plan(pools, nodes) is None:
        missing = homeless(pools, nodes)
        raise ClusterError(f"not enough CPUs or GPUs: no room for {_missing(pools, missing)}\n{_table(demands, pools, missing)}")


def place(demands: Mapping[str, Demand], seconds: float, colocate: Sequence[Sequence[str]] = ()) -> dict[str, Room]:
    """Room for all groups, or for none: a placement group for each, but one for a whole set of `colocate`.

    Raises ClusterError with the table, and with who holds what is missing, when they are not all there within `seconds`.
    """
    pools, end = pools_of(demands, colocate), time.monotonic() + seconds
    while True:
        found = plan(pools, free := _free())
        if found is not None and (groups := _reserve(pools, found, end)) is not None:
            return {name: _room(demands, pool, group, name) for pool, group in zip(pools, groups, strict=True) for name in pool.names}
        if time.monotonic() >= end:
            missing = homeless(pools, free) or dict.fromkeys(range(len(pools)), 0)  # 0: others were quicker each time
            raise ClusterError(
                f"no room for {_missing(pools, missing)} within {seconds:g} s (cluster.placement_timeout_s)\n"
                f"{_table(demands, pools, missing, free)}"
            )
        time.sleep(0.2)


def _reserve(pools: Sequence[Pool], found: Sequence[Sequence[str]], end: float) -> list[PlacementGroup] | None:
    """The placement groups, all on the nodes they were planned for; None when some are not there soon."""
    groups = [
        placement_group(
            [pool.bundle] * len(nodes),
            name=f"roundhouse-{'+'.join(pool.names)}",
            bundle_label_selector=[{"ray.io/node-id": node} for node in nodes],
        )
        for pool, nodes in zip(pools, found, strict=True)
    ]
    soon = min(end, time.monotonic() + SETTLING_SECONDS)
    if all(group.wait(max(0.1, soon - time.monotonic())) for group in groups):
        return groups
    for group in groups:
        remove_placement_group(group)
    return None


def _room(demands: Mapping[str, Demand], pool: Pool, group: PlacementGroup, name: str) -> Room:
    """A set's actors share the cores of a bundle; its GPUs are counted for the host's actor."""
    count = {member: per_bundle(demands[pool.names[0]], demands[member]) for member in pool.names}
    asked = sum(count[member] * demands[member].cpus for member in pool.names)
    share = demands[name].cpus * min(1.0, pool.demand.cpus / asked) if asked else 0.0
    host = pool.names[0]
    # Ray counts in steps of 0.0001: rounded up, three thirds would not fit into one
    return Room(group, host, count[name], floor(share * 1e4 + 1e-6) / 1e4, demands[name].gpus if name == host else 0)


# ------------------------------------------------------------------------------------------------ what there is, and who has it


@client_mode_wrap
def _free() -> dict[str, Amounts]:
    """Node -> what is free on it, as the head node knows it; a second old at most. Needs no dashboard, as Ray's state API does."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {n: dict(free) for n, free in ray._private.state.available_resources_per_node().items() if n in alive}


@client_mode_wrap
def _holders() -> list[tuple[str, str, Amounts]]:
    """(who, of which job, what) of every placement group, and of every actor outside of them, that holds CPUs or GPUs."""
    from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData

    tables = ray._private.state.state._connect_and_get_accessor()
    jobs = {job["JobID"]: f"job {job['JobID']} ({job['Entrypoint']})" for job in ray._private.state.jobs()}
    held: list[tuple[str, str, Amounts]] = []
    for group in map(PlacementGroupTableData.FromString, tables.get_placement_group_table()):
        if group.state == PlacementGroupTableData.CREATED:
            amounts: Counter[str] = Counter()
            for bundle in group.bundles:
                amounts.update(dict(bundle.unit_resources))
            name = group.name or group.placement_group_id.hex()
            held.append((f"placement group {name}", jobs.get(group.creator_job_id.hex(), "an ended job"), amounts))
    actors: Counter[tuple[str, str]] = Counter()
    sums: dict[tuple[str, str], Counter[str]] = {}
    for actor in map(ActorTableData.FromString, tables.get_actor_table(None, "ALIVE")):
        if not actor.placement_group_id and (amounts := Counter({r: a for r, a in actor.required_resources.items() if r in (CPU, GPU)})):
            who = (actor.name or actor.class_name, jobs.get(actor.job_id.hex(), "an ended job"))
            actors[who] += 1
            sums.setdefault(who, Counter()).update(amounts)
    return held + [(f"{n} actor{'s' * (n > 1)} {who}", job, sums[who, job]) for (who, job), n in actors.items()]


def _missing(pools: Sequence[Pool], missing: Mapping[int, int]) -> str:
    """`policy (2 of 8 actors)`; a set is counted by its bundles, each of which is for one actor of its widest group."""
    named = []
    for i, n in missing.items():
        pool = pools[i]
        what = "actors" if len(pool.names) == 1 else "bundles"
        named.append("+".join(pool.names) + (f" ({n} of {pool.demand.workers} {what})" if n else ""))
    return ", ".join(named)


def _table(
    demands: Mapping[str, Demand], pools: Sequence[Pool], missing: Mapping[int, int], free: Mapping[str, Amounts] | None = None
) -> str:
    """Wanted, there, free and (when something is free or not: `free` is given) held by whom, as lines of text."""
    lines = []
    for i, pool in enumerate(pools):
        for name in pool.names:
            others = [other for other in pool.names if other != name]
            shared = f" with {', '.join(others)}" if others else ""
            lines.append((name, f"{demands[name]}{shared}", "MISSING" if i in missing else "fits"))
    width = max(len(what) for _, what, _ in lines)
    rows = [f"  {name:<12} {what:<{width}}  {fits}" for name, what, fits in lines]
    total = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    now = _free() if free is None else free
    for r in (CPU, GPU):
        wanted = sum(pool.demand.workers * pool.demand.bundle.get(r, 0) for pool in pools)
        there, left = (sum(node.get(r, 0) for node in nodes.values()) for nodes in (total, now))
        rows.append(f"  {r}: wanted {wanted:g}, in the cluster {there:g}, free now {left:g}")
    if len(total) > 1:
        rows.append(f"  nodes: {_nodes(total)}" + (f"; free: {_nodes(now)}" if free is not None else ""))
    if free is not None:
        rows += [f"  held by {who}: {_amounts(amounts)}, {job}" for who, job, amounts in _holders()]
    rows.append("  ask for less (ppo.groups.*.cpus / gpus / workers / nodes, cluster.workers), share (ppo.colocate), or add nodes")
    return "\n".join(rows)


def _nodes(nodes: Mapping[str, Amounts]) -> str:
    """`3 x (8 GPU + 16 CPU), 1 x (2 CPU)`"""
    return ", ".join(f"{n} x ({what})" for what, n in sorted(Counter(map(_amounts, nodes.values())).items(), reverse=True))


def _amounts(amounts: Amounts) -> str:
    return " + ".join(f"{round(amounts[r], 4):g} {r}" for r in (GPU, CPU) if amounts.get(r, 0) > 1e-4) or "nothing"
