"""Compiled: speeds of what runs, settled where something began or ended. What they mean is written in `engine_simpy`, what the arrays hold in `engine_kernels`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hardware_models.network.sharing_kernels import fill
from simulator.heap_kernels import sift
from simulator.loop_kernels import part_of_loop

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bytes = NDArray[np.int8]
Flags = NDArray[np.bool_]

WORKING, MOVING = 1, 2
"""States of what a stream runs: it works (or is a transfer in its latency), or it moves bytes."""


@njit(cache=True)  # type: ignore[untyped-decorator]
def disturbing(slowdown: Floats) -> Flags:
    """Streams (of any device) that slow another one or are slowed."""
    found = np.zeros(len(slowdown), dtype=np.bool_)
    for one in range(len(slowdown)):
        for other in range(len(slowdown)):
            if slowdown[one, other] > 1.0:
                found[one] = found[other] = True
    return found


@njit(cache=True)  # type: ignore[untyped-decorator]
def slowable(slowdown: Floats) -> Integers:
    """Streams (of any device) that another one slows, the lowest first; -1 behind the last."""
    streams, found = np.full(len(slowdown) + 1, -1, dtype=np.int64), 0
    for one in range(len(slowdown)):
        slowed = False
        for other in range(len(slowdown)):
            slowed = slowed or slowdown[one, other] > 1.0
        if slowed:
            streams[found] = one
            found += 1
    return streams


@njit(cache=True)  # type: ignore[untyped-decorator]
def share_beside(stream: int, busy: int, slowdown: Floats) -> float:
    """Share of full speed that a stream has beside those whose bits are set."""
    worst = 1.0
    for other in range(len(slowdown)):
        if other != stream and busy >> other & 1:
            worst = max(worst, slowdown[stream, other])
    return 1.0 / worst


@part_of_loop  # type: ignore[untyped-decorator]
def settle_device(
    first: int, busy: int, slowed: Integers, slowdown: Floats, shares: Floats, share: Floats, changed: Integers
) -> int:
    """How many of a device's streams have another share of full speed than before, because of what else runs there.

    Args:
        first: the device's first stream.
        busy: a bit for each stream that runs something.
        slowed: what `slowable` returns.
        slowdown: as in `program.Program`.
        shares: of each stream beside each set of busy ones, 0 where not yet known.
        share: by stream; overwritten.
        changed: its first values become the streams whose share is another now.
    """
    found, k = 0, 0
    while slowed[k] >= 0:
        stream = slowed[k]
        k += 1
        if busy >> stream & 1:
            if shares[stream, busy] == 0.0:
                shares[stream, busy] = share_beside(stream, busy, slowdown)
            if share[first + stream] != shares[stream, busy]:
                share[first + stream] = shares[stream, busy]
                changed[found] = first + stream
                found += 1
    return found


@part_of_loop  # type: ignore[untyped-decorator]
def go_on(
    queue: int, rate: float, now: float, speed: Floats, left: Floats, since_s: Floats, num_running: int, ends: Floats, names: Integers, running: Integers,
    place_of: Integers,
) -> None:  # fmt: skip
    """From now on a stream's instruction goes at this speed, if that is another."""
    if rate != speed[queue]:
        left[queue] = max(0.0, left[queue] - speed[queue] * (now - since_s[queue]))
        since_s[queue] = now
        speed[queue] = rate
        ends[place_of[queue]] = now + left[queue] / rate if rate > 0.0 else np.inf
        sift(place_of[queue], num_running, ends, names, running, place_of)


@part_of_loop  # type: ignore[untyped-decorator]
def rate_alone(row: int, limit: float, users: Integers, route_offsets: Integers, routes: Integers, link_rate: Floats) -> float:
    """What `fill` gives a transfer that shares none of its links; -1 where another uses one, too. ``users`` counts both."""
    rate = limit
    for position in range(route_offsets[row], route_offsets[row + 1]):
        rate = min(rate, link_rate[routes[position]] if users[routes[position]] == 1 else -1.0)
    return rate


