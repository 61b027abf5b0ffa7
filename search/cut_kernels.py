"""Compiled kernels of `search.stage_runs`: what runs without graphs need, where to cut them, and how their blocks run inside."""

from __future__ import annotations

import numpy as np
from numba import njit

from search.chain_kernels import ChainArrays, Ints

NEVER = 1 << 60
"""More bytes than any memory."""


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def run_needs(chain: ChainArrays, options: Ints) -> Ints:
    """Bytes [blocks + 1, blocks + 1] that the run from the first index to the second needs beyond what is kept below it, its blocks then kept under ``options``.

    **Model**: without graphs one block after the other; in the backward pass all of its blocks again, with graphs, then back.
    """
    blocks = options.size
    need = np.full((blocks + 1, blocks + 1), NEVER)
    for end in range(1, blocks + 1):
        held, above, discards = chain.held_bytes[end - 1], 0, 0
        for block in range(end - 1, -1, -1):
            option = options[block]
            own = max(held + chain.forward_peak_bytes[block, option], chain.backward_need_bytes[block, option])
            above = own if block == end - 1 else max(own, chain.saved_bytes[block, option] + above)
            need[block, end] = max(above, chain.discard_peak_bytes[block], discards)
            discards = max(discards, chain.boundary_bytes[block] + chain.discard_peak_bytes[block])
    return need


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def need_of_run(chain: ChainArrays, first: int, options: Ints) -> int:
    """What `run_needs` says of one run, whose blocks run under ``options``."""
    end = first + options.size
    need, discards = 0, 0
    for block in range(end - 1, first - 1, -1):
        option = options[block - first]
        forward = chain.held_bytes[end - 1] + chain.forward_peak_bytes[block, option]
        own = max(forward, chain.backward_need_bytes[block, option])
        need = own if block == end - 1 else max(own, chain.saved_bytes[block, option] + need)
        below = chain.boundary_bytes[block] if block > first else 0
        discards = max(discards, below + chain.discard_peak_bytes[block])
    return max(need, discards)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def fastest_inside(chain: ChainArrays, first: int, end: int, room_bytes: float, most_points: int) -> Ints:
    """Options of least time for the blocks of a run whose need must not exceed ``room_bytes``; -1 first where none do.

    **Model**: from the last block down, the undominated pairs of what the blocks so far need and take: need' = max(own need, saved + need).

    Args:
        chain: the stage.
        first: block of the run.
        end: block behind it.
        room_bytes: beyond what is kept below the run.
        most_points: pairs that are kept; of more, those of least need.
    """
    length, held = end - first, chain.held_bytes[end - 1]
    need, seconds = np.zeros((length + 1, most_points), np.int64), np.zeros((length + 1, most_points))
    option, parent = np.zeros((length + 1, most_points), np.int64), np.zeros((length + 1, most_points), np.int64)
    widest = chain.option_s.shape[1]
    size, grown = 1, np.empty((widest * most_points, 2))
    origin = np.empty((widest * most_points, 2), np.int64)
    for row in range(length - 1, -1, -1):
        block, count = first + row, 0
        for own in range(chain.num_options[block]):
            alone = max(held + chain.forward_peak_bytes[block, own], chain.backward_need_bytes[block, own])
            for point in range(size):
                above = 0 if row == length - 1 else chain.saved_bytes[block, own] + need[row + 1, point]
                grown[count, 0], grown[count, 1] = max(alone, above), seconds[row + 1, point] + chain.option_s[block, own]
                origin[count, 0], origin[count, 1] = own, point
                count += 1
        size, least_s = 0, np.inf
        for place in np.argsort(grown[:count, 0], kind="mergesort"):
            if grown[place, 0] > room_bytes or (size == most_points and grown[place, 1] >= least_s):
                break
            if grown[place, 1] < least_s:
                if size == most_points or (size > 0 and grown[place, 0] == need[row, size - 1]):
                    size -= 1
                least_s = grown[place, 1]
                need[row, size], seconds[row, size] = int(grown[place, 0]), least_s
                option[row, size], parent[row, size] = origin[place, 0], origin[place, 1]
                size += 1
        if size == 0:
            return np.full(length, -1, np.int64)
    chosen, point = np.empty(length, np.int64), size - 1
    for row in range(length):
        chosen[row] = option[row, point]
        point = parent[row, point]
    return chosen


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def cut_runs(chain: ChainArrays, need: Ints, first: int) -> tuple[Ints, Ints, Ints]:
    """The stretch from ``first`` to each block in each number of runs, cut so that its peak is least: peaks, kept bytes and starts of a table of `Runs`.

    **Model**: P(r, n) = min over i < r of max(P(i, n - 1), kept(i, n - 1) + need(i, r)): the first term grows with i, the second falls where boundaries are alike, so that the least
    lies where they cross.
    """
    blocks = chain.discard_s.shape[0]
    shape = (blocks + 1, blocks + 1)
    peak, kept, start = np.full(shape, NEVER), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    peak[first, 0] = 0
    for count in range(1, blocks - first + 1):
        for end in range(first + count, blocks + 1):
            low, high = first + count - 1, end - 1
            while low < high:
                middle = (low + high) // 2
                if peak[middle, count - 1] >= kept[middle, count - 1] + need[middle, end]:
                    high = middle
                else:
                    low = middle + 1
            for block in (low, low - 1):
                if block < first + count - 1:
                    continue
                own = max(peak[block, count - 1], kept[block, count - 1] + need[block, end])
                if own < peak[end, count]:
                    peak[end, count], start[end, count] = own, block
            behind = chain.boundary_bytes[end] if end < blocks else 0
            kept[end, count] = kept[start[end, count], count - 1] + behind
    return peak, kept, start
