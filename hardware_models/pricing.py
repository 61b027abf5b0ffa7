"""Seconds of kernels on a device, and how well each is known. Pure; no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hardware_models.curves import Curve, Floats
from hardware_models.kernel import Kernel
from hardware_models.op_groups import group_of
from hardware_models.profile import EVIDENCE_KINDS, DeviceProfile, Evidence
from hardware_models.roofline import roofline_seconds
from hardware_models.units import DTYPE_BYTES

_BY_TRAFFIC = frozenset({"pointwise", "copy", "optimizer"})
"""Classes priced by bytes: a curve of one dtype holds for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a list of kernels costs together."""

    total_s: float
    relative_standard_error: float
    """Of ``total_s``."""
    evidence: tuple[Evidence, ...]
    """Kinds that it rests on, strongest first."""


def price(kernels: Sequence[Kernel], profile: DeviceProfile) -> Floats:
    """Seconds of each kernel on the device; shape ``(len(kernels),)``, all positive.

    **Model**: the curve of its operator (`curves.Curve`; `op_groups` says which) where the profile has one in its dtype, else the
    roofline (`roofline.roofline_seconds`).

    Raises:
        InputError: a kernel computes in a dtype for which the device has no peak.
    """
    seconds = np.empty(len(kernels), dtype=np.float64)
    for curve, positions in _by_curve(kernels, profile).items():
        chosen = [kernels[position] for position in positions]
        seconds[positions] = roofline_seconds(chosen, profile) if curve is None else curve.seconds_of(chosen)
    return seconds


def price_together(kernels: Sequence[Kernel], profile: DeviceProfile) -> Price:
    """The sum of the prices with its relative standard error and the kinds of evidence.

    **Model**: errors of kernels on one curve (or of one class on the roofline) are taken as fully correlated, those of different curves as
    independent: ``var = sum_c (r_c * sum_{k in c} t_k)^2``.
    """
    seconds = price(kernels, profile)
    kinds: set[Evidence] = set()
    spread: dict[object, float] = defaultdict(float)
    for curve, positions in _by_curve(kernels, profile).items():
        if curve is not None:
            kinds.add(curve.evidence)
            spread[curve.kernel_class, curve.group, curve.dtype] += curve.relative_standard_error * float(
                seconds[positions].sum()
            )
            continue
        kinds |= {"datasheet"}
        for position in positions:
            efficiency = profile.efficiency(kernels[position].kernel_class)
            kinds.add(efficiency.evidence)
            spread[efficiency.kernel_class] += efficiency.relative_standard_error * float(seconds[position])
    total_s = float(seconds.sum())
    error_s = float(np.sqrt(sum(value**2 for value in spread.values())))
    ordered: list[Evidence] = [kind for kind in EVIDENCE_KINDS if kind in kinds]
    return Price(total_s=total_s, relative_standard_error=error_s / total_s if total_s else 0.0, evidence=tuple(ordered))


def _by_curve(kernels: Sequence[Kernel], profile: DeviceProfile) -> Mapping[Curve | None, list[int]]:
    """Positions of the kernels by the curve that prices them; None for the roofline. In order of first use."""
    chosen: dict[tuple[str, str, str], Curve | None] = {}
    positions: dict[Curve | None, list[int]] = {}
    by_curve: dict[int, list[int]] = {}
    curves: dict[int, Curve | None] = {}
    for position, kernel in enumerate(kernels):
        key = kernel.kernel_class, kernel.op, kernel.dtype
        if key not in chosen:
            chosen[key] = curve_of(kernel, profile)
        curve = chosen[key]
        by_curve.setdefault(id(curve), []).append(position)
        curves[id(curve)] = curve
    for identity, rows in by_curve.items():
        positions.setdefault(curves[identity], []).extend(rows)
    return positions


def curve_of(kernel: Kernel, profile: DeviceProfile) -> Curve | None:
    """The curve that prices a kernel; None where only the roofline does."""
    index = _index(profile.curves)
    for dtype in _dtypes(kernel, profile):
        measured = index.get((kernel.kernel_class, dtype), {})
        group = group_of(kernel.op, kernel.kernel_class, frozenset(measured))
        if group is not None:
            return measured[group]
    return None


def _dtypes(kernel: Kernel, profile: DeviceProfile) -> tuple[str, ...]:
    """Dtypes whose curves hold for a kernel: its own, one of the same width and peak, any where bytes decide."""
    known = tuple(dict.fromkeys(curve.dtype for curve in profile.curves if curve.kernel_class == kernel.kernel_class))
    if kernel.kernel_class in _BY_TRAFFIC:
        return (kernel.dtype, *known)
    peaks = profile.peak_flops_per_s
    twins = tuple(
        other
        for other in known
        if DTYPE_BYTES.get(other) == DTYPE_BYTES.get(kernel.dtype)
        and other in peaks
        and peaks[other] == peaks.get(kernel.dtype)
    )
    return (kernel.dtype, *twins)


@lru_cache(maxsize=64)
def _index(curves: tuple[Curve, ...]) -> Mapping[tuple[str, str], Mapping[str, Curve]]:
    """Curves by class and dtype, then by operator."""
    index: dict[tuple[str, str], dict[str, Curve]] = {}
    for curve in curves:
        index.setdefault((curve.kernel_class, curve.dtype), {})[curve.group] = curve
    return index
