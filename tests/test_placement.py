"""Groups get what they ask for, or one clear error in time; waits end at their deadline and name who is missing."""

import json
import math
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import layouts
import pytest
import ray

from cluster.deadlines import wait
from cluster.errors import ClusterError
from cluster.groups import Group, Worker, begin
from cluster.placement import Demand, check, place
from cluster.ports import free_port

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


class Sleeper(Worker):
    def nap(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.rank

    def fail(self) -> None:
        raise ValueError(f"this is rank {self.rank}")

    def total(self) -> float:
        import torch
        import torch.distributed as dist

        value = torch.tensor([float(self.rank + 1)])
        dist.all_reduce(value)
        return value.item()


@pytest.fixture
def pair(ray_session):
    demand = Demand(workers=2, cpus=0.5, gpus=0)
    group = Group("pair", Sleeper, demand, place({"pair": demand}, seconds=20)["pair"], args=(), threads=1)
    begin([group], 60)
    yield group
    group.stop()


def test_a_group_forms_one_process_group(pair):
    pair.connect((20000, 30000), seconds=60)
    assert wait(pair.start("total"), 60, "total") == {"pair[0]": 3.0, "pair[1]": 3.0}


def test_a_late_answer_is_named(pair):
    refs = {"quick": pair.actors[0].nap.remote(0), "slow one": pair.actors[1].nap.remote(60)}
    with pytest.raises(ClusterError, match=r"rehearsal: no answer from slow one within 5 s \(1 of 2 answered\)"):
        wait(refs, 5, "rehearsal")


def test_a_dead_actor_is_named_at_once(pair):
    refs = pair.start("nap", 60)
    ray.kill(pair.actors[1])
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"rehearsal: pair\[1\] died"):
        wait(refs, 60, "rehearsal")
    assert time.monotonic() - began < 30


def test_an_error_inside_keeps_its_type(pair):
    with pytest.raises(ValueError, match="this is rank"):
        wait(pair.start("fail"), 60, "rehearsal")


@pytest.mark.parametrize(
    ("demand", "missing"),
    [(Demand(1, 0.1, 1), "GPU"), (Demand(3, 1, 0), "CPU"), (Demand(1, 2.5, 0), "CPU")],
)
def test_what_never_fits_is_refused_at_once_with_a_table(ray_session, demand, missing):
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"(?s)no room for policy.*MISSING.*wanted .*ask for less") as error:
        check({"reward": Demand(1, 0.1, 0), "policy": demand})
    assert time.monotonic() - began < 10
    assert f"{missing}: wanted" in str(error.value)


def test_what_is_taken_is_waited_for_until_the_deadline(ray_session):
    everything = place({"hog": Demand(2, 1, 0)}, seconds=20)
    try:
        check({"policy": Demand(1, 1, 0)})
        who = r"held by placement group roundhouse-hog: 2 CPU, job \w+ \(.*\)"
        with pytest.raises(ClusterError, match=rf"(?s)no room for policy \(1 of 1 actors\) within 2 s.*free now 0.*{who}"):
            place({"policy": Demand(1, 1, 0)}, seconds=2)
    finally:
        ray.util.remove_placement_group(everything["hog"].group)


def test_a_constructor_that_fails_is_told_as_it_is(ray_session):
    demand = Demand(workers=1, cpus=0.5, gpus=0)
    group = Group("bad", Sleeper, demand, place({"bad": demand}, seconds=20)["bad"], args=("one too many",), threads=1)
    with pytest.raises(TypeError, match="positional argument"):
        begin([group], 60)
    group.stop()


