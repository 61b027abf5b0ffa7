"""Which measured stack prices a collective, and how its curves carry over to another device, rate or number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot, log

import numpy as np

from hardware_models.errors import InputError
from hardware_models.network.clocks import latency_ratio
from hardware_models.network.cluster import Cluster, CommGroup
from hardware_models.network.collective_algorithms import Floats, ProtocolLine, Wire, bus_factor, physical_seconds
from hardware_models.network.collective_curves import CollectiveCurve, CollectiveStack
from hardware_models.profile import Evidence

NEAR_ERROR = 0.1
"""Relative standard error of a price carried over from another device or number of ranks on the same kind of link
(`collective_fit.leave_devices_out`: medians 1 to 5%, p90 4 to 16%)."""
FAR_ERROR = 0.3
"""The same from another kind of link (a generation left out: medians 11 to 36%, p90 20 to 42%)."""
PHYSICAL_ERROR = 0.4
"""Relative standard error where no collective of this kind was measured on a like fabric: an estimate, not measured."""
_SAME_RATE = 1e-6
_STANDS_FOR = {"broadcast": "all_gather"}
"""Both send every byte along a ring once, in as many steps."""
_FADE_OCTAVES = 4.0
"""Below the least size measured, a stack's own level fades over so many octaves to that of one with smaller sizes: estimate."""
_SMALL_LOG2 = 13.0
"""A stack that was measured down to this size (8 KiB) knows its latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivePrices:
    """Prices of one collective at several sizes."""

    seconds: Floats
    """Shape of the sizes."""
    evidence: Evidence
    """``measured``: a curve of this device and number of ranks; ``published``: carried over from another; ``datasheet``: physics alone."""
    relative_standard_error: float
    stack: str
    """The measured stack that the prices rest on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be priced and which curves are preferred."""

    collective: str
    cluster: Cluster
    nccl_version: str | None
    stack: str


def priced(wanted: Wanted, sizes_bytes: Floats, wire: Wire, stacks: Sequence[CollectiveStack]) -> CollectivePrices:
    """Prices over one wire, in the shape of ``sizes_bytes``.

    **Model**: the chosen stack's. A broadcast that nobody timed is an all_gather with as many bytes on the wire. Below the least size that
    a stack holds, the price goes over to that of the stack chosen among those that hold small sizes.

    Raises:
        InputError: nothing was measured for this kind of wire.
    """
    stack = choose_stack(wanted, wire, stacks)
    positive = np.maximum(sizes_bytes, 1.0)
    stand_in = _STANDS_FOR.get(wanted.collective)
    if wire.scope == "intra" and stand_in is not None and not stack.curves_of(wanted.collective, wire.scope):
        factor = bus_factor(wanted.collective, wire.num_ranks) / bus_factor(stand_in, wire.num_ranks)
        prices = priced(replace(wanted, collective=stand_in), positive * factor, wire, stacks)
        return replace(prices, evidence="datasheet" if prices.evidence == "datasheet" else "published")
    own = _by_stack(wanted, positive, wire, stack)
    least = _least_log2(stack, wanted.collective, wire)
    if wire.scope == "inter" or least <= _SMALL_LOG2 or not np.isfinite(least) or not (positive < 2.0**least).any():
        return own
    small = [one for one in stacks if wire.scope in one.automatic and _least_log2(one, wanted.collective, wire) <= _SMALL_LOG2]
    if not small:
        return own
    other = choose_stack(replace(wanted, stack=""), wire, small)
    edge = np.array([2.0**least])
    level = log(float(_by_stack(wanted, edge, wire, stack).seconds[0] / _by_stack(wanted, edge, wire, other).seconds[0]))
    weight = np.clip(1.0 - (least - np.log2(positive)) / _FADE_OCTAVES, 0.0, 1.0)
    below = _by_stack(wanted, positive, wire, other).seconds * np.exp(level * weight)
    return replace(own, seconds=np.where(positive < edge, below, own.seconds))


def _least_log2(stack: CollectiveStack, collective: str, wire: Wire) -> float:
    """Least size that the stack holds on a like wire; infinite without a curve."""
    curves = _like_curves(stack, collective, wire)
    return min((curve.log2_bytes[0] for curve in curves), default=float("inf"))


def _like_curves(stack: CollectiveStack, collective: str, wire: Wire) -> tuple[CollectiveCurve, ...]:
    """Curves of the collective whose ranks had the same kind of wire as the machine has for this number of ranks."""
    curves = stack.curves_of(collective, wire.scope)
    if wire.scope == "inter":
        return curves
    fabric = stack.machine.fabric
    return tuple(curve for curve in curves if fabric.has_nvlink(curve.num_ranks) == fabric.has_nvlink(wire.num_ranks))


def _by_stack(wanted: Wanted, sizes_bytes: Floats, wire: Wire, stack: CollectiveStack) -> CollectivePrices:
    own_lines = _lines(stack, wanted.collective, wire)
    nvlink = wire.scope == "intra" and wanted.cluster.fabric.has_nvlink(wire.num_ranks)
    slower = latency_ratio(wanted.cluster.device, stack.machine.device) if nvlink else 1.0
    lines = tuple(replace(line, base_s=slower * line.base_s, step_s=slower * line.step_s) for line in own_lines)
    seconds = physical_seconds(lines, wanted.collective, sizes_bytes, wire)
    curves = _like_curves(stack, wanted.collective, wire)
    if not curves:
        return CollectivePrices(seconds=seconds, evidence="datasheet", relative_standard_error=PHYSICAL_ERROR, stack=stack.name)
    ratio, error, exact = _ratio(curves, np.log2(sizes_bytes / slower), wire, stack)
    same = stack.machine.device == wanted.cluster.device and exact
    carried = NEAR_ERROR if _same_link(wire, wanted.cluster, stack.machine) else FAR_ERROR
    return CollectivePrices(
        seconds=np.asarray(seconds * np.exp(ratio)), evidence="measured" if same else "published",
        relative_standard_error=error if same else hypot(error, carried), stack=stack.name,
    )  # fmt: skip


def _same_link(wire: Wire, cluster: Cluster, machine: Cluster) -> bool:
    if wire.scope == "inter":
        return (
            cluster.network is not None
            and machine.network is not None
            and cluster.network.link.name == machine.network.link.name
        )
    if not cluster.fabric.has_nvlink(wire.num_ranks):
        return cluster.fabric.host_link.name == machine.fabric.host_link.name
    return cluster.fabric.link.name == machine.fabric.link.name


def choose_stack(wanted: Wanted, wire: Wire, stacks: Sequence[CollectiveStack]) -> CollectiveStack:
    """The measured stack that prices a collective: the one asked for if it holds it.

    Else, in this order: like fabric, this collective measured, nearest rate, like topology, this device, this version, newest.

    Raises:
        InputError: nothing was measured for this kind of wire.
    """
    asked = [stack for stack in stacks if stack.name == wanted.stack and stack.curves_of(wanted.collective, wire.scope)]
    if asked:
        return asked[0]
    usable = [
        stack for stack in stacks if wire.scope in stack.automatic and any(scope == wire.scope for _, scope in stack.lines)
    ]
    if not usable:
        raise InputError(
            source="collective", key=wanted.collective, value=wire.scope, rule="no measured stack", remedy="add curves to data/collectives"
        )  # fmt: skip

    def distance(stack: CollectiveStack) -> tuple[float, ...]:
        machine = stack.machine
        rate = abs(log(machine_rate(wire, machine) / wire.bytes_per_s))
        version = tuple(-int(part) for part in stack.nccl_version.split(".") if part.isdigit())
        other = wanted.nccl_version is not None and stack.nccl_version != wanted.nccl_version
        return (
            _unlikeness(wire, wanted.cluster, machine), not _like_curves(stack, wanted.collective, wire),
            ("all_reduce", wire.scope) not in stack.lines and (wanted.collective, wire.scope) not in stack.lines, rate if rate > _SAME_RATE else 0.0,
            machine.fabric.topology != wanted.cluster.fabric.topology, machine.device != wanted.cluster.device, other, not version, *version,
        )  # fmt: skip

    return min(usable, key=distance)


def _unlikeness(wire: Wire, cluster: Cluster, machine: Cluster) -> float:
    """0 for the same kind of wire (NVLink against PCIe; any network is like another)."""
    if wire.scope == "inter":
        return 0.0
    return float(cluster.fabric.has_nvlink(wire.num_ranks) != machine.fabric.has_nvlink(wire.num_ranks))


def machine_rate(wire: Wire, machine: Cluster) -> float:
    """Rate of the measured machine's wire for as many ranks."""
    if wire.scope == "inter":
        assert machine.network is not None
        ranks = min(wire.ranks_per_domain, machine.devices_per_node)
        return CommGroup(num_ranks=ranks * wire.count, ranks_per_node=ranks).network_bytes_per_s(machine)
    return machine.fabric.wire_bytes_per_s(wire.num_ranks)


