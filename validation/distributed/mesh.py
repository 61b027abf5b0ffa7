"""Which process is where on a plan's axes, and the groups that sum and send."""

from __future__ import annotations

from dataclasses import dataclass

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