@part_of_loop  # type: ignore[untyped-decorator]
def touch(row: int, touched: Flags, route_offsets: Integers, routes: Integers) -> None:
    """Marks the links of a transfer."""
    for position in range(route_offsets[row], route_offsets[row + 1]):
        touched[routes[position]] = True


@njit(cache=True)  # type: ignore[untyped-decorator]
def settle_shared(
    now: float, touched: Flags, number: Integers, state: Bytes, share: Floats, speed: Floats, left: Floats, since_s: Floats, row: Integers,
    limit: Floats, route_offsets: Integers, routes: Integers, link_rate: Floats, num_running: int, ends: Floats, names: Integers, running: Integers,
    place_of: Integers,
) -> None:  # fmt: skip
    """New rates of all transfers that share ``touched`` links, directly or through others; no link is touched afterwards.

    Args:
        number: room for one number a link, all -1; left so.
    """
    queues, flows, moving = np.empty(num_running, dtype=np.int64), np.empty(num_running, dtype=np.int64), 0
    for k in range(num_running):
        if state[running[k]] == MOVING:
            place = moving  # in the order of the instructions; sorting by numpy would take longer to compile than the engine
            while place > 0 and flows[place - 1] > names[k]:
                queues[place], flows[place] = queues[place - 1], flows[place - 1]
                place -= 1
            queues[place], flows[place] = running[k], names[k]
            moving += 1
    inside = _reached(flows[:moving], row, touched, route_offsets, routes)
    rows, limits, found = np.empty(moving, dtype=np.int64), np.empty(moving), 0
    for i in range(moving):
        if inside[i]:
            rows[found], queues[found] = row[flows[i]], queues[i]
            limits[found] = limit[rows[found]] * share[queues[found]]
            found += 1
    for link in range(len(touched)):
        touched[link] = False
    rates = _shared_rates(rows[:found], limits[:found], number, route_offsets, routes, link_rate)
    for i in range(found):
        go_on(queues[i], rates[i], now, speed, left, since_s, num_running, ends, names, running, place_of)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _reached(flows: Integers, row: Integers, touched: Flags, route_offsets: Integers, routes: Integers) -> Flags:
    """Which of the moving transfers (by instruction) share touched links, directly or through others; ``touched`` grows to all their links."""
    inside = np.zeros(len(flows), dtype=np.bool_)
    grows = True
    while grows:
        grows = False
        for i in range(len(flows)):
            its_row = row[flows[i]]
            for position in range(route_offsets[its_row], route_offsets[its_row + 1]):
                if not inside[i] and touched[routes[position]]:
                    inside[i] = grows = True
                    touch(its_row, touched, route_offsets, routes)
    return inside


@njit(cache=True)  # type: ignore[untyped-decorator]
def _shared_rates(
    rows: Integers, limits: Floats, number: Integers, route_offsets: Integers, routes: Integers, link_rate: Floats
) -> Floats:
    """Max-min fair rates of transfers that share links with no others: links are numbered anew, so that `fill` sees these only."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    for i in range(len(rows)):
        offsets[i + 1] = offsets[i] + route_offsets[rows[i] + 1] - route_offsets[rows[i]]
    links, capacity, known = np.empty(offsets[-1], dtype=np.int64), np.empty(offsets[-1]), 0
    for i in range(len(rows)):
        for k in range(offsets[i + 1] - offsets[i]):
            link = routes[route_offsets[rows[i]] + k]
            if number[link] < 0:
                number[link], capacity[known] = known, link_rate[link]
                known += 1
            links[offsets[i] + k] = number[link]
    for i in range(len(rows)):
        for position in range(route_offsets[rows[i]], route_offsets[rows[i] + 1]):
            number[routes[position]] = -1
    rates: Floats = fill(offsets, links, capacity[:known], np.ones(len(rows)), limits)
    return rates
