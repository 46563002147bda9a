"""Groups get what they ask for, or one clear error in time; waits end at their deadline and name who is missing."""

import socket
import sys
import time

import pytest
import ray

from cluster.deadlines import wait
from cluster.errors import ClusterError
from cluster.groups import Group, Worker
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
    wait(group.start("host"), 60, "start")
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
        with pytest.raises(ClusterError, match=r"(?s)no room for policy within 2 s.*free now 0"):
            place({"policy": Demand(1, 1, 0)}, seconds=2)
    finally:
        ray.util.remove_placement_group(everything["hog"])


def test_no_free_port():
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"no free port in {port}..{port}"):
            free_port((port, port))
        assert port < free_port((port + 1, 65535)) <= 65535
