"""The price of a kernel from first principles, where nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot

import numpy as np
from numpy.typing import ArrayLike

from hardware_models.bandwidth_ramp import LaunchMode
from hardware_models.curves import Floats, work_flops
from hardware_models.kernel import Kernel
from hardware_models.light_kernels import LIGHT_CLASSES, Integers, light_seconds
from hardware_models.profile import DeviceProfile, Evidence

OPERATOR_ERROR = 0.15
"""Relative error of counting an operator's passes: not measured on a GPU; the selective recompute of Korthikanti et al. 2022, table 4 (1.3 ms of scaling,
softmax, dropout and two small products on an A100), is met to 6%."""
DEVIATIONS_OF_P90 = 1.64
"""Ninth decile of the magnitude of a normal deviation."""
MOST_SHARED_LENGTH = 8192
"""Complex numbers in single precision that 64 KiB of a block's shared memory hold: a longer transform goes through memory in between."""


def roofline_seconds(kernels: Sequence[Kernel], profile: DeviceProfile, *, launch: LaunchMode = "stream") -> Floats:
    """Seconds of kernels of any class; shape ``(len(kernels),)``. `roofline_seconds_of` says how.

    Raises:
        InputError: a kernel computes in a dtype for which the device has no peak.
    """
    groups: dict[tuple[str, str, str, int], list[int]] = {}
    for position, kernel in enumerate(kernels):
        groups.setdefault((kernel.kernel_class, kernel.op, kernel.dtype, len(kernel.shape)), []).append(position)
    seconds = np.empty(len(kernels), dtype=np.float64)
    for (kernel_class, op, dtype, _dims), positions in groups.items():
        chosen = [kernels[position] for position in positions]
        seconds[positions] = roofline_seconds_of(
            kernel_class, op, dtype, shapes=np.array([kernel.shape for kernel in chosen], dtype=np.int64), work=[work_flops(kernel) for kernel in chosen],
            read_bytes=[kernel.read_bytes for kernel in chosen], written_bytes=[kernel.written_bytes for kernel in chosen], profile=profile, launch=launch,
        )  # fmt: skip
    return seconds


def roofline_seconds_of(
    kernel_class: str,
    op: str,
    dtype: str,
    *,
    shapes: Integers,
    work: ArrayLike,
    read_bytes: ArrayLike,
    written_bytes: ArrayLike,
    profile: DeviceProfile,
    launch: LaunchMode = "stream",
) -> Floats:
    """Seconds of many kernels of one operator; shape ``(num,)``.

    **Model**: ``t = launch + max(q / (peak * eff_f), bytes / (bandwidth * eff_b))`` with q the FLOPs after tile and wave
    quantization and efficiencies by class from the device's data file; a launch from a stream adds ``light.stream_gap_s`` where the device's file has
    it. Kernels of memory-bound classes on such devices: `light_kernels.light_seconds`. Transforms move their bytes once for each of `transform_passes`.

    **Source**: Williams, Waterman and Patterson 2009 (roofline); efficiencies: `Efficiency.source`.

    **Not modelled**: caches of compute-bound kernels, the ramp along short reductions, clocks under power limits (`Sustained`).

    Args:
        kernel_class: as in `Kernel`.
        op: ATen operator.
        dtype: torch's name of the operands' dtype.
        shapes: as in `Kernel`, shape ``(num, dims of the class)``.
        work: FLOPs that the price rests on (`curves.work_flops`), shape ``(num,)``.
        read_bytes: least traffic, shape ``(num,)``.
        written_bytes: the same.
        profile: the device.
        launch: from a stream or inside a CUDA graph.

    Raises:
        InputError: the kernels compute, and the device has no peak for the dtype.
    """
    flops = np.asarray(work, dtype=np.float64)
    if profile.light is not None and kernel_class in LIGHT_CLASSES and not flops.any():
        return light_seconds(kernel_class, op, shapes, read_bytes, written_bytes, profile, launch=launch)
    efficiency = profile.efficiency(kernel_class)
    moved = np.asarray(read_bytes, dtype=np.float64) + np.asarray(written_bytes, dtype=np.float64)
    if kernel_class == "fft" and profile.num_multiprocessors:
        moved = moved * transform_passes(shapes)
    busy_s = moved / (profile.memory_bandwidth_bytes_per_s * efficiency.bandwidth)
    if flops.any():
        quantized = _quantized(kernel_class, shapes, flops, profile)
        busy_s = np.maximum(busy_s, quantized / (profile.peak(dtype) * efficiency.flops))
    gap_s = profile.light.stream_gap_s if profile.light is not None and launch == "stream" else 0.0
    return np.asarray(profile.launch_s + gap_s + busy_s, dtype=np.float64)


