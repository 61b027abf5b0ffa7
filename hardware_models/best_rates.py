"""Seconds that kernels of some FLOPs are never below on a device, whatever their shapes: what a search may assume of kernels that it has not built."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hardware_models.curves import Floats
from hardware_models.kernel import Kernel
from hardware_models.physical_law import work
from hardware_models.pricers import (
    GridPricer,
    MisalignedPricer,
    ProductPricer,
    RooflinePricer,
    pricer_of,
    product_form,
)
from hardware_models.profile import DeviceProfile

_MEMORY_SHARPNESS = 3.0
"""Of `least_sustained_factor`: where its derivative changes sign."""


def best_rate_seconds(kernels: Sequence[Kernel], profile: DeviceProfile) -> Floats:
    """Seconds that `price` of any kernel of each one's class, operator and dtype with as many FLOPs is not below; shape ``(len(kernels),)``.

    **Model**: a grid's price is ``law * exp(r)`` with r at least its least node, and its law at least the FLOPs at the law's rate (`best_rate`); grouped and batched products are so many
    plain ones, and a batch's own roofline leaves out what nodes add; the roofline gives FLOPs at its efficiency of the peak.

    **Not counted**: traffic, launches, tiles and waves, misaligned rows: all of these only add. Kernels that a curve of this machine prices, and those without FLOPs, count 0.

    Raises:
        InputError: a kernel computes in a dtype for which the device has no peak.
    """
    return np.array([_least_seconds(kernel, profile) for kernel in kernels], dtype=np.float64)


def _least_seconds(kernel: Kernel, profile: DeviceProfile) -> float:
    pricer = pricer_of(kernel, profile)
    if isinstance(pricer, MisalignedPricer):
        pricer = pricer.aligned
    if isinstance(pricer, RooflinePricer):
        rate = profile.peak(kernel.dtype) * profile.efficiency(kernel.kernel_class).flops if kernel.flops else 1.0
        return kernel.flops / rate if kernel.kernel_class in {"gemm", "batched_gemm"} else 0.0
    if isinstance(pricer, ProductPricer):
        count, *shape = product_form(kernel)
        flops = count * float(work("product", np.array([shape], dtype=np.int64))[0][0])
        return flops / max(best_rate(pricer.grid), pricer.grid.curve.law.flops_per_s)
    if isinstance(pricer, GridPricer):
        flops = float(work(pricer.curve.sizes, np.array([kernel.shape], dtype=np.int64))[0][0])
        return flops / best_rate(pricer)
    return 0.0


def best_rate(pricer: GridPricer) -> float:
    """Most FLOP/s that a grid's prices amount to, of FLOPs that are executed."""
    return (
        pricer.curve.law.flops_per_s * float(np.exp(-pricer.curve.log_ratios.min())) / least_sustained_factor(pricer.sustained)
    )


def least_sustained_factor(sustained: float) -> float:
    """Least of ``(c^4 + m^4)^(1/4) (1 + k c^4 / (c^4 + m^4)) / c`` over times c of arithmetic and m of traffic, with k = 1 / sustained - 1.

    With ``y = 1 + (m/c)^4 >= 1`` it is ``y^(1/4) + k y^(-3/4)``, which grows where ``y > 3 k``.
    """
    slower = 1.0 / sustained - 1.0
    least = max(1.0, _MEMORY_SHARPNESS * slower)
    return float(least**0.25 + slower * least**-0.75)
