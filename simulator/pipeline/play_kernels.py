"""Compiled kernel that plays an order: each rank runs its cells in order, each as soon as its inputs have arrived."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, FULL_BACKWARD = 0, 1, 2, 3
"""Kinds of passes, as `simulator.pipeline.order_arrays` numbers them."""
NOT_YET = -1.0
"""Time of what has not happened; times are never negative."""


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _arrival(
    stage: int, kind: int, micro_batch: int, rank: int, rank_of: Ints, comm: float, forward_end: Floats, backward_end: Floats
) -> float:
    """When a pass has its inputs, `NOT_YET` if that is not known. The one rule of readiness."""
    if kind == FORWARD and stage == 0:
        return 0.0
    if kind != FORWARD and forward_end[stage, micro_batch] == NOT_YET:
        return NOT_YET
    if kind == FORWARD:
        source, came_from = forward_end[stage - 1, micro_batch], stage - 1
    elif kind == WEIGHT_GRADIENT:
        source, came_from = backward_end[stage, micro_batch], stage
    elif stage == rank_of.shape[0] - 1:
        source, came_from = forward_end[stage, micro_batch], stage
    else:
        source, came_from = backward_end[stage + 1, micro_batch], stage + 1
    apart = source != NOT_YET and rank_of[came_from, micro_batch] != rank
    return float(source + comm) if apart else float(source)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def play_cells(
    first_cell: Ints, first_part: Ints, stage: Ints, kind: Ints, micro_batch: Ints, rank_of: Ints, duration: Floats, comm: float
) -> tuple[Floats, Floats, Ints]:
    """Start and end of every cell, and how many cells of each rank ran: fewer than it has where the order is stuck.

    Args:
        first_cell, first_part, stage, kind, micro_batch, rank_of: `simulator.pipeline.order_arrays.OrderArrays`.
        duration: [cells], time of each cell.
        comm: time between the end of a pass and the arrival of what it sends on another rank; occupies neither.
    """
    num_ranks, num_cells = first_cell.size - 1, duration.size
    start, end = np.zeros(num_cells), np.zeros(num_cells)
    done = np.zeros(num_ranks, dtype=np.int64)
    free = np.zeros(num_ranks)
    forward_end, backward_end = np.full(rank_of.shape, NOT_YET), np.full(rank_of.shape, NOT_YET)
    moved = True
    while moved:
        moved = False
        for rank in range(num_ranks):
            for cell in range(first_cell[rank] + done[rank], first_cell[rank + 1]):
                begin = free[rank]
                for part in range(first_part[cell], first_part[cell + 1]):
                    at = _arrival(stage[part], kind[part], micro_batch[part], rank, rank_of, comm, forward_end, backward_end)
                    if at == NOT_YET:
                        begin = NOT_YET
                        break
                    begin = max(begin, at)
                if begin == NOT_YET:
                    break
                start[cell], end[cell] = begin, begin + duration[cell]
                free[rank] = end[cell]
                done[rank] += 1
                moved = True
                for part in range(first_part[cell], first_part[cell + 1]):
                    if kind[part] == FORWARD:
                        forward_end[stage[part], micro_batch[part]] = end[cell]
                    elif kind[part] != WEIGHT_GRADIENT:
                        backward_end[stage[part], micro_batch[part]] = end[cell]
    return start, end, done
