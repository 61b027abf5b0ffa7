"""Compiled kernels of stage partition: fronts of saved bytes and time over stretches of blocks, and the shortest way through stages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from search.chain_kernels import Floats, Ints


class BlockArrays(NamedTuple):
    """Options of every block, padded to the widest."""

    num_options: Ints
    """[blocks]"""
    time_s: Floats
    """[blocks, options], forward and backward."""
    saved_bytes: Ints
    """[blocks, options]"""
    transient_bytes: Ints
    """[blocks, options]"""


class Fronts(NamedTuple):
    """Choices of options for growing stretches, none of which another beats in both saved bytes and time."""

    size: Ints
    """[blocks + 1]"""
    saved_bytes: Ints
    """[blocks + 1, points], growing."""
    time_s: Floats
    """[blocks + 1, points], falling."""
    parent: Ints
    """[blocks + 1, points], point of the stretch one block shorter."""
    option: Ints
    """[blocks + 1, points], of the last block."""
    thinned: bool
    """Whether points had to be dropped for want of room."""


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def stretch_fronts(
    blocks: BlockArrays, first: int, stop: int, most_transient: int, most_saved: int, most_points: int
) -> Fronts:
    """Fronts of first..first, first..first+1, ... up to ``stop``; row n is the stretch of n blocks.

    Args:
        blocks: options.
        first: first block.
        stop: block after the last.
        most_transient: options with larger transients are not used.
        most_saved: choices that save more are not used.
        most_points: of a front.
    """
    length, widest = stop - first, blocks.time_s.shape[1]
    size = np.zeros(length + 1, np.int64)
    saved, time_s = np.empty((length + 1, most_points), np.int64), np.empty((length + 1, most_points))
    parent, option = np.empty((length + 1, most_points), np.int64), np.empty((length + 1, most_points), np.int64)
    size[0], saved[0, 0], time_s[0, 0], thinned = 1, 0, 0.0, False
    heads = np.zeros(widest, np.int64)
    for row in range(length):
        block, kept, least_s = first + row, 0, np.inf
        heads[:] = 0
        while True:
            way, least_saved, way_s = -1, most_saved + 1, np.inf
            for other in range(blocks.num_options[block]):
                if blocks.transient_bytes[block, other] > most_transient or heads[other] == size[row]:
                    continue
                own_saved = saved[row, heads[other]] + blocks.saved_bytes[block, other]
                own_s = time_s[row, heads[other]] + blocks.time_s[block, other]
                if own_saved < least_saved or (own_saved == least_saved and own_s < way_s):
                    way, least_saved, way_s = other, own_saved, own_s
            if way < 0:
                break
            if way_s < least_s:
                if kept == most_points:
                    thinned = True
                    kept -= 1
                saved[row + 1, kept], time_s[row + 1, kept] = least_saved, way_s
                parent[row + 1, kept], option[row + 1, kept] = heads[way], way
                least_s = way_s
                kept += 1
            heads[way] += 1
        size[row + 1] = kept
    return Fronts(size, saved, time_s, parent, option, thinned)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def best_point(fronts: Fronts, row: int, most_saved: int) -> int:
    """The fastest point of a row that saves at most so much; -1 where none does."""
    start, stop = 0, fronts.size[row]
    while start < stop:
        middle = (start + stop) // 2
        if fronts.saved_bytes[row, middle] <= most_saved:
            start = middle + 1
        else:
            stop = middle
    return int(start) - 1


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def stage_times(
    blocks: BlockArrays, transients: Ints, static_until: Ints, room_bytes: Ints, in_flight: Ints, most_points: int
) -> tuple[Floats, bool]:
    """Least time of every stretch on every stage, inf where it does not fit, and whether fronts were thinned.

    Args:
        blocks: options.
        transients: distinct transient bytes, growing.
        static_until: [blocks + 1], lasting bytes of the blocks below each.
        room_bytes: [stages], memory less what the stage itself keeps.
        in_flight: [stages], micro-batches whose saved bytes are held at once.
        most_points: of a front.

    Returns:
        Seconds [stages, blocks + 1, blocks + 1] of the stretch from the first index to the second.
    """
    stages, length = in_flight.size, blocks.num_options.size
    times, thinned = np.full((stages, length + 1, length + 1), np.inf), False
    most_saved = 0
    for stage in range(stages):
        most_saved = max(most_saved, room_bytes[stage] // in_flight[stage])
        for first in range(length + 1):
            if room_bytes[stage] >= 0:
                times[stage, first, first] = 0.0
    for transient in transients:
        for first in range(length):
            fronts = stretch_fronts(blocks, first, length, transient, most_saved, most_points)
            thinned = thinned or fronts.thinned
            for row in range(1, length - first + 1):
                if fronts.size[row] == 0:
                    break
                stop = first + row
                for stage in range(stages):
                    room = room_bytes[stage] - (static_until[stop] - static_until[first]) - transient
                    if room < 0:
                        continue
                    point = best_point(fronts, row, room // in_flight[stage])
                    if point >= 0:
                        times[stage, first, stop] = min(times[stage, first, stop], fronts.time_s[row, point])
    return times, thinned


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def shortest_split(times: Floats, most_s: float, least_blocks: int) -> tuple[float, float, Ints]:
    """Least sum of stage times none of which exceeds ``most_s``: the sum, the largest of them, and where stages end.

    Args:
        times: [stages, blocks + 1, blocks + 1].
        most_s: of one stage.
        least_blocks: of a stage.
    """
    stages, length = times.shape[0], times.shape[1] - 1
    best, came_from = np.full((stages + 1, length + 1), np.inf), np.zeros((stages + 1, length + 1), np.int64)
    best[0, 0] = 0.0
    for stage in range(stages):
        for first in range(length + 1):
            if best[stage, first] == np.inf:
                continue
            for stop in range(first + least_blocks, length + 1):
                own_s = times[stage, first, stop]
                if own_s <= most_s and best[stage, first] + own_s < best[stage + 1, stop]:
                    best[stage + 1, stop] = best[stage, first] + own_s
                    came_from[stage + 1, stop] = first
    ends = np.zeros(stages, np.int64)
    if best[stages, length] == np.inf:
        return np.inf, np.inf, ends
    stop, largest = length, 0.0
    for stage in range(stages - 1, -1, -1):
        ends[stage] = stop
        first = came_from[stage + 1, stop]
        largest = max(largest, times[stage, first, stop])
        stop = first
    return best[stages, length], largest, ends


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def least_bottleneck(times: Floats, least_blocks: int) -> float:
    """The least possible largest stage time."""
    stages, length = times.shape[0], times.shape[1] - 1
    best = np.full((stages + 1, length + 1), np.inf)
    best[0, 0] = 0.0
    for stage in range(stages):
        for first in range(length + 1):
            for stop in range(first + least_blocks, length + 1):
                best[stage + 1, stop] = min(best[stage + 1, stop], max(best[stage, first], times[stage, first, stop]))
    return float(best[stages, length])


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def best_split(times: Floats, levels: Floats, repeats: float, least_blocks: int) -> tuple[float, Ints]:
    """Least sum + repeats * largest over all splits, and where stages end; inf where none fits.

    Args:
        times: [stages, blocks + 1, blocks + 1].
        levels: all finite times, growing, from `least_bottleneck` on.
        repeats: how often the largest stage time counts beyond the sum.
        least_blocks: of a stage.

    Model:
        For each bound on the largest time, growing, the least sum; ends when repeats * bound + the least sum of all cannot win.
    """
    least_sum, largest, best_ends = shortest_split(times, np.inf, least_blocks)
    best = least_sum + repeats * largest
    for level in levels:
        if repeats * level + least_sum >= best:
            break
        total, largest, ends = shortest_split(times, level, least_blocks)
        if total + repeats * largest < best:
            best, best_ends = total + repeats * largest, ends
    return best, best_ends
