"""Points: outer decisions of many plans as arrays, one row a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int32]
Ints = NDArray[np.int64]
_MOST_CODE = 2**62


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


def groups_of(points: Points, names: tuple[str, ...]) -> tuple[Ints, Ints]:
    """First row of each different combination of columns of points, and which combination each row has."""
    return groups([getattr(points, name) for name in names])


def groups(columns: Sequence[NDArray[np.integer]]) -> tuple[Ints, Ints]:
    """The same of arrays of numbers from 0 on, which are made one number."""
    code, most = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        width = int(column.max()) + 1
        if most * width >= _MOST_CODE:
            code, most = np.unique(code, return_inverse=True)[1].ravel(), len(code)
        code, most = code * width + column, most * width
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return first, inverse.ravel()
