"""Who gets which CPUs and GPUs: checked before anything starts, waited for with a deadline.

    demands = {"policy": Demand(workers=8, cpus=1, gpus=1), "rollout": Demand(workers=4, cpus=2, gpus=1)}
    check(demands)                              # ClusterError with a table when they can never fit
    groups = place(demands, seconds=30)         # {"policy": PlacementGroup, ...}

Amounts are Ray's: a group may ask for half a core, and `CUDA_VISIBLE_DEVICES` follows from the GPUs of a bundle.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.errors import ClusterError


@dataclass(frozen=True)
class Demand:
    """`workers` actors, each with `cpus` cores and `gpus` GPUs of one node."""

    workers: int
    cpus: float
    gpus: float

    @property
    def meets(self) -> bool:
        """Whether the actors form a process group, for which the first one listens on a port: one CPU actor alone needs none."""
        return self.workers > 1 or self.gpus > 0

    @property
    def bundle(self) -> dict[str, float]:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount > 0}

    def __str__(self) -> str:
        each = " + ".join(f"{amount:g} {name}" for name, amount in self.bundle.items()) or "nothing"
        return f"{self.workers} x ({each})"


def check(demands: Mapping[str, Demand]) -> None:
    """Do all demands fit the cluster at once, were it empty?

    First-fit, largest first, over the nodes. Raises ClusterError with a table of who wants what and what there is.
    """
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    bundles = [(name, demand.bundle) for name, demand in demands.items() for _ in range(demand.workers)]
    homeless = []
    for name, bundle in sorted(bundles, key=lambda item: (-item[1].get("GPU", 0), -item[1].get("CPU", 0))):
        home = next((n for n in nodes if all(n.get(r, 0) + 1e-6 >= amount for r, amount in bundle.items())), None)
        if home is None:
            homeless.append(name)
            continue
        for resource, amount in bundle.items():
            home[resource] -= amount
    if homeless:
        missing = ", ".join(f"{name} ({homeless.count(name)} of {demands[name].workers} actors)" for name in dict.fromkeys(homeless))
        raise ClusterError(f"not enough CPUs or GPUs: no room for {missing}\n{_table(demands, set(homeless))}")


def place(demands: Mapping[str, Demand], seconds: float) -> dict[str, PlacementGroup]:
    """One placement group per demand, a bundle per worker, packed onto few nodes; all ready, or none kept.

    Raises ClusterError with the table when they are not all there within `seconds`.
    """
    end = time.monotonic() + seconds
    groups = {
        name: placement_group([demand.bundle or {"CPU": 0.001}] * demand.workers, strategy="PACK", name=f"roundhouse-{name}")
        for name, demand in demands.items()
    }
    waiting = {name for name, group in groups.items() if not group.wait(max(0.0, end - time.monotonic()))}
    if waiting:
        for group in groups.values():
            remove_placement_group(group)
        raise ClusterError(
            f"no room for {', '.join(sorted(waiting))} within {seconds:g} s (cluster.placement_timeout_s)\n{_table(demands, waiting)}"
        )
    return groups


def _table(demands: Mapping[str, Demand], missing: set[str]) -> str:
    """Wanted, there and free, as lines of text."""
    rows = [f"  {name:<12} {demand!s:<28} {'MISSING' if name in missing else 'fits'}" for name, demand in demands.items()]
    wanted = {r: sum(d.workers * d.bundle.get(r, 0) for d in demands.values()) for r in ("CPU", "GPU")}
    total, free = ray.cluster_resources(), ray.available_resources()
    for resource, amount in wanted.items():
        rows.append(f"  {resource}: wanted {amount:g}, in the cluster {total.get(resource, 0):g}, free now {free.get(resource, 0):g}")
    rows.append("  ask for less (ppo.groups.*.cpus / gpus / workers, cluster.workers), or add nodes")
    return "\n".join(rows)
