"""The price of collectives: seconds of a group's communication on a cluster, with evidence and a standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.network.cluster import Cluster, CommGroup
from hardware_models.network.collective_algorithms import Floats, Wire, canonical
from hardware_models.network.collective_choice import CollectivePrices, Wanted, priced
from hardware_models.network.collective_curves import CollectiveStack, catalogued_stacks
from hardware_models.profile import Evidence
from hardware_models.units import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivePrice:
    """Price of one collective."""

    seconds: float
    evidence: Evidence
    relative_standard_error: float
    stack: str


def collective_seconds(
    collective: str,
    size_bytes: float,
    group: CommGroup,
    cluster: Cluster,
    *,
    dtype: str = "bfloat16",
    nccl_version: str | None = None,
) -> float:
    """Seconds of one collective; arguments as in `price_collectives`."""
    return price_collective(collective, size_bytes, group, cluster, dtype=dtype, nccl_version=nccl_version).seconds


def price_collective(
    collective: str,
    size_bytes: float,
    group: CommGroup,
    cluster: Cluster,
    *,
    dtype: str = "bfloat16",
    nccl_version: str | None = None,
) -> CollectivePrice:
    """Price of one collective; arguments as in `price_collectives`."""
    return _remembered(collective, float(size_bytes), group, cluster, dtype, nccl_version)


@lru_cache(maxsize=1 << 16)
def _remembered(
    collective: str, size_bytes: float, group: CommGroup, cluster: Cluster, dtype: str, nccl_version: str | None
) -> CollectivePrice:
    """One price; a search asks for the same ones again and again."""
    prices = price_collectives(collective, [size_bytes], group, cluster, dtype=dtype, nccl_version=nccl_version)
    return CollectivePrice(
        seconds=float(prices.seconds[0]), evidence=prices.evidence,
        relative_standard_error=prices.relative_standard_error, stack=prices.stack,
    )  # fmt: skip


def price_collectives(
    collective: str, sizes_bytes: ArrayLike, group: CommGroup, cluster: Cluster, *,
    dtype: str = "bfloat16", nccl_version: str | None = None, stack: str = "", stacks: Sequence[CollectiveStack] | None = None,
) -> CollectivePrices:  # fmt: skip
    """Prices of a collective at sizes.

    Args:
        collective: one of `collective_algorithms.COLLECTIVES` or a usual alias.
        sizes_bytes: by the convention of nccl-tests, see `collective_algorithms.bus_factor`.
        group: ranks and their placement.
        cluster: where.
        dtype: of the elements; a size is of bytes, so it changes nothing but is checked.
        nccl_version: prefer this version's curves where the device has several.
        stack: prefer the curves of this stack wherever it holds the collective.
        stacks: what was measured; default: the catalogue.

    **Model**: ``physical(size) * exp(ratio(size'))``. ``physical`` is the least of lines (`ProtocolLine`) with this cluster's rate and
    latencies in inverse ratio of the devices' clocks; ``ratio`` is the measured stack's, at the size ``size'`` that takes as long on its
    wire; between numbers of ranks linear in ``log2 n``, beyond them constant. The stack is that of the same device, else of the nearest
    rate on a like fabric (`collective_choice`). Over several NVLink domains: the larger of the part between them and the part inside one
    (of an all_to_all, the bytes that stay inside), since NCCL pipelines both.

    **Not modelled**: other traffic on the same links (see `sharing`), compute at the same time (see `overlap`).

    Raises:
        InputError: a size below 0, a placement that the cluster does not allow, or a dtype or collective that is not known.
    """
    name = canonical(collective)
    sizes = np.asarray(sizes_bytes, dtype=np.float64)
    _check(name, sizes, group, dtype)
    known = catalogued_stacks() if stacks is None else tuple(stacks)
    if group.num_ranks == 1:
        return CollectivePrices(seconds=np.zeros_like(sizes), evidence="measured", relative_standard_error=0.0, stack="")
    domains, ranks = group.domains(cluster)
    wanted = Wanted(collective=name, cluster=cluster, nccl_version=nccl_version, stack=stack)
    share = ranks / group.num_ranks if name == "all_to_all" else 1.0
    inside = priced(wanted, share * sizes, wire_of(group, cluster, inside=True), known) if ranks > 1 else None
    if domains == 1:
        assert inside is not None
        return inside
    between = priced(wanted, sizes, wire_of(group, cluster, inside=False), known)
    if inside is None or name == "send_recv":
        return between
    return replace(between, seconds=np.maximum(inside.seconds, between.seconds))


def wire_of(group: CommGroup, cluster: Cluster, *, inside: bool) -> Wire:
    """The wire of a group inside an NVLink domain, or between domains."""
    domains, ranks = group.domains(cluster)
    if inside:
        return Wire(
            scope="intra", num_ranks=ranks, count=ranks, ranks_per_domain=ranks, bytes_per_s=cluster.fabric.wire_bytes_per_s(ranks),
            in_network_reduction=cluster.fabric.in_network_reduction,
        )  # fmt: skip
    return Wire(
        scope="inter", num_ranks=group.num_ranks, count=domains, ranks_per_domain=ranks,
        bytes_per_s=group.network_bytes_per_s(cluster), in_network_reduction=False,
    )  # fmt: skip


def _check(collective: str, sizes: Floats, group: CommGroup, dtype: str) -> None:
    if dtype not in DTYPE_BYTES:
        raise UnknownNameError(
            source="collective", key="dtype", value=dtype, known=tuple(DTYPE_BYTES), remedy="name torch's dtype"
        )
    if sizes.size and not (np.isfinite(sizes).all() and sizes.min() >= 0):
        raise InputError(
            source="collective",
            key="sizes_bytes",
            value=float(sizes.min()),
            rule="sizes are finite and >= 0",
            remedy="correct them",
        )
    if collective == "send_recv" and group.num_ranks > 2:  # noqa: PLR2004 - one sends, one receives
        raise InputError(
            source="group", key="num_ranks", value=group.num_ranks, rule="send_recv has two ranks", remedy="price each pair"
        )
