"""What a device is asked to do: one kernel, with all that its price depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

KernelClass = Literal[
    "gemm", "batched_gemm", "attention", "convolution", "fft",
    "normalization", "softmax", "pointwise", "reduction", "embedding", "optimizer", "copy",
]  # fmt: skip
KERNEL_CLASSES: tuple[str, ...] = get_args(KernelClass)
COPY_BYTES, SECTOR_BYTES = 16, 32
"""What one asynchronous copy moves, and what a GPU's cache hands out at once: NVIDIA, CUDA C++ programming guide, sections on asynchronous copies and device memory accesses."""
_TENSOR_CORE_BYTES = {"float16": 2, "bfloat16": 2}
_PRODUCTS = frozenset({"gemm", "batched_gemm"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel launch, untimed.

    ``shape`` by class (all positive integers):

    - gemm ``(m, n, k)``: C[m, n] = A[m, k] B[k, n]; batched_gemm ``(batch, m, n, k)``;
    - attention ``(batch, heads, kv_heads, query_len, kv_len, head_dim, causal)``, causal 0 or 1;
    - convolution ``(batch, in_channels, out_channels, groups, kernel_elements, output_positions, stride)``, positions and
      kernel elements multiplied over the spatial axes, ``op`` one of convolution, convolution_backward_input,
      convolution_backward_weight;
    - fft ``(batch, length, ...)``: the transformed lengths of the real or complex signal, ``op`` one of _fft_r2c, _fft_c2r, _fft_c2c;
    - normalization, softmax, reduction ``(rows, columns)``: the axis that is reduced has ``columns`` elements;
    - embedding ``(indices, width, vocabulary)``;
    - pointwise, optimizer, copy ``(elements,)`` written.

    ``flops`` follows the project's definition (2mnk a product, 8mnk complex, attention in full, convolutions alike, all else 0).
    ``read_bytes`` and ``written_bytes`` are the least traffic: each operand once.
    """

    kernel_class: KernelClass
    op: str
    """ATen operator without namespace and overload, for example ``addmm`` or ``gelu_backward``."""
    shape: tuple[int, ...]
    dtype: str
    """torch's name of the operands' dtype without ``torch.``, for example ``float32``."""
    flops: int
    read_bytes: int
    written_bytes: int

    @property
    def moved_bytes(self) -> int:
        """Least traffic to and from memory."""
        return self.read_bytes + self.written_bytes


def on_tensor_cores(kernel: Kernel) -> bool:
    """Whether a kernel is a product whose rows tensor cores take as they lie; grouped products pad theirs."""
    return kernel.kernel_class in _PRODUCTS and kernel.dtype in _TENSOR_CORE_BYTES and kernel.op != "_grouped_mm"


def row_bytes(kernel: Kernel) -> int:
    """The greatest power of two, in bytes, that divides the rows of a product's operands and result; at most `SECTOR_BYTES`.

    **Model**: rows have n or k elements; m counts rows, which lie at any address. Of a weight gradient, whose rows are m and n wide, k is the tokens: a width m that is odd is not seen.

    Args:
        kernel: for which `on_tensor_cores` holds.
    """
    n, k = kernel.shape[-2:]
    own = (n | k) * _TENSOR_CORE_BYTES[kernel.dtype]
    return min(own & -own, SECTOR_BYTES)
