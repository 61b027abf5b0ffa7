"""Timings to stacks: protocol lines by alternating least squares, then smoothed residuals as knots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from hardware_models.fit import nonnegative_least_squares
from hardware_models.network.cluster import CommGroup
from hardware_models.network.collective_algorithms import Floats, ProtocolLine, Scope, Wire, num_steps, physical_seconds
from hardware_models.network.collective_curves import CollectiveCurve, CollectiveStack
from hardware_models.network.collective_smoothing import Point, smooth, thin
from hardware_models.network.collectives import wire_of
from hardware_models.network.network_tables import (
    BANDWIDTH_ONLY,
    COPIES,
    TimedCollective,
)
from hardware_models.network.platforms import group_of, platform_cluster, stack_name
from hardware_models.units import KIB, MIB

_PROTOCOLS_FROM = (0, 64 * KIB, 4 * MIB)
"""Sizes at which the lines start the fit: about where NCCL leaves LL and LL128 for Simple."""
_ROUNDS = 12
"""Rounds of fitting and reassigning; the assignment settles well before."""
_DATE = "2026-11-23"
"""Day on which the published tables were read."""
_FEWEST_ROWS = 3
"""A line needs as many rows as it has parameters."""
_BIN_OCTAVES = 1 / 32
"""Rows of a dense table are averaged over as much of an octave."""
_DENSE_ROWS = 200
"""More rows of one curve are averaged in bins and smoothed by the bins' broken line alone."""
_TOLERANCE = 0.01
"""Thinning of knots moves no price by more."""
_NVLS_RANKS = 8
"""The tables show in-switch reduction taken over rings from eight ranks on."""
_AUTOMATIC: Mapping[str, tuple[Scope, ...]] = MappingProxyType(
    {
        "dgx-a100-80gb-vtrain": ("intra",), "dgx1-v100-vtrain": ("intra",), "hgx-h100-vidur": ("intra", "inter"),
        "a100-sxm-2x100gbe-vidur": ("intra",), "a100-sxm-800gbps-ml-engineering": ("inter",),
    }
)  # fmt: skip
"""Stacks beside those of nccl-tests that price clusters unasked. The others are priced only for their own rows: slow networks, launches
from Python that hide small sizes, in-switch reduction between nodes."""
_PCIE_LATENCY = 5.7 / 3.4
"""Latency of a hop over PCIe relative to NVLink, Simple protocol, ring (LL: 1.0 / 0.6, the same): NVIDIA/nccl src/graph/tuning.cc."""
_LL_BYTES = 2.0
"""Protocol LL sends a flag of 4 bytes with every 4 bytes of data (NVIDIA/nccl documentation of NCCL_PROTO)."""
_PCIE_REFERENCE = ("dgx-a100-80gb-nccl-2.27.3", "a100-pcie-pairs-vidur")
"""Stacks from which lines for PCIe are put together: latency from the first, bandwidth from the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRow:
    """A row with its stack and wire."""

    row: TimedCollective
    stack: str
    wire: Wire
    family: str

    @property
    def curve(self) -> str:
        """Name of the row's curve."""
        return f"{self.stack}/{self.row.collective}/{self.wire.scope}/{self.wire.count}/{self.wire.num_ranks}"


def fit_stacks(rows: Sequence[TimedCollective], errors: Mapping[str, Floats] | None = None) -> tuple[CollectiveStack, ...]:
    """Stacks fitted to rows.

    Args:
        rows: collectives; copies are left out.
        errors: held-out logarithmic residuals by curve, from `cross_validate`; without them the curves' errors are 0.
    """
    placed = place(rows)
    by_stack: dict[str, list[PlacedRow]] = defaultdict(list)
    for one in placed:
        by_stack[one.stack].append(one)
    lines = {name: _fit_all_lines(of_stack) for name, of_stack in by_stack.items()}
    knots = _knots(placed, lines)
    stacks = tuple(_stack(name, by_stack[name], lines[name], knots, errors or {}) for name in sorted(by_stack))
    return (*stacks, *_pcie_stack(stacks))


def place(rows: Iterable[TimedCollective]) -> list[PlacedRow]:
    """Collectives on their machines; copies and bandwidths of unknown size are left out."""
    placed = []
    for row in rows:
        if row.collective in COPIES or row.stack.endswith(BANDWIDTH_ONLY):
            continue
        cluster = platform_cluster(row.platform)
        group = group_of(row, cluster)
        inside = group.domains(cluster)[0] == 1
        wire = wire_of(group, cluster, inside=inside)
        family = f"{cluster.fabric.link.name}/{wire.scope}" if row.stack.startswith("nccl-") else stack_name(row)
        placed.append(PlacedRow(row=row, stack=stack_name(row), wire=wire, family=family))
    return placed


def _fit_all_lines(rows: Sequence[PlacedRow]) -> dict[tuple[str, Scope], tuple[ProtocolLine, ...]]:
    groups: dict[tuple[str, Scope], list[PlacedRow]] = defaultdict(list)
    for one in rows:
        groups[one.row.collective, one.wire.scope].append(one)
    return {key: _fit_lines(key[0], groups[key]) for key in sorted(groups)}


