"""What collectives move and how: conventions, steps and the physical price of ring, tree and in-switch algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hardware_models.errors import UnknownNameError

Floats = NDArray[np.float64]
Scope = Literal["intra", "inter"]
Algorithm = Literal["ring", "nvls"]

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")
_ALIASES = MappingProxyType(
    {
        "allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter", "alltoall": "all_to_all", "all2all": "all_to_all",
        "bcast": "broadcast", "p2p": "send_recv", "sendrecv": "send_recv",
    }
)  # fmt: skip
"""Names that tables and libraries use, without underscores."""
_TREE_FROM_RANKS = 8
"""Up to this many ranks a ring's latency is what the tables show (2, 4 and 8 ranks grow linearly); beyond it NCCL's double binary tree is
taken for all-reduce and broadcast, whose steps grow with the logarithm (Sanders, Speck and Traeff 2009)."""


_RING_HOP = 0.5
"""Latency of a ring's hop over the network relative to a tree's: NCCL's own tuning table has 2.7 and 4.0 us against 5.0 and 8.5 us (LL, LL128;
NVIDIA/nccl src/graph/tuning.cc)."""
_NEAR_HOP = 0.25
"""Latency of a ring's hop inside a domain relative to one over the network: 0.6, 1.9 and 3.4 us against 2.7, 4.0 and 14.0 us there (LL, LL128, Simple); that of Simple,
which carries all but small messages."""


def canonical(collective: str) -> str:
    """The project's name of a collective.

    Raises:
        UnknownNameError: lists the known ones.
    """
    name = collective.strip().lower().replace("-", "_")
    name = _ALIASES.get(name.replace("_", ""), name)
    if name not in COLLECTIVES:
        raise UnknownNameError(
            source="collective", key="collective", value=collective, known=COLLECTIVES, remedy="choose one of these"
        )
    return name


def bus_factor(collective: str, num_ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth: bytes that cross each rank's link per direction, over the collective's size.

    Sizes are those of nccl-tests: all_reduce, broadcast and send_recv count one rank's buffer; all_gather the gathered result;
    reduce_scatter one rank's whole input; all_to_all one rank's whole buffer, of which it keeps 1/n.

    **Model**: all_reduce ``2 (n-1)/n``; all_gather, reduce_scatter, all_to_all ``(n-1)/n``; broadcast, send_recv 1.

    **Source**: NVIDIA/nccl-tests doc/PERFORMANCE.md.
    """
    fraction = (num_ranks - 1) / num_ranks
    return {"all_reduce": 2 * fraction, "broadcast": 1.0, "send_recv": 1.0}.get(collective, fraction)


def network_factor(collective: str, num_ranks: int, ranks_per_domain: int) -> float:
    """Bytes that leave one NVLink domain per direction, over the collective's size.

    **Model**: as `bus_factor`, since a ring crosses each domain's border once; all_to_all: every rank of a domain sends to all outside.
    """
    if collective == "all_to_all":
        return ranks_per_domain * (num_ranks - ranks_per_domain) / num_ranks
    return bus_factor(collective, num_ranks)


def num_steps(collective: str, count: int, scope: Scope, *, num_ranks: int = 0) -> float:
    """Latencies in a row, among ``count`` ranks (intra) or domains (inter).

    Args:
        collective: its canonical name.
        count: of ranks or domains.
        scope: inside a domain or between several.
        num_ranks: in all domains, where each has several; a ring between domains passes through all of them.

    **Model**: ring: ``n - 1``, twice for all_reduce; beyond 8 ranks all_reduce and broadcast grow with ``log2 n`` (trees).
    Between domains all_reduce and broadcast are trees; others are rings through every rank, whose hop counts half of a tree's, and an eighth inside a domain.

    **Source**: the sum of hops is NCCL's own (NVIDIA/nccl src/graph/tuning.cc, ``(nsteps - nInterSteps) * intraLat + nInterSteps * interLat``).
    """
    if collective == "send_recv":
        return 1.0
    twice = 2.0 if collective == "all_reduce" else 1.0
    if collective in {"all_reduce", "broadcast"}:
        if scope == "inter":
            return float(twice * np.ceil(np.log2(max(2, count))))
        if count > _TREE_FROM_RANKS:
            return float(twice * (_TREE_FROM_RANKS - 1) * np.log2(count) / np.log2(_TREE_FROM_RANKS))
    if scope == "intra":
        return twice * (count - 1)
    return max(1.0, _RING_HOP * (count - 1 + _NEAR_HOP * max(0, num_ranks - count)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolLine:
    """One algorithm with one protocol (LL, LL128, Simple): a latency and a slope.

    **Model**: ``seconds = base_s + step_s * steps + inverse_efficiency * wire_bytes / wire_bytes_per_s``.
    """

    algorithm: Algorithm
    base_s: float
    step_s: float
    inverse_efficiency: float

    def seconds(self, steps: float, wire_seconds: Floats) -> Floats:
        """Seconds for transfers that take ``wire_seconds`` at the link's rate."""
        return np.asarray(self.base_s + self.step_s * steps + self.inverse_efficiency * wire_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What a group's collective runs over: the numbers that the physical price needs."""

    scope: Scope
    num_ranks: int
    count: int
    """Ranks (intra) or NVLink domains (inter)."""
    ranks_per_domain: int
    bytes_per_s: float
    """Achieved by the link alone, per direction: of a rank's link (intra) or of a domain's adapters (inter)."""
    in_network_reduction: bool

    def seconds_per_byte(self, collective: str, algorithm: Algorithm = "ring") -> float:
        """Seconds of the wire per byte of the collective at the link's rate.

        **Model**: `bus_factor` or `network_factor` over the rate; in-switch reduction: each rank reads and writes ``1 + 1/n`` of the buffer.

        **Not modelled**: in-switch reduction between domains (SHARP), which only a measured curve holds.
        """
        if self.scope == "inter":
            return network_factor(collective, self.num_ranks, self.ranks_per_domain) / self.bytes_per_s
        if algorithm == "nvls":
            return (1 + 1 / self.num_ranks) / self.bytes_per_s
        return bus_factor(collective, self.num_ranks) / self.bytes_per_s


def physical_seconds(lines: Sequence[ProtocolLine], collective: str, sizes_bytes: Floats, wire: Wire) -> Floats:
    """Seconds of the fastest line, in the shape of ``sizes_bytes``: NCCL, too, takes the algorithm and protocol that it expects to end first.

    In-switch lines count for all_reduce on fabrics that add.
    """
    steps = num_steps(collective, wire.count, wire.scope, num_ranks=wire.num_ranks)
    nvls = wire.in_network_reduction and collective == "all_reduce"
    usable = [line for line in lines if line.algorithm == "ring" or nvls]
    times = [line.seconds(steps, sizes_bytes * wire.seconds_per_byte(collective, line.algorithm)) for line in usable]
    return np.asarray(np.min(times, axis=0), dtype=np.float64)
