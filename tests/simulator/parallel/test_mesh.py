"""Where groups lie on nodes of eight GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
