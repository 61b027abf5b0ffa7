"""Bounds of all points of a space: layers are priced once for each way to split them, and only where arithmetic leaves a point open; then spread over schedules, ZeRO stages and placements."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from hardware_models.network.cluster import CommGroup
from hardware_models.profile import DeviceProfile
from search.joint.bounds import TWO_WAYS, PipelineShape, held_bytes, limits_of, stacked
from search.joint.bounds_kernels import Case, least_times
from search.joint.crude_bounds import CrudeBounds
from search.joint.layer_tables import LayerTable, LayerTables
from search.joint.points import groups, groups_of
from search.joint.processes import num_processes, shared_out
from search.joint.sharded_parameters import ShardedSeconds
from search.joint.space import JointSpace
from simulator.parallel.gradient_sync import PARAMETERS_SHARDED
from simulator.plan import Plan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NO_BOUND = float("inf")
CASES = 4096
"""Bounds between two looks at the clock."""
NARROW = 1e-6
"""Part of a time up to which the least one is looked for: the bound is the lower end."""
_SPLIT_COLUMNS = ("tp", "cp", "pp", "dp", "ep", "micro_batch", "placement", "cp_method", "compute")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedSpace:
    """A space with a bound of the step's time for each point."""

    space: JointSpace
    bound_s: Floats
    """Shape (points,)."""

    def in_order(self) -> Ints:
        """Points, least bound first; ties in the order of the space."""
        return np.argsort(self.bound_s, kind="stable")

    def digest(self) -> str:
        """Of the order: batches of two searches are the same points only if it is."""
        return sha256(self.in_order().tobytes()).hexdigest()[:16]


class FirstBounds:
    """Bounds of all points: by arithmetic alone (`search.joint.crude_bounds`), then, where that leaves a point open, by its layers' prices (`search.joint.bounds`).

    Args:
        space: whose points are bounded.
        device: profile of the cluster's devices.
        tables: of the space's layers, as far as they are known.
    """

    def __init__(self, space: JointSpace, device: DeviceProfile, tables: LayerTables) -> None:
        self.space, self.tables = space, tables
        self.sharded = ShardedSeconds(tables)
        self.limits = limits_of(space.request.trainer, space.request.cluster, device, budget_bytes=space.request.budget_bytes)
        self._crude = CrudeBounds(space, tables)
        self.bound_s = self._crude.alone()
        self.priced = np.zeros(len(space), np.bool_)
        """Of each point: whether its bound rests on prices."""
        self._below_s = np.full(len(space), np.nan)
        """Time below which it was last looked for."""

    def num_open_splits(self, most_s: float) -> int:
        """Ways to split the model that arithmetic leaves below a time."""
        rows = self.bound_s < most_s
        return len(groups_of(self.space.points.take(rows), _SPLIT_COLUMNS)[0]) if rows.any() else 0

    def price(self, most_s: float, *, end: float = NO_BOUND, most_splits: int | None = None) -> BoundedSpace:
        """Prices the layers of points whose bound is below a time, the least bound first.

        Args:
            most_s: above which no bound is looked for: the time of a plan that is known.
            end: moment (`time.monotonic`) at which nothing else is priced; bounds by arithmetic hold for the points that are left.
            most_splits: ways to split the model that are priced; None: all.
        """
        np.maximum(self.bound_s, self._crude.with_collectives(most_s), out=self.bound_s)
        rows = np.flatnonzero((self.bound_s < most_s) & (self._below_s != most_s))
        rows = rows[np.argsort(self.bound_s[rows], kind="stable")]
        if len(rows):
            first, split_of = groups_of(self.space.points.take(rows), _SPLIT_COLUMNS)
            in_order = np.argsort(first, kind="stable")[:most_splits]
            plans = [self.space.plan(int(rows[first[one]])) for one in in_order.tolist()]
            count = self.tables.price(plans, end=end)
            place = np.full(len(first), -1, np.int64)
            place[in_order[:count]] = np.arange(count)
            known = place[split_of] >= 0
            if known.any():
                self._bound(rows[known], place[split_of][known], plans[:count], most_s, end)
        return BoundedSpace(space=self.space, bound_s=self.bound_s.copy())

    def _bound(self, rows: Ints, split_of: Ints, plans: Sequence[Plan], most_s: float, end: float) -> None:
        """Bounds of points whose layers are priced; ``split_of`` says which of the plans each one splits the model as."""
        space, points = self.space, self.space.points.take(rows)
        rules = _Splits(self.tables, self.sharded, gathers=bool((points.zero_stage == PARAMETERS_SHARDED).any()))
        for plan in plans:
            rules.add(plan)
        replicas = points.dp.astype(np.int64) * points.cp
        heldings, held_of = groups([replicas, points.zero_stage, points.compute])
        held = [
            held_bytes(space.request.trainer, space.plan(int(rows[one])), space.request.cluster) for one in heldings.tolist()
        ]
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
        table_of, message_s = np.array(rules.table_of, np.int64), np.array(rules.message_s)
        entry = np.where(points.zero_stage == PARAMETERS_SHARDED, np.array(rules.entry_of, np.int64)[split_of, twice], -1)
        columns = (
            table_of[split_of], entry + 1, size_of[held_of], points.pp, points.virtual_stages, points.num_microbatches, *kinds.T,
            np.unique(message_s, return_inverse=True)[1].ravel()[split_of],
        )  # fmt: skip
        first, group_of = groups(columns)
        in_order = np.argsort(first, kind="stable")  # rows come in the order of their bounds
        case = Case(
            table=table_of[split_of][first], entry=entry[first], ranks=points.pp[first].astype(np.int64), chunks=points.virtual_stages[first].astype(np.int64),
            share=points.num_microbatches[first].astype(np.float64), shape=kinds[first, 0], split=kinds[first, 1].astype(np.bool_), flight=kinds[first, 2],
            message_s=message_s[split_of][first], parameter_bytes=sizes[held_of[first], 0], gradient_bytes=sizes[held_of[first], 1],
            state_bytes=sizes[held_of[first], 2], away_gradient_bytes=sizes[held_of[first], 3], away_s=sizes[held_of[first], 4],
        )  # fmt: skip
        found, tables = np.zeros(len(first)), stacked(rules.tables, rules.rows)

        def bounded(part: Ints) -> Floats:
            seconds = np.zeros(len(part))
            for place in range(0, len(part), CASES):
                if time.monotonic() > end:
                    break
                own = part[place : place + CASES]
                seconds[place : place + CASES] = least_times(
                    tables, Case._make(column[own] for column in case), self.limits, most_s, NARROW
                )
            return seconds

        count = num_processes() if len(first) > CASES else 1
        for number, seconds in enumerate(shared_out(bounded, [in_order[number::count] for number in range(count)])):
            found[in_order[number::count]] = seconds
        self.bound_s[rows] = np.maximum(self.bound_s[rows], found[group_of])
        self.priced[rows], self._below_s[rows] = True, most_s


