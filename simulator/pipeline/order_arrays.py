"""An order as arrays: what the compiled kernels run."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.pipeline.action import ActionKind, Order, Overlap

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

KIND_CODES: dict[ActionKind, int] = {"F": 0, "B": 1, "W": 2, "BW": 3}
"""Number of each kind in arrays; `simulator.pipeline.play_kernels` uses the same."""


class OrderArrays(NamedTuple):
    """Cells of all ranks, rank after rank; a cell is one pass, or two that overlap."""

    first_cell: Ints
    """[ranks + 1], where each rank's cells begin."""
    first_part: Ints
    """[cells + 1], where each cell's passes begin."""
    stage: Ints
    """[passes]"""
    kind: Ints
    """[passes], of `KIND_CODES`."""
    micro_batch: Ints
    """[passes]"""
    rank_of: Ints
    """[stages, micro-batches], the rank that runs the forward pass, -1 where none does."""

    @property
    def rank_of_part(self) -> Ints:
        """The rank of each pass."""
        lengths = np.diff(self.first_part[self.first_cell])
        return np.repeat(np.arange(lengths.size), lengths)


def order_arrays(order: Order) -> OrderArrays:
    """The arrays of an order, made once an order."""
    return order.once("arrays", lambda: _made(order))


def _made(order: Order) -> OrderArrays:
    first_cell = np.cumsum([0, *map(len, order.ranks)])
    cells = list(chain.from_iterable(order.ranks))
    joined = any(isinstance(cell, Overlap) for cell in cells)
    first_part = np.cumsum([0, *(len(cell.parts) for cell in cells)]) if joined else np.arange(len(cells) + 1)
    actions = [part for cell in cells for part in cell.parts] if joined else cells
    stages, kinds, batches = zip(*actions, strict=True) if actions else ((), (), ())
    stage, micro_batch = np.array(stages, dtype=np.int64), np.array(batches, dtype=np.int64)
    kind = np.array([KIND_CODES[one] for one in kinds], dtype=np.int64)
    rank_of = np.full((order.num_stages, order.num_microbatches), -1, dtype=np.int64)
    arrays = OrderArrays(first_cell, first_part, stage, kind, micro_batch, rank_of)
    forward = (
        (kind == KIND_CODES["F"])
        & (stage >= 0)
        & (stage < order.num_stages)
        & (micro_batch >= 0)
        & (micro_batch < order.num_microbatches)
    )
    rank_of[stage[forward], micro_batch[forward]] = arrays.rank_of_part[forward]
    return arrays
