"""Which process is where on a plan's axes, and the groups that sum and send."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from simulator.plan import Plan

AXES = ("tp", "dp", "pp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's coordinates."""

    tp: int
    dp: int
    pp: int


def place_of(rank: int, plan: Plan) -> Place:
    """Coordinates of a rank: axes in the plan's order, innermost first."""
    coordinates, rest = {}, rank
    for axis in _order(plan):
        degree = getattr(plan.parallel, axis)
        coordinates[axis], rest = rest % degree, rest // degree
    return Place(**coordinates)


def groups_of(axis: str, plan: Plan) -> list[list[int]]:
    """Ranks of every group along an axis, each in the axis' order."""
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for rank in range(plan.num_gpus):
        place = place_of(rank, plan)
        others = tuple(getattr(place, other) for other in AXES if other != axis)
        found.setdefault(others, []).append((getattr(place, axis), rank))
    return [[rank for _, rank in sorted(group)] for _, group in sorted(found.items())]


def _order(plan: Plan) -> list[str]:
    return [axis for axis in plan.parallel.order.split("-") if axis in AXES]


def module_mesh(device_type: str, plan: Plan) -> DeviceMesh:
    """The axes ``tp`` and ``dp`` of a plan without a pipeline, outermost first, as ranks lie in the plan's order; those of degree 1 only where both are."""
    degrees = {axis: getattr(plan.parallel, axis) for axis in reversed(_order(plan)) if axis != "pp"}
    split = {axis: degree for axis, degree in degrees.items() if degree > 1} or {"dp": 1}
    return init_device_mesh(device_type, tuple(split.values()), mesh_dim_names=tuple(split))
