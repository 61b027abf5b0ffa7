"""What a device is asked to do: one kernel, with all that its price depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

KernelClass = Literal[
    "gemm", "batched_gemm", "attention", "convolution", "fft",
    "normalization", "softmax", "pointwise", "reduction", "embedding", "optimizer", "copy",
]  # fmt: skip
KERNEL_CLASSES: tuple[str, ...] = get_args(KernelClass)


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