def transform_passes(shapes: Integers) -> Floats:
    """How often a GPU reads and writes the whole signal of a transform; shape ``(num,)``.

    **Model**: once for each transformed axis, and once more for each power of `MOST_SHARED_LENGTH` by which an axis is longer than what a block's shared memory holds.

    **Source**: cuFFT on a Titan V (653 GB/s), there and back, DTolm/VkFFT#10: 2048 x 256 x 256 double takes 45.9 ms, 3.5 times its traffic each way; 4096 x 4096 x 8
    single 29.2 ms, 4.4 times.

    **Not modelled**: lengths with great prime factors; small signals that stay in the cache between the passes.

    Args:
        shapes: ``(batch, length, ...)``, shape ``(num, 1 + transformed axes)``.
    """
    lengths = np.maximum(np.asarray(shapes, dtype=np.float64)[:, 1:], 2.0)
    return np.asarray(np.ceil(np.log2(lengths) / np.log2(MOST_SHARED_LENGTH)).sum(axis=1), dtype=np.float64)


def roofline_evidence(kernel_class: str, profile: DeviceProfile) -> tuple[Evidence, float]:
    """What the price of a class rests on, and its relative standard error.

    **Model**: for memory-bound classes on a device with ``light``: the error of the ramp (a ninth decile is 1.64 standard deviations) and, independent
    of it, that of the framework's kernels against the timed one; else the class's `Efficiency`.
    """
    if profile.light is not None and kernel_class in LIGHT_CLASSES:
        return profile.light.evidence, hypot(profile.light.p90_error / DEVIATIONS_OF_P90, OPERATOR_ERROR)
    efficiency = profile.efficiency(kernel_class)
    return efficiency.evidence, efficiency.relative_standard_error


def quantized_flops(kernel: Kernel, profile: DeviceProfile) -> float:
    """FLOPs that a device spends in whole tiles and whole waves: at least the kernel's own.

    **Model**: an ``m x n`` output is cut into ``ceil(m/tile_m) ceil(n/tile_n)`` tiles a batch entry; ``num_multiprocessors`` of them run
    in a wave and a wave takes as long as one tile. Fewer tiles than multiprocessors split the summed axis ``floor(multiprocessors/tiles)`` ways.

    **Source**: NVIDIA, Matrix multiplication background user's guide, sections on tile and wave quantization.

    **Not modelled**: the library's choice among tile shapes; stream-k.
    """
    shapes = np.array([kernel.shape], dtype=np.int64)
    return float(_quantized(kernel.kernel_class, shapes, np.array([work_flops(kernel)]), profile)[0])


def _quantized(kernel_class: str, shapes: Integers, flops: Floats, profile: DeviceProfile) -> Floats:
    """`quantized_flops` of many kernels of a class; what is no product stays as it is."""
    if not profile.num_multiprocessors or kernel_class not in {"gemm", "batched_gemm"}:
        return flops
    batch = shapes[:, 0] if kernel_class == "batched_gemm" else np.ones(len(shapes), dtype=np.int64)
    m, n = shapes[:, -3], shapes[:, -2]
    tile_m, tile_n = profile.tile
    num_tiles = batch * -(-m // tile_m) * -(-n // tile_n)
    waves = -(-num_tiles // profile.num_multiprocessors)
    splits = np.maximum(1, profile.num_multiprocessors // num_tiles)
    filled = waves * profile.num_multiprocessors * tile_m * tile_n / splits
    return np.asarray(flops * np.maximum(1.0, filled / (batch * m * n)), dtype=np.float64)