class Sharer(Worker):
    """One of a set; keeps a log of what happened on the devices, in a file that all of the set write."""

    def __init__(self, rank: int, world: int, threads: int, name: str, log: Path) -> None:
        super().__init__(rank, world, threads)
        self.name, self.log = name, log

    def note(self, what: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{self.name} {what}\n")

    def sleep(self) -> None:
        if self.name == "insomniac":
            raise RuntimeError("cannot sleep")
        self.note("sleeps")

    def wake(self) -> None:
        self.note("wakes")

    def work(self, seconds: float, *after: str) -> str:
        self.note("works")
        time.sleep(seconds)
        self.note("is done")
        return f"{self.name} after {','.join(after)}"


def sharers(log: Path, *names: str) -> list[Group]:
    demands = {name: Demand(workers=1, cpus=1, gpus=0) for name in names}
    rooms = place(demands, 20, [names])
    groups = [Group(name, Sharer, demands[name], rooms[name], args=(name, log), threads=1) for name in names]
    begin(groups, 60)
    return groups


def test_groups_of_a_set_take_turns_whatever_the_controller_asks_at_once(ray_session, tmp_path):
    log = tmp_path / "log"
    policy, reference, critic = groups = sharers(log, "policy", "reference", "critic")
    assert ray.available_resources()["CPU"] == 1, "three actors of one core each share one"
    try:
        first = policy.start("work", 0.3)
        second = reference.start("work", 0.1, first["policy[0]"])  # sent before the first is done
        third = reference.start("work", 0.0)
        fourth = policy.ask(0, "work", 0.0, second["reference[0]"])
        answers = wait(first | second | {"third": third["reference[0]"], "fourth": fourth}, 60, "work")
        assert answers["fourth"] == "policy after reference after policy after "
        happened = log.read_text().splitlines()
        assert sorted(happened[:2]) == ["critic sleeps", "reference sleeps"]
        assert happened[2:] == [
            *("policy works", "policy is done", "policy sleeps"),
            *("reference wakes", "reference works", "reference is done", "reference works", "reference is done", "reference sleeps"),
            *("policy wakes", "policy works", "policy is done"),
        ]
        log.unlink()
        wait(policy.start("work", 0.0) | critic.start("work", 0.0), 60, "work")
        assert log.read_text().splitlines() == [
            *("policy works", "policy is done", "policy sleeps", "critic wakes", "critic works", "critic is done"),
        ]
    finally:
        for group in groups:
            group.stop()


def test_whoever_cannot_sleep_stops_those_who_would_take_its_place(ray_session, tmp_path):
    _, other = groups = sharers(tmp_path / "log", "insomniac", "other")
    try:
        with pytest.raises(RuntimeError, match="cannot sleep"):
            wait(other.start("work", 0.0), 60, "work")
    finally:
        for group in groups:
            group.stop()


# ------------------------------------------------------------------------------------------------ four nodes of eight GPUs


@pytest.fixture(scope="module")
def landed() -> dict:
    run = subprocess.run([sys.executable, layouts.__file__], capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def devices(actors: list[dict]) -> list[tuple[str, str]]:
    return [(a["node"], gpu) for a in actors for gpu in a["devices"].split(",") if gpu]


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_ranks_are_neighbours_and_have_what_they_asked_for(landed, layout):
    for name, demand in layouts.LAYOUTS[layout][0].items():
        actors = landed[layout][name]
        assert [a["rank"] for a in actors] == list(range(demand.workers))
        seats = [(a["node"], [int(gpu) for gpu in a["devices"].split(",") if gpu]) for a in actors]
        assert seats == sorted(seats)
        assert all(len(gpus) == math.ceil(demand.gpus) for _, gpus in seats)
        nodes = {node for node, _ in seats}
        assert len(nodes) == (demand.nodes or math.ceil(demand.workers * demand.gpus / layouts.GPUS) or 1)


@pytest.mark.slow
def test_groups_of_their_own_share_no_device(landed):
    found = landed["apart"]
    whole = [device for name in ("policy", "rollout", "critic") for device in devices(found[name])]
    assert len(whole) == len(set(whole)) == 6 + 8 + 2
    halves = devices(found["reference"])
    assert len(set(halves)) == 1, "two halves of one GPU"
    assert not set(halves) & set(whole)
    assert devices(found["reward"]) == [], "no GPU asked for, none seen, although its node has some"
    assert all(sorted(map(str, a["of_ray"])) == sorted(a["devices"].split(",")) for a in found["policy"] + found["rollout"])


@pytest.mark.slow
def test_a_set_shares_its_devices_exactly(landed):
    found = landed["colocated"]
    assert devices(found["policy"]) == devices(found["reference"])
    assert devices(found["rollout"]) == devices(found["reward"])
    assert not set(devices(found["policy"])) & set(devices(found["rollout"]))
    assert len({*devices(found["policy"]), *devices(found["rollout"])}) == 32
    # rank i of the two: an engine of eight GPUs has those of two reward ranks
    for rank, engine in enumerate(found["rollout"]):
        assert devices([engine]) == devices(found["reward"][2 * rank : 2 * rank + 2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "missing", "row"),
    [
        ("an engine larger than a node", "rollout (1 of 1 actors)", r"rollout +1 x \(1 CPU \+ 16 GPU\) +MISSING"),
        ("more than a node on one", "policy (1 of 9 actors)", r"policy +9 x \(0.1 CPU \+ 1 GPU\) on 1 node +MISSING"),
        ("two sets too large", "critic+reward (1 of 1 bundles)", r"critic +1 x \(1 CPU \+ 1 GPU\) with reward +MISSING"),
    ],
)
def test_what_the_nodes_can_never_hold_is_refused_at_once(landed, layout, missing, row):
    found = landed[layout]
    assert found["error"].startswith(f"not enough CPUs or GPUs: no room for {missing}\n")
    assert re.search(row, found["error"]), found["error"]
    assert "nodes: 4 x (8 GPU + 4 CPU)" in found["error"]
    assert found["seconds"] < 10


@pytest.mark.slow
def test_what_others_hold_is_named_when_the_wait_ends(landed):
    error = landed["taken by others"]["error"]
    assert re.match(r"no room for policy \(\d of 4 actors\) within 3 s \(cluster.placement_timeout_s\)\n", error), error
    assert "  GPU: wanted 33, in the cluster 32, free now 5\n" in error
    assert "free: 1 x (5 GPU + 4 CPU), 3 x (4 CPU)" in error
    assert re.search(r"held by placement group roundhouse-squatter: 24 GPU, job \w+ \(.*layouts.py\)", error), error
    assert re.search(r"held by 1 actor idler: 3 GPU, job", error), error
    assert landed["taken by others"]["seconds"] < 10


def test_no_free_port():
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"no free port in {port}..{port}"):
            free_port((port, port))
        assert port < free_port((port + 1, 65535)) <= 65535
