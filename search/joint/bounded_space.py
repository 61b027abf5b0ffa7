"""Bounds of all points of a space: priced once for each way to split a layer, then spread over schedules, ZeRO stages and placements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from hardware_models.network.cluster import CommGroup
from hardware_models.profile import DeviceProfile
from search.joint.bounds import TWO_WAYS, PipelineShape, held_bytes, limits_of, stacked
from search.joint.bounds_kernels import Case, least_times
from search.joint.layer_tables import LayerTable, LayerTables
from search.joint.points import Points
from search.joint.sharded_parameters import ShardedSeconds
from search.joint.space import JointSpace
from simulator.parallel.gradient_sync import PARAMETERS_SHARDED

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NO_BOUND = float("inf")
_SPLIT_COLUMNS = ("tp", "cp", "pp", "dp", "ep", "micro_batch", "placement", "cp_method", "compute")
_HELD_COLUMNS = ("tp", "cp", "pp", "dp", "ep", "zero_stage", "compute")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedSpace:
    """A space with a bound of the step's time for each point."""

    space: JointSpace
    bound_s: Floats
    """Shape (points,)."""

    def in_order(self) -> Ints:
        """Points, least bound first; ties in the order of the space."""
        return np.argsort(self.bound_s, kind="stable")


def bounded_space(
    space: JointSpace, device: DeviceProfile, tables: LayerTables | None = None, *, most_s: float | None = None
) -> BoundedSpace:
    """Bounds of all points; what they say is in `search.joint.bounds`.

    Args:
        space: whose points are bounded.
        device: profile of the cluster's devices.
        tables: of the space's layers, as far as they are known; None: none is.
        most_s: above which no bound is looked for: the time of a plan that is known. None: half an hour and a day.
    """
    known, points, request = tables or LayerTables(space.request, device), space.points, space.request
    splits, split_of = groups_of(points, _SPLIT_COLUMNS)
    sharded = ShardedSeconds(known)
    table_of, entry_of, message_s = (
        np.empty(len(splits), np.int64),
        np.full((len(splits), 2), -1, np.int64),
        np.empty(len(splits)),
    )
    places: dict[int, int] = {}
    found: list[LayerTable] = []
    rows: list[Floats] = []
    row_of: dict[tuple[int, tuple[CommGroup, ...]], int] = {}
    gathers = bool((points.zero_stage == PARAMETERS_SHARDED).any())
    plans = [space.plan(index) for index in splits.tolist()]
    known.price(plans)
    for place, plan in enumerate(plans):
        split = known.split(plan)
        table, message_s[place] = split.table, split.message_s()
        if id(table) not in places:
            places[id(table)] = len(found)
            found.append(table)
        table_of[place] = places[id(table)]
        for ways in (1, 2)[: min(2, plan.parallel.pp)] if gathers and plan.parallel.dp * plan.parallel.cp > 1 else ():
            apart = (0,) if ways == 1 else sharded.distances(split)
            key = (id(table), tuple(split.mesh.gradient_group(distance) for distance in apart))
            if key not in row_of:
                row_of[key] = len(rows)
                rows.append((sharded.sums(plan, split) if ways == 1 else sharded.least(plan, split)).total_s)
            entry_of[place, ways - 1] = row_of[key]
    heldings, held_of = groups_of(points, _HELD_COLUMNS)
    held = [held_bytes(request.trainer, space.plan(index), request.cluster) for index in heldings.tolist()]
    sizes = np.array([[getattr(one, field.name) for field in fields(one)] for one in held])
    size_of = np.unique(sizes, axis=0, return_inverse=True)[1].ravel()
    shapes, shape_of = groups_of(points, ("schedule", "pp", "virtual_stages"))
    kinds = np.array(
        [
            PipelineShape(schedule=space.schedules[points.schedule[n]], num_ranks=int(points.pp[n]), chunks=int(points.virtual_stages[n]), num_microbatches=1).kind
            for n in shapes.tolist()
        ], dtype=np.int64,
    )[shape_of]  # fmt: skip
    twice = np.array([name in TWO_WAYS for name in space.schedules])[points.schedule].astype(np.int64)
    entry = np.where(points.zero_stage == PARAMETERS_SHARDED, entry_of[split_of, twice], -1)
    columns = (
        table_of[split_of],
        entry + 1,
        size_of[held_of],
        points.pp,
        points.virtual_stages,
        points.num_microbatches,
        *kinds.T,
        _numbered(message_s)[split_of],
    )
    first, group_of = _groups(columns)
    case = Case(
        table=table_of[split_of][first], entry=entry[first], ranks=points.pp[first].astype(np.int64), chunks=points.virtual_stages[first].astype(np.int64),
        share=points.num_microbatches[first].astype(np.float64), shape=kinds[first, 0], split=kinds[first, 1].astype(np.bool_), flight=kinds[first, 2],
        message_s=message_s[split_of][first], parameter_bytes=sizes[held_of[first], 0], gradient_bytes=sizes[held_of[first], 1],
        state_bytes=sizes[held_of[first], 2], away_gradient_bytes=sizes[held_of[first], 3], away_s=sizes[held_of[first], 4],
    )  # fmt: skip
    limits = limits_of(request.trainer, request.cluster, device, budget_bytes=request.budget_bytes)
    bounds = least_times(stacked(found, rows), case, limits, NO_BOUND if most_s is None else most_s)
    return BoundedSpace(space=space, bound_s=bounds[group_of])


def _numbered(values: Floats) -> Ints:
    """Each value's place among the different ones."""
    return np.unique(values, return_inverse=True)[1].ravel().astype(np.int64)


def groups_of(points: Points, names: tuple[str, ...]) -> tuple[Ints, Ints]:
    """First row of each different combination of columns of points, and which combination each row has."""
    return _groups([getattr(points, name) for name in names])


def _groups(columns: Sequence[NDArray[np.integer]]) -> tuple[Ints, Ints]:
    """The same of arrays of numbers from 0 on, which are made one number."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        code = code * (int(column.max()) + 1) + column
    assert np.prod([float(column.max()) + 1 for column in columns]) < 2.0**63, "columns fit one number"
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return first, inverse.ravel()
