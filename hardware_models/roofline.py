"""The price of a kernel from first principles, where nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from hardware_models.curves import Floats, work_flops
from hardware_models.kernel import Kernel
from hardware_models.profile import DeviceProfile


def roofline_seconds(kernels: Sequence[Kernel], profile: DeviceProfile) -> Floats:
    """Seconds of kernels of any class; shape ``(len(kernels),)``.

    **Model**: ``t = launch + max(q / (peak * eff_f), bytes / (bandwidth * eff_b))`` with q the FLOPs after tile and wave
    quantization (`quantized_flops`) and efficiencies by class from the device's data file.

    **Source**: Williams, Waterman and Patterson 2009 (roofline); efficiencies: `Efficiency.source`.

    **Not modelled**: caches, the ramp along short reductions, clocks under power limits.

    Raises:
        InputError: a kernel computes in a dtype for which the device has no peak.
    """
    seconds = np.empty(len(kernels), dtype=np.float64)
    for position, kernel in enumerate(kernels):
        efficiency = profile.efficiency(kernel.kernel_class)
        memory_s = kernel.moved_bytes / (profile.memory_bandwidth_bytes_per_s * efficiency.bandwidth)
        flops = quantized_flops(kernel, profile)
        compute_s = flops / (profile.peak(kernel.dtype) * efficiency.flops) if flops else 0.0
        seconds[position] = profile.launch_s + max(compute_s, memory_s)
    return seconds


def quantized_flops(kernel: Kernel, profile: DeviceProfile) -> float:
    """FLOPs that a device spends in whole tiles and whole waves: at least the kernel's own.

    **Model**: an ``m x n`` output is cut into ``ceil(m/tile_m) ceil(n/tile_n)`` tiles a batch entry; ``num_multiprocessors`` of them run
    in a wave and a wave takes as long as one tile. Fewer tiles than multiprocessors split the summed axis ``floor(multiprocessors/tiles)`` ways.

    **Source**: NVIDIA, Matrix multiplication background user's guide, sections on tile and wave quantization.

    **Not modelled**: the library's choice among tile shapes; stream-k.
    """
    flops = work_flops(kernel)
    output = _output(kernel)
    if not profile.num_multiprocessors or output is None:
        return flops
    batch, m, n = output
    tile_m, tile_n = profile.tile
    num_tiles = batch * ceil(m / tile_m) * ceil(n / tile_n)
    waves = ceil(num_tiles / profile.num_multiprocessors)
    splits = max(1, profile.num_multiprocessors // num_tiles)
    filled = waves * profile.num_multiprocessors * tile_m * tile_n / splits
    return flops * max(1.0, filled / (batch * m * n))


def _output(kernel: Kernel) -> tuple[int, int, int] | None:
    """Batch, rows and columns of a product's output; None for what is no product."""
    if kernel.kernel_class == "gemm":
        m, n, _k = kernel.shape
        return 1, m, n
    if kernel.kernel_class == "batched_gemm":
        batch, m, n, _k = kernel.shape
        return batch, m, n
    return None
