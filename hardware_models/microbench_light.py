"""The rest of `microbench`'s grid: kernels bound by memory, by transcendental functions or by indexing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hardware_models.kernel import KernelClass
from hardware_models.microbench_cases import ATEN, Call, Case, Pool, on

_FUNCTIONAL = torch.nn.functional


def _unary(function: Callable[[torch.Tensor], object]) -> Callable[[Pool, int], Call]:
    def build(pool: Pool, elements: int) -> Call:
        x = pool.tensor(elements)
        return Call(run=lambda: function(x), reads=(x,))

    return build


def _binary(function: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[Pool, int], Call]:
    def build(pool: Pool, elements: int) -> Call:
        x, y = pool.tensor(elements), pool.tensor(elements)
        return Call(run=lambda: function(x, y), reads=(x, y))

    return build


def _add_inplace(pool: Pool, elements: int) -> Call:
    x, y = pool.own(elements), pool.tensor(elements)
    return Call(run=lambda: x.add_(y), reads=(x, y), produced=(y,))


def _relu_inplace(pool: Pool, elements: int) -> Call:
    x = pool.own(elements)
    return Call(run=x.relu_, reads=(x,))


def _bernoulli(pool: Pool, elements: int) -> Call:
    x = torch.empty(elements, device=pool.device, dtype=pool.dtype)
    return Call(run=lambda: x.bernoulli_(0.9), reads=(x,))


def _where(pool: Pool, elements: int) -> Call:
    x, y = pool.tensor(elements), pool.tensor(elements)
    mask = x > 0
    return Call(run=lambda: torch.where(mask, x, y), reads=(mask, x, y))


POINTWISE: Mapping[str, Callable[[Pool, int], Call]] = {
    "add": _binary(torch.add), "mul": _binary(torch.mul), "div": _unary(lambda x: ATEN.div.Scalar(x, 2.0)), "add_": _add_inplace,
    "relu": _unary(torch.relu), "relu_": _relu_inplace, "threshold_backward": _binary(lambda x, y: ATEN.threshold_backward(x, y, 0)),
    "gelu": _unary(_FUNCTIONAL.gelu), "gelu_backward": _binary(ATEN.gelu_backward),
    "gelu_tanh": _unary(lambda x: _FUNCTIONAL.gelu(x, approximate="tanh")),
    "gelu_tanh_backward": _binary(lambda x, y: ATEN.gelu_backward(x, y, approximate="tanh")),
    "tanh": _unary(torch.tanh), "tanh_backward": _binary(ATEN.tanh_backward), "silu": _unary(_FUNCTIONAL.silu),
    "silu_backward": _binary(ATEN.silu_backward), "exp": _unary(torch.exp), "pow": _unary(lambda x: x.pow(3.0)), "sqrt": _unary(torch.sqrt),
    "bernoulli_": _bernoulli, "where": _where,
}  # fmt: skip
"""How each pointwise operator is run on a number of elements; ``gelu_tanh`` is ``gelu`` with its tanh approximation."""


_COLUMNS = 512
"""Length of the rows that a transposing copy reads across."""


def _clone(pool: Pool, elements: int) -> Call:
    x = pool.tensor(elements)
    return Call(run=x.clone, reads=(x,))


def _transposed(pool: Pool, elements: int) -> Call:
    """Heads moved behind positions, rows of 64 elements stay whole: what a transformer's reshapes copy."""
    rows = max(1, elements // (64 * 16))
    x = pool.tensor(16, rows, 64).transpose(0, 1)
    return Call(run=x.contiguous, reads=(x,))


def _column_major(pool: Pool, elements: int) -> Call:
    """The fastest axis of the source is another than that of the result: what contractions over channels copy."""
    columns = min(_COLUMNS, elements)
    x = pool.tensor(elements // columns, columns).t()
    return Call(run=x.contiguous, reads=(x,))


def _cat(pool: Pool, elements: int) -> Call:
    x, y = pool.tensor(16, elements // 32), pool.tensor(16, elements // 32)
    return Call(run=lambda: torch.cat((x, y), dim=1), reads=(x, y))


def _zeros(pool: Pool, elements: int) -> Call:
    return Call(run=lambda: torch.zeros(elements, device=pool.device, dtype=pool.dtype), reads=())


def _copy_inplace(pool: Pool, elements: int) -> Call:
    x, y = pool.own(elements), pool.tensor(elements)
    return Call(run=lambda: x.copy_(y), reads=(y,))


def _slice_backward(pool: Pool, elements: int) -> Call:
    x = pool.tensor(elements // 4)
    return Call(run=lambda: ATEN.slice_backward(x, [elements], 0, 0, elements // 4, 1), reads=(x,))


COPIES: Mapping[str, Callable[[Pool, int], Call]] = {
    "_to_copy": _clone, "clone": _transposed, "transposed_copy": _column_major, "cat": _cat, "zeros": _zeros, "copy_": _copy_inplace, "slice_backward": _slice_backward,
}  # fmt: skip
"""Each copy; ``clone`` moves whole rows, ``transposed_copy`` changes the fastest axis (`simulator.tracing.kernels_of`)."""


def _adamw(pool: Pool, elements: int) -> Call:
    count = max(1, min(4, 2**20 // elements))
    params, grads, averages = ([pool.own(elements) for _ in range(count)] for _ in range(3))
    squares = [pool.own(elements).abs_() for _ in range(count)]
    steps = [torch.ones((), device=pool.device) for _ in range(count)]

    def run() -> None:
        torch._fused_adamw_(
            params, grads, averages, squares, [], steps, lr=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    return Call(
        run=run,
        reads=(params[0], grads[0], averages[0], squares[0]),
        writes=(params[0], averages[0], squares[0]),
        repeats=count,
        produced=(),
    )


def _layer_norm(pool: Pool, rows: int, columns: int) -> Call:
    x, weight, bias = pool.tensor(rows, columns), pool.tensor(columns), pool.tensor(columns)
    return Call(run=lambda: torch.native_layer_norm(x, [columns], weight, bias, 1e-5), reads=(x, weight, bias))


def _layer_norm_backward(pool: Pool, rows: int, columns: int) -> Call:
    x, grad, weight, bias = pool.tensor(rows, columns), pool.tensor(rows, columns), pool.tensor(columns), pool.tensor(columns)
    mean, rstd = pool.own(rows, 1) * 0, pool.own(rows, 1) * 0 + 1
    backward = ATEN.native_layer_norm_backward
    return Call(
        run=lambda: backward(grad, x, [columns], mean, rstd, weight, bias, [True, True, True]),
        reads=(grad, x, mean, rstd, weight, bias),
    )


def _batch_norm(pool: Pool, rows: int, columns: int) -> Call:
    x, weight, bias = _images(pool, rows, columns), pool.tensor(rows), pool.tensor(rows)
    mean, variance = pool.own(rows), pool.own(rows).abs_()
    return Call(
        run=lambda: torch.native_batch_norm(x, weight, bias, mean, variance, True, 0.1, 1e-5),
        reads=(x, weight, bias, mean, variance),
    )


def _batch_norm_backward(pool: Pool, rows: int, columns: int) -> Call:
    x, grad, weight = _images(pool, rows, columns), _images(pool, rows, columns), pool.tensor(rows)
    mean, variance, save_mean, save_rstd = pool.own(rows), pool.own(rows).abs_(), pool.own(rows), pool.own(rows).abs_()
    backward = ATEN.native_batch_norm_backward
    return Call(
        run=lambda: backward(grad, x, weight, mean, variance, save_mean, save_rstd, True, 1e-5, [True, True, True]),
        reads=(grad, x, weight, mean, variance, save_mean, save_rstd),
    )


_IMAGE_BATCH = 8


def _images(pool: Pool, channels: int, columns: int) -> torch.Tensor:
    batch = _IMAGE_BATCH if columns % _IMAGE_BATCH == 0 else 1
    return pool.tensor(batch, channels, columns // batch, 1)


def _rows(function: Callable[[torch.Tensor], object]) -> Callable[[Pool, int, int], Call]:
    def build(pool: Pool, rows: int, columns: int) -> Call:
        x = pool.tensor(rows, columns)
        return Call(run=lambda: function(x), reads=(x,))

    return build


def _rows_backward(function: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[Pool, int, int], Call]:
    def build(pool: Pool, rows: int, columns: int) -> Call:
        grad, out = pool.tensor(rows, columns), pool.tensor(rows, columns)
        return Call(run=lambda: function(grad, out), reads=(grad, out))

    return build


def _softmax_backward(grad: torch.Tensor, out: torch.Tensor) -> object:
    return ATEN._softmax_backward_data(grad, out, -1, grad.dtype)  # noqa: SLF001 - the operator's name


def _log_softmax_backward(grad: torch.Tensor, out: torch.Tensor) -> object:
    return ATEN._log_softmax_backward_data(grad, out, -1, grad.dtype)  # noqa: SLF001 - the operator's name


def _bias_gradient(pool: Pool, rows: int, columns: int) -> Call:
    """Sums the outer axis of a ``[columns, rows]`` tensor: the bias gradient of a linear layer."""
    x = pool.tensor(columns, rows)
    return Call(run=lambda: x.sum(0, keepdim=True), reads=(x,))


_NORMALIZED = ((64, 256), (1024, 256), (256, 1024), (1024, 768), (4096, 512), (4096, 1024), (16384, 768))
_IMAGES = ((64, 8 * 3136), (64, 8 * 784), (256, 8 * 3136), (128, 8 * 784), (512, 8 * 784), (1024, 8 * 196), (256, 8 * 196), (512, 8 * 49), (2048, 8 * 49),
           (64, 8 * 12544), (32, 4096))  # fmt: skip
_SOFT = ((64, 1000), (3072, 256), (12288, 256), (6144, 512), (1024, 8192), (1024, 32001), (16384, 197))
_REDUCED = (
    (768, 1024),
    (3072, 1024),
    (256, 4096),
    (1024, 256),
    (16384, 512),
    (16384, 64),
    (4096, 2048),
    (64, 131072),
    (8192, 4096),
)

ROWS: Mapping[tuple[KernelClass, str], tuple[Callable[[Pool, int, int], Call], tuple[tuple[int, int], ...]]] = {
    ("normalization", "native_layer_norm"): (_layer_norm, _NORMALIZED),
    ("normalization", "native_layer_norm_backward"): (_layer_norm_backward, _NORMALIZED),
    ("normalization", "native_batch_norm"): (_batch_norm, _IMAGES),
    ("normalization", "native_batch_norm_backward"): (_batch_norm_backward, _IMAGES),
    ("softmax", "_softmax"): (_rows(lambda x: torch.softmax(x, -1)), _SOFT),
    ("softmax", "_log_softmax"): (_rows(lambda x: torch.log_softmax(x, -1)), _SOFT),
    ("softmax", "_softmax_backward_data"): (_rows_backward(_softmax_backward), _SOFT),
    ("softmax", "_log_softmax_backward_data"): (_rows_backward(_log_softmax_backward), _SOFT),
    ("reduction", "sum"): (_bias_gradient, _REDUCED),
    ("reduction", "mean"): (_rows(lambda x: x.mean(-1)), _REDUCED),
}
"""Operators over rows and columns with their grids."""

_POOLED = ((8, 64, 56), (8, 64, 28), (4, 32, 64), (2, 64, 16))
_EMBEDDED = ((256, 768, 1024), (1024, 768, 1024), (1024, 768, 32000), (4096, 512, 16000), (1024, 256, 4000))


def _max_pool(pool: Pool, batch: int, channels: int, side: int) -> Call:
    x = pool.tensor(batch, channels, 2 * side, 2 * side)
    return Call(run=lambda: ATEN.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1]), reads=(x,))


def _max_pool_backward(pool: Pool, batch: int, channels: int, side: int) -> Call:
    x, grad = pool.tensor(batch, channels, 2 * side, 2 * side), pool.tensor(batch, channels, side, side)
    indices = ATEN.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])[1]
    backward = ATEN.max_pool2d_with_indices_backward
    return Call(run=lambda: backward(grad, x, [3, 3], [2, 2], [1, 1], [1, 1], False, indices), reads=(grad, x, indices))


def _embedding(pool: Pool, num_indices: int, width: int, vocabulary: int) -> Call:
    indices = torch.randint(vocabulary, (num_indices,), device=pool.device)
    weight = pool.tensor(vocabulary, width)
    out = pool.tensor(num_indices, width)
    return Call(run=lambda: _FUNCTIONAL.embedding(indices, weight), reads=(indices, out))


def _embedding_backward(pool: Pool, num_indices: int, width: int, vocabulary: int) -> Call:
    indices = torch.randint(vocabulary, (num_indices,), device=pool.device)
    grad = pool.tensor(num_indices, width)
    return Call(run=lambda: ATEN.embedding_dense_backward(grad, indices, vocabulary, -1, False), reads=(grad, indices))


def light_cases(dtype: str, *, full: bool) -> list[Case]:
    """Pointwise kernels, copies, the optimizer, normalizations, softmaxes, reductions, poolings and embeddings."""
    exponents = (10, 14, 16, 18, 19, 20, 21, 22, 23, 24, 25, 25.6) if full else (10, 15, 17.5, 19, 20, 21, 22, 23, 24.2)
    sizes = [int(2**exponent) // 1024 * 1024 for exponent in exponents]

    def case(kernel_class: KernelClass, op: str, shape: tuple[int, ...], build: Callable[..., Call]) -> Case:
        return Case(kernel_class=kernel_class, op=op, shape=shape, dtype=dtype, flops=0, build=on(build, *shape))

    cases = [case("pointwise", op, (size,), build) for op, build in POINTWISE.items() for size in sizes]
    cases += [case("copy", op, (size,), build) for op, build in COPIES.items() for size in sizes]
    cases += [case("optimizer", "adamw", (size,), _adamw) for size in sizes]
    cases += [case(cls, op, shape, build) for (cls, op), (build, shapes) in ROWS.items() for shape in shapes]
    for batch, channels, side in _POOLED:
        for op, pool_build, written in (
            ("max_pool2d_with_indices", _max_pool, side * side),
            ("max_pool2d_with_indices_backward", _max_pool_backward, 4 * side * side),
        ):
            cases.append(
                Case(
                    kernel_class="pointwise", op=op, shape=(batch * channels * written,), dtype=dtype, flops=0,
                    build=on(pool_build, batch, channels, side),
                )
            )  # fmt: skip
    for shape in _EMBEDDED:
        cases.append(case("embedding", "embedding", shape, _embedding))
        cases.append(case("embedding", "embedding_dense_backward", shape, _embedding_backward))
    return cases
