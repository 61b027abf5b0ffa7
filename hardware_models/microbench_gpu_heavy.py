"""The grid of a GPU, part one: products, attention, convolutions and transforms (standard library, numpy and torch only).

Shapes are wider than any one device can take: `microbench_plan.Limits` drops what does not fit or takes too long. After a few corners
come points of a low-discrepancy sequence, so every prefix fills the space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from hardware_models.kernel import KernelClass
from hardware_models.microbench_cases import ATEN, Call, Case, Pool, on
from hardware_models.microbench_plan import halton
from hardware_models.units import DTYPE_BYTES

FLOAT8 = "float8_e4m3fn"
_ALIGNMENTS = (64, 64, 8, 64, 128, 64, 1, 64)
"""Multiples that sizes of successive points are rounded to: mostly those of layers, one in eight odd."""
_FLOAT8_ALIGNMENT = 16
"""torch._scaled_mm wants the summed and the column axis in multiples of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSize:
    """How many points of the finest dtype each class gets, and which dtypes a device has.

    ``main`` is the dtype of training (bfloat16, float16 before Ampere); ``others`` are products only.
    """

    full: bool
    main: str
    others: tuple[str, ...]

    def num(self, quick: int, full: int) -> int:
        """A number of points."""
        return full if self.full else quick

    @property
    def single(self) -> tuple[str, ...]:
        """Single precision, where that is not the dtype of training: softmaxes, losses and neural operators often stay in it."""
        return () if self.main == "float32" else ("float32",)


def rounded(value: float, multiple: int) -> int:
    """The nearest positive multiple."""
    return max(1, round(value / multiple)) * multiple


def _products(num: int, *, least_multiple: int = 1) -> Iterator[tuple[int, int, int]]:
    """Sizes (m, n, k): corners and layers first, then points with logarithms spread evenly."""
    yield from ((4096, 4096, 4096), (128, 128, 128), (8192, 1024, 8192), (16, 8192, 8192), (65536, 512, 512), (2048, 16384, 4096),
                (512, 512, 32768), (1024, 50304, 1024), (32768, 4096, 1024), (1024, 1024, 1024), (2048, 16386, 2048), (2048, 16385, 2048))  # fmt: skip
    for number, logs in enumerate(halton(num, (4.0, 6.0, 6.0), (17.0, 15.0, 15.0))):
        alignment = max(least_multiple, _ALIGNMENTS[number % len(_ALIGNMENTS)])
        m, n, k = (rounded(2.0**log, min(alignment, 2 ** int(log))) for log in logs)
        yield m, n, k


def gemm_cases(size: GridSize) -> Iterator[Case]:
    """``addmm`` and ``mm`` in the training dtype, ``mm`` in the others, and ``mm`` in each layout on a few shapes."""
    for op, build, num in (("mm", _mm, size.num(40, 230)), ("addmm", _addmm, size.num(24, 150))):
        for shape in _products(num):
            yield _product("gemm", op, shape, size.main, build, tier=0)
    for dtype in size.others:
        build = _scaled_mm if dtype == FLOAT8 else _mm
        least = _FLOAT8_ALIGNMENT if dtype == FLOAT8 else 1
        for shape in _products(size.num(12, 90), least_multiple=least):
            yield _product("gemm", "mm", shape, dtype, build, tier=1)
    for shape in list(_products(30))[: size.num(4, 30)]:
        for layout in ("nn", "nt", "tn"):
            yield _product("gemm", "mm", shape, size.main, _in_layout(layout), tier=2, variant=layout)


def _product(
    kernel_class: KernelClass, op: str, shape: tuple[int, ...], dtype: str, build: Callable[..., Call], *, tier: int, variant: str = ""
) -> Case:  # fmt: skip
    *batch, m, n, k = shape
    real = 8 if dtype == "complex64" else 2
    work = prod(batch) * (m * k + k * n + m * n) * DTYPE_BYTES[dtype] * (2 if dtype == FLOAT8 else 1)
    return Case(
        kernel_class=kernel_class, op=op, shape=shape, dtype=dtype, flops=real * prod(shape), build=on(build, *shape), variant=variant, tier=tier,
        work_bytes=work,
    )  # fmt: skip


def role(m: int, n: int, k: int) -> str:
    """Layout that the widest axis suggests: n a forward without bias, m a weight gradient, else an input gradient."""
    if n > max(m, k):
        return "nt"
    return "tn" if m > max(n, k) else "nn"


def _mm(pool: Pool, m: int, n: int, k: int) -> Call:
    return _in_layout(role(m, n, k))(pool, m, n, k)


