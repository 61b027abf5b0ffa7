"""Compiled: the loop of `engine_compiled`. What it means is written in `engine_simpy`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hardware_models.network.sharing_kernels import fill

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_WAITING, _RUNNING, _MOVING, _ENDED = 0, 1, 2, 3


@njit(cache=True)  # type: ignore[untyped-decorator]
def record_kernel(
    queue_offsets: Integers, queues: Integers, queue_of: Integers, device: Integers, stream: Integers, duration_s: Floats, dependency_offsets: Integers,
    dependencies: Integers, transfer_row: Integers, size_bytes: Floats, limit: Floats, route_offsets: Integers, routes: Integers, link_rate: Floats,
    slowdown: Floats,
) -> tuple[Floats, Floats, Integers, Integers]:  # fmt: skip
    """Start and end of each instruction and their counts; see `run_record.RunRecord`."""
    num, num_queues = len(device), len(queue_offsets) - 1
    start_s, end_s = np.zeros(num), np.zeros(num)
    start_count, end_count = np.zeros(num, dtype=np.int64), np.full(num, -1, dtype=np.int64)
    successor_offsets, successors = _successors(dependency_offsets, dependencies, num)
    waits = np.diff(dependency_offsets)
    place = queue_offsets[:-1].copy()
    state = np.zeros(num, dtype=np.int8)
    speed, left, since_s = np.zeros(num), np.zeros(num), np.zeros(num)
    slows = (slowdown > 1.0).any()
    ready = np.empty(num_queues, dtype=np.bool_)
    active = np.full(num_queues, -1, dtype=np.int64)
    for queue in range(num_queues):
        ready[queue] = _can_start(queue, place, queue_offsets, queues, waits)
    now, count, changed = 0.0, 0, False
    weight = np.ones(num_queues)
    while True:
        n = _first_to_end(active, end_s, now)
        if n >= 0:
            queue = queue_of[n]
            row = transfer_row[n]
            changed = True
            if row >= 0 and state[n] == _RUNNING:
                state[n] = _MOVING
                left[n], since_s[n], speed[n], end_s[n] = size_bytes[row], now, 0.0, np.inf
                continue
            state[n], end_count[n], active[queue] = _ENDED, count, -1
            count += 1
            for position in range(successor_offsets[n], successor_offsets[n + 1]):
                other = successors[position]
                waits[other] -= 1
                if waits[other] == 0:
                    ready[queue_of[other]] = ready[queue_of[other]] or (
                        active[queue_of[other]] < 0 and _next(queue_of[other], place, queue_offsets, queues) == other
                    )
            ready[queue] = _can_start(queue, place, queue_offsets, queues, waits)
            continue
        n = _first_ready(ready, place, queues)
        if n >= 0:
            queue = queue_of[n]
            ready[queue] = False
            place[queue] += 1
            active[queue], state[n] = n, _RUNNING
            start_s[n], start_count[n], end_s[n] = now, count, now + duration_s[n] / 1.0
            count += 1
            speed[n], left[n], since_s[n] = 1.0, duration_s[n], now
            changed = True
            continue
        if changed and (slows or len(link_rate) or len(size_bytes)):
            _settle(
                now,
                active,
                device,
                stream,
                state,
                speed,
                left,
                since_s,
                end_s,
                transfer_row,
                limit,
                route_offsets,
                routes,
                link_rate,
                slowdown,
                weight,
            )
        changed = False
        now = _next_end(active, end_s)
        if now == np.inf:
            return start_s, end_s, start_count, end_count


@njit(cache=True)  # type: ignore[untyped-decorator]
def _successors(offsets: Integers, dependencies: Integers, num: int) -> tuple[Integers, Integers]:
    """Who waits for each instruction, as offsets and indices."""
    successor_offsets = np.zeros(num + 1, dtype=np.int64)
    for dependency in dependencies:
        successor_offsets[dependency + 1] += 1
    successor_offsets = np.cumsum(successor_offsets)
    successors, filled = np.empty(len(dependencies), dtype=np.int64), successor_offsets[:-1].copy()
    for n in range(num):
        for position in range(offsets[n], offsets[n + 1]):
            dependency = dependencies[position]
            successors[filled[dependency]] = n
            filled[dependency] += 1
    return successor_offsets, successors


@njit(cache=True)  # type: ignore[untyped-decorator]
def _next(queue: int, place: Integers, queue_offsets: Integers, queues: Integers) -> int:
    """The instruction that a stream runs next; -1 at its end."""
    return queues[place[queue]] if place[queue] < queue_offsets[queue + 1] else -1


@njit(cache=True)  # type: ignore[untyped-decorator]
def _can_start(queue: int, place: Integers, queue_offsets: Integers, queues: Integers, waits: Integers) -> bool:
    n = _next(queue, place, queue_offsets, queues)
    return bool(n >= 0 and waits[n] == 0)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _first_to_end(active: Integers, end_s: Floats, now: float) -> int:
    """The lowest index that ends now; -1 if none does."""
    found = -1
    for n in active:
        if n >= 0 and end_s[n] <= now and (found < 0 or n < found):
            found = n
    return found


@njit(cache=True)  # type: ignore[untyped-decorator]
def _first_ready(ready: NDArray[np.bool_], place: Integers, queues: Integers) -> int:
    """The lowest index that can start; -1 if none can."""
    found = -1
    for queue in range(len(ready)):
        if ready[queue]:
            n = queues[place[queue]]
            if found < 0 or n < found:
                found = n
    return found


@njit(cache=True)  # type: ignore[untyped-decorator]
def _next_end(active: Integers, end_s: Floats) -> float:
    earliest = np.inf
    for n in active:
        if n >= 0:
            earliest = min(earliest, end_s[n])
    return earliest


@njit(cache=True)  # type: ignore[untyped-decorator]
def _settle(
    now: float, active: Integers, device: Integers, stream: Integers, state: NDArray[np.int8], speed: Floats, left: Floats, since_s: Floats, end_s: Floats,
    transfer_row: Integers, limit: Floats, route_offsets: Integers, routes: Integers, link_rate: Floats, slowdown: Floats, weight: Floats,
) -> None:  # fmt: skip
    """New speeds for what runs, where they differ."""
    running = np.sort(active[active >= 0])
    num = len(running)
    new = np.ones(num)
    for i in range(num):
        worst = 1.0
        for j in range(num):
            if i != j and device[running[i]] == device[running[j]]:
                worst = max(worst, slowdown[stream[running[i]], stream[running[j]]])
        new[i] = 1.0 / worst
    _share(running, state, new, transfer_row, limit, route_offsets, routes, link_rate, weight)
    for i in range(num):
        n = running[i]
        if new[i] != speed[n]:
            left[n] = max(0.0, left[n] - speed[n] * (now - since_s[n]))
            since_s[n], speed[n] = now, new[i]
            end_s[n] = now + left[n] / new[i] if new[i] > 0.0 else np.inf


@njit(cache=True)  # type: ignore[untyped-decorator]
def _share(
    running: Integers, state: NDArray[np.int8], new: Floats, transfer_row: Integers, limit: Floats, route_offsets: Integers, routes: Integers,
    link_rate: Floats, weight: Floats,
) -> None:  # fmt: skip
    """Rates of the transfers that move; ``new`` holds the part of its limit that each may take."""
    moving = np.flatnonzero(state[running] == _MOVING)
    if not len(moving):
        return
    rows = transfer_row[running[moving]]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    offsets[1:] = np.cumsum(route_offsets[rows + 1] - route_offsets[rows])
    links, limits = np.empty(offsets[-1], dtype=np.int64), np.empty(len(rows))
    for flow in range(len(rows)):
        row = rows[flow]
        links[offsets[flow] : offsets[flow + 1]] = routes[route_offsets[row] : route_offsets[row + 1]]
        limits[flow] = limit[row] * new[moving[flow]]
    new[moving] = fill(offsets, links, link_rate, weight[: len(rows)], limits)
