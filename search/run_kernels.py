"""Compiled kernels of `search.stage_runs`: undominated choices of single blocks, and the fastest way to join them with runs without graphs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from search.chain_kernels import ChainArrays, Floats, Ints
from search.cut_kernels import NEVER


class Choices(NamedTuple):
    """Ways to run one block by itself: its options first, then each of them behind a forward pass that keeps the block's input only."""

    seconds: Floats
    """[blocks, 2 * options], infinite where there is no such choice or another is as good in everything."""
    kept_bytes: Ints
    """[blocks, 2 * options], from forward to backward, the block's input not among them."""
    need_bytes: Ints
    """[blocks, 2 * options], most that is held beyond what the blocks below keep."""


class Fronts(NamedTuple):
    """Choices for the last blocks of a chain: for each excess (e), row r for those from block r on; in a row none beats another in both bytes and seconds."""

    excess_bytes: Ints
    """[excesses], most that the peak exceeds what is kept."""
    offsets: Ints
    """[excesses, blocks + 2], where rows begin."""
    kept_bytes: Ints
    """[points], growing in a row."""
    seconds: Floats
    """[points], falling in a row."""
    choice: Ints
    """[points], of the row's first block."""
    parent: Ints
    """[points], place in the next row."""


class Runs(NamedTuple):
    """Least peaks of a stretch that runs without graphs in so many runs; a table (t) for each first block and way of the blocks inside."""

    peak_bytes: Ints
    """[tables, blocks + 1, runs + 1], for the stretch that ends before a block; beyond what is kept below the stretch."""
    kept_bytes: Ints
    """[tables, blocks + 1, runs + 1], inputs of the runs and of the block behind, but the first run's own."""
    start: Ints
    """[tables, blocks + 1, runs + 1], first block of the last run."""
    seconds: Floats
    """[tables, blocks + 1], of the blocks below each, run twice."""


class Beginnings(NamedTuple):
    """What may lie below the runs; one (w) for each way of the blocks below and table of runs."""

    first: Ints
    """[beginnings], block at which runs begin."""
    table: Ints
    """[beginnings], of `Runs`."""
    seconds: Floats
    kept_bytes: Ints
    peak_bytes: Ints


