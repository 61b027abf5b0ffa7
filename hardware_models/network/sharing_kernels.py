"""Compiled: progressive filling, the rule of max-min fair rates. `sharing` and both engines use this one function."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FULL = 1e-12
"""A link is full, a limit reached, when less than this share of it is left: rounding."""


@njit(cache=True)  # type: ignore[untyped-decorator]
def fill(route_offsets: Integers, routes: Integers, capacity: Floats, weight: Floats, limit: Floats) -> Floats:
    """Max-min fair rates of flows, shape ``(flows,)``.

    **Model**: all flows grow in proportion to their weights; a link that fills, or a limit that is reached, freezes its flows.

    **Source**: Bertsekas and Gallager, Data Networks, 2nd edition, section 6.5.2.

    Args:
        route_offsets: shape ``(flows + 1,)``; links of flow f are ``routes[route_offsets[f]:route_offsets[f + 1]]``.
        routes: indices of links.
        capacity: of each link.
        weight: of each flow, positive.
        limit: of each flow, may be infinite where it has a link.
    """
    num_flows, num_links = len(weight), len(capacity)
    rate, active = np.zeros(num_flows), np.ones(num_flows, dtype=np.bool_)
    used, demand = np.zeros(num_links), np.zeros(num_links)
    left = num_flows
    while left > 0:
        growth = _growth(route_offsets, routes, capacity, weight, limit, rate, active, used, demand)
        for flow in range(num_flows):
            if active[flow]:
                rate[flow] += growth * weight[flow]
                for place in range(route_offsets[flow], route_offsets[flow + 1]):
                    used[routes[place]] += growth * weight[flow]
        frozen = 0
        for flow in range(num_flows):
            if not active[flow]:
                continue
            stop = rate[flow] >= limit[flow] * (1.0 - FULL)
            for place in range(route_offsets[flow], route_offsets[flow + 1]):
                link = routes[place]
                stop = stop or capacity[link] - used[link] <= FULL * capacity[link]
            if stop:
                active[flow] = False
                frozen += 1
        left -= frozen
        if frozen == 0:
            break
    return rate


@njit(cache=True)  # type: ignore[untyped-decorator]
def _growth(
    route_offsets: Integers, routes: Integers, capacity: Floats, weight: Floats, limit: Floats, rate: Floats, active: NDArray[np.bool_], used: Floats,
    demand: Floats,
) -> float:  # fmt: skip
    """Common growth per weight until the next link fills or limit is reached; leaves in ``used`` what each link carries now."""
    used[:] = 0.0
    demand[:] = 0.0
    for flow in range(len(rate)):
        for place in range(route_offsets[flow], route_offsets[flow + 1]):
            used[routes[place]] += rate[flow]
            if active[flow]:
                demand[routes[place]] += weight[flow]
    growth = np.inf
    for link in range(len(capacity)):
        if demand[link] > 0.0:
            growth = min(growth, max(0.0, capacity[link] - used[link]) / demand[link])
    for flow in range(len(rate)):
        if active[flow]:
            growth = min(growth, (limit[flow] - rate[flow]) / weight[flow])
    return growth
