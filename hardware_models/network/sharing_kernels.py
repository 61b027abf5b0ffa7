"""Compiled: progressive filling, the rule of max-min fair rates. `sharing` and both engines use this one function."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@njit(cache=True)  # type: ignore[untyped-decorator]
def fill(route_offsets: Integers, routes: Integers, capacity: Floats, weight: Floats, limit: Floats) -> Floats:
    """Max-min fair rates of flows, shape ``(flows,)``.

    **Model**: the flows' common level (rate over weight) rises; a link that fills, or a limit that is reached, stops its flows at the level that it has
    then. A rate follows, to the last bit, from the flows that share links with it, directly or through others, and from nothing else.

    **Source**: Bertsekas and Gallager, Data Networks, 2nd edition, section 6.5.2.

    Args:
        route_offsets: shape ``(flows + 1,)``; links of flow f are ``routes[route_offsets[f]:route_offsets[f + 1]]``.
        routes: indices of links.
        capacity: of each link.
        weight: of each flow, positive.
        limit: of each flow, may be infinite where it has a link.
    """
    num_flows = len(weight)
    rate, level, active = np.zeros(num_flows), np.empty(num_flows), np.ones(num_flows, dtype=np.bool_)
    used, demand = np.empty(len(capacity)), np.empty(len(capacity))
    left = num_flows
    while left > 0:
        _load(route_offsets, routes, weight, rate, active, used, demand)
        lowest = np.inf
        for flow in range(num_flows):
            if active[flow]:
                level[flow] = limit[flow] / weight[flow]
                for place in range(route_offsets[flow], route_offsets[flow + 1]):
                    link = routes[place]
                    level[flow] = min(level[flow], max(0.0, capacity[link] - used[link]) / demand[link])
                lowest = min(lowest, level[flow])
        for flow in range(num_flows):
            if active[flow] and level[flow] <= lowest:
                active[flow] = False
                rate[flow] = min(level[flow] * weight[flow], limit[flow])
                left -= 1
    return rate


@njit(cache=True)  # type: ignore[untyped-decorator]
def _load(
    route_offsets: Integers, routes: Integers, weight: Floats, rate: Floats, active: NDArray[np.bool_], used: Floats, demand: Floats
) -> None:  # fmt: skip
    """Leaves in ``used`` what flows that have stopped take of each link, in ``demand`` the weights of the others."""
    used[:] = 0.0
    demand[:] = 0.0
    for flow in range(len(rate)):
        for place in range(route_offsets[flow], route_offsets[flow + 1]):
            if active[flow]:
                demand[routes[place]] += weight[flow]
            else:
                used[routes[place]] += rate[flow]
