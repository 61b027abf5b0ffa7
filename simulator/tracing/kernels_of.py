"""Which kernels one ATen operator launches: class, shape, FLOPs and least traffic, read off its arguments and results.

One rule per kind of operator. An operator without a rule is pointwise over its largest result. Operators whose results share
memory with their arguments and that change nothing (views) launch nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hardware_models.kernel import Kernel, KernelClass

Rule = Callable[[str, Sequence[Any], Any], list[Kernel]]

COMPLEX_PRODUCT_FACTOR = 4
"""A complex product is four real ones (8mnk instead of 2mnk)."""

_NOTHING = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided _local_scalar_dense is_nonzero lift_fresh set_ resize_".split()
)
_COPIES = frozenset(
    "clone copy_ _to_copy cat stack constant_pad_nd slice_backward select_backward slice_scatter select_scatter diagonal_backward fill_ "
    "zero_ zeros zeros_like ones ones_like full full_like new_zeros new_ones new_full scalar_tensor roll flip repeat index_select "
    "gather index tril triu arange linspace as_strided_scatter _reshape_copy unfold_backward".split()
)  # fmt: skip
_NORMALIZATIONS = frozenset(
    "native_layer_norm native_layer_norm_backward native_batch_norm native_batch_norm_backward _native_batch_norm_legit "
    "native_group_norm native_group_norm_backward _fused_rms_norm _fused_rms_norm_backward batch_norm_backward "
    "_batch_norm_with_update cudnn_batch_norm cudnn_batch_norm_backward".split()
)
_SOFTMAXES = frozenset("_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data logsumexp".split())
_REDUCTIONS = frozenset(
    "sum mean amax amin max min var var_mean std prod all any norm linalg_vector_norm cumsum topk sort argmax "
    "nll_loss_forward mse_loss".split()
)


def kernels_of(operator: Any, args: Sequence[Any], out: Any) -> list[Kernel]:
    """The kernels that ``out = operator(*args)`` launches, in order; empty for views and bare allocations.

    Args:
        operator: an ATen overload, as a dispatch mode sees it.
        args: positional arguments, tensors among them real or fake.
        out: its result.
    """
    name = operator.overloadpacket.__name__
    if name in _NOTHING or (_is_view(args, out) and not operator._schema.is_mutable):  # noqa: SLF001 - torch's only access to it
        return []
    rule = _RULES.get(name)
    if rule is not None:
        return rule(name, args, out)
    if name.startswith("_scaled_dot_product"):
        return _attention(operator, args, out)
    return _elementwise(name, args, out)


def _is_view(args: Sequence[Any], out: Any) -> bool:
    results = _tensors(out)
    known = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}  # noqa: SLF001 - torch's only storage identity
    return all(tensor.untyped_storage()._cdata in known for tensor in results)  # noqa: SLF001


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _kernel(kernel_class: KernelClass, op: str, shape: Sequence[int], args: Any, out: Any, *, flops: int = 0) -> Kernel:
    results = _tensors(out)
    operands = _tensors(args)
    dtype = dtype_name((results or operands)[0].dtype)
    if kernel_class in {"gemm", "batched_gemm"} and results[0].dtype.is_complex:
        flops *= COMPLEX_PRODUCT_FACTOR
    return Kernel(
        kernel_class=kernel_class, op=op, shape=tuple(max(1, int(size)) for size in shape), dtype=dtype, flops=int(flops),
        read_bytes=_num_bytes(operands), written_bytes=_num_bytes(results),
    )  # fmt: skip


def _mm(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    a, b = (args[1], args[2]) if name == "addmm" else (args[0], args[1])
    (m, k), n = a.shape, b.shape[1]
    return [_kernel("gemm", name, (m, n, k), args, out, flops=2 * m * n * k)]


def _eight_bit_mm(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    """A product of two operands in eight bits (scales apart), of the dtype of the first."""
    a, b = args[0], args[1]
    (m, k), n = a.shape, b.shape[1]
    return [replace(_kernel("gemm", name, (m, n, k), (a, b), out, flops=2 * m * n * k), dtype=dtype_name(a.dtype))]


def _bmm(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    a, b = (args[1], args[2]) if name == "baddbmm" else (args[0], args[1])
    batch, m, k = a.shape
    n = b.shape[2]
    return [_kernel("batched_gemm", name, (batch, m, n, k), args, out, flops=2 * batch * m * n * k)]


def _mv(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    matrix = next(tensor for tensor in _tensors(args) if tensor.ndim == 2)  # noqa: PLR2004 - a matrix
    m, k = matrix.shape
    return [_kernel("gemm", name, (m, 1, k), args, out, flops=2 * m * k)]


def _dot(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    k = args[0].numel()
    return [_kernel("gemm", name, (1, 1, k), args, out, flops=2 * k)]


def _grouped_mm(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    a, b = args[0], args[1]
    m, k, n = a.numel() // a.shape[-1], a.shape[-1], b.shape[-1]
    if a.ndim == 2 and b.ndim == 2:  # noqa: PLR2004 - weight gradient: groups along the summed axis
        m, n = a.shape[0], b.shape[1]
    groups = _tensors(out)[0].shape[0] if a.ndim == b.ndim else b.shape[0]
    return [_kernel("batched_gemm", name, (groups, max(1, m // groups), n, k), args, out, flops=2 * m * n * k)]


def _convolution(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    x, weight, stride, transposed, groups = args[0], args[1], args[3], args[6], args[8]
    return [_one_convolution(name, x, weight, out, stride=stride, transposed=transposed, groups=groups, args=args, out=out)]


def _convolution_backward(_name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    grad, x, weight, stride, transposed, groups, mask = args[0], args[1], args[2], args[4], args[7], args[9], args[10]
    kernels = []
    for wanted, op, operand, result in (
        (mask[0], "convolution_backward_input", weight, out[0]),
        (mask[1], "convolution_backward_weight", x, out[1]),
    ):
        if wanted:
            kernels.append(
                _one_convolution(
                    op, x, weight, grad, stride=stride, transposed=transposed, groups=groups, args=(grad, operand), out=result
                )
            )
    if mask[2]:
        kernels.append(_kernel("reduction", "sum", (grad.shape[1], grad.numel() // grad.shape[1]), (grad,), out[2]))
    return kernels


def _one_convolution(
    op: str, x: Any, weight: Any, y: Any, *, stride: Sequence[int], transposed: bool, groups: int, args: Any, out: Any
) -> Kernel:
    kernel_elements = prod(weight.shape[2:])
    in_channels, out_channels = x.shape[1], y.shape[1]
    positions = prod((x if transposed else y).shape[2:])
    flops = 2 * x.shape[0] * positions * kernel_elements * in_channels * out_channels // groups
    shape = (x.shape[0], in_channels, out_channels, groups, kernel_elements, positions, stride[0])
    return _kernel("convolution", op, shape, args, out, flops=flops)


def _attention(operator: Any, args: Sequence[Any], out: Any) -> list[Kernel]:
    backward = "backward" in operator.overloadpacket.__name__
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    batch, heads, query_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    names = [argument.name for argument in operator._schema.arguments]  # noqa: SLF001 - torch's only access to it
    causal = names.index("is_causal")
    products = 4 if backward else 2
    flops = products * 2 * batch * heads * query_len * kv_len * head_dim
    op = "attention_backward" if backward else "attention"
    kernel = _kernel("attention", op, (batch, heads, kv_heads, query_len, kv_len, head_dim), args, out, flops=flops)
    return [replace(kernel, shape=(*kernel.shape, int(causal < len(args) and args[causal] is True)))]


def _fft(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    """The transform, after a copy of its operand where the axes that are not transformed do not run through memory as one.

    **Source**: torch 2.13, aten/src/ATen/native/mkl/SpectralOps.cpp and cuda/SpectralOps.cpp (``_exec_fft``): these axes, longest stride first, are made one by ``reshape``.
    """
    signal = out if name == "_fft_c2r" else args[0]
    lengths = [signal.shape[dim] for dim in args[1]]
    transform = _kernel("fft", name, (signal.numel() // max(1, prod(lengths)), *lengths), args, out)
    return [*_collected(args[0], args[1]), transform]


def _collected(operand: torch.Tensor, dims: Sequence[int]) -> list[Kernel]:
    """That copy; none where there is nothing to do."""
    transformed = [dim % operand.ndim for dim in dims]
    kept = [axis for axis in _memory_order(operand) if axis not in transformed]
    if all(operand.stride(outer) == operand.stride(inner) * operand.shape[inner] for outer, inner in pairwise(kept)):
        return []
    name = _copy_name("clone", _memory_order(operand), (*kept, *transformed))
    return [_kernel("copy", name, (operand.numel(),), (operand,), operand)]


def _embedding(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    if name == "embedding":
        weight, indices = args[0], args[1]
        shape = (indices.numel(), weight.shape[1], weight.shape[0])
        return [_kernel("embedding", name, shape, (indices, out), out)]
    grad, indices = args[0], args[1]
    return [_kernel("embedding", name, (indices.numel(), grad.shape[-1], args[2]), args, out)]


def _rows_columns(name: str, args: Sequence[Any], _out: Any) -> tuple[int, int]:
    """The reduced axis (columns) and everything else (rows) of the operand that is read in full."""
    x = max(_tensors(args), key=lambda tensor: tensor.numel())
    if "batch_norm" in name:
        return x.shape[1], x.numel() // x.shape[1]
    if "group_norm" in name:
        return x.shape[0], x.numel() // x.shape[0]
    results = max((tensor.numel() for tensor in _tensors(_out)), default=1)
    columns = x.numel() // results if name in _REDUCTIONS and results else x.shape[-1] if x.ndim else 1
    return x.numel() // max(1, columns), max(1, columns)


def _normalization(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    return [_kernel("normalization", name, _rows_columns(name, args, out), args, out)]


def _softmax(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    return [_kernel("softmax", name, _rows_columns(name, args, out), args, out)]


def _safe_softmax(_name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    """A softmax, and the search for rows that are all masked: a comparison, a reduction and a selection."""
    shape = _rows_columns("_softmax", args, out)
    mask = torch.empty(out.shape, dtype=torch.bool, device="meta")
    return [
        _kernel("softmax", "_softmax", shape, (args[0],), out), _kernel("pointwise", "eq", (out.numel(),), (args[0],), mask),
        _kernel("reduction", "all", shape, (mask,), mask[..., :1]), _kernel("pointwise", "where", (out.numel(),), (mask, out), out),
    ]  # fmt: skip


def _reduction(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    return [_kernel("reduction", name, _rows_columns(name, args, out), args, out)]


def _nll(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    rows = _tensors(args)[0].shape[0]
    return [Kernel(kernel_class="reduction", op=name, shape=(1, rows), dtype=dtype_name(args[0].dtype), flops=0,
                   read_bytes=rows * args[0].element_size(), written_bytes=_num_bytes(_tensors(out)))]  # fmt: skip


STRAIGHT, ROWS, TRANSPOSED = "_to_copy", "clone", "transposed_copy"
"""Names of copies by how source and destination run through memory: in the same order; in another order of whole rows; with another
fastest axis. Each is slower than the one before."""
_STRAIGHT_COPIES = frozenset({"clone", "copy_", "_to_copy", "_reshape_copy"})


def _copy(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    results = _tensors(out)
    written = results[0]
    if name in _STRAIGHT_COPIES:
        source = args[1] if name == "copy_" else args[0]
        if isinstance(source, torch.Tensor):
            name = _copy_name(name, _memory_order(source), _memory_order(written))
    if name in {"gather", "index", "index_select"}:
        args = (*results, *[tensor for tensor in _tensors(args) if not tensor.dtype.is_floating_point])
    elif len(args) > 1 and isinstance(args[1], torch.Tensor):
        args = (args[1],)
    elif name in {"fill_", "zero_"}:
        args = ()
    return [_kernel("copy", name, (written.numel(),), args, results[:1])]


def _copy_name(name: str, source: tuple[int, ...], destination: tuple[int, ...]) -> str:
    if source == destination:
        return name if name == "copy_" else STRAIGHT
    return ROWS if source[-1:] == destination[-1:] else TRANSPOSED


def _memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Axes from the slowest to the fastest in memory; those of length 1 left out."""
    axes = [axis for axis in range(tensor.ndim) if tensor.shape[axis] > 1]
    return tuple(sorted(axes, key=lambda axis: -tensor.stride()[axis]))