def _lines(stack: CollectiveStack, collective: str, wire: Wire) -> tuple[ProtocolLine, ...]:
    """The stack's lines for a collective, else those of its first other one."""
    own = stack.lines.get((collective, wire.scope))
    if own is not None:
        return own
    return next(lines for (_, of_scope), lines in sorted(stack.lines.items()) if of_scope == wire.scope)


def _ratio(
    curves: Sequence[CollectiveCurve], log2_bytes: Floats, wire: Wire, stack: CollectiveStack
) -> tuple[Floats, float, bool]:
    """``log(seconds / physical)``, its standard error, and whether this very number of ranks was measured.

    Sizes are shifted to those that take as long on the measured machine's wire.
    """
    shifted = log2_bytes + np.log2(machine_rate(wire, stack.machine) / wire.bytes_per_s)
    exact = [curve for curve in curves if curve.num_ranks == wire.num_ranks and curve.num_domains in {1, wire.count}]
    if exact:
        return exact[0].ratio(shifted), exact[0].relative_standard_error, True
    nearest = min({curve.num_domains for curve in curves}, key=lambda count: abs(log(count / wire.count)))
    of_count = [curve for curve in curves if curve.num_domains in {1, nearest}]
    ranks = np.log2([curve.num_ranks for curve in of_count])
    at = float(np.clip(np.log2(wire.num_ranks), ranks[0], ranks[-1]))
    above = min(int(np.searchsorted(ranks, at)), len(of_count) - 1)
    below = above if ranks[above] == at else above - 1
    span = float(ranks[above] - ranks[below])
    weight = 1.0 if above == below else (at - float(ranks[below])) / span
    ratio = (1 - weight) * of_count[below].ratio(shifted) + weight * of_count[above].ratio(shifted)
    return np.asarray(ratio), max(of_count[below].relative_standard_error, of_count[above].relative_standard_error), False
