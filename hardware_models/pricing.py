"""Seconds of kernels on a device, and how well each is known. Pure; no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hardware_models.alignment import misaligned
from hardware_models.bandwidth_ramp import LaunchMode
from hardware_models.curves import Floats
from hardware_models.kernel import Kernel
from hardware_models.pricers import Pricer, pricer_of
from hardware_models.profile import EVIDENCE_KINDS, DeviceProfile, Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a list of kernels costs together."""

    total_s: float
    relative_standard_error: float
    """Of ``total_s``."""
    evidence: tuple[Evidence, ...]
    """Kinds that it rests on, strongest first."""


def price(
    kernels: Sequence[Kernel], profile: DeviceProfile, *, sustained: bool = True, stack: str = "", launch: LaunchMode = "stream"
) -> Floats:
    """Seconds of each kernel on the device; shape ``(len(kernels),)``, all positive. `pricers` says what each rests on.

    Args:
        kernels: to price.
        profile: of the device.
        sustained: as in a long step; False: each timed alone, on a cool board.
        stack: software whose curves are preferred where there are several; empty: the one nearest to torch.
        launch: from a stream or inside a CUDA graph.

    Raises:
        InputError: a kernel computes in a dtype for which the device has no peak.
    """
    seconds = np.empty(len(kernels), dtype=np.float64)
    for pricer, positions in _priced(kernels, profile, sustained=sustained, stack=stack, launch=launch):
        seconds[positions] = pricer.seconds_of([kernels[position] for position in positions])
    return seconds


def price_together(kernels: Sequence[Kernel], profile: DeviceProfile) -> Price:
    """The sum of the prices with its relative standard error and the kinds of evidence.

    **Model**: errors of kernels on one curve (or of one class on the roofline) are taken as fully correlated, those of different curves as
    independent: ``var = sum_c (r_c * sum_{k in c} t_k)^2``.
    """
    total_s = 0.0
    kinds: set[Evidence] = set()
    spread: dict[str, float] = defaultdict(float)
    for pricer, positions in _priced(kernels, profile, sustained=True, stack="", launch="stream"):
        seconds = float(pricer.seconds_of([kernels[position] for position in positions]).sum())
        total_s += seconds
        kinds.update(pricer.evidence)
        spread[pricer.name] += pricer.relative_standard_error * seconds
    error_s = float(np.sqrt(sum(value**2 for value in spread.values())))
    ordered: list[Evidence] = [kind for kind in EVIDENCE_KINDS if kind in kinds]
    return Price(total_s=total_s, relative_standard_error=error_s / total_s if total_s else 0.0, evidence=tuple(ordered))


def _priced(
    kernels: Sequence[Kernel], profile: DeviceProfile, *, sustained: bool, stack: str, launch: LaunchMode
) -> Iterator[tuple[Pricer, list[int]]]:
    """Positions of the kernels by what prices them, in order of first use."""
    positions: dict[tuple[object, ...], list[int]] = {}
    for position, kernel in enumerate(kernels):
        one_token = kernel.kernel_class == "attention" and kernel.shape[3] == 1
        key = (kernel.kernel_class, kernel.op, kernel.dtype, len(kernel.shape), one_token, misaligned(kernel))
        positions.setdefault(key, []).append(position)
    for rows in positions.values():
        yield pricer_of(kernels[rows[0]], profile, sustained=sustained, stack=stack, launch=launch), rows