def _in_layout(layout: str) -> Callable[[Pool, int, int, int], Call]:
    """A product whose first and second operand are stored as is (n) or transposed (t)."""

    def build(pool: Pool, m: int, n: int, k: int) -> Call:
        a = pool.tensor(m, k) if layout[0] == "n" else pool.tensor(k, m).t()
        b = pool.tensor(k, n) if layout[1] == "n" else pool.tensor(n, k).t()
        return Call(run=lambda: torch.mm(a, b), reads=(a, b))

    return build


def _addmm(pool: Pool, m: int, n: int, k: int) -> Call:
    bias, a, weight = pool.tensor(n), pool.tensor(m, k), pool.tensor(n, k)
    return Call(run=lambda: torch.addmm(bias, a, weight.t()), reads=(bias, a, weight), produced=(a,))


def _scaled_mm(pool: Pool, m: int, n: int, k: int) -> Call:
    """Float8 operands with one scale each, bfloat16 result; the second operand is column-major, as the library wants it."""
    a, b = pool.tensor(m, k).to(torch.float8_e4m3fn), pool.tensor(n, k).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=pool.device)
    return Call(run=lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), reads=(a, b))  # noqa: SLF001


_UNEVEN_HEADS = ((64, 1024, 1024, 108), (64, 1024, 108, 1024), (64, 1024, 1024, 75), (64, 1024, 75, 1024))
"""Scores and mixtures of heads whose rows no 16-byte copy can fetch: of 8 and of 2 bytes (`hardware_models.kernel.row_bytes`)."""


def batched_cases(size: GridSize) -> Iterator[Case]:
    """Products of a batch: heads of attention as matrices, experts, and the complex ones of spectral layers."""
    corners = ((64, 512, 512, 64), (64, 512, 64, 512), (8, 2048, 2048, 2048), (512, 64, 64, 64), *_UNEVEN_HEADS)
    points = halton(size.num(14, 90), (1.0, 4.0, 4.0, 4.0), (11.0, 12.0, 12.0, 12.0))
    shapes = [*corners, *(tuple(rounded(2.0**log, 8 if log > 3 else 1) for log in logs) for logs in points)]  # noqa: PLR2004 - 2^3 = 8
    for shape in shapes:
        yield _product("batched_gemm", "bmm", shape, size.main, _bmm, tier=0)
    for dtype in size.single:
        for shape in shapes[: size.num(5, 30)]:
            yield _product("batched_gemm", "bmm", shape, dtype, _bmm, tier=1)
    # the batch is the number of modes that a real transform keeps, 2^a (2^b + 1)
    modes = ((272, 8, 64, 64), (272, 64, 64, 8), (528, 16, 128, 128), (2112, 4, 64, 64))
    complex_points = halton(size.num(8, 50), (5.0, 0.0, 3.0, 3.0), (13.0, 6.0, 9.0, 9.0))
    for shape in [*modes, *(tuple(rounded(2.0**log, 1) for log in logs) for logs in complex_points)]:
        yield _product("batched_gemm", "bmm", shape, "complex64", _complex_bmm, tier=0)


def _bmm(pool: Pool, b: int, m: int, n: int, k: int) -> Call:
    a, c = pool.tensor(b, m, k), pool.tensor(b, k, n)
    return Call(run=lambda: torch.bmm(a, c), reads=(a, c))


def _complex_bmm(pool: Pool, b: int, m: int, n: int, k: int) -> Call:
    """A spectral contraction: weights are stored with the batched (mode) axis innermost."""
    a, weight = pool.complex_tensor(b, m, k), pool.complex_tensor(k, n, b).permute(2, 0, 1)
    return Call(run=lambda: torch.bmm(a, weight), reads=(a, weight))


_ATTENTION = (
    (4, 16, 16, 2048, 2048, 128),
    (1, 32, 8, 8192, 8192, 128),
    (16, 12, 12, 512, 512, 64),
    (2, 8, 8, 128, 128, 64),
    (32, 32, 8, 1, 4096, 128),
)
"""(batch, heads, heads of keys and values, queries, keys, width of a head)."""
BACK_ENDS = ("flash", "efficient", "math", "cudnn")


