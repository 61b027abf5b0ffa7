"""Points: outer decisions of many plans as arrays, one row a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Rows of the outer space; all columns have the same length.

    What recompute and offload keep on the device is not here: those are inner decisions (`search.joint.memory_variants`).
    """

    tp: Column
    cp: Column
    pp: Column
    dp: Column
    ep: Column
    micro_batch: Column
    num_microbatches: Column
    virtual_stages: Column
    schedule: Column
    """Index into `JointSpace.schedules`."""
    zero_stage: Column
    placement: Column
    """Index into `JointSpace.placements`."""
    cp_method: Column
    """Index into `JointSpace.cp_methods`."""
    compute: Column
    """Index into `JointSpace.computes`."""

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Points:
        """Some of the rows."""
        return Points(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def row(self, index: int) -> dict[str, int]:
        """One row by column name."""
        return {field.name: int(getattr(self, field.name)[index]) for field in fields(self)}


def points_of(rows: Sequence[tuple[int, ...]]) -> Points:
    """Rows in the order of the fields of `Points`."""
    names = [field.name for field in fields(Points)]
    table = np.array(rows, dtype=np.int32).reshape(len(rows), len(names))
    return Points(**{name: np.ascontiguousarray(table[:, place]) for place, name in enumerate(names)})


def crossed(points: Points, name: str, values: Sequence[int]) -> Points:
    """Every row once with each value of one column, rows of one value together."""
    count, repeats = len(points), len(values)
    columns = {field.name: np.tile(getattr(points, field.name), repeats) for field in fields(points)}
    columns[name] = np.repeat(np.array(values, dtype=np.int32), count)
    return Points(**columns)
