"""Recompute inside one pipeline stage: an option per block, for as many micro-batches as the stage holds at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hardware_models.errors import InfeasibleError, InputError
from search.chain_kernels import Ints
from search.solvers.partition_kernels import BlockArrays, Fronts, best_point, stretch_fronts

MOST_POINTS = 4096
"""Of a front of saved bytes and time."""
_MOST_BYTES = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOption:
    """One way to run a block in a pipeline stage."""

    name: str
    forward_s: float
    backward_s: float
    """What it recomputes included."""
    saved_bytes: int
    """Held per micro-batch from forward to backward, the block's input among them where nobody else holds it."""
    transient_bytes: int = 0
    """Most that one of its passes adds beyond all that is held."""

    def __post_init__(self) -> None:
        for key in ("forward_s", "backward_s", "saved_bytes", "transient_bytes"):
            value = getattr(self, key)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(source=f"option {self.name}", key=key, value=value, rule="0 <= value < inf must hold")

    @property
    def time_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSolution:
    """Options of a stage's blocks; exact unless ``is_exact`` says that fronts had to be thinned."""

    time_s: float
    """Forward and backward of one micro-batch."""
    options: tuple[int, ...]
    """Per block."""
    peak_bytes: int
    is_exact: bool


def solve_stage_recompute(blocks: Sequence[tuple[StageOption, ...]], *, in_flight: int, budget_bytes: int) -> StageSolution:
    """The fastest options whose memory fits.

    Args:
        blocks: options of each block.
        in_flight: micro-batches whose saved bytes are held at once.
        budget_bytes: memory for saved and transient bytes.

    Raises:
        InfeasibleError: no options fit; names the least budget.

    Model:
        min sum of time_s with in_flight * sum of saved_bytes + max of transient_bytes <= budget: for each possible largest
        transient, a front of (saved, time) grows block by block. Equal blocks keep fronts short: n blocks of two options have n + 1
        points.

    Source:
        AdaPipe (ASPLOS 2024): units of a stage saved or recomputed, under the memory of the micro-batches in flight there.

    Not modelled:
        Nested recompute (`search.chain_solver` does that for one micro-batch); options that differ by micro-batch
        (`search.solvers.microbatch_recompute`).
    """
    if in_flight < 1 or not blocks or not all(blocks):
        rule = f"in_flight >= 1 and one or more blocks with options must hold, but got {in_flight} and {len(blocks)} blocks"
        raise InputError(source="stage", key="in_flight", value=in_flight, rule=rule)
    found = _fastest(tuple(blocks), in_flight, budget_bytes)
    if found is None:
        least = least_stage_bytes(blocks, in_flight=in_flight)
        raise InfeasibleError(
            limit=f"a stage of {len(blocks)} blocks with {in_flight} micro-batches in flight does not fit into {budget_bytes} bytes",
            smallest_change=f"the least that fits is {least} bytes",
            needed_bytes=least,
        )
    return found


def least_stage_bytes(blocks: Sequence[tuple[StageOption, ...]], *, in_flight: int) -> int:
    """The least budget that a stage fits."""
    least = _MOST_BYTES
    for transient in distinct_transients(tuple(blocks)):
        sizes = [[o.saved_bytes for o in row if o.transient_bytes <= transient] for row in blocks]
        if all(sizes):
            least = min(least, in_flight * sum(map(min, sizes)) + int(transient))
    return least


@lru_cache(maxsize=1 << 16)
def _fastest(blocks: tuple[tuple[StageOption, ...], ...], in_flight: int, budget_bytes: int) -> StageSolution | None:
    """Remembered, as an outer search asks the same stage many times."""
    arrays, best, is_exact = block_arrays(blocks), None, True
    for transient in distinct_transients(blocks):
        room = (budget_bytes - int(transient)) // in_flight
        if room < 0:
            break
        fronts = stretch_fronts(arrays, 0, len(blocks), transient, room, MOST_POINTS)
        is_exact = is_exact and not fronts.thinned
        point = best_point(fronts, len(blocks), room)
        if point >= 0 and (best is None or fronts.time_s[len(blocks), point] < best[0]):
            best = (float(fronts.time_s[len(blocks), point]), _options(fronts, len(blocks), point))
    if best is None:
        return None
    chosen = [row[option] for row, option in zip(blocks, best[1], strict=True)]
    peak = in_flight * sum(o.saved_bytes for o in chosen) + max(o.transient_bytes for o in chosen)
    return StageSolution(time_s=best[0], options=best[1], peak_bytes=peak, is_exact=is_exact)


def _options(fronts: Fronts, row: int, point: int) -> tuple[int, ...]:
    options = []
    while row:
        options.append(int(fronts.option[row, point]))
        row, point = row - 1, int(fronts.parent[row, point])
    return tuple(reversed(options))


@lru_cache(maxsize=1 << 10)
def distinct_transients(blocks: tuple[tuple[StageOption, ...], ...]) -> Ints:
    """Transient bytes that can be the largest, growing."""
    transients: Ints = np.unique(np.array([option.transient_bytes for row in blocks for option in row], np.int64))
    return transients


@lru_cache(maxsize=1 << 10)
def block_arrays(blocks: tuple[tuple[StageOption, ...], ...]) -> BlockArrays:
    """Options as the kernels take them."""
    widest = max(map(len, blocks))

    def padded(values: list[list[float]]) -> list[list[float]]:
        return [[*row, *[0] * (widest - len(row))] for row in values]

    return BlockArrays(
        num_options=np.array([len(row) for row in blocks], np.int64),
        time_s=np.array(padded([[o.time_s for o in row] for row in blocks]), np.float64),
        saved_bytes=np.array(padded([[o.saved_bytes for o in row] for row in blocks]), np.int64),
        transient_bytes=np.array(padded([[o.transient_bytes for o in row] for row in blocks]), np.int64),
    )