def attention_cases(size: GridSize) -> Iterator[Case]:
    """Fused attention as torch chooses it, forward and backward, causal or not, grouped heads, decoding; then each back end on a few shapes."""
    shapes = list(_ATTENTION)
    for number, (log_heads, log_len, width) in enumerate(halton(size.num(6, 56), (3.0, 6.0, 0.0), (8.5, 14.0, 3.0))):
        heads = (12, 16, 32, 8)[number % 4]
        length = rounded(2.0**log_len, 64 if number % 4 else 1)
        groups = 4 if number % 3 == 2 else 1  # noqa: PLR2004 - every third is grouped
        shapes.append(
            (max(1, round(2.0**log_heads / heads)), heads, heads // groups, length, length, (64, 128, 96)[int(width)])
        )
    shapes += [(batch, 32, 8, 1, keys, 128) for batch in (1, 8, 64) for keys in (512, 4096, 32768)][: size.num(2, 9)]
    for number, shape in enumerate(shapes):
        for causal in (0, 1) if shape[3] > 1 else (0,):
            yield from _attention_pair(shape, causal, size.main, tier=0 if number < len(_ATTENTION) else 1)
    for dtype in size.single:
        for shape in [shape for shape in shapes if shape[1] == shape[2]][: size.num(3, 12)]:
            yield from _attention_pair(shape, 0, dtype, tier=1)
    for shape in shapes[: size.num(1, 4)]:
        for variant in BACK_ENDS:
            for causal in (0, 1)[: size.num(1, 2)] if shape[3] > 1 else (0,):
                yield from _attention_pair(shape, causal, size.main, tier=2, variant=variant)


def _attention_pair(shape: Sequence[int], causal: int, dtype: str, *, tier: int, variant: str = "") -> Iterator[Case]:
    batch, heads, kv_heads, queries, keys, width = shape
    flops = 4 * batch * heads * queries * keys * width
    moved = 2 * batch * width * (heads * queries + kv_heads * keys) * DTYPE_BYTES[dtype]
    scores = batch * heads * queries * keys * DTYPE_BYTES[dtype] * 3 if variant == "math" else 0
    for op, times in (("attention", 1), ("attention_backward", 2)):
        if op == "attention_backward" and queries == 1:
            continue
        build = on(_attention, op == "attention_backward", variant, *shape, bool(causal))
        yield Case(
            kernel_class="attention", op=op, shape=(*shape, causal), dtype=dtype, flops=times * flops, build=build, tier=tier, variant=variant,
            work_bytes=times * (moved + scores),
        )  # fmt: skip


def _attention(
    pool: Pool, backward: bool, variant: str, batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, causal: bool
) -> Call:  # fmt: skip
    query = pool.tensor(batch, queries, heads, width).transpose(1, 2)
    key, value = (pool.tensor(batch, keys, kv_heads, width).transpose(1, 2) for _ in range(2))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        function = torch.nn.functional.scaled_dot_product_attention
        if not variant:
            return function(q, k, v, None, 0.0, causal, enable_gqa=kv_heads != heads)
        with torch.nn.attention.sdpa_kernel(_back_end(variant)):
            return function(q, k, v, None, 0.0, causal, enable_gqa=kv_heads != heads)

    if not backward:
        return Call(run=lambda: attend(query, key, value), reads=(query, key, value), produced=(query, key, value))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]  # the pool's tensors are written to
    with torch.enable_grad():
        out = attend(*leaves)
    grad = pool.tensor(batch, queries, heads, width).transpose(1, 2)
    return Call(
        run=lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), reads=(grad, query, key, value, out.detach())
    )


def _back_end(variant: str) -> torch.nn.attention.SDPBackend:
    names = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH", "cudnn": "CUDNN_ATTENTION"}
    return getattr(torch.nn.attention.SDPBackend, names[variant])  # type: ignore[no-any-return]


_LAYERS = ((32, 3, 64, 7, 2, 112, 1), (32, 64, 64, 3, 1, 56, 1), (32, 64, 256, 1, 1, 56, 1), (32, 256, 256, 3, 1, 14, 1), (32, 512, 512, 3, 1, 7, 1),
           (32, 1024, 256, 1, 1, 14, 1), (32, 512, 2048, 1, 1, 7, 1), (32, 3, 768, 16, 16, 14, 1), (16, 64, 64, 1, 1, 128, 1),
           (32, 192, 192, 3, 2, 28, 1), (32, 96, 96, 7, 1, 56, 96), (4, 128, 128, 3, 1, 128, 1))  # fmt: skip
"""(batch, in, out, kernel, stride, side of the output, groups): residual networks, patches, pointwise and depthwise layers, U-Nets."""
CONVOLUTIONS = ("convolution", "convolution_backward_input", "convolution_backward_weight")


def convolution_cases(size: GridSize) -> Iterator[Case]:
    """Convolutions, forward and both gradients, in the training dtype and (fewer) as TensorFloat-32; channels last on a few."""
    layers = list(_LAYERS)
    points = halton(size.num(5, 44), (0.0, 4.5, 4.5, 2.0), (7.0, 11.0, 11.0, 8.0))
    for number, (log_batch, log_in, log_out, log_side) in enumerate(points):
        kernel, stride = ((3, 1), (1, 1), (3, 2), (1, 2))[number % 4]
        sizes = (rounded(2.0**log_batch, 1), rounded(2.0**log_in, 8), rounded(2.0**log_out, 8))
        layers.append((*sizes, kernel, stride, rounded(2.0**log_side, 1), 1))
    for layer in layers:
        yield from _convolution_triple(layer, size.main, tier=0)
    for layer in layers[: size.num(2, 12)]:
        yield from _convolution_triple(layer, "float32", tier=1)
    for layer in layers[1 : size.num(3, 12)]:
        yield from _convolution_triple(layer, size.main, tier=2, variant="channels_last")