class _Splits:
    """Ways to split a model, as arrays that bounds are computed from."""

    def __init__(self, tables: LayerTables, sharded: ShardedSeconds, *, gathers: bool) -> None:
        self.known, self.sharded, self.gathers = tables, sharded, gathers
        self.tables: list[LayerTable] = []
        self.table_of: list[int] = []
        """Of each split."""
        self.message_s: list[float] = []
        self.rows: list[Floats] = []
        """Of `Tables.sharded_s`."""
        self.entry_of: list[tuple[int, int]] = []
        """Rows of each split for orders of one direction and of two; -1: none."""
        self._places: dict[int, int] = {}
        self._row_of: dict[tuple[int, tuple[CommGroup, ...]], int] = {}

    def add(self, plan: Plan) -> None:
        """One that is priced."""
        split = self.known.split(plan)
        place = self._places.setdefault(id(split.table), len(self.tables))
        if place == len(self.tables):
            self.tables.append(split.table)
        self.table_of.append(place)
        self.message_s.append(split.message_s())
        entries = [-1, -1]
        for ways in (1, 2)[: min(2, plan.parallel.pp)] if self.gathers and plan.parallel.dp * plan.parallel.cp > 1 else ():
            apart = (0,) if ways == 1 else self.sharded.distances(split)
            key = (id(split.table), tuple(split.mesh.gradient_group(distance) for distance in apart))
            if key not in self._row_of:
                self._row_of[key] = len(self.rows)
                found = self.sharded.sums(plan, split) if ways == 1 else self.sharded.least(plan, split)
                self.rows.append(found.total_s)
            entries[ways - 1] = self._row_of[key]
        self.entry_of.append((entries[0], entries[1]))


def bounded_space(
    space: JointSpace, device: DeviceProfile, tables: LayerTables | None = None, *, most_s: float | None = None
) -> BoundedSpace:
    """Bounds of all points, as `FirstBounds` finds them without a limit of time.

    Args:
        space: whose points are bounded.
        device: profile of the cluster's devices.
        tables: of the space's layers, as far as they are known; None: none is.
        most_s: above which no bound is looked for: the time of a plan that is known. None: half an hour and a day.
    """
    first = FirstBounds(space, device, tables or LayerTables(space.request, device))
    return first.price(NO_BOUND if most_s is None else most_s)
