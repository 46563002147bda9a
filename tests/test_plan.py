"""The plan of who goes where: never more than there is, few nodes, sets that share, and no room only where there is none."""

import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ours_ppo import recipe_for
from benchmarks.ppo_sizes import GRPO, SIZES, WORKS
from cluster.plan import Demand, Pool, disagreement, homeless, plan, pools_of
from rlhf.graph import demands
from rlhf.weight_sender import transport

EIGHT = {f"n{i}": {"CPU": 16.0, "GPU": 8.0} for i in range(4)}


def layout(demands, nodes=EIGHT, colocate=()):
    """Group or set -> bundles on each node it is on."""
    pools = pools_of(demands, colocate)
    found = plan(pools, nodes)
    return found and {"+".join(pool.names): Counter(where) for pool, where in zip(pools, found, strict=True)}


def test_each_group_stands_on_few_nodes_and_fills_those_that_are_begun():
    found = layout({"policy": Demand(16, 1, 1), "reference": Demand(4, 1, 1), "reward": Demand(4, 1, 1), "rollout": Demand(4, 1, 2)})
    assert sorted(found["policy"].values()) == [8, 8]
    assert len(found["rollout"]) == 1
    assert found["reference"].keys() == found["reward"].keys()
    assert len(set().union(*found.values())) == 4


def test_groups_without_gpus_leave_nodes_with_free_ones_alone():
    nodes = {"gpu": {"CPU": 16, "GPU": 8}, "cpu": {"CPU": 16}}
    assert layout({"reward": Demand(4, 2, 0), "policy": Demand(7, 1, 1)}, nodes) == {"reward": {"cpu": 4}, "policy": {"gpu": 7}}


def test_nodes_spreads_evenly_or_not_at_all():
    assert sorted(layout({"policy": Demand(8, 1, 1, nodes=4)})["policy"].values()) == [2, 2, 2, 2]
    assert layout({"policy": Demand(8, 1, 1, nodes=1)})["policy"].total() == 8
    assert layout({"policy": Demand(9, 1, 1)}) is not None
    assert layout({"policy": Demand(9, 1, 1, nodes=1)}) is None
    assert layout({"policy": Demand(10, 1, 1, nodes=5)}) is None


def test_an_engine_needs_its_gpus_on_one_node():
    nodes = {f"n{i}": {"CPU": 8, "GPU": 3} for i in range(4)}
    assert layout({"rollout": Demand(4, 1, 2)}, nodes) is not None
    assert layout({"rollout": Demand(5, 1, 2)}, nodes) is None  # 12 GPUs, but the third of each node is alone
    assert homeless(pools_of({"rollout": Demand(6, 1, 2)}), nodes) == {0: 2}


def test_a_set_is_as_large_as_one_of_its_groups():
    demands = {"policy": Demand(8, 2, 1), "rollout": Demand(4, 3, 2), "reward": Demand(8, 1, 1)}
    (pool,) = pools_of(demands, [["policy", "rollout", "reward"]])
    assert pool == Pool(("rollout", "policy", "reward"), Demand(4, 4, 2))  # 4 cores: two policy actors in a bundle of two GPUs
    assert layout(demands, {"n": {"CPU": 16, "GPU": 8}}, [["policy", "rollout", "reward"]]) is not None
    assert layout(demands, {"n": {"CPU": 99, "GPU": 8}}) is None
    # a stage without some of the roles
    assert [p.names for p in pools_of({"policy": demands["policy"]}, [["policy", "rollout"], ["critic", "reward"]])] == [("policy",)]


def test_a_first_choice_that_leaves_no_room_is_taken_back():
    """The six bundles would go to the fullest node, and then four in a row have no place."""
    nodes = {"a": {"GPU": 6}, "b": {"GPU": 7}}
    assert layout({"loose": Demand(6, 0, 1), "row": Demand(6, 0, 1, nodes=1)}, nodes) is not None
    assert layout({"long": Demand(8, 0, 1), "row": Demand(4, 0, 1, nodes=1)}, nodes) is not None


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (Demand(8, 1, 1), Demand(4, 1, 1), r"same amount, workers x gpus \(policy 8 x 1, reference 4 x 1\)"),
        (Demand(1, 1, 1), Demand(1, 1, 0), r"whole GPUs, or none of them any \(policy 1 x 1, reference 1 x 0\)"),
        (Demand(2, 1, 0.5), Demand(2, 1, 0.5), "whole GPUs"),
        (Demand(3, 1, 2), Demand(2, 1, 3), "a multiple"),
        (Demand(1, 1, 0), Demand(1, 0.5, 0), "same amount, workers x cpus"),
        (Demand(4, 1, 1, nodes=2), Demand(4, 1, 1, nodes=4), "got nodes = 2 and 4"),
        (Demand(4, 1, 1, nodes=4), Demand(2, 1, 2), "2 sets of devices cannot be spread evenly over nodes = 4"),
    ],
)
def test_groups_that_cannot_share(one, other, why):
    assert re.search(why, disagreement({"policy": one, "reference": other}))
    assert disagreement({"policy": one, "reference": one}) is None or one.gpus == 0.5


small = st.builds(Demand, st.integers(1, 4), st.sampled_from([0, 0.5, 1]), st.sampled_from([0, 1, 2, 4]))
machines = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 2, 4, 8])), min_size=1, max_size=3)


@given(st.lists(small, min_size=1, max_size=3), machines)
def test_no_room_only_where_there_is_none(demands, machines):
    """Against all ways to put the bundles on the nodes."""
    pools = pools_of({f"g{i}": demand for i, demand in enumerate(demands)})
    nodes = {f"n{i}": {"CPU": float(cpus), "GPU": float(gpus)} for i, (cpus, gpus) in enumerate(machines)}

    def fits(counts) -> bool:
        """counts[i][j]: bundles of pool i on node j."""
        return all(
            sum(count[j] * pool.bundle.get(r, 0) for pool, count in zip(pools, counts, strict=True)) <= free[r] + 1e-6
            for j, free in enumerate(nodes.values())
            for r in ("CPU", "GPU")
        )

    ways = [[c for c in product(range(p.demand.workers + 1), repeat=len(nodes)) if sum(c) == p.demand.workers] for p in pools]
    found = plan(pools, nodes)
    assert (found is not None) == any(fits(counts) for counts in product(*ways))
    if found is not None:
        assert fits([[where.count(node) for node in nodes] for where in found])
    else:
        assert homeless(pools, nodes)


def test_a_thousand_nodes_take_no_time():
    nodes = {f"n{i}": {"CPU": 64.0, "GPU": 8.0} for i in range(1000)}
    found = layout({"policy": Demand(4096, 1, 1), "rollout": Demand(1024, 1, 2), "reward": Demand(64, 1, 1, nodes=8)}, nodes)
    assert len(found["policy"]) == 512
    assert len(layout({"policy": Demand(8000, 1, 1)}, nodes)["policy"]) == 1000
    assert layout({"policy": Demand(8001, 1, 1)}, nodes) is None


@pytest.mark.parametrize("work", WORKS)
def test_the_steps_that_are_timed_fit_one_gpu_and_two_cores(work):
    for on, node in (("gpu", {"CPU": 8, "GPU": 1}), ("cpu", {"CPU": 2})):
        recipe = recipe_for(work, on, steps=4)
        assert plan(pools_of(demands(recipe), recipe.ppo.colocate), {"here": node}) is not None
        assert recipe.ppo.samples == SIZES[on].samples
        assert recipe.ppo.needs_critic == (work != GRPO)
        assert transport(recipe) == "object_store"