def _fit_lines(collective: str, rows: Sequence[PlacedRow]) -> tuple[ProtocolLine, ...]:
    """The least of up to three lines through rows, and one in-switch line, by alternating assignment and least squares."""
    in_switch = [
        one for one in rows if one.wire.in_network_reduction and collective == "all_reduce" and one.wire.count >= _NVLS_RANKS
    ]
    top = [one for one in in_switch if one.row.bytes >= max(_PROTOCOLS_FROM)]
    seconds = np.array([one.row.seconds for one in rows])
    sizes = np.array([one.row.bytes for one in rows])
    terms = np.array([_terms(collective, one) for one in rows])
    eligible = np.array([one not in top for one in rows]) if top else np.ones(len(rows), dtype=bool)
    assigned = np.searchsorted(np.array(_PROTOCOLS_FROM), sizes, side="right") - 1
    columns = _determined(terms)
    best: list[Floats] = []
    best_error = np.inf
    for _ in range(_ROUNDS):
        fitted = [_least_squares(terms, seconds, eligible & (assigned == k), columns) for k in range(len(_PROTOCOLS_FROM))]
        found = [line for line in fitted if line is not None]
        if not found:
            found = [_least_squares(terms, seconds, eligible, columns, fewest=1)]  # type: ignore[list-item]
        times = np.maximum(np.stack([terms @ line for line in found]), np.finfo(np.float64).tiny)
        error = float(np.mean(np.abs(np.log(times.min(axis=0) / seconds))[eligible]))
        if error < best_error:
            best, best_error = found, error
        assigned = times.argmin(axis=0)
    lines = [_line("ring", line) for line in best]
    if top:
        nvls = np.array([[1.0, 0.0, one.row.bytes * one.wire.seconds_per_byte(collective, "nvls")] for one in top])
        solved = nonnegative_least_squares(nvls / np.array([[one.row.seconds] for one in top]), np.ones(len(top)))
        lines.append(_line("nvls", solved))
    return tuple(lines)


def _terms(collective: str, one: PlacedRow) -> tuple[float, float, float]:
    steps = num_steps(collective, one.wire.count, one.wire.scope)
    return 1.0, steps, one.row.bytes * one.wire.seconds_per_byte(collective)


def _determined(terms: Floats) -> list[int]:
    """Columns that rows can tell apart: latency goes to the steps where only one number of steps was measured."""
    return [0, 1, 2] if len(np.unique(terms[:, 1])) > 1 else [1, 2]


def _least_squares(
    terms: Floats, seconds: Floats, chosen: NDArray[np.bool_], columns: list[int], fewest: int = _FEWEST_ROWS
) -> Floats | None:
    """Coefficients >= 0 with the least relative error; None with too few rows."""
    if int(chosen.sum()) < fewest:
        return None
    relative = terms[chosen][:, columns] / seconds[chosen][:, None]
    solution = np.zeros(terms.shape[1])
    solution[columns] = nonnegative_least_squares(relative, np.ones(int(chosen.sum())))
    return solution


def _line(algorithm: str, values: Floats) -> ProtocolLine:
    base, step, slope = (float(value) for value in values)
    return ProtocolLine(algorithm="nvls" if algorithm == "nvls" else "ring", base_s=base, step_s=step, inverse_efficiency=slope)


def _knots(
    placed: Sequence[PlacedRow], lines: Mapping[str, Mapping[tuple[str, Scope], Sequence[ProtocolLine]]]
) -> dict[str, tuple[Floats, Floats]]:
    """Sizes and smoothed residuals of each curve."""
    points = _points(placed, lines)
    by_curve: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_curve[point.curve].append(point)
    dense = {name for name, of_curve in by_curve.items() if len(of_curve) > _DENSE_ROWS}
    known = [point for point in points if point.curve not in dense]
    wanted = sorted({replace(point, residual=0.0) for point in known}, key=lambda point: (point.curve, point.log2_bytes))
    smoothed = smooth(known, wanted) if known else np.zeros(0)
    result: dict[str, tuple[Floats, Floats]] = {}
    for name, of_curve in by_curve.items():
        if name in dense:
            sizes, values = _binned(of_curve)
        else:
            chosen = [position for position, point in enumerate(wanted) if point.curve == name]
            sizes, values = np.array([wanted[position].log2_bytes for position in chosen]), smoothed[chosen]
        result[name] = sizes, values
    return result


def _points(
    placed: Sequence[PlacedRow], lines: Mapping[str, Mapping[tuple[str, Scope], Sequence[ProtocolLine]]]
) -> list[Point]:
    points = []
    for one in placed:
        of_collective = lines[one.stack][one.row.collective, one.wire.scope]
        physical = physical_seconds(of_collective, one.row.collective, np.array([one.row.bytes]), one.wire)[0]
        points.append(
            Point(
                family=one.family, collective=one.row.collective, curve=one.curve, num_ranks=one.wire.num_ranks,
                log2_bytes=float(np.log2(one.row.bytes)), residual=float(np.log(one.row.seconds / physical)),
            )
        )  # fmt: skip
    return points


