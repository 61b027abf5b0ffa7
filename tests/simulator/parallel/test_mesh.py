"""Where groups lie on nodes of eight GPUs."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from hardware_models.errors import InputError
from hardware_models.network.cluster import CommGroup
from simulator.parallel.mesh import Mesh, mesh_of
from simulator.plan import Plan
from tests.simulator.parallel.step_cases import cluster_of, plan_of


def mesh(plan: Plan) -> Mesh:
    return mesh_of(plan, cluster_of(plan))


def test_strides_follow_the_order() -> None:
    plan = plan_of(tp=2, cp=4, dp=2, pp=2)
    assert [mesh(plan).stride(axis) for axis in ("tp", "cp", "dp", "pp", "ep")] == [1, 2, 8, 16, 2]
    turned = replace(plan, parallel=replace(plan.parallel, order="tp-pp-dp-cp-ep"))
    assert [mesh(turned).stride(axis) for axis in ("tp", "pp", "dp", "cp")] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("degrees", "axis", "expected"),
    [
        ({"tp": 8, "dp": 4}, "tp", CommGroup(num_ranks=8, ranks_per_node=8)),
        ({"tp": 8, "dp": 4}, "dp", CommGroup(num_ranks=4, ranks_per_node=1, concurrent_groups=8)),
        ({"tp": 2, "dp": 16}, "tp", CommGroup(num_ranks=2, ranks_per_node=2, concurrent_groups=4)),
        ({"tp": 2, "dp": 16}, "dp", CommGroup(num_ranks=16, ranks_per_node=4, concurrent_groups=2)),
        ({"tp": 4, "dp": 2}, "dp", CommGroup(num_ranks=2, ranks_per_node=2, concurrent_groups=4)),
        ({"tp": 16, "dp": 2}, "tp", CommGroup(num_ranks=16, ranks_per_node=8)),
        ({"dp": 64}, "dp", CommGroup(num_ranks=64, ranks_per_node=8)),
        ({"tp": 2, "cp": 2, "dp": 2, "pp": 4}, "pp", CommGroup(num_ranks=4, ranks_per_node=1, concurrent_groups=8)),
    ],
)
def test_groups_by_hand(degrees: dict[str, int], axis: str, expected: CommGroup) -> None:
    assert mesh(plan_of(**degrees)).group(axis) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("degrees", "order", "expected"),
    [
        ({"dp": 16, "tp": 2}, "tp-cp-ep-dp-pp", CommGroup(num_ranks=16, ranks_per_node=4, concurrent_groups=2)),
        ({"cp": 2, "dp": 2, "tp": 2}, "tp-cp-ep-dp-pp", CommGroup(num_ranks=4, ranks_per_node=4, concurrent_groups=2)),
        ({"cp": 8, "dp": 2}, "tp-cp-ep-dp-pp", CommGroup(num_ranks=16, ranks_per_node=8, concurrent_groups=1)),
        ({"cp": 2, "dp": 4, "pp": 4}, "tp-cp-pp-dp-ep", CommGroup(num_ranks=8, ranks_per_node=2, concurrent_groups=4)),
    ],
)
def test_gradients_go_over_dp_and_cp(degrees: dict[str, int], order: str, expected: CommGroup) -> None:
    plan = plan_of(**degrees)  # type: ignore[arg-type]
    plan = replace(plan, parallel=replace(plan.parallel, order=order))
    assert mesh(plan).gradient_group() == expected


def test_neighbours_are_inside_a_node_or_not() -> None:
    assert mesh(plan_of(tp=2, pp=4)).neighbours("pp").ranks_per_node == 2
    outside = mesh(plan_of(tp=8, pp=4)).neighbours("pp")
    assert (outside.num_ranks, outside.ranks_per_node, outside.concurrent_groups) == (2, 1, 8)


def test_experts_take_no_ranks() -> None:
    plan = plan_of(tp=2, dp=8, ep=4)
    group = mesh(plan).group("ep")
    assert (group.num_ranks, group.ranks_per_node) == (4, 4)
    assert plan.num_gpus == 16


LEVELS = {  # tp 4, pp 2, dp 4 on nodes of eight: ranks of a group in a node, by order
    "tp-cp-ep-dp-pp": {"tp": 4, "dp": 2, "pp": 1},
    "tp-pp-cp-ep-dp": {"tp": 4, "pp": 2, "dp": 1},
    "dp-tp-pp-cp-ep": {"dp": 4, "tp": 2, "pp": 1},
    "dp-pp-tp-cp-ep": {"dp": 4, "pp": 2, "tp": 1},
    "pp-tp-dp-cp-ep": {"pp": 2, "tp": 4, "dp": 1},
    "pp-dp-tp-cp-ep": {"pp": 2, "dp": 4, "tp": 1},
}


def ordered(order: str, **degrees: int) -> Mesh:
    plan = plan_of(**degrees)  # type: ignore[arg-type]
    return mesh(replace(plan, parallel=replace(plan.parallel, order=order)))


@pytest.mark.parametrize("order", LEVELS)
def test_each_order_puts_its_inner_axes_into_a_node(order: str) -> None:
    """What is left of a node's eight devices goes to the next axis; the groups that have ranks in a node fill it."""
    own = ordered(order, tp=4, pp=2, dp=4)
    for axis, per_node in LEVELS[order].items():
        group = own.group(axis)
        assert (group.ranks_per_node, group.concurrent_groups) == (per_node, 8 // per_node)


@pytest.mark.parametrize("order", ["-".join(order) for order in permutations(("tp", "cp", "ep", "dp", "pp"))])
def test_groups_of_every_order_cover_the_cluster(order: str) -> None:
    """Products of degrees: replicas hold each rank once a (tp, pp) pair, ep groups and copies of experts split the replicas."""
    own = ordered(order, tp=2, cp=2, ep=4, dp=4, pp=4)
    strides = {axis: own.stride(axis) for axis in ("tp", "cp", "dp", "pp")}
    ranks = {
        a * strides["tp"] + b * strides["cp"] + c * strides["dp"] + d * strides["pp"]
        for a in range(2) for b in range(2) for c in range(4) for d in range(4)
    }  # fmt: skip
    assert ranks == set(range(64))
    assert len(own.replicas()) == 8
    assert own.gradient_group().num_ranks == 8
    for distance in range(4):  # ranks that are counted are those that are listed
        assert own.gradient_group(distance) == own.copy_group(1, distance)
    assert own.group("ep").num_ranks * own.expert_group().num_ranks == 8
    for group in (own.group("ep"), own.expert_group(), *(own.group(axis) for axis in strides)):
        assert group.ranks_per_node * group.concurrent_groups == 8


def test_experts_are_neighbours_unless_the_order_names_ep_last() -> None:
    inner, outer = ordered("tp-cp-ep-dp-pp", tp=2, dp=16, ep=4), ordered("tp-cp-dp-ep-pp", tp=2, dp=16, ep=4)
    assert inner.group("ep") == CommGroup(num_ranks=4, ranks_per_node=4, concurrent_groups=2) == outer.expert_group()
    assert outer.group("ep") == CommGroup(num_ranks=4, ranks_per_node=1, concurrent_groups=8) == inner.expert_group()


def test_shards_are_inside_a_node_and_copies_across() -> None:
    own = mesh(plan_of(dp=32))
    assert own.shard_group(8) == CommGroup(num_ranks=8, ranks_per_node=8)
    assert own.copy_group(8) == CommGroup(num_ranks=4, ranks_per_node=1, concurrent_groups=8)
    assert own.shard_group(32) == own.gradient_group()
    assert own.copy_group(32).num_ranks == 1


def test_two_holders_of_a_stage_join_copies() -> None:
    own = mesh(plan_of(dp=4, pp=4))
    assert own.copy_group(4, distance=3) == CommGroup(num_ranks=2, ranks_per_node=1, concurrent_groups=8)
    assert own.gradient_group(distance=1).num_ranks == 8


def test_shards_that_lie_differently_are_refused() -> None:
    own = ordered("cp-pp-dp-tp-ep", cp=3, dp=4, pp=2)
    assert own.shard_group(6).num_ranks == 6
    with pytest.raises(InputError, match=r"dp_shard = 4: dp_shard must divide the inner one"):
        own.shard_group(4)
