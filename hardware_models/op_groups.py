"""Which measured operator prices an operator that was not measured itself: one table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CLASS_DEFAULT: Mapping[str, str] = MappingProxyType(
    {
        "gemm": "mm", "batched_gemm": "bmm", "attention": "attention", "convolution": "convolution", "fft": "_fft_c2c",
        "normalization": "native_layer_norm", "softmax": "_softmax", "pointwise": "add", "reduction": "mean", "embedding": "embedding",
        "optimizer": "adamw", "copy": "_to_copy",
    }
)  # fmt: skip
"""The curve of a class's operators that the next table does not name."""

_STANDS_FOR: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # pointwise, one read
        "div": ("mul_scalar", "neg", "abs", "reciprocal", "clamp", "clamp_min", "clamp_max", "sign", "bitwise_not", "logical_not", "floor", "round"),
        "relu": ("hardtanh", "leaky_relu", "hardswish", "hardsigmoid"),
        "relu_": ("mul_", "div_", "neg_", "clamp_", "hardtanh_", "leaky_relu_", "masked_fill_"),
        # pointwise, two reads
        "mul": ("sub", "rsub", "maximum", "minimum", "eq", "ne", "lt", "gt", "le", "ge", "addcmul", "lerp", "native_dropout_backward"),
        "add_": ("sub_", "addcmul_", "addcdiv_", "lerp_", "addcdiv"),
        "threshold_backward": ("hardtanh_backward", "leaky_relu_backward", "hardswish_backward", "mse_loss_backward", "hardsigmoid_backward"),
        "where": ("masked_fill", "masked_scatter"),
        # transcendental
        "tanh": ("sin", "cos", "erf", "atan", "tan", "tanh_"),
        "silu": ("sigmoid", "elu", "softplus", "mish", "silu_", "sigmoid_", "elu_"),
        "exp": ("log", "expm1", "log1p", "exp_", "log_", "log2", "exp2", "log_sigmoid_forward"),
        "sqrt": ("rsqrt", "sqrt_", "rsqrt_"),
        "tanh_backward": ("sigmoid_backward",),
        "silu_backward": ("elu_backward", "softplus_backward", "mish_backward", "log_sigmoid_backward"),
        "bernoulli_": ("bernoulli", "native_dropout", "rand_like", "randn_like", "uniform_", "normal_", "randn", "rand"),
        "max_pool2d_with_indices": ("max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "upsample_bilinear2d", "upsample_nearest2d", "grid_sampler_2d"),
        "max_pool2d_with_indices_backward": (
            "avg_pool2d_backward", "avg_pool3d_backward", "upsample_bilinear2d_backward", "upsample_nearest2d_backward",
            "max_pool3d_with_indices_backward", "grid_sampler_2d_backward",
        ),
        # products
        "addmm": ("addmv", "_addmm_activation"),
        "mm": ("mv", "dot", "vdot"),
        "bmm": ("baddbmm", "_grouped_mm"),
        # normalization and softmax
        "native_layer_norm": ("_fused_rms_norm", "native_group_norm"),
        "native_layer_norm_backward": ("_fused_rms_norm_backward", "native_group_norm_backward"),
        "native_batch_norm": ("_native_batch_norm_legit", "_batch_norm_with_update", "cudnn_batch_norm"),
        "native_batch_norm_backward": ("batch_norm_backward", "cudnn_batch_norm_backward"),
        "_softmax": ("_safe_softmax", "logsumexp"),
        # copies
        "copy_": ("select_scatter", "slice_scatter", "as_strided_scatter"),
        "clone": ("_reshape_copy", "roll", "flip", "index", "gather", "repeat"),
        "cat": ("stack", "constant_pad_nd"),
        "zeros": (
            "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "fill_", "zero_", "arange", "linspace",
        ),
        "slice_backward": ("select_backward", "diagonal_backward", "unfold_backward"),
        "adamw": ("adam", "adamw8bit", "sgd"),
    }
)  # fmt: skip

MEASURED_AS: Mapping[str, str] = MappingProxyType({op: measured for measured, ops in _STANDS_FOR.items() for op in ops})
"""Operator -> the measured operator that prices it."""


def group_of(op: str, kernel_class: str, measured: frozenset[str]) -> str | None:
    """The measured operator whose curve prices ``op``: itself, its stand-in, the class's default; None if none was measured.

    Args:
        op: ATen operator.
        kernel_class: its class.
        measured: operators of the class that have curves.
    """
    for candidate in (op, MEASURED_AS.get(op, ""), CLASS_DEFAULT[kernel_class]):
        if candidate in measured:
            return candidate
    return None
