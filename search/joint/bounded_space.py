"""Bounds of all points of a space: priced once for each way to split a layer, then spread over schedules, ZeRO stages and placements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardware_models.profile import DeviceProfile
from search.joint.bounds import SPLIT, TWO_WAYS, VEES, PipelineShape, time_bound
from search.joint.layer_tables import LayerTable, LayerTables
from search.joint.points import Points
from search.joint.space import JointSpace
from simulator.parallel.mesh import mesh_of
from simulator.parallel.messages import message_link

Floats = NDArray[np.float64]
_SPLIT_COLUMNS = ("tp", "cp", "pp", "dp", "ep", "micro_batch", "placement", "cp_method", "compute")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedSpace:
    """A space with a bound of the step's time for each point."""

    space: JointSpace
    bound_s: Floats
    """Shape (points,)."""

    def in_order(self) -> NDArray[np.int64]:
        """Points, least bound first; ties in the order of the space."""
        return np.argsort(self.bound_s, kind="stable")


def bounded_space(space: JointSpace, device: DeviceProfile) -> BoundedSpace:
    """Bounds of all points; what they say is in `search.joint.bounds`."""
    tables, points = LayerTables(space.request, device), space.points
    splits, split_of = _unique(points, _SPLIT_COLUMNS)
    priced = [_priced(space, tables, int(index)) for index in splits]
    number: dict[tuple[int, float], int] = {}
    ids = np.array([number.setdefault((id(table), message_s), len(number)) for table, message_s in priced], dtype=np.int64)
    distinct = {int(ids[place]): pair for place, pair in enumerate(priced)}
    kinds = np.array([_kind(name) for name in space.schedules], dtype=np.int64)[points.schedule]
    columns = np.stack([ids[split_of], points.pp, points.virtual_stages, points.num_microbatches, kinds], axis=1)
    groups, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    bounds = np.empty(len(groups))
    for place, (own, pp, chunks, count, _) in enumerate(groups.tolist()):
        table, message_s = distinct[own]
        schedule = space.schedules[points.schedule[first[place]]]
        shape = PipelineShape(schedule=schedule, num_ranks=pp, chunks=chunks, num_microbatches=count)
        bounds[place] = time_bound(table, shape, message_s=message_s, update_s=0.0)
    return BoundedSpace(space=space, bound_s=bounds[inverse.ravel()])


def _priced(space: JointSpace, tables: LayerTables, index: int) -> tuple[LayerTable, float]:
    """The table of a point, and seconds of a message between its ranks."""
    plan = space.plan(index)
    table = tables.table(plan)
    rate, latency_s = message_link(mesh_of(plan, space.request.cluster))
    return table, latency_s + table.message_bytes / rate if plan.parallel.pp > 1 else 0.0


def _kind(schedule: str) -> int:
    """Schedules of one kind have one bound."""
    return 4 * (schedule in TWO_WAYS) + 2 * (schedule in VEES) + (schedule in SPLIT)


def _unique(points: Points, names: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row of each different combination of columns, and which combination each row has."""
    table = np.stack([getattr(points, name) for name in names], axis=1)
    _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return first, inverse.ravel()
