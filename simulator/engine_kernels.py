"""Compiled: the loops of `engine_compiled`. What they mean is written in `engine_simpy`.

Streams are numbered ``device * num_streams + stream``. The first instruction of a stream that cannot start stands in a list of the one that it waits for: nobody looks at
it again before that has ended. Running streams are a heap by (end, index), those that can start a heap by index, and speeds are settled only where something began or ended.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from simulator.heap_kernels import pop_number, push_number, sift
from simulator.loop_kernels import part_of_loop
from simulator.settle_kernels import (
    MOVING,
    WORKING,
    disturbing,
    go_on,
    rate_alone,
    settle_device,
    settle_shared,
    slowable,
    touch,
)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bytes = NDArray[np.int8]
Devices = NDArray[np.int32]

NOBODY = -1


@njit(cache=True)  # type: ignore[untyped-decorator]
def queues_kernel(device: Devices, stream: Bytes, num_devices: int, num_streams: int) -> tuple[Integers, Integers]:
    """Instructions of each stream in their order: offsets, shape (devices * streams + 1,), and indices."""
    offsets = np.zeros(num_devices * num_streams + 1, dtype=np.int64)
    for n in range(len(device)):
        offsets[device[n] * num_streams + stream[n] + 1] += 1
    for queue in range(num_devices * num_streams):
        offsets[queue + 1] += offsets[queue]
    place, order = offsets[:-1].copy(), np.empty(len(device), dtype=np.int64)
    for n in range(len(device)):
        queue = device[n] * num_streams + stream[n]
        order[place[queue]] = n
        place[queue] += 1
    return offsets, order


@njit(cache=True)  # type: ignore[untyped-decorator]
def times_kernel(
    queue_offsets: Integers, queues: Integers, duration_s: Floats, dependency_offsets: Integers, dependencies: Integers
) -> tuple[Floats, Floats, int]:
    """Start and end of each instruction where nothing slows anything, and how many ended. Streams advance as far as they can, in any order."""
    num, num_queues = len(duration_s), len(queue_offsets) - 1
    start_s, end_s = np.zeros(num), np.full(num, -1.0)  # below 0: has not ended
    waiting, behind = np.full(num, NOBODY, dtype=np.int32), np.full(num_queues, NOBODY, dtype=np.int32)
    place, free_s = queue_offsets[:-1].copy(), np.zeros(num_queues)
    stack, height, done = np.arange(num_queues), num_queues, 0
    while height:
        height -= 1
        queue = stack[height]
        begin_s, at, last = free_s[queue], place[queue], queue_offsets[queue + 1]
        while at < last:
            n = queues[at]
            stuck = NOBODY
            for position in range(dependency_offsets[n], dependency_offsets[n + 1]):
                other = dependencies[position]
                if end_s[other] < 0.0:
                    stuck = other
                    break
                begin_s = max(begin_s, end_s[other])
            if stuck >= 0:
                behind[queue], waiting[stuck] = waiting[stuck], queue
                break
            start_s[n] = begin_s
            begin_s += duration_s[n]
            end_s[n] = begin_s
            at += 1
            woken = waiting[n]
            while woken >= 0:
                stack[height] = woken
                height += 1
                woken = behind[woken]
        done += at - place[queue]
        free_s[queue], place[queue] = begin_s, at
    return start_s, end_s, done


@part_of_loop  # type: ignore[untyped-decorator]
def _offer(
    queue: int, place: Integers, queue_offsets: Integers, queues: Integers, dependency_offsets: Integers, dependencies: Integers, end_count: Integers,
    waiting: Integers, behind: Integers, ready: Integers, num_ready: int,
) -> int:  # fmt: skip
    """Makes the next instruction of a stream ready, or lists the stream with the first one that it waits for; returns how many are ready."""
    if place[queue] < queue_offsets[queue + 1]:
        n = queues[place[queue]]
        stuck = NOBODY
        for position in range(dependency_offsets[n], dependency_offsets[n + 1]):
            if end_count[dependencies[position]] < 0:
                stuck = dependencies[position]
                break
        if stuck < 0:
            push_number(n, num_ready, ready)
            num_ready += 1
        else:
            behind[queue], waiting[stuck] = waiting[stuck], queue
    return num_ready


@njit(cache=True)  # type: ignore[untyped-decorator]
def record_kernel(  # noqa: C901, PLR0912, PLR0915 - one loop, put together from what is inlined: passing the machine's arrays on costs more than running it
    num_streams: int, queue_offsets: Integers, queues: Integers, device: Devices, stream: Bytes, duration_s: Floats, dependency_offsets: Integers,
    dependencies: Integers, row: Integers, size_bytes: Floats, limit: Floats, route_offsets: Integers, routes: Integers, link_rate: Floats, slowdown: Floats,
) -> tuple[Floats, Floats, Integers, Integers]:  # fmt: skip
    """Start and end of each instruction and their counts; see `run_record.RunRecord`. ``row``: of each instruction in `program.Transfers`, or `NOBODY`."""
    num, num_queues, num_links = len(device), len(queue_offsets) - 1, len(link_rate)
    start_s, end_s = np.zeros(num), np.zeros(num)
    start_count, end_count = np.zeros(num, dtype=np.int64), np.full(num, NOBODY, dtype=np.int64)  # end_count < 0: has not ended
    waiting, behind = np.full(num, NOBODY, dtype=np.int64), np.full(num_queues, NOBODY, dtype=np.int64)
    place, state = queue_offsets[:-1].copy(), np.zeros(num_queues, dtype=np.int8)
    ends, names, running = np.empty(num_queues), np.empty(num_queues, dtype=np.int64), np.empty(num_queues, dtype=np.int64)
    place_of, num_running = np.zeros(num_queues, dtype=np.int64), 0
    ready, num_ready = np.empty(num_queues, dtype=np.int64), 0
    share, speed, left, since_s = np.ones(num_queues), np.zeros(num_queues), np.zeros(num_queues), np.zeros(num_queues)
    disturbs, slowed = disturbing(slowdown), slowable(slowdown)
    shares, changed = np.zeros((num_streams, 1 << num_streams)), np.empty(num_streams, dtype=np.int64)
    busy, is_stirred = np.zeros(num_queues // num_streams, dtype=np.int64), np.zeros(num_queues // num_streams, dtype=np.bool_)
    stirred, num_stirred = np.empty(num_queues // num_streams, dtype=np.int64), 0
    users, number = np.zeros(num_links, dtype=np.int64), np.full(num_links, NOBODY, dtype=np.int64)
    touched, any_touched = np.zeros(num_links, dtype=np.bool_), False
    due, num_due = np.empty(2 * num_queues, dtype=np.int64), 0
    for queue in range(num_queues):
        num_ready = _offer(
            queue, place, queue_offsets, queues, dependency_offsets, dependencies, end_count, waiting, behind, ready, num_ready
        )  # fmt: skip
    now, count = 0.0, 0
    while True:
        if num_running and ends[0] <= now:
            queue, n = running[0], names[0]
            home, its_row = device[n], row[n]
            if its_row >= 0 and state[queue] == WORKING:  # its latency is over
                state[queue], left[queue], since_s[queue], speed[queue], ends[0] = MOVING, size_bytes[its_row], now, 0.0, np.inf
                sift(0, num_running, ends, names, running, place_of)
                for position in range(route_offsets[its_row], route_offsets[its_row + 1]):
                    users[routes[position]] += 1
                due[num_due] = queue
                num_due += 1
                continue
            end_s[n], end_count[n], state[queue], share[queue] = ends[0], count, 0, 1.0
            count += 1
            num_running -= 1
            if num_running:
                ends[0], names[0], running[0] = ends[num_running], names[num_running], running[num_running]
                sift(0, num_running, ends, names, running, place_of)
            if its_row >= 0:
                for position in range(route_offsets[its_row], route_offsets[its_row + 1]):
                    users[routes[position]] -= 1
                    if users[routes[position]] > 0:
                        touched[routes[position]] = any_touched = True
            place[queue] += 1
            behind[queue] = waiting[n]
            woken = queue  # its own stream, then those that waited for it
            while woken >= 0:
                following = behind[woken]
                num_ready = _offer(
                    woken, place, queue_offsets, queues, dependency_offsets, dependencies, end_count, waiting, behind, ready, num_ready
                )  # fmt: skip
                woken = following
        elif num_ready:
            n = pop_number(num_ready, ready)
            num_ready -= 1
            home = device[n]
            queue = home * num_streams + stream[n]
            state[queue], speed[queue], left[queue], since_s[queue] = WORKING, 1.0, duration_s[n], now
            start_s[n], start_count[n] = now, count
            count += 1
            ends[num_running], names[num_running], running[num_running] = now + duration_s[n], n, queue
            num_running += 1
            sift(num_running - 1, num_running, ends, names, running, place_of)
        else:
            for k in range(num_stirred):
                is_stirred[stirred[k]] = False
                num_changed = settle_device(
                    stirred[k] * num_streams, busy[stirred[k]], slowed, slowdown, shares, share, changed
                )
                for c in range(num_changed):
                    if state[changed[c]] == MOVING:
                        due[num_due] = changed[c]
                        num_due += 1
                    else:
                        go_on(
                            changed[c],
                            share[changed[c]],
                            now,
                            speed,
                            left,
                            since_s,
                            num_running,
                            ends,
                            names,
                            running,
                            place_of,
                        )
            num_stirred = 0
            for k in range(num_due):
                queue = due[k]
                if state[queue] == MOVING:
                    its_row = row[names[place_of[queue]]]
                    rate = rate_alone(its_row, limit[its_row] * share[queue], users, route_offsets, routes, link_rate)
                    if rate >= 0.0:
                        go_on(queue, rate, now, speed, left, since_s, num_running, ends, names, running, place_of)
                    else:
                        touch(its_row, touched, route_offsets, routes)
                        any_touched = True
            num_due = 0
            if any_touched:
                settle_shared(
                    now, touched, number, state, share, speed, left, since_s, row, limit, route_offsets, routes, link_rate, num_running, ends, names, running,
                    place_of,
                )  # fmt: skip
                any_touched = False
            if not num_running or ends[0] == np.inf:
                return start_s, end_s, start_count, end_count
            now = ends[0]
            continue
        if disturbs[stream[n]]:
            busy[home] ^= 1 << stream[n]
            if not is_stirred[home]:
                is_stirred[home], stirred[num_stirred] = True, home
                num_stirred += 1
