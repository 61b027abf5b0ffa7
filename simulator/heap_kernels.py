"""Compiled: heaps of what ends and of what can start, changed in place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simulator.loop_kernels import part_of_loop

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@part_of_loop  # type: ignore[untyped-decorator]
def sift(at: int, size: int, ends: Floats, names: Integers, running: Integers, place_of: Integers) -> None:
    """Moves an entry of the heap of running streams to where it belongs.

    An entry is an end, the instruction that ends (the lower index first at equal times) and its stream; ``place_of`` says where each stream stands.
    """
    end_s, name, queue = ends[at], names[at], running[at]
    while at > 0:
        above = (at - 1) >> 1
        if ends[above] < end_s or (ends[above] == end_s and names[above] < name):
            break
        ends[at], names[at], running[at] = ends[above], names[above], running[above]
        place_of[running[at]] = at
        at = above
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (ends[other] < ends[child] or (ends[other] == ends[child] and names[other] < names[child])):
            child = other
        if end_s < ends[child] or (end_s == ends[child] and name < names[child]):
            break
        ends[at], names[at], running[at] = ends[child], names[child], running[child]
        place_of[running[at]] = at
        at = child
    ends[at], names[at], running[at] = end_s, name, queue
    place_of[queue] = at


@part_of_loop  # type: ignore[untyped-decorator]
def push_number(number: int, size: int, heap: Integers) -> None:
    """Adds a number to a heap of ``size`` numbers, the lowest first."""
    at = size
    while at > 0 and heap[(at - 1) >> 1] > number:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = number


@part_of_loop  # type: ignore[untyped-decorator]
def pop_number(size: int, heap: Integers) -> int:
    """Takes the lowest of ``size`` numbers out."""
    lowest, moved, at = heap[0], heap[size - 1], 0
    while True:
        child = 2 * at + 1
        if child >= size - 1:
            break
        if child + 1 < size - 1 and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= moved:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moved
    return int(lowest)