def _convolution_triple(layer: tuple[int, ...], dtype: str, *, tier: int, variant: str = "") -> Iterator[Case]:
    batch, c, o, kernel, stride, side, groups = layer
    shape = (batch, c, o, groups, kernel * kernel, side * side, stride)
    elements = batch * (c * (side * stride) ** 2 + o * side * side) + c * o // groups * kernel**2
    for op in CONVOLUTIONS:
        yield Case(
            kernel_class="convolution", op=op, shape=shape, dtype=dtype, flops=2 * batch * side * side * kernel * kernel * c * o // groups,
            build=on(_convolution, op, variant, *layer), tier=tier, variant=variant, work_bytes=elements * DTYPE_BYTES[dtype],
        )  # fmt: skip


def _convolution(
    pool: Pool, op: str, variant: str, batch: int, c: int, o: int, kernel: int, stride: int, side: int, groups: int
) -> Call:
    layout = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    padding = [0 if kernel == stride else (kernel - 1) // 2] * 2
    x = pool.tensor(batch, c, side * stride, side * stride).contiguous(memory_format=layout)
    weight = pool.tensor(o, c // groups, kernel, kernel).contiguous(memory_format=layout)
    if op == "convolution":
        return Call(
            run=lambda: ATEN.convolution(x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], groups),
            reads=(x, weight),
        )
    grad = pool.tensor(batch, o, side, side).contiguous(memory_format=layout)
    to_input = op == "convolution_backward_input"
    mask = [to_input, not to_input, False]
    run = ATEN.convolution_backward
    return Call(
        run=lambda: run(grad, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], groups, mask),
        reads=(grad, weight if to_input else x),
    )


_SIGNALS = (
    (64, 64, 64),
    (256, 128, 128),
    (64, 256, 256),
    (16, 512, 512),
    (128, 85, 85),
    (512, 1024),
    (64, 8192),
    (16, 64, 64, 64),
    (32, 421, 421),
    (1024, 32, 32),
)
"""(batch, lengths ...)."""


def fft_cases(size: GridSize) -> Iterator[Case]:
    """Real and complex transforms in one to three dimensions, single precision; dtypes are those of the results."""
    signals: list[tuple[int, ...]] = list(_SIGNALS)
    for number, (log_batch, log_length) in enumerate(halton(size.num(6, 40), (3.0, 4.0), (12.0, 10.0))):
        length = rounded(2.0**log_length, 1) if number % 4 == 3 else 2 ** round(log_length)  # noqa: PLR2004 - one in four is not a power
        dims = (2, 2, 1, 2, 3)[number % 5]
        length = max(8, min(length, 128)) if dims == 3 else length  # noqa: PLR2004 - a cube of 128
        signals.append((rounded(2.0**log_batch, 1), *[length] * dims))
    for signal in signals:
        axes = tuple(range(1, len(signal)))
        work = 3 * 8 * prod(signal)
        for op, dtype, build in (
            ("_fft_r2c", "complex64", on(_fft_r2c, signal, axes)), ("_fft_c2r", "float32", on(_fft_c2r, signal, axes)),
            ("_fft_c2c", "complex64", on(_fft_c2c, signal, axes)),
        ):  # fmt: skip
            yield Case(kernel_class="fft", op=op, shape=signal, dtype=dtype, flops=0, build=build, work_bytes=work)


def _fft_r2c(pool: Pool, signal: tuple[int, ...], dims: tuple[int, ...]) -> Call:
    x = pool.tensor(*signal)
    return Call(run=lambda: ATEN._fft_r2c(x, dims, 0, True), reads=(x,))  # noqa: SLF001 - the operator's name


def _fft_c2r(pool: Pool, signal: tuple[int, ...], dims: tuple[int, ...]) -> Call:
    x = pool.complex_tensor(*signal[:-1], signal[-1] // 2 + 1)
    return Call(run=lambda: ATEN._fft_c2r(x, dims, 2, signal[-1]), reads=(x,))  # noqa: SLF001


def _fft_c2c(pool: Pool, signal: tuple[int, ...], dims: tuple[int, ...]) -> Call:
    x = pool.complex_tensor(*signal)
    return Call(run=lambda: ATEN._fft_c2c(x, dims, 0, False), reads=(x,))  # noqa: SLF001


def heavy_gpu_cases(size: GridSize) -> list[Case]:
    """Products, attention, convolutions and transforms."""
    return [
        *gemm_cases(size), *batched_cases(size), *attention_cases(size), *convolution_cases(size), *fft_cases(size),
    ]  # fmt: skip
