"""How transfers share links: max-min fair rates, with directions coupled by a duplex capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hardware_models.errors import InputError
from hardware_models.network.links import Floats, Link
from hardware_models.network.sharing_kernels import fill


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplexLink:
    """Resources of one full-duplex link in the arrays given to `max_min_rates`: two directions and their sum."""

    forward: int
    """Index of the direction towards the device."""
    back: int
    both: int
    """Index of the joint capacity, which every flow of either direction also uses."""

    def route(self, *, forward: bool) -> tuple[int, int]:
        """Indices that a flow in one direction uses."""
        return (self.forward if forward else self.back, self.both)


def duplex_capacities(link: Link, first: int) -> tuple[DuplexLink, tuple[float, float, float]]:
    """The three resources of a link, numbered from ``first``, and their bytes/s.

    **Model**: each direction has its achieved rate; together at most ``duplex_efficiency`` times the sum of both.
    """
    forward, back = link.achieved_bytes_per_s.value, link.achieved_back_bytes_per_s.value
    return DuplexLink(forward=first, back=first + 1, both=first + 2), (forward, back, link.duplex_capacity_bytes_per_s)


def max_min_rates(
    routes: Sequence[Sequence[int]], capacities: ArrayLike, *, weights: ArrayLike | None = None, limits: ArrayLike | None = None
) -> Floats:
    """Rates of flows in bytes/s, shape ``(len(routes),)``: no flow can gain without one of no larger share losing.

    Args:
        routes: of each flow, the links that it uses, as indices into ``capacities``; a flow without a link is bound by its limit alone.
        capacities: bytes/s of each link, shape ``(links,)``.
        weights: share of each flow on a full link, positive; default: equal.
        limits: most bytes/s of each flow; default: none.

    **Model**: progressive filling: all flows grow in proportion to their weights; a link that fills, or a limit that is reached, freezes
    its flows. Ends after at most ``links + flows`` rounds.

    **Source**: Bertsekas and Gallager, Data Networks, 2nd edition, section 6.5.2.

    Raises:
        InputError: an index outside, a negative capacity or limit, a weight that is not positive, or a flow with neither link nor limit.
    """
    capacity = np.asarray(capacities, dtype=np.float64)
    num_flows = len(routes)
    weight = np.ones(num_flows) if weights is None else np.asarray(weights, dtype=np.float64)
    limit = np.full(num_flows, np.inf) if limits is None else np.asarray(limits, dtype=np.float64)
    _check(routes, capacity, weight, limit)
    offsets = np.cumsum([0, *(len(set(route)) for route in routes)], dtype=np.int64)
    links = np.array([link for route in routes for link in sorted(set(route))], dtype=np.int64)
    return np.asarray(fill(offsets, links, capacity, weight, limit), dtype=np.float64)


def _check(routes: Sequence[Sequence[int]], capacity: Floats, weight: Floats, limit: Floats) -> None:
    shapes = (capacity.ndim, weight.shape, limit.shape)
    if shapes != (1, (len(routes),), (len(routes),)):
        raise _wrong("weights", shapes, "capacities is a list, weights and limits have one value for each flow")
    if capacity.size and not (np.isfinite(capacity).all() and capacity.min() >= 0):
        raise _wrong("capacities", capacity.tolist(), "capacities are finite and >= 0")
    if weight.size and not (np.isfinite(weight).all() and weight.min() > 0):
        raise _wrong("weights", weight.tolist(), "weights are finite and > 0")
    if limit.size and not limit.min() >= 0:
        raise _wrong("limits", limit.tolist(), "limits are >= 0")
    for flow, route in enumerate(routes):
        if any(not 0 <= link < capacity.size for link in route):
            raise _wrong(f"routes[{flow}]", list(route), f"indices are in [0, {capacity.size})")
        if not route and np.isinf(limit[flow]):
            raise _wrong(f"routes[{flow}]", [], "a flow uses a link or has a limit")


def _wrong(key: str, value: object, rule: str) -> InputError:
    return InputError(source="max_min_rates", key=key, value=value, rule=rule, remedy="correct the argument")
