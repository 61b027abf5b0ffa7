"""Compiled: when each memory event of a program happens, and in which order. The rule is written in `engine_simpy`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bytes = NDArray[np.int8]

AT_BOUNDARY = 1
"""Place of an event at a start or an end; below and above it stand frees and allocations in the midst of instructions."""


@njit(cache=True)  # type: ignore[untyped-decorator]
def moment_s(start_s: float, end_s: float, duration_s: float, offset_s: float) -> float:
    """When a memory event happens: its offset, stretched as the instruction was; at the end where it is the whole duration."""
    if offset_s <= 0.0:
        return start_s
    if offset_s >= duration_s:
        return end_s
    if end_s == start_s + duration_s:
        return start_s + offset_s
    return start_s + offset_s * ((end_s - start_s) / duration_s)


@njit(cache=True)  # type: ignore[untyped-decorator]
def moments_kernel(
    start_s: Floats, end_s: Floats, duration_s: Floats, offsets: Integers, offset_s: Floats, size_bytes: Integers
) -> tuple[Floats, Bytes, Integers]:
    """Of each memory event its time, its place within that instant and its instruction.

    Args:
        start_s, end_s, duration_s: of each instruction.
        offsets: events of instruction n are ``offsets[n]:offsets[n + 1]``.
        offset_s, size_bytes: of each event.
    """
    num = len(offset_s)
    time_s, place, owner = np.empty(num), np.full(num, AT_BOUNDARY, dtype=np.int8), np.empty(num, dtype=np.int64)
    for n in range(len(start_s)):
        for event in range(offsets[n], offsets[n + 1]):
            time_s[event] = moment_s(start_s[n], end_s[n], duration_s[n], offset_s[event])
            owner[event] = n
            if time_s[event] == start_s[n] or time_s[event] == end_s[n]:
                continue
            if event > offsets[n] and time_s[event - 1] == time_s[event]:
                place[event] = place[event - 1]
            else:
                place[event] = 0 if size_bytes[event] < 0 else 2
    return time_s, place, owner


@njit(cache=True)  # type: ignore[untyped-decorator]
def boundary_kernel(
    offsets: Integers, time_s: Floats, place: Bytes, start_s: Floats, start_count: Integers, end_count: Integers
) -> Integers:
    """Events at starts and ends, in the order of those."""
    at = np.full(2 * len(start_s), -1, dtype=np.int64)
    for n in range(len(start_s)):
        if offsets[n + 1] > offsets[n]:
            at[start_count[n]], at[end_count[n]] = 2 * n, 2 * n + 1
    order, found = np.empty(len(time_s), dtype=np.int64), 0
    for k in range(len(at)):
        if at[k] >= 0:
            n, ends = at[k] >> 1, at[k] & 1
            for event in range(offsets[n], offsets[n + 1]):
                if place[event] == AT_BOUNDARY and (time_s[event] != start_s[n]) == ends:
                    order[found] = event
                    found += 1
    return order[:found]


@njit(cache=True)  # type: ignore[untyped-decorator]
def by_device(order: Integers, home: Integers, num_devices: int) -> tuple[Integers, Integers]:
    """The same events device after device, each device's in their order: offsets, shape (devices + 1,), and events."""
    offsets = np.zeros(num_devices + 1, dtype=np.int64)
    for k in range(len(order)):
        offsets[home[order[k]] + 1] += 1
    offsets = np.cumsum(offsets)
    place, sorted_events = offsets[:-1].copy(), np.empty(len(order), dtype=np.int64)
    for k in range(len(order)):
        device = home[order[k]]
        sorted_events[place[device]] = order[k]
        place[device] += 1
    return offsets, sorted_events
