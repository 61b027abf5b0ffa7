"""A fitted curve: seconds of one group of operators over shape, interpolated inside what was measured, physical outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hardware_models.kernel import COPY_BYTES, Kernel, on_tensor_cores, row_bytes
from hardware_models.units import DTYPE_BYTES

Floats = NDArray[np.float64]

_ALIGNED_BYTES = 64
"""A row that is no multiple of this many bytes (a cache line, a vector register) is written unaligned."""
_FFT_FLOPS = 5.0
"""Operations of a complex transform per element and binary digit of its length (Cooley and Tukey 1965)."""
TERMS = ("launch_s", "s_per_flop", "s_per_read_byte", "s_per_written_byte", "s_per_spilled_byte", "s_per_product")


def work_flops(kernel: Kernel) -> float:
    """Arithmetic that the price rests on.

    **Model**: the kernel's FLOPs; for causal attention the part that is not masked, ``(kv_len + 1) / (2 kv_len)`` of them, since fused
    kernels skip masked blocks; for a transform, whose FLOPs the project's definition leaves out, ``5 n log2 n`` (half for a real one).
    """
    if kernel.kernel_class == "attention" and kernel.shape[-1]:
        kv_len = kernel.shape[4]
        return kernel.flops * (kv_len + 1) / (2 * kv_len)
    if kernel.kernel_class != "fft":
        return float(kernel.flops)
    batch, *lengths = kernel.shape
    size = prod(lengths)
    real = 1.0 if kernel.op == "_fft_c2c" else 0.5
    return real * _FFT_FLOPS * batch * size * float(np.log2(max(2, size)))


def _gemm(kernel: Kernel) -> tuple[float, ...]:
    m, n, k = kernel.shape
    return (*_logs(m, n, k), _unaligned(n, kernel.dtype) + _uncopyable(kernel))


def _batched_gemm(kernel: Kernel) -> tuple[float, ...]:
    return (*_logs(*kernel.shape), *((_uncopyable(kernel),) if on_tensor_cores(kernel) else ()))


def _attention(kernel: Kernel) -> tuple[float, ...]:
    batch, heads, _kv_heads, query_len, kv_len, head_dim, causal = kernel.shape
    return (*_logs(batch * heads, query_len, kv_len, head_dim), 4.0 * causal)


def _convolution(kernel: Kernel) -> tuple[float, ...]:
    batch, in_channels, out_channels, groups, kernel_elements, positions, stride = kernel.shape
    return _logs(batch * positions, in_channels // groups, out_channels // groups, kernel_elements, stride**2, groups)


def _fft(kernel: Kernel) -> tuple[float, ...]:
    """With how far the size is from a power of two, whose passes are the fastest: 0 is one, 1 has other factors, 2 mostly others."""
    batch, *lengths = kernel.shape
    size = prod(lengths)
    twos = size & -size
    return (*_logs(batch, size), 1.0 * len(lengths), 2.0 if twos * twos < size else 1.0 if twos < size else 0.0)


def _shape(kernel: Kernel) -> tuple[float, ...]:
    return _logs(*kernel.shape)


def _traffic(kernel: Kernel) -> tuple[float, ...]:
    return _logs(kernel.moved_bytes)


def _logs(*values: int) -> tuple[float, ...]:
    return tuple(float(np.log2(max(1, value))) for value in values)


def _unaligned(columns: int, dtype: str) -> float:
    return 2.0 if columns * DTYPE_BYTES.get(dtype, 1) % _ALIGNED_BYTES else 0.0


def _uncopyable(kernel: Kernel) -> float:
    """Halvings by which rows of a product on tensor cores miss the 16 bytes of an asynchronous copy."""
    return float(np.log2(COPY_BYTES / min(row_bytes(kernel), COPY_BYTES))) if on_tensor_cores(kernel) else 0.0


FEATURES: Mapping[str, Callable[[Kernel], tuple[float, ...]]] = MappingProxyType(
    {
        "gemm": _gemm, "batched_gemm": _batched_gemm, "attention": _attention, "convolution": _convolution, "fft": _fft, "normalization": _shape,
        "softmax": _shape, "reduction": _shape, "embedding": _shape, "pointwise": _traffic, "optimizer": _traffic, "copy": _traffic,
    }
)  # fmt: skip
"""Coordinates of a kernel in its class's space: binary logarithms of the sizes that its speed depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Measured seconds of a group of operators at points, and how to go between and beyond them.

    **Model**: ``log t = log p(kernel) + g(features)``. ``p = launch_s + s_per_flop * flops + s_per_read_byte * read + s_per_written_byte *
    written + s_per_spilled_byte * max(0, read + written - cache_bytes) + s_per_product * products`` is the physical part with coefficients >= 0; ``g`` is the mean of
    a Gaussian process (Matern 3/2, one length scale in octaves) through the logarithmic residuals at the points, so it interpolates
    inside the grid and fades to ``p`` a few octaves beyond it.

    **Source**: Rasmussen and Williams 2006, equations 2.25 (mean), 4.17 (kernel), 5.12 (leave-one-out).
    """

    kernel_class: str
    group: str
    """Operator whose timings these are."""
    dtype: str
    evidence: Literal["measured", "published", "datasheet"]
    points: tuple[tuple[float, ...], ...]
    """Features of the measured kernels, sorted, no two alike."""
    seconds: tuple[float, ...]
    physical_seconds: tuple[float, ...]
    """``p`` at the points."""
    cache_bytes: int
    """Traffic beyond this does not stay in the last-level cache."""
    coefficients: tuple[float, ...]
    """In the order of `TERMS`."""
    length_scale: float
    noise: float
    """Standard deviation of one measured logarithm, relative to that of ``g``."""
    relative_standard_error: float
    """Root mean square of the leave-one-out residuals, weighted by the square root of the times."""
    median_error: float
    """Median of their magnitudes."""

    def seconds_of(self, kernels: Sequence[Kernel]) -> Floats:
        """Seconds of kernels that this curve covers; shape ``(len(kernels),)``."""
        features = FEATURES[self.kernel_class]
        at = np.array([features(kernel) for kernel in kernels], dtype=np.float64)
        base = physical_terms(kernels, self.cache_bytes) @ np.array(self.coefficients)
        points, weights = _process(self)
        return np.asarray(base * np.exp(covariance(at, points, self.length_scale) @ weights), dtype=np.float64)


def physical_terms(kernels: Sequence[Kernel], cache_bytes: int) -> Floats:
    """The factors of `TERMS`, shape ``(len(kernels), len(TERMS))``; a batched product counts its products, one by one on some devices."""
    rows = [
        (
            1.0,
            work_flops(kernel),
            float(kernel.read_bytes),
            float(kernel.written_bytes),
            float(max(0, kernel.moved_bytes - cache_bytes)),
            float(kernel.shape[0]) if kernel.kernel_class == "batched_gemm" else 0.0,
        )
        for kernel in kernels
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, len(TERMS))


def covariance(a: Floats, b: Floats, length_scale: float) -> Floats:
    """Matern 3/2 of the distances between rows; shapes ``(p, d)``, ``(q, d)`` -> ``(p, q)``."""
    distance = np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=-1)) * (np.sqrt(3.0) / length_scale)
    return np.asarray((1.0 + distance) * np.exp(-distance), dtype=np.float64)


@lru_cache(maxsize=512)
def _process(curve: Curve) -> tuple[Floats, Floats]:
    """Points and weights of the Gaussian process."""
    points = np.array(curve.points, dtype=np.float64)
    residuals = np.log(np.array(curve.seconds)) - np.log(np.array(curve.physical_seconds))
    gram = covariance(points, points, curve.length_scale) + curve.noise**2 * np.eye(len(points))
    return points, np.linalg.solve(gram, residuals)