class Joins(NamedTuple):
    """Sequences: a beginning, runs up to ``behind``, single blocks from there on; one (q) for each limit that was asked for."""

    seconds: Floats
    """Infinite where nothing fits."""
    kept_bytes: Ints
    peak_bytes: Ints
    beginning: Ints
    excess: Ints
    """Place among the excesses."""
    behind: Ints
    runs: Ints
    """How many."""
    point: Ints
    """Of the fronts."""


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def block_choices(chain: ChainArrays) -> Choices:
    """The choices of every block."""
    blocks, widest = chain.option_s.shape
    seconds = np.full((blocks, 2 * widest), np.inf)
    kept, need = np.zeros((blocks, 2 * widest), np.int64), np.full((blocks, 2 * widest), NEVER)
    for block in range(blocks):
        below = chain.boundary_bytes[block + 1] if block + 1 < blocks else 0
        for option in range(chain.num_options[block]):
            forward, backward = chain.forward_peak_bytes[block, option], chain.backward_need_bytes[block, option]
            seconds[block, option], kept[block, option] = chain.option_s[block, option], chain.saved_bytes[block, option]
            need[block, option] = max(chain.held_bytes[blocks - 1] + forward, backward)
            again = widest + option
            seconds[block, again], kept[block, again] = chain.discard_s[block] + chain.option_s[block, option], below
            need[block, again] = max(chain.discard_peak_bytes[block], chain.held_bytes[block] + forward, backward)
        for choice in range(2 * widest):
            for other in range(2 * widest):
                no_worse = seconds[block, other] <= seconds[block, choice] and kept[block, other] <= kept[block, choice]
                if other == choice or not no_worse or need[block, other] > need[block, choice]:
                    continue
                same = seconds[block, other] == seconds[block, choice] and kept[block, other] == kept[block, choice]
                if not same or need[block, other] < need[block, choice] or other < choice:
                    seconds[block, choice] = np.inf
                    break
    return Choices(seconds, kept, need)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def choice_front(
    choices: Choices, most_excess: int, grain_bytes: int, most_points: int
) -> tuple[Ints, Ints, Floats, Ints, Ints]:
    """The rows of `Fronts` for one excess: offsets, bytes, seconds, choices, parents.

    Args:
        choices: of the chain.
        most_excess: bytes.
        grain_bytes: points that keep less than so much more than the one before are left out.
        most_points: of a row.
    """
    blocks, widest = choices.seconds.shape
    size, first_point = np.zeros(blocks + 1, np.int64), np.zeros(widest, np.int64)
    kept, seconds = np.empty((blocks + 1, most_points), np.int64), np.empty((blocks + 1, most_points))
    choice, parent = np.empty((blocks + 1, most_points), np.int64), np.empty((blocks + 1, most_points), np.int64)
    size[blocks], kept[blocks, 0], seconds[blocks, 0], choice[blocks, 0], parent[blocks, 0] = 1, 0, 0.0, -1, -1
    for row in range(blocks - 1, -1, -1):
        above, count, least_s = row + 1, 0, np.inf
        for way in range(widest):
            excess = choices.need_bytes[row, way] - choices.kept_bytes[row, way] - most_excess
            place = 0 if choices.seconds[row, way] < np.inf else size[above]
            while place < size[above] and kept[above, place] < excess:  # what is kept above hides the choice's own excess
                place += 1
            first_point[way] = place
        while True:
            best, best_kept, best_s = -1, NEVER, np.inf
            for way in range(widest):
                place = first_point[way]
                if place == size[above]:
                    continue
                own_kept = kept[above, place] + choices.kept_bytes[row, way]
                own_s = seconds[above, place] + choices.seconds[row, way]
                if own_kept < best_kept or (own_kept == best_kept and own_s < best_s):
                    best, best_kept, best_s = way, own_kept, own_s
            if best < 0:
                break
            if best_s < least_s:
                close = count > 1 and best_kept < kept[row, count - 2] + grain_bytes
                if close or count == most_points:
                    count -= 1  # the last point stays the fastest
                kept[row, count], seconds[row, count] = best_kept, best_s
                choice[row, count], parent[row, count] = best, first_point[best]
                least_s = best_s
                count += 1
            first_point[best] += 1
        size[row] = count
    offsets = np.zeros(blocks + 2, np.int64)
    offsets[1:] = np.cumsum(size)
    flat_kept, flat_s = np.empty(offsets[-1], np.int64), np.empty(offsets[-1])
    flat_choice, flat_parent = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int64)
    for row in range(blocks + 1):
        begin, end = offsets[row], offsets[row + 1]
        flat_kept[begin:end], flat_s[begin:end] = kept[row, : size[row]], seconds[row, : size[row]]
        flat_choice[begin:end], flat_parent[begin:end] = choice[row, : size[row]], parent[row, : size[row]]
    return offsets, flat_kept, flat_s, flat_choice, flat_parent


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def last_within(values: Ints, begin: int, end: int, most: float) -> int:
    """Index behind the last of the growing values [begin, end) that is at most ``most``."""
    while begin < end:
        middle = (begin + end) // 2
        if values[middle] <= most:
            begin = middle + 1
        else:
            end = middle
    return begin


