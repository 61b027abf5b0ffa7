"""Compiled kernels of the chain solver: least memory, least time over memory slots, and the choice behind an entry.

Values of states (i, l), i <= l, lie in row ``row_of(i, l)``. Sizes are of two kinds: what stays beneath a sub-chain is counted in slots,
each item rounded up; what a step needs at its peak is summed in bytes and rounded up once. Slots of one byte are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_NO_LIMIT = 1 << 60
"""More slots than any need."""
_FIRSTS_PER_BLOCK = 4
"""States of so many first stages and one last stage are filled together: they read the same rows while those are in cache."""


class ChainArrays(NamedTuple):
    """The numbers of a `ChainProblem` as arrays; options are padded to the widest stage."""

    boundary_bytes: Ints
    """[stages + 1]"""
    held_bytes: Ints
    """[stages], what stays while stages up to l run forward."""
    discard_s: Floats
    """[stages]"""
    discard_peak_bytes: Ints
    """[stages]"""
    num_options: Ints
    """[stages], how many entries of the rows below are valid."""
    fastest: Ints
    """[stages], the option of least ``option_s``."""
    option_s: Floats
    """[stages, options], forward and backward."""
    saved_bytes: Ints
    """[stages, options]"""
    forward_peak_bytes: Ints
    """[stages, options]"""
    backward_need_bytes: Ints
    """[stages, options], backward peak and resident bytes."""


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def row_of(first: int, last: int, stages: int) -> int:
    """Row of state (first, last) among the stages * (stages + 1) / 2 states."""
    return first * stages - first * (first - 1) // 2 + last - first


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def slots_for(size_bytes: int, slot_bytes: int) -> int:
    """Slots that hold ``size_bytes``, rounded up."""
    return (size_bytes + slot_bytes - 1) // slot_bytes


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _option_peak(chain: ChainArrays, first: int, last: int, option: int) -> int:
    """Bytes at the higher peak of the forward and the backward run of ``first`` in state (first, last)."""
    peak_bytes: int = max(
        chain.held_bytes[last] + chain.forward_peak_bytes[first, option], chain.backward_need_bytes[first, option]
    )
    return peak_bytes


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _run_peak(chain: ChainArrays, run_peak_bytes: int, first: int, stage: int) -> int:
    """Peak without held bytes of a run from ``first`` through ``stage``, given that of the run through the stage before."""
    own_bytes: int = chain.discard_peak_bytes[stage]
    return own_bytes if stage == first else max(run_peak_bytes, chain.boundary_bytes[stage] + own_bytes)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def least_memory(chain: ChainArrays, slot_bytes: int) -> tuple[Ints, Floats]:
    """Slots that each state needs at least, and the time of a schedule that needs no more.

    Args:
        chain: the problem.
        slot_bytes: size of a slot; 1 for exact bytes.

    Returns:
        Slots [states] and seconds [states].

    Model:
        need(i, l) = min over the choices of `ChainProblem` of the largest of the step's own needs and, per sub-chain, what is
        kept beneath it plus its need. Seconds are the least among choices of equal need, so not the least for that memory.
    """
    stages = chain.discard_s.shape[0]
    rows = stages * (stages + 1) // 2
    need, seconds = np.empty(rows, np.int64), np.empty(rows, np.float64)
    for first in range(stages - 1, -1, -1):
        for last in range(first, stages):
            best, best_s = _NO_LIMIT, np.inf
            for option in range(chain.num_options[first]):
                value = slots_for(_option_peak(chain, first, last, option), slot_bytes)
                value_s = chain.option_s[first, option]
                if last > first:
                    child = row_of(first + 1, last, stages)
                    value = max(value, slots_for(chain.saved_bytes[first, option], slot_bytes) + need[child])
                    value_s += seconds[child]
                if value < best or (value == best and value_s < best_s):
                    best, best_s = value, value_s
            run_s, run_peak = 0.0, 0
            for middle in range(first + 1, last + 1):
                run_s += chain.discard_s[middle - 1]
                run_peak = _run_peak(chain, run_peak, first, middle - 1)
                upper, lower = row_of(middle, last, stages), row_of(first, middle - 1, stages)
                value = max(slots_for(chain.boundary_bytes[middle], slot_bytes) + need[upper], need[lower])
                value = max(value, slots_for(chain.held_bytes[last] + run_peak, slot_bytes))
                value_s = run_s + seconds[upper] + seconds[lower]
                if value < best or (value == best and value_s < best_s):
                    best, best_s = value, value_s
            row = row_of(first, last, stages)
            need[row], seconds[row] = best, best_s
    return need, seconds


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _enough_memory(chain: ChainArrays, slot_bytes: int) -> Ints:
    """Slots from which on each state can run every stage once, under its fastest option: more memory does not help."""
    stages = chain.discard_s.shape[0]
    enough = np.empty(stages * (stages + 1) // 2, np.int64)
    for first in range(stages - 1, -1, -1):
        option = chain.fastest[first]
        saved = slots_for(chain.saved_bytes[first, option], slot_bytes)
        for last in range(first, stages):
            value = slots_for(_option_peak(chain, first, last, option), slot_bytes)
            if last > first:
                value = max(value, saved + enough[row_of(first + 1, last, stages)])
            enough[row_of(first, last, stages)] = value
    return enough


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _lower_to_pair(out: Floats, upper: Floats, lower: Floats, extra_s: float) -> None:
    """Makes ``out`` the lesser of itself and extra_s + upper + lower; plain loops over slices from 0 become vector code."""
    for slot in range(out.shape[0]):
        value = extra_s + upper[slot] + lower[slot]
        out[slot] = min(out[slot], value)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _lower_to(out: Floats, upper: Floats, extra_s: float) -> None:
    """Makes ``out`` the lesser of itself and extra_s + upper."""
    for slot in range(out.shape[0]):
        value = extra_s + upper[slot]
        out[slot] = min(out[slot], value)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _first_at_most(values: Floats, start: int, stop: int, bound: float) -> int:
    """First index in [start, stop) of a never growing array whose value is at most ``bound``, else ``stop``."""
    while start < stop:
        middle = (start + stop) // 2
        if values[middle] <= bound:
            stop = middle
        else:
            start = middle + 1
    return start


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _fill_options(chain: ChainArrays, slot_bytes: int, need: Ints, times: Floats, first: int, last: int, stop: int) -> None:
    """Row (first, last) with F_all choices only, and from slot ``stop`` on with every stage running once."""
    stages, child = chain.discard_s.shape[0], row_of(first + 1, last, chain.discard_s.shape[0])
    out = times[row_of(first, last, stages)]
    rest_s = times[child, times.shape[1] - 1] if last > first else 0.0
    out[:stop] = np.inf
    out[stop:] = chain.option_s[first, chain.fastest[first]] + rest_s
    for option in range(chain.num_options[first]):
        start = slots_for(_option_peak(chain, first, last, option), slot_bytes)
        if last == first:
            for slot in range(start, stop):
                out[slot] = min(out[slot], chain.option_s[first, option])
        else:
            saved = slots_for(chain.saved_bytes[first, option], slot_bytes)
            start = max(start, saved + need[child])
            if start < stop:
                _lower_to(out[start:stop], times[child, start - saved : stop - saved], chain.option_s[first, option])


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def least_times(chain: ChainArrays, slot_bytes: int, num_slots: int, need: Ints) -> Floats:
    """Least time of every state for every number of slots from 0 to ``num_slots``; inf where it does not fit.

    Args:
        chain: the problem.
        slot_bytes: size of a slot.
        num_slots: most slots.
        need: what `least_memory` returned for the same slot size.

    Returns:
        Seconds [states, num_slots + 1].

    Model:
        The recurrence of `ChainProblem`. Entries are only searched between the state's need and the memory from which on every stage
        runs once; runs to boundary j only where their time, if nothing else were recomputed, beats what is known.
    """
    stages = chain.discard_s.shape[0]
    times = np.empty((need.shape[0], num_slots + 1))
    enough = _enough_memory(chain, slot_bytes)
    run_until_s, once_until_s = np.zeros(stages + 1), np.zeros(stages + 1)
    boundary = np.zeros(stages + 1, np.int64)
    for stage in range(stages):
        run_until_s[stage + 1] = run_until_s[stage] + chain.discard_s[stage]
        once_until_s[stage + 1] = once_until_s[stage] + chain.option_s[stage, chain.fastest[stage]]
        boundary[stage] = slots_for(chain.boundary_bytes[stage], slot_bytes)
    for highest in range(stages - 1, -1, -_FIRSTS_PER_BLOCK):
        lowest = max(0, highest - _FIRSTS_PER_BLOCK + 1)
        for last in range(lowest, stages):
            for first in range(min(highest, last), lowest - 1, -1):
                row = row_of(first, last, stages)
                stop = min(enough[row], num_slots + 1)
                _fill_options(chain, slot_bytes, need, times, first, last, stop)
                once_s = once_until_s[last + 1] - once_until_s[first]
                out, run_peak = times[row], 0
                for middle in range(first + 1, last + 1):
                    run_peak = _run_peak(chain, run_peak, first, middle - 1)
                    run_s, kept = run_until_s[middle] - run_until_s[first], boundary[middle]
                    upper, lower = row_of(middle, last, stages), row_of(first, middle - 1, stages)
                    start = max(slots_for(chain.held_bytes[last] + run_peak, slot_bytes), kept + need[upper], need[lower])
                    end = _first_at_most(out, start, stop, run_s + once_s)
                    if start < end:
                        _lower_to_pair(out[start:end], times[upper, start - kept : end - kept], times[lower, start:end], run_s)
    return times


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def best_choice(chain: ChainArrays, slot_bytes: int, need: Ints, times: Floats, first: int, last: int, slots: int) -> int:
    """The choice of least time for state (first, last) with ``slots``, found again from the finished table.

    Args:
        chain: the problem.
        slot_bytes: size of a slot.
        need: what `least_memory` returned for that size.
        times: seconds [states, columns]; memory beyond the last column counts as that column (a single column holds the times that
            `least_memory` returns).
        first: first stage of the state.
        last: last stage.
        slots: memory of the state.

    Returns:
        Option o >= 0 for F_all, or -j for a run without graphs to boundary j; of equal ones the first in that order.
    """
    stages, most = chain.discard_s.shape[0], times.shape[1] - 1
    best, best_s = 0, np.inf
    for option in range(chain.num_options[first]):
        if slots < slots_for(_option_peak(chain, first, last, option), slot_bytes):
            continue
        value_s = chain.option_s[first, option]
        if last > first:
            child = row_of(first + 1, last, stages)
            rest = slots - slots_for(chain.saved_bytes[first, option], slot_bytes)
            if rest < need[child]:
                continue
            value_s += times[child, min(rest, most)]
        if value_s < best_s:
            best, best_s = option, value_s
    run_s, run_peak = 0.0, 0
    for middle in range(first + 1, last + 1):
        run_s += chain.discard_s[middle - 1]
        run_peak = _run_peak(chain, run_peak, first, middle - 1)
        upper, lower = row_of(middle, last, stages), row_of(first, middle - 1, stages)
        rest = slots - slots_for(chain.boundary_bytes[middle], slot_bytes)
        if slots < slots_for(chain.held_bytes[last] + run_peak, slot_bytes):
            break
        if rest < need[upper] or slots < need[lower]:
            continue
        value_s = run_s + times[upper, min(rest, most)] + times[lower, min(slots, most)]
        if value_s < best_s:
            best, best_s = -middle, value_s
    return best
