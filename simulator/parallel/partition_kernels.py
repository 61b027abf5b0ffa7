"""Compiled part of the partition into stages: cuts whose joined costs are least."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
OVER, SLOWEST, SQUARES = 0, 1, 2
"""What is least: bytes beyond the room of the stage that exceeds it most; seconds of the slowest stage; the sum of squared seconds."""


class Spans(NamedTuple):
    """Sums over the layers before each one, shape (layers + 1,), and what the ends add."""

    seconds: Floats
    fixed_bytes: Floats
    kept_bytes: Floats
    front_s: float
    back_s: float
    front_bytes: float
    back_bytes: float
    in_flight: Floats
    """Shape (stages,)."""
    room_bytes: float


@njit(cache=True)  # type: ignore[untyped-decorator]
def _seconds(spans: Spans, stage: int, stages: int, first: int, end: int) -> float:
    seconds = spans.seconds[end] - spans.seconds[first]
    if stage == 0:
        seconds += spans.front_s
    if stage == stages - 1:
        seconds += spans.back_s
    return float(seconds)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _over(spans: Spans, stage: int, stages: int, first: int, end: int) -> float:
    used = (
        spans.fixed_bytes[end]
        - spans.fixed_bytes[first]
        + spans.in_flight[stage] * (spans.kept_bytes[end] - spans.kept_bytes[first])
    )
    if stage == 0:
        used += spans.front_bytes
    if stage == stages - 1:
        used += spans.back_bytes
    return float(max(0.0, used - spans.room_bytes))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _worst_stage(spans: Spans, cuts: Ints) -> tuple[float, float]:
    """Bytes beyond its room of the stage that exceeds it most, and seconds of the slowest one, of a cut."""
    stages = len(cuts) - 1
    over = slowest = 0.0
    for stage in range(stages):
        over = max(over, _over(spans, stage, stages, cuts[stage], cuts[stage + 1]))
        slowest = max(slowest, _seconds(spans, stage, stages, cuts[stage], cuts[stage + 1]))
    return over, slowest


@njit(cache=True)  # type: ignore[untyped-decorator]
def _allowed(spans: Spans, stage: int, stages: int, first: int, end: int, most_over: float, most_s: float) -> bool:
    return bool(_seconds(spans, stage, stages, first, end) <= most_s and _over(spans, stage, stages, first, end) <= most_over)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _reach(spans: Spans, stages: int, most_over: float, most_s: float) -> tuple[Ints, Ints]:
    """The first and the last layer at which each stage can begin in a cut whose stages are all allowed; shape (stages + 1,)."""
    count = len(spans.seconds) - 1
    lowest, highest = np.zeros(stages + 1, np.int64), np.zeros(stages + 1, np.int64)
    lowest[stages] = count
    for stage in range(stages):  # a stage that begins later may end later
        end = highest[stage]
        while end < count - (stages - 1 - stage) and _allowed(spans, stage, stages, highest[stage], end + 1, most_over, most_s):
            end += 1
        highest[stage + 1] = end
    for stage in range(stages - 1, -1, -1):
        first = lowest[stage + 1]
        while first > stage and _allowed(spans, stage, stages, first - 1, lowest[stage + 1], most_over, most_s):
            first -= 1
        lowest[stage] = first
    return lowest, highest


@njit(cache=True)  # type: ignore[untyped-decorator]
def least_cuts(spans: Spans, stages: int, aim: int, most_over: float, most_s: float) -> tuple[Ints, float]:
    """First layer of each stage, and the number of layers; and what they come to.

    Dynamic programming over (stages, layers); each stage has a layer, and layers at which no cut under both limits has a stage begin are not looked at. Ties go to the earlier cut.

    Args:
        spans: of the layers.
        stages: to cut into.
        aim: `OVER`, `SLOWEST` or `SQUARES`.
        most_over: bytes by which a stage may exceed its room.
        most_s: seconds that a stage may take.
    """
    count = len(spans.seconds) - 1
    best = np.full((stages + 1, count + 1), np.inf)
    before = np.zeros((stages + 1, count + 1), np.int64)
    best[0, 0] = 0.0
    lowest, highest = _reach(spans, stages, most_over, most_s)
    for stage in range(stages):
        for end in range(max(stage + 1, lowest[stage + 1]), highest[stage + 1] + 1):
            least = np.inf
            for first in range(
                end - 1, stage - 1, -1
            ):  # what a stage takes and holds only grows: no longer one is looked at than could be best
                if aim == OVER:
                    own = _over(spans, stage, stages, first, end)
                    if own > most_over:
                        break
                    joined = max(best[stage, first], own)
                else:
                    seconds = _seconds(spans, stage, stages, first, end)
                    if seconds > most_s or _over(spans, stage, stages, first, end) > most_over:
                        break
                    own = seconds if aim == SLOWEST else seconds * seconds
                    joined = max(best[stage, first], own) if aim == SLOWEST else best[stage, first] + own
                if own > least or (aim == OVER and least == 0.0):  # which of the cuts that all fit is asked of the other aims
                    break
                if joined <= least and joined < np.inf:
                    least = joined
                    before[stage + 1, end] = first
            best[stage + 1, end] = least
    cuts = np.empty(stages + 1, np.int64)
    cuts[stages] = count
    for stage in range(stages, 0, -1):
        cuts[stage - 1] = before[stage, cuts[stage]]
    return cuts, float(best[stages, count])


@njit(cache=True)  # type: ignore[untyped-decorator]
def best_cuts(spans: Spans, stages: int) -> Ints:
    """First layer of each stage, and the number of layers, of the cut that exceeds rooms least, then is fastest, then most even (`partition.best_partition`)."""
    even = np.arange(stages + 1) * (len(spans.seconds) - 1) // stages
    over, even_s = _worst_stage(spans, even)  # no best cut is worse than this one: most others need not be looked at
    least_over = least_cuts(spans, stages, OVER, over, np.inf)[1] if over > 0.0 else 0.0
    most_s = even_s if over <= least_over else np.inf
    slowest = least_cuts(spans, stages, SLOWEST, least_over, most_s)[1]
    cuts: Ints = least_cuts(spans, stages, SQUARES, least_over, slowest * (1 + 1e-12))[0]
    return cuts