class Stretch(NamedTuple):
    """Runs from ``first`` up to ``behind`` above what lies below them."""

    table: int
    """Of `Runs`."""
    first: int
    behind: int
    kept_bytes: int
    """Below the runs."""
    peak_bytes: int
    """Below the runs."""


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def roomiest_count(
    runs: Runs, stretch: Stretch, front_bytes: Ints, begin: int, end: int, limit_bytes: float, others: float, most_kept: float
) -> tuple[int, int, int, int]:
    """In how many runs a stretch leaves most to the single blocks behind it: the number, the point of their front [begin, end) (``begin`` - 1: nothing fits), kept bytes, peak."""
    best, last_peak = (0, begin - 1, 0, 0), NEVER
    for count in range(1 if stretch.behind > stretch.first else 0, stretch.behind - stretch.first + 1):
        if runs.peak_bytes[stretch.table, stretch.behind, count] >= last_peak:
            continue
        last_peak = runs.peak_bytes[stretch.table, stretch.behind, count]
        kept = stretch.kept_bytes + runs.kept_bytes[stretch.table, stretch.behind, count]
        if kept > most_kept:
            break
        peak = max(stretch.peak_bytes, stretch.kept_bytes + last_peak) if stretch.behind > stretch.first else stretch.peak_bytes
        left = limit_bytes - peak
        by_runs = (left / others if others > 0.0 else np.inf) if left >= 0.0 else -1.0
        point = last_within(front_bytes, begin, end, min(most_kept, by_runs) - kept) - 1
        if point > best[1]:
            best = (count, point, kept + front_bytes[point], peak)
        if by_runs >= most_kept:
            break  # more runs keep more and help no further
    return best


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def fastest_joins(
    fronts: Fronts, runs: Runs, beginnings: Beginnings, limit_bytes: Floats, others: Floats, most_kept: Floats
) -> Joins:
    """The fastest sequence under each limit.

    **Model**: with K bytes kept by a micro-batch and P at its own peak, others * K + P <= limit and K <= most_kept; P is the largest of the peak below the runs, of the runs' own
    and of K + excess where single blocks follow.

    Args:
        fronts: of single blocks.
        runs: without graphs.
        beginnings: what lies below these.
        limit_bytes: [limits], for all micro-batches in flight.
        others: [limits], of these, beside the running one.
        most_kept: [limits], by one micro-batch.
    """
    blocks, limits = runs.seconds.shape[1] - 1, limit_bytes.size
    found = Joins(
        np.full(limits, np.inf), np.zeros(limits, np.int64), np.zeros(limits, np.int64), np.zeros(limits, np.int64), np.zeros(limits, np.int64),
        np.zeros(limits, np.int64), np.zeros(limits, np.int64), np.zeros(limits, np.int64),
    )  # fmt: skip
    for way in range(beginnings.first.size):
        first, table = beginnings.first[way], beginnings.table[way]
        for place in range(fronts.excess_bytes.size):
            excess = fronts.excess_bytes[place]
            for behind in range(first, blocks + 1):
                begin, end = fronts.offsets[place, behind], fronts.offsets[place, behind + 1]
                stretch = Stretch(table, first, behind, beginnings.kept_bytes[way], beginnings.peak_bytes[way])
                twice_s = beginnings.seconds[way] + runs.seconds[table, behind] - runs.seconds[table, first]
                for query in range(limits):
                    if begin == end or twice_s + fronts.seconds[end - 1] >= found.seconds[query]:
                        continue
                    by_singles = (limit_bytes[query] - excess) / (others[query] + 1.0) if behind < blocks else np.inf
                    count, point, kept, peak = roomiest_count(
                        runs,
                        stretch,
                        fronts.kept_bytes,
                        begin,
                        end,
                        limit_bytes[query],
                        others[query],
                        min(most_kept[query], by_singles),
                    )
                    if point >= begin and twice_s + fronts.seconds[point] < found.seconds[query]:
                        found.seconds[query], found.kept_bytes[query] = twice_s + fronts.seconds[point], kept
                        found.peak_bytes[query] = max(peak, kept + excess if behind < blocks else 0)
                        found.beginning[query], found.excess[query] = way, place
                        found.behind[query], found.runs[query], found.point[query] = behind, count, point
    return found


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def leanest_join(fronts: Fronts, runs: Runs, beginnings: Beginnings, others: float) -> Joins:
    """The sequence of least others * K + P, the fastest of equal ones; arguments as in `fastest_joins`."""
    blocks, least = runs.seconds.shape[1] - 1, np.inf
    found = Joins(
        np.full(1, np.inf), np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64),
        np.zeros(1, np.int64), np.zeros(1, np.int64),
    )  # fmt: skip
    for way in range(beginnings.first.size):
        first, table = beginnings.first[way], beginnings.table[way]
        for place in range(fronts.excess_bytes.size):
            for behind in range(first, blocks + 1):
                begin = fronts.offsets[place, behind]
                if begin == fronts.offsets[place, behind + 1]:
                    continue
                for count in range(1 if behind > first else 0, behind - first + 1):
                    kept = beginnings.kept_bytes[way] + runs.kept_bytes[table, behind, count] + fronts.kept_bytes[begin]
                    peak = beginnings.peak_bytes[way]
                    if behind > first:
                        peak = max(peak, beginnings.kept_bytes[way] + runs.peak_bytes[table, behind, count])
                    if behind < blocks:
                        peak = max(peak, kept + fronts.excess_bytes[place])
                    seconds = (
                        beginnings.seconds[way]
                        + runs.seconds[table, behind]
                        - runs.seconds[table, first]
                        + fronts.seconds[begin]
                    )
                    needed = others * kept + peak
                    if needed < least or (needed == least and seconds < found.seconds[0]):
                        least = needed
                        found.seconds[0], found.kept_bytes[0], found.peak_bytes[0] = seconds, kept, peak
                        found.beginning[0], found.excess[0] = way, place
                        found.behind[0], found.runs[0], found.point[0] = behind, count, begin
    return found
