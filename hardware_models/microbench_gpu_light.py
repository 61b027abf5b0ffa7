"""The grid of a GPU, part two: kernels bound by memory or indexing, and optimizer steps (standard library, numpy and torch only)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hardware_models.kernel import KernelClass
from hardware_models.microbench_cases import ATEN, Call, Case, Pool, on
from hardware_models.microbench_gpu_heavy import GridSize, heavy_gpu_cases, rounded
from hardware_models.microbench_light import COPIES, POINTWISE
from hardware_models.microbench_plan import halton, plan_sizes
from hardware_models.units import DTYPE_BYTES

_LARGEST_EXPONENT, _SMALLEST_EXPONENT = 29.0, 10.0
_OPERANDS = 4
"""Tensors of the result's size that a pointwise kernel, a normalization or an optimizer holds at most."""


def _native_dropout(pool: Pool, elements: int) -> Call:
    x = pool.tensor(elements)
    return Call(run=lambda: ATEN.native_dropout(x, 0.1, True), reads=(x,))


def _to_float(pool: Pool, elements: int) -> Call:
    """A copy that widens: gradients into the master precision."""
    x = pool.tensor(elements)
    return Call(run=lambda: x.to(torch.float32), reads=(x,))


def _nll_backward(pool: Pool, elements: int) -> Call:
    columns = min(elements, _VOCABULARY)
    rows = max(1, elements // columns)
    x, target = pool.tensor(rows, columns), torch.randint(columns, (rows,), device=pool.device)
    one, total = pool.own(1)[0], torch.full((), rows, device=pool.device, dtype=pool.dtype)
    return Call(run=lambda: ATEN.nll_loss_backward(one, x, target, None, 1, -100, total), reads=(target,))


_VOCABULARY = 32768
_GPU_POINTWISE: Mapping[str, Callable[[Pool, int], Call]] = {
    **POINTWISE,
    "native_dropout": _native_dropout,
    "nll_loss_backward": _nll_backward,
}
_GPU_COPIES: Mapping[str, Callable[[Pool, int], Call]] = {**COPIES, "widening_copy": _to_float}


def by_size_cases(size: GridSize) -> Iterator[Case]:
    """Pointwise kernels and copies over the number of elements, optimizers over the number of parameters."""
    exponents = list(plan_sizes(_SMALLEST_EXPONENT, _LARGEST_EXPONENT, size.num(5, 14)))
    sizes = [int(2**exponent) // 1024 * 1024 for exponent in exponents]
    tables: tuple[tuple[KernelClass, Mapping[str, Callable[[Pool, int], Call]], str], ...] = (
        ("pointwise", _GPU_POINTWISE, size.main), ("copy", _GPU_COPIES, size.main), ("optimizer", OPTIMIZERS, "float32"),
    )  # fmt: skip
    for kernel_class, table, dtype in tables:
        for op, build in table.items():
            for elements in sizes:
                yield Case(
                    kernel_class=kernel_class, op=op, shape=(elements,), dtype=dtype, flops=0, build=on(build, elements),
                    work_bytes=_OPERANDS * elements * DTYPE_BYTES[dtype],
                )  # fmt: skip


_STATES = 4
_TENSOR_ELEMENTS = 2**20
"""Parameters of one tensor, where an optimizer takes many: those of a layer of a small transformer."""
_MOST_TENSORS = 256


def _parameters(pool: Pool, elements: int) -> list[list[torch.Tensor]]:
    """Parameters, gradients, first and second moments, each cut into tensors of a million elements."""
    count = max(1, min(_MOST_TENSORS, elements // _TENSOR_ELEMENTS))
    return [[x.abs_() for x in pool.own(elements).chunk(count)] for _ in range(_STATES)]


def _adamw(*, fused: bool, foreach: bool) -> Callable[[Pool, int], Call]:
    def build(pool: Pool, elements: int) -> Call:
        params, grads, averages, squares = _parameters(pool, elements)
        steps = [torch.ones((), device=pool.device if fused else "cpu") for _ in params]

        def run() -> None:
            adamw(
                params, grads, averages, squares, [], steps, foreach=foreach, fused=fused, amsgrad=False, beta1=0.9, beta2=0.999, lr=1e-5,
                weight_decay=0.01, eps=1e-8, maximize=False,
            )  # fmt: skip

        return Call(run=run, reads=(*params, *grads, *averages, *squares), writes=(*params, *averages, *squares), produced=())

    return build


def _sgd(*, fused: bool, foreach: bool) -> Callable[[Pool, int], Call]:
    def build(pool: Pool, elements: int) -> Call:
        params, grads, momenta, _ = _parameters(pool, elements)

        def run() -> None:
            sgd(
                params, grads, list(momenta), foreach=foreach, fused=fused, weight_decay=0.0, momentum=0.9, lr=1e-5, dampening=0.0, nesterov=False,
                maximize=False,
            )  # fmt: skip

        return Call(run=run, reads=(*params, *grads, *momenta), writes=(*params, *momenta), produced=())

    return build


OPTIMIZERS: Mapping[str, Callable[[Pool, int], Call]] = {
    "adamw": _adamw(fused=True, foreach=False), "adamw_foreach": _adamw(fused=False, foreach=True), "adamw_per_tensor": _adamw(fused=False, foreach=False),
    "sgd": _sgd(fused=True, foreach=False), "sgd_foreach": _sgd(fused=False, foreach=True), "sgd_per_tensor": _sgd(fused=False, foreach=False),
}  # fmt: skip
"""Optimizer steps; what has no suffix is fused."""


def _layer_norm(pool: Pool, rows: int, columns: int) -> Call:
    x, weight, bias = pool.tensor(rows, columns), pool.tensor(columns), pool.tensor(columns)
    return Call(run=lambda: torch.native_layer_norm(x, [columns], weight, bias, 1e-5), reads=(x, weight, bias))


def _layer_norm_backward(pool: Pool, rows: int, columns: int) -> Call:
    x, grad, weight, bias = pool.tensor(rows, columns), pool.tensor(rows, columns), pool.tensor(columns), pool.tensor(columns)
    _, mean, rstd = torch.native_layer_norm(x, [columns], weight, bias, 1e-5)
    run = ATEN.native_layer_norm_backward
    return Call(
        run=lambda: run(grad, x, [columns], mean, rstd, weight, bias, [True] * 3), reads=(grad, x, mean, rstd, weight, bias)
    )


def _rms_norm(pool: Pool, rows: int, columns: int) -> Call:
    x, weight = pool.tensor(rows, columns), pool.tensor(columns)
    return Call(run=lambda: ATEN._fused_rms_norm(x, [columns], weight, 1e-6), reads=(x, weight))  # noqa: SLF001 - the operator's name


def _rms_norm_backward(pool: Pool, rows: int, columns: int) -> Call:
    x, grad, weight = pool.tensor(rows, columns), pool.tensor(rows, columns), pool.tensor(columns)
    _, rstd = ATEN._fused_rms_norm(x, [columns], weight, 1e-6)  # noqa: SLF001
    run = ATEN._fused_rms_norm_backward  # noqa: SLF001
    return Call(run=lambda: run(grad, x, [columns], rstd, weight, [True, True]), reads=(grad, x, rstd, weight))


_IMAGE_BATCH = 8


def _images(pool: Pool, channels: int, columns: int) -> torch.Tensor:
    return pool.tensor(_IMAGE_BATCH, channels, columns // _IMAGE_BATCH, 1)


def _batch_norm(pool: Pool, rows: int, columns: int) -> Call:
    x, weight, bias, mean, variance = _images(pool, rows, columns), *(torch.ones(rows, device=pool.device) for _ in range(4))
    return Call(
        run=lambda: torch.native_batch_norm(x, weight, bias, mean, variance, True, 0.1, 1e-5),
        reads=(x, weight, bias, mean, variance),
    )


def _batch_norm_backward(pool: Pool, rows: int, columns: int) -> Call:
    x, grad = _images(pool, rows, columns), _images(pool, rows, columns)
    weight, bias, mean, variance = (torch.ones(rows, device=pool.device) for _ in range(4))
    _, save_mean, save_rstd = torch.native_batch_norm(x, weight, bias, mean, variance, True, 0.1, 1e-5)
    run = ATEN.native_batch_norm_backward
    return Call(
        run=lambda: run(grad, x, weight, mean, variance, save_mean, save_rstd, True, 1e-5, [True] * 3),
        reads=(grad, x, weight, mean, variance, save_mean, save_rstd),
    )


_GROUPS = 32
_GROUP_CHANNELS = 128


def _group_norm(pool: Pool, rows: int, columns: int) -> Call:
    positions = columns // _GROUP_CHANNELS
    x, weight, bias = pool.tensor(rows, _GROUP_CHANNELS, positions), pool.tensor(_GROUP_CHANNELS), pool.tensor(_GROUP_CHANNELS)
    run = ATEN.native_group_norm
    return Call(run=lambda: run(x, weight, bias, rows, _GROUP_CHANNELS, positions, _GROUPS, 1e-5), reads=(x, weight, bias))


def _group_norm_backward(pool: Pool, rows: int, columns: int) -> Call:
    positions = columns // _GROUP_CHANNELS
    x, grad = (pool.tensor(rows, _GROUP_CHANNELS, positions) for _ in range(2))
    weight, bias = pool.tensor(_GROUP_CHANNELS), pool.tensor(_GROUP_CHANNELS)
    _, mean, rstd = ATEN.native_group_norm(x, weight, bias, rows, _GROUP_CHANNELS, positions, _GROUPS, 1e-5)
    run = ATEN.native_group_norm_backward
    return Call(
        run=lambda: run(grad, x, mean, rstd, weight, rows, _GROUP_CHANNELS, positions, _GROUPS, [True] * 3),
        reads=(grad, x, mean, rstd, weight),
    )


def _row_kernel(function: Callable[[torch.Tensor], object]) -> Callable[[Pool, int, int], Call]:
    def build(pool: Pool, rows: int, columns: int) -> Call:
        x = pool.tensor(rows, columns)
        return Call(run=lambda: function(x), reads=(x,))

    return build


def _softmax_backward(name: str) -> Callable[[Pool, int, int], Call]:
    def build(pool: Pool, rows: int, columns: int) -> Call:
        grad, out = pool.tensor(rows, columns), pool.tensor(rows, columns)
        run = getattr(ATEN, name)
        return Call(run=lambda: run(grad, out, -1, grad.dtype), reads=(grad, out))

    return build


def _bias_gradient(pool: Pool, rows: int, columns: int) -> Call:
    """Sums the outer axis of a ``[columns, rows]`` tensor."""
    x = pool.tensor(columns, rows)
    return Call(run=lambda: x.sum(0, keepdim=True), reads=(x,))


def _nll_forward(pool: Pool, rows: int, columns: int) -> Call:
    """The loss of ``columns`` rows over a vocabulary: one number from each (`Kernel` counts those)."""
    x, target = pool.tensor(columns, _VOCABULARY), torch.randint(_VOCABULARY, (columns,), device=pool.device)
    return Call(run=lambda: ATEN.nll_loss_forward(x, target, None, 1, -100), reads=(x[:, :rows], target))


_Box = tuple[tuple[float, float], tuple[float, float]]
_TOKENS: _Box = ((6.0, 7.0), (17.0, 14.0))
_CHANNELS: _Box = ((4.0, 11.0), (11.0, 19.0))
_SAMPLES: _Box = ((0.0, 12.0), (7.0, 21.0))
_LOGITS: _Box = ((5.0, 5.0), (16.0, 17.3))
_SUMMED: _Box = ((5.0, 5.0), (16.0, 17.0))
_ROWS: Mapping[tuple[KernelClass, str], tuple[Callable[[Pool, int, int], Call], _Box, int]] = {
    ("normalization", "native_layer_norm"): (_layer_norm, _TOKENS, 1),
    ("normalization", "native_layer_norm_backward"): (_layer_norm_backward, _TOKENS, 1),
    ("normalization", "_fused_rms_norm"): (_rms_norm, _TOKENS, 1),
    ("normalization", "_fused_rms_norm_backward"): (_rms_norm_backward, _TOKENS, 1),
    ("normalization", "native_batch_norm"): (_batch_norm, _CHANNELS, _IMAGE_BATCH),
    ("normalization", "native_batch_norm_backward"): (_batch_norm_backward, _CHANNELS, _IMAGE_BATCH),
    ("normalization", "native_group_norm"): (_group_norm, _SAMPLES, _GROUP_CHANNELS),
    ("normalization", "native_group_norm_backward"): (_group_norm_backward, _SAMPLES, _GROUP_CHANNELS),
    ("softmax", "_softmax"): (_row_kernel(lambda x: torch.softmax(x, -1)), _LOGITS, 1),
    ("softmax", "_log_softmax"): (_row_kernel(lambda x: torch.log_softmax(x, -1)), _LOGITS, 1),
    ("softmax", "_softmax_backward_data"): (_softmax_backward("_softmax_backward_data"), _LOGITS, 1),
    ("softmax", "_log_softmax_backward_data"): (_softmax_backward("_log_softmax_backward_data"), _LOGITS, 1),
    ("reduction", "sum"): (_bias_gradient, _SUMMED, 1),
    ("reduction", "mean"): (_row_kernel(lambda x: x.mean(-1)), _SUMMED, 1),
    ("reduction", "linalg_vector_norm"): (_row_kernel(lambda x: torch.linalg.vector_norm(x, dim=-1)), _SUMMED, 1),
}
"""Operators over rows and columns: how each is run, the box of binary logarithms, and what columns are multiples of."""


def row_cases(size: GridSize) -> Iterator[Case]:
    """Normalizations, softmaxes over a vocabulary and reductions, over rows and columns."""
    dtypes = {size.main: (size.num(5, 26), 0), **dict.fromkeys(size.single, (size.num(3, 10), 1))}
    for (kernel_class, op), (build, (low, high), multiple) in _ROWS.items():
        for dtype, (num, tier) in dtypes.items():
            for logs in halton(num, low, high):
                rows, columns = rounded(2.0 ** logs[0], 1), rounded(2.0 ** logs[1], max(multiple, 8))
                yield Case(
                    kernel_class=kernel_class, op=op, shape=(rows, columns), dtype=dtype, flops=0, build=on(build, rows, columns), tier=tier,
                    work_bytes=_OPERANDS * rows * columns * DTYPE_BYTES[dtype],
                )  # fmt: skip
    for (log_rows,) in halton(size.num(3, 8), (5.0,), (14.0,)):
        rows = rounded(2.0**log_rows, 1)
        yield Case(
            kernel_class="reduction", op="nll_loss_forward", shape=(1, rows), dtype=size.main, flops=0, build=on(_nll_forward, 1, rows),
            work_bytes=rows * _VOCABULARY * DTYPE_BYTES[size.main],
        )  # fmt: skip


def embedding_cases(size: GridSize) -> Iterator[Case]:
    """Look-ups and their gradients."""
    for logs in halton(size.num(6, 24), (6.0, 6.0, 9.0), (17.0, 13.0, 18.0)):
        indices, width, vocabulary = (rounded(2.0**log, 8) for log in logs)
        for op, build in (("embedding", _embedding), ("embedding_dense_backward", _embedding_backward)):
            yield Case(
                kernel_class="embedding", op=op, shape=(indices, width, vocabulary), dtype=size.main, flops=0,
                build=on(build, indices, width, vocabulary), work_bytes=width * (2 * indices + 2 * vocabulary) * DTYPE_BYTES[size.main],
            )  # fmt: skip


def _embedding(pool: Pool, num_indices: int, width: int, vocabulary: int) -> Call:
    indices = torch.randint(vocabulary, (num_indices,), device=pool.device)
    weight, out = pool.tensor(vocabulary, width), pool.tensor(num_indices, width)
    return Call(run=lambda: torch.nn.functional.embedding(indices, weight), reads=(indices, out))


def _embedding_backward(pool: Pool, num_indices: int, width: int, vocabulary: int) -> Call:
    indices, grad = torch.randint(vocabulary, (num_indices,), device=pool.device), pool.tensor(num_indices, width)
    return Call(
        run=lambda: ATEN.embedding_dense_backward(grad, indices, vocabulary, -1, False),
        reads=(grad, indices),
    )


def gpu_cases(size: GridSize) -> list[Case]:
    """The whole grid of a GPU, before its limits."""
    return [*heavy_gpu_cases(size), *by_size_cases(size), *row_cases(size), *embedding_cases(size)]
