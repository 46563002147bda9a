"""Layouts of the actor graph on a cluster of four nodes with eight GPUs each, made of this machine: Ray schedules GPUs that are not there.

python tests/layouts.py     # -> one line of JSON: layout -> role -> [{rank, node, devices}, ...], or {error, seconds}

A process of its own, since the other tests' Ray lives in theirs. The actors only tell where they are; no CUDA is initialised.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0", "RAY_AUTH_MODE": "disabled"}

import ray
from ray.cluster_utils import Cluster

from cluster.deadlines import wait
from cluster.errors import ClusterError
from cluster.groups import Group, Worker, begin
from cluster.placement import Demand, check, place

NODES, GPUS, CPUS = 4, 8, 4

LAYOUTS: dict[str, tuple[dict[str, Demand], list[list[str]]]] = {
    "apart": (
        {
            "policy": Demand(3, 0.5, 2),
            "rollout": Demand(2, 0.5, 4),
            "critic": Demand(2, 0.5, 1, nodes=2),
            "reward": Demand(1, 0.5, 0),
            "reference": Demand(2, 0.1, 0.5),
        },
        [],
    ),
    "colocated": (
        {"policy": Demand(4, 1, 4), "reference": Demand(4, 1, 4), "rollout": Demand(2, 1, 8), "reward": Demand(4, 1, 4)},
        [["policy", "reference"], ["reward", "rollout"]],
    ),
}
NEVER: dict[str, tuple[dict[str, Demand], list[list[str]]]] = {
    "an engine larger than a node": ({"policy": Demand(4, 1, 1), "rollout": Demand(1, 1, 16)}, []),
    "more than a node on one": ({"reward": Demand(1, 1, 1), "policy": Demand(9, 0.1, 1, nodes=1)}, []),
    "two sets too large": (
        {"policy": Demand(4, 1, 8), "reference": Demand(4, 1, 8), "critic": Demand(1, 1, 1), "reward": Demand(1, 1, 1)},
        [["policy", "reference"], ["critic", "reward"]],
    ),
}


class Teller(Worker):
    def tell(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"rank": self.rank, "node": node, "devices": os.environ["CUDA_VISIBLE_DEVICES"], "of_ray": ray.get_gpu_ids()}


def land(demands: dict[str, Demand], colocate: list[list[str]]) -> dict[str, list[dict[str, Any]]]:
    check(demands, colocate)
    rooms = place(demands, 60, colocate)
    groups = [Group(name, Teller, demand, rooms[name], args=(), threads=1) for name, demand in demands.items()]
    try:
        begin(groups, 240)
        return {group.name: list(wait(group.start("tell"), 60, "tell").values()) for group in groups}
    finally:
        for group in groups:
            group.stop()


def refused(act: Any, *args: Any) -> dict[str, Any]:
    began = time.monotonic()
    try:
        act(*args)
    except ClusterError as error:
        return {"error": str(error), "seconds": time.monotonic() - began}
    return {"error": "", "seconds": 0.0}


def main() -> dict[str, Any]:
    # Its own folder: Ray notes the newest cluster of this machine in the usual one, for whoever joins "auto". Short, for its sockets.
    folder = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="rh-")
    cluster, found = Cluster(), {}
    try:
        for i in range(NODES):
            cluster.add_node(num_cpus=CPUS, num_gpus=GPUS, object_store_memory=80_000_000, include_dashboard=False, wait=i == 0)
        cluster.wait_for_nodes(120)
        path = os.pathsep.join(sys.path)
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
        found |= {name: refused(check, *layout) for name, layout in NEVER.items()}
        demands, colocate = LAYOUTS["apart"]
        found["apart"] = land(demands, colocate)
        taken = place({"squatter": Demand(3, 0, 8)}, 30)
        squat = ray.remote(num_gpus=3, num_cpus=0)(Idler).options(name="idler").remote()
        ray.get(squat.ping.remote())
        layout = {"reward": Demand(1, 0.5, 1), "policy": Demand(4, 1, 8)}
        found["taken by others"] = refused(place, layout, 3)
        ray.util.remove_placement_group(taken["squatter"].group)
        ray.kill(squat)
        demands, colocate = LAYOUTS["colocated"]
        found["colocated"] = land(demands, colocate)
    finally:
        with suppress(Exception):
            ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    return found


class Idler:
    def ping(self) -> None:
        pass


if __name__ == "__main__":
    print(json.dumps(main()))