def _binned(points: Sequence[Point]) -> tuple[Floats, Floats]:
    """Medians over bins of the size."""
    bins: dict[int, list[Point]] = defaultdict(list)
    for point in points:
        bins[round(point.log2_bytes / _BIN_OCTAVES)].append(point)
    ordered = [bins[key] for key in sorted(bins)]
    sizes = np.array([np.mean([point.log2_bytes for point in one]) for one in ordered])
    return sizes, np.array([np.median([point.residual for point in one]) for one in ordered])


def _stack(
    name: str, rows: Sequence[PlacedRow], lines: Mapping[tuple[str, Scope], tuple[ProtocolLine, ...]],
    knots: Mapping[str, tuple[Floats, Floats]], errors: Mapping[str, Floats],
) -> CollectiveStack:  # fmt: skip
    first = rows[0].row
    by_curve: dict[str, list[PlacedRow]] = defaultdict(list)
    for one in rows:
        by_curve[one.curve].append(one)
    curves = []
    for key in sorted(by_curve):
        sizes, values = knots[key]
        kept = thin(sizes, values, _TOLERANCE)
        held_out = errors.get(key, np.zeros(1))
        wire = by_curve[key][0].wire
        curves.append(
            CollectiveCurve(
                collective=by_curve[key][0].row.collective, num_ranks=wire.num_ranks, num_domains=1 if wire.scope == "intra" else wire.count,
                log2_bytes=tuple(round(float(value), 4) for value in sizes[kept]), log_ratio=tuple(round(float(value), 4) for value in values[kept]),
                num_rows=len(by_curve[key]), relative_standard_error=round(float(np.sqrt(np.mean(held_out**2))), 4),
                median_error=round(float(np.median(np.abs(held_out))), 4),
            )
        )  # fmt: skip
    version = first.stack.removeprefix("nccl-") if first.stack.startswith("nccl-") else ""
    sources = sorted({one.row.source for one in rows})
    return CollectiveStack(
        name=name, cluster=platform_cluster(first.platform).name, nccl_version=version,
        automatic=("intra",) if version else _AUTOMATIC.get(name, ()),
        source=sources[0] + (f" and {len(sources) - 1} more" if len(sources) > 1 else ""), commit=first.commit, date=_DATE,
        lines=MappingProxyType(dict(lines)), curves=tuple(curves),
    )  # fmt: skip


def _pcie_stack(stacks: Sequence[CollectiveStack]) -> tuple[CollectiveStack, ...]:
    """Lines for fabrics of PCIe alone, where the tables hold no small messages: none without the stacks that they rest on.

    **Model**: LL and Simple (LL128 needs NVLink). Latency: NVLink's base, its hops times 1.68. Slope: Simple reaches the measured share
    of PCIe's rate; LL half of that, and no more bytes/s than over NVLink.
    """
    by_name = {stack.name: stack for stack in stacks}
    if not all(name in by_name and by_name[name].lines for name in _PCIE_REFERENCE):
        return ()
    nvlink, pairs = (by_name[name] for name in _PCIE_REFERENCE)
    measured = [
        curve for curve in pairs.curves_of("all_reduce", "intra") if not pairs.machine.fabric.has_nvlink(curve.num_ranks)
    ]
    if not measured:
        return ()
    ranks = measured[-1].num_ranks
    wire = wire_of(CommGroup(num_ranks=ranks, ranks_per_node=ranks), pairs.machine, inside=True)
    size = np.array([2.0 ** measured[-1].log2_bytes[-1]])
    seconds = physical_seconds(pairs.lines["all_reduce", "intra"], "all_reduce", size, wire) * np.exp(
        measured[-1].log_ratio[-1]
    )
    slope = float(seconds[0] / (size[0] * wire.seconds_per_byte("all_reduce")))
    slower = wire.bytes_per_s / nvlink.machine.fabric.wire_bytes_per_s(ranks)
    lines: dict[tuple[str, Scope], tuple[ProtocolLine, ...]] = {}
    for key, of_nvlink in nvlink.lines.items():
        rings = sorted((line for line in of_nvlink if line.algorithm == "ring"), key=lambda line: line.inverse_efficiency)
        slopes = (slope, max(_LL_BYTES * slope, rings[-1].inverse_efficiency * slower))
        lines[key] = tuple(
            replace(line, step_s=_PCIE_LATENCY * line.step_s, inverse_efficiency=value)
            for line, value in zip((rings[0], rings[-1]), slopes, strict=True)
        )
    stack = CollectiveStack(
        name="pcie-estimate", cluster="a100-pcie-no-bridge", nccl_version="", automatic=("intra",), source=f"latency of {nvlink.name} and rate of {pairs.name}",
        commit=nvlink.commit, date=nvlink.date, lines=MappingProxyType(lines), curves=(),
    )  # fmt: skip
    return (stack,)