def _elementwise(name: str, args: Sequence[Any], out: Any) -> list[Kernel]:
    results = _tensors(out)
    if not results:
        return []
    elements = max(tensor.numel() for tensor in results)
    if name in {"gelu", "gelu_backward"} and "tanh" in args:
        name = name.replace("gelu", "gelu_tanh")  # the approximation, which costs several times less or more than erf
    return [_kernel("pointwise", name, (elements,), args, out)]


_RULES: dict[str, Rule] = {
    "_scaled_mm": _eight_bit_mm, "_int_mm": _eight_bit_mm,
    "mm": _mm, "addmm": _mm, "bmm": _bmm, "baddbmm": _bmm, "mv": _mv, "addmv": _mv, "dot": _dot, "vdot": _dot,
    "_grouped_mm": _grouped_mm, "convolution": _convolution, "convolution_backward": _convolution_backward,
    "_fft_r2c": _fft, "_fft_c2r": _fft, "_fft_c2c": _fft,
    "embedding": _embedding, "embedding_dense_backward": _embedding,
    "nll_loss_forward": _nll,
    **dict.fromkeys(_NORMALIZATIONS, _normalization),
    **dict.fromkeys(_SOFTMAXES, _softmax),
    "_safe_softmax": _safe_softmax,
    **dict.fromkeys(_REDUCTIONS - {"nll_loss_forward"}, _reduction),
    **dict.fromkeys(_COPIES, _copy),
}  # fmt: skip
