"""Number formats of a plan: in which dtype tensors are stored, in which one products compute, and what casting costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from hardware_models.bandwidth_ramp import LaunchMode
from hardware_models.kernel import Kernel
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from hardware_models.units import DTYPE_BYTES
from simulator.lower import Price

STORED_AS: Mapping[str, str] = MappingProxyType(
    {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16"}
)
"""torch's name of parameters and activations, by the plan's precision. Eight-bit products take operands that are cast from bfloat16."""
PRODUCTS_IN: Mapping[str, str] = MappingProxyType({"tf32": "tf32", "fp8": "float8_e4m3fn"})
"""dtype of products where it is not that of the tensors."""
_EIGHT_BIT_PEAKS: Mapping[str, str] = MappingProxyType({"int8": "int8"})
"""Peaks of precisions that only traced models run in."""
_PRODUCTS = frozenset({"gemm", "batched_gemm", "convolution"})
_EIGHT_BIT_PRODUCTS = frozenset({"gemm"})
"""Attention and batched products stay in bfloat16 under fp8 recipes (NVIDIA, Transformer Engine user guide, FP8 primer)."""


def price_in(precision: str, profile: DeviceProfile, *, launch: LaunchMode = "stream") -> Price:
    """Prices of kernels whose products compute as a plan's precision says.

    **Model**: ``tf32``: float32 products, convolutions and batched products at the tensor cores' rate, bytes unchanged. ``fp8``: products in float8 with operands of a byte, and
    before each one a cast of its left operand (read two bytes, write one, and one more transposed): the right one is a weight, cast once a step, or was cast by another
    product. What a framework keeps in eight bits: `simulator.parallel.framework.operators_of`.

    **Not modelled**: scales and their history; layers that a recipe leaves in bfloat16.

    Args:
        precision: of `STORED_AS`.
        profile: of the device.
        launch: from a stream or inside a CUDA graph.
    """

    def priced(kernels: Sequence[Kernel]) -> NDArray[np.float64]:
        recast = [in_precision(kernel, precision) for kernel in kernels]
        seconds = price(recast, profile, launch=launch)
        casts = [
            place
            for place, (old, new) in enumerate(zip(kernels, recast, strict=True))
            if precision == "fp8" and old.dtype != new.dtype
        ]
        if casts:
            seconds[casts] += price([cast_kernel(kernels[place]) for place in casts], profile, launch=launch)
        return seconds

    return priced


def peak_dtype(compute: str) -> str:
    """The dtype whose peak ``mfu`` counts under a plan's precision."""
    return _EIGHT_BIT_PEAKS.get(compute) or PRODUCTS_IN.get(compute) or STORED_AS[compute]


def repriced_in(mode: str) -> str:
    """What prices must know of the mode in which a model was traced: its kernels have the dtypes in which they run, save that TF32 products read float32."""
    return mode if mode == "tf32" else "fp32"


def in_precision(kernel: Kernel, precision: str) -> Kernel:
    """The kernel that computes a product in a plan's precision; any other kernel is itself."""
    dtype = PRODUCTS_IN.get(precision)
    changes = _EIGHT_BIT_PRODUCTS if precision == "fp8" else _PRODUCTS
    if dtype is None or kernel.kernel_class not in changes or kernel.dtype != STORED_AS[precision]:
        return kernel
    return replace(kernel, dtype=dtype, read_bytes=kernel.read_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES[kernel.dtype])


def cast_kernel(kernel: Kernel) -> Kernel:
    """The cast of a product's left operand to eight bits, in both orders."""
    m, _n, k = kernel.shape
    elements = m * k
    return Kernel(
        kernel_class="copy",
        op="_to_copy",
        shape=(elements,),
        dtype=kernel.dtype,
        flops=0,
        read_bytes=elements * DTYPE_BYTES[kernel.dtype],
        written_bytes=2 * elements,
    )
