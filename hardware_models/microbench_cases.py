"""The grid of kernels that `microbench` times: shapes by class, and how to run each (standard library, numpy and torch only)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from hardware_models.kernel import KernelClass

ATEN = torch.ops.aten
_IMAGE_CHANNELS = 3
"""Inputs with so many channels are data: no gradient is asked for them."""
_NARROW = 128
"""Channels up to which the widest axis of a product is no feature axis, but the points of a field that a layer maps one by one."""
_WIDE_SIDE = 56
"""Positions a side above which pointwise convolutions are layers of neural operators, which have a bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One runnable kernel: ``run()`` returns its outputs; the least traffic is that of ``reads`` and of the outputs."""

    run: Callable[[], Any]
    reads: tuple[torch.Tensor, ...]
    writes: tuple[torch.Tensor, ...] | None = None
    """What is written, where that is not the tensors that ``run`` returns."""
    repeats: int = 1
    """Kernels of this kind in one ``run``."""
    produced: tuple[torch.Tensor, ...] | None = None
    """What the kernel before has just written; by default the first of ``reads``."""

    def touch(self) -> None:
        """Rewrites what the kernel before would just have written, so that as much of it is in the caches as in a real step."""
        for tensor in self.reads[:1] if self.produced is None else self.produced:
            tensor.copy_(tensor.clone())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A point of the grid: as a `Kernel`, with the way to build it from a pool of operands."""

    kernel_class: KernelClass
    op: str
    shape: tuple[int, ...]
    dtype: str
    flops: int
    build: Build
    variant: str = ""
    """How it differs from what a kernel of this shape is by default (layout, back end); those that do are compared with it, not fitted."""
    work_bytes: int = 0
    """About what its operands and results take."""
    tier: int = 0
    """Lower ones are measured first."""

    @property
    def key(self) -> str:
        """Unique text of the case."""
        variant = f"/{self.variant}" if self.variant else ""
        return f"{self.kernel_class}/{self.op}/{self.dtype}/{'x'.join(map(str, self.shape))}{variant}"


class Pool:
    """Operands as views at rotating offsets of one buffer larger than any cache, so that weights and saved tensors are cold when read."""

    def __init__(self, *, num_elements: int, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        self.device, self.dtype = device, dtype
        self._buffer = torch.empty(num_elements, device=device, dtype=dtype).normal_(generator=generator)
        self._offset = 0

    def tensor(self, *shape: int) -> torch.Tensor:
        """A contiguous tensor of normal values."""
        size = prod(shape)
        if size > self._buffer.numel():
            return torch.empty(shape, device=self.device, dtype=self.dtype).normal_()
        if self._offset + size > self._buffer.numel():
            self._offset = 0
        view = self._buffer[self._offset : self._offset + size].view(shape)
        self._offset += -(-size // 64) * 64
        return view

    def complex_tensor(self, *shape: int) -> torch.Tensor:
        """A contiguous complex64 tensor (single precision whatever the pool's dtype)."""
        return torch.view_as_complex(self.tensor(*shape, 2).float())

    def own(self, *shape: int) -> torch.Tensor:
        """A tensor of its own, for kernels that write in place."""
        return self.tensor(*shape).clone()


Build = Callable[[Pool], Call]


def on(function: Callable[..., Call], *shape: object) -> Build:
    """Builds the call on a shape, once a pool is there."""
    return lambda pool: function(pool, *shape)


def _gemm_cases(full: bool) -> Iterator[tuple[KernelClass, str, tuple[int, ...], int, Build]]:
    sizes = [(64, 256, 256), (256, 256, 1024), (256, 1024, 256), (1024, 256, 256), (512, 512, 512), (256, 1024, 1024), (1024, 1024, 256),
             (1024, 256, 1024), (1024, 1024, 1024), (2048, 512, 512), (1024, 4096, 1024), (1024, 1024, 4096), (4096, 1024, 1024),
             (512, 2048, 2048), (2048, 1024, 512), (256, 4096, 1024), (1024, 512, 2560), (2560, 1024, 512), (1024, 2560, 512),
             (128, 128, 128), (64, 1024, 1024), (8, 1024, 2048), (8, 2048, 1024), (2048, 8, 1024), (1024, 2048, 8), (16, 4096, 256),
             (512, 1003, 512), (1024, 3001, 768)]  # fmt: skip
    vocabulary_sizes = [(1024, 16001, 512), (1024, 512, 16001), (16001, 512, 1024), (1024, 16000, 512)]
    if full:
        sizes += [(m, n, k) for m in (128, 512, 2048) for n in (384, 1536, 6144) for k in (384, 1536, 6144)]
        sizes += [(8192, 1024, 1024), (32, 2048, 8192), (32, 8192, 2048)]
    pointwise = [(16384, n, k) for n, k in ((16, 32), (32, 16), (32, 64), (64, 32), (1, 64), (64, 1), (128, 64))]
    if full:
        pointwise += [
            (points, n, k) for points in (4096, 65536) for n, k in ((32, 32), (64, 20), (24, 48), (48, 96), (1, 128), (64, 64))
        ]
        pointwise += [(4096, 128, 256), (4096, 256, 128)]
    for m, n, k in sizes + pointwise:
        yield "gemm", "addmm", (m, n, k), 2 * m * n * k, on(_addmm, m, n, k)
    weights = [(n, k, points) for points, n, k in pointwise]
    if full:
        vocabulary_sizes += [
            (1024, 30001, 768),
            (1024, 50001, 1024),
            (1024, 1024, 50001),
            (50001, 1024, 1024),
            (512, 32000, 1024),
        ]
    for m, n, k in sizes + vocabulary_sizes + pointwise + weights:
        yield "gemm", "mm", (m, n, k), 2 * m * n * k, on(_mm, m, n, k)


def _addmm(pool: Pool, m: int, n: int, k: int) -> Call:
    """The forward of a linear layer: weight ``[n, k]`` read transposed."""
    bias, a, weight = pool.tensor(n), pool.tensor(m, k), pool.tensor(n, k)
    return Call(run=lambda: torch.addmm(bias, a, weight.t()), reads=(bias, a, weight), produced=(a,))


def _mm(pool: Pool, m: int, n: int, k: int) -> Call:
    """Layout by role: the widest of m, n, k is the feature axis that tells forward, input gradient or weight gradient.

    n widest: a forward without bias (NT) as in a language-model head; m widest: a weight gradient (TN); else input gradient (NN). Where the others are narrow the widest axis is
    that of points: summed over in a weight gradient (k, TN), kept in an input gradient (m, NN).
    """
    narrow = sorted((m, n, k))[1] <= _NARROW
    if n > max(m, k):
        a, weight = pool.tensor(m, k), pool.tensor(n, k)
        return Call(run=lambda: torch.mm(a, weight.t()), reads=(a, weight))
    if k > max(m, n) if narrow else m > max(n, k):
        a, b = pool.tensor(k, m), pool.tensor(k, n)
        return Call(run=lambda: torch.mm(a.t(), b), reads=(a, b))
    a, b = pool.tensor(m, k), pool.tensor(k, n)
    return Call(run=lambda: torch.mm(a, b), reads=(a, b))


def _batched_gemm_cases(full: bool) -> Iterator[tuple[str, tuple[int, ...], int, str, Build]]:
    sizes = [(16, 128, 128, 64), (48, 256, 256, 64), (48, 256, 64, 256), (96, 64, 64, 64), (32, 512, 64, 512), (32, 512, 512, 64), (256, 16, 64, 64),
             (512, 64, 64, 8), (96, 200, 200, 64), (8, 256, 1024, 512), (4, 32, 32, 32)]  # fmt: skip
    # the batch is the number of modes that a real transform keeps, 2^a (2^b + 1): it sets the stride, and so which cache lines collide and
    # how many pages a matrix spans
    complex_sizes = [(272, 8, 64, 64), (272, 64, 64, 8), (72, 16, 32, 32), (288, 4, 32, 32), (288, 32, 32, 4), (528, 4, 64, 64),
                     (528, 64, 64, 4), (528, 2, 64, 64), (528, 1, 64, 64), (136, 16, 128, 128), (136, 96, 96, 16), (272, 8, 32, 32),
                     (72, 4, 16, 16), (272, 20, 48, 48)]  # fmt: skip
    if full:
        sizes += [(12, 1024, 1024, 64), (12, 1024, 64, 1024), (192, 197, 197, 64), (192, 197, 64, 197), (16, 512, 512, 512)]
        complex_sizes += [(300, 8, 24, 24), (300, 24, 24, 8), (2048, 4, 64, 64), (2048, 64, 64, 4), (160, 32, 64, 64)]
    for b, m, n, k in sizes:
        yield "bmm", (b, m, n, k), 2 * b * m * n * k, "", on(_bmm, b, m, n, k)
    for b, m, n, k in complex_sizes:
        yield "bmm", (b, m, n, k), 8 * b * m * n * k, "complex64", on(_complex_bmm, b, m, n, k)


def _bmm(pool: Pool, b: int, m: int, n: int, k: int) -> Call:
    a, c = pool.tensor(b, m, k), pool.tensor(b, k, n)
    return Call(run=lambda: torch.bmm(a, c), reads=(a, c))


def _complex_bmm(pool: Pool, b: int, m: int, n: int, k: int) -> Call:
    """The spectral contraction of a neural operator: weights are stored with the batched (mode) axis innermost."""
    a = pool.complex_tensor(b, m, k)
    weight = pool.complex_tensor(k, n, b).permute(2, 0, 1)
    return Call(run=lambda: torch.bmm(a, weight), reads=(a, weight))


def _attention_cases(full: bool) -> Iterator[tuple[str, tuple[int, ...], int, Build]]:
    sizes = [(1, 4, 128, 64), (4, 8, 128, 64), (2, 8, 256, 64), (4, 12, 320, 64), (2, 8, 512, 64), (8, 12, 197, 64), (1, 8, 1024, 64),
             (4, 8, 256, 32), (2, 4, 512, 128)]  # fmt: skip
    if full:
        sizes += [(1, 12, 2048, 64), (16, 12, 128, 64), (2, 16, 1024, 64), (1, 16, 1024, 128), (32, 3, 197, 64), (1, 2, 64, 64)]
    for b, h, length, d in sizes:
        for causal in (0, 1):
            shape = (b, h, h, length, length, d, causal)
            flops = 4 * b * h * length * length * d
            yield "attention", shape, flops, on(_attention, b, h, length, d, bool(causal))
            yield "attention_backward", shape, 2 * flops, on(_attention_backward, b, h, length, d, bool(causal))


def _attention(pool: Pool, b: int, h: int, length: int, d: int, causal: bool) -> Call:
    """Heads as a projection of query, key and value leaves them: strided views of one ``[b, length, 3, h, d]`` tensor."""
    q, k, v = pool.tensor(b, length, 3, h, d).permute(2, 0, 3, 1, 4)
    function = torch.nn.functional.scaled_dot_product_attention
    return Call(run=lambda: function(q, k, v, None, 0.0, causal), reads=(q, k, v), produced=(q, k, v))


def _attention_backward(pool: Pool, b: int, h: int, length: int, d: int, causal: bool) -> Call:
    q, k, v = pool.tensor(b, length, 3, h, d).permute(2, 0, 3, 1, 4)
    grad = pool.tensor(b, length, h, d).transpose(1, 2)
    if pool.device == "cpu":
        out, logsumexp = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)  # noqa: SLF001 - the operator's name
        backward = ATEN._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
        return Call(run=lambda: backward(grad, q, k, v, out, logsumexp, 0.0, causal), reads=(grad, q, k, v, out, logsumexp))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], None, 0.0, causal)
    return Call(run=lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), reads=(grad, q, k, v, out.detach()))


def _convolution_cases(full: bool) -> Iterator[tuple[str, tuple[int, ...], int, Build]]:
    """(batch, in, out, kernel, stride, output side, groups): residual networks, patches, U-Nets, pointwise layers of operators."""
    sizes = [(8, 3, 64, 7, 2, 112, 1), (8, 64, 64, 3, 1, 56, 1), (8, 64, 256, 1, 1, 56, 1), (8, 256, 64, 1, 1, 56, 1), (8, 128, 128, 3, 1, 28, 1),
             (8, 96, 96, 3, 2, 32, 1), (8, 512, 128, 1, 1, 28, 1), (8, 128, 512, 1, 1, 28, 1), (8, 256, 256, 3, 1, 14, 1), (8, 192, 192, 3, 2, 20, 1),
             (8, 1024, 256, 1, 1, 14, 1), (8, 256, 1024, 1, 1, 14, 1), (8, 512, 512, 3, 1, 7, 1), (8, 384, 384, 3, 2, 9, 1), (8, 2048, 512, 1, 1, 7, 1),
             (8, 512, 2048, 1, 1, 7, 1), (8, 256, 512, 1, 2, 28, 1), (8, 768, 1536, 1, 2, 10, 1), (4, 32, 32, 1, 1, 64, 1), (8, 64, 64, 1, 1, 96, 1),
             (4, 32, 128, 1, 1, 128, 1), (4, 128, 1, 1, 1, 128, 1), (4, 3, 48, 1, 1, 128, 1), (4, 3, 384, 16, 16, 14, 1), (2, 32, 32, 3, 1, 64, 1),
             (4, 16, 32, 3, 1, 96, 1), (8, 96, 96, 3, 1, 28, 96), (2, 128, 128, 3, 1, 32, 1)]  # fmt: skip
    if full:
        sizes += [
            (b, c, o, k, s, side, 1)
            for b in (2, 16)
            for c, o, side in ((48, 48, 48), (160, 160, 24), (320, 320, 12), (640, 640, 6))
            for k, s in ((1, 1), (3, 1), (3, 2))
        ]
        sizes += [
            (16, 3, 64, 7, 2, 112, 1),
            (16, 3, 768, 16, 16, 14, 1),
            (16, 48, 48, 1, 1, 128, 1),
            (1, 64, 64, 3, 1, 128, 1),
            (1, 256, 128, 3, 1, 64, 1),
        ]
    for size in sizes:
        batch, c, o, kernel, stride, side, groups = size
        shape = (batch, c, o, groups, kernel * kernel, side * side, stride)
        flops = 2 * batch * side * side * kernel * kernel * c * o // groups
        for op in ("convolution", "convolution_backward_input", "convolution_backward_weight"):
            if op == "convolution_backward_input" and c == _IMAGE_CHANNELS:
                continue
            yield op, shape, flops, on(_convolution, op, *size)


def _convolution(pool: Pool, op: str, batch: int, c: int, o: int, kernel: int, stride: int, side: int, groups: int) -> Call:
    padding = [0 if kernel == stride else (kernel - 1) // 2] * 2
    x = pool.tensor(batch, c, side * stride, side * stride)
    weight = pool.tensor(o, c // groups, kernel, kernel)
    if op == "convolution":
        bias = pool.tensor(o) if kernel == 1 and o < c * 2 and stride == 1 and side > _WIDE_SIDE else None
        reads = (x, weight) if bias is None else (x, weight, bias)
        return Call(
            run=lambda: ATEN.convolution(x, weight, bias, [stride] * 2, padding, [1, 1], False, [0, 0], groups), reads=reads
        )
    grad = pool.tensor(batch, o, side, side)
    to_input = op == "convolution_backward_input"
    mask = [to_input, not to_input, False]
    return Call(
        run=lambda: ATEN.convolution_backward(
            grad, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], groups, mask
        ),
        reads=(grad, weight if to_input else x),
    )


def _fft_cases(full: bool) -> Iterator[tuple[str, tuple[int, ...], str, Build]]:
    sizes = [
        (64, 64, 64),
        (256, 64, 64),
        (256, 96, 96),
        (256, 128, 128),
        (64, 128, 128),
        (1024, 32, 32),
        (32, 256, 256),
        (256, 40, 40),
        (512, 24, 24),
        (128, 85, 85),
        (640, 128, 128),
        (16, 1024),
        (512, 1024),
        (64, 8192),
    ]
    if full:
        sizes += [(256, 24, 96), (128, 56, 56), (32, 192, 192)]  # two and other primes
        sizes += [(1024, 64, 64), (16, 512, 512), (128, 421, 421), (64, 160, 160), (16, 64, 64, 64), (2048, 256), (512, 8192)]
    for size in sizes:  # dtypes are those of the results
        dims = tuple(range(1, len(size)))
        last = size[-1] // 2 + 1
        yield "_fft_r2c", size, "complex64", on(_fft_r2c, size, dims)
        yield "_fft_c2r", size, "float32", on(_fft_c2r, size, dims, last)
        yield "_fft_c2c", size, "complex64", on(_fft_c2c, size, dims)


def _fft_r2c(pool: Pool, size: tuple[int, ...], dims: tuple[int, ...]) -> Call:
    x = pool.tensor(*size).float()
    return Call(run=lambda: ATEN._fft_r2c(x, dims, 0, True), reads=(x,))  # noqa: SLF001 - the operator's name


def _fft_c2r(pool: Pool, size: tuple[int, ...], dims: tuple[int, ...], last: int) -> Call:
    x = pool.complex_tensor(*size[:-1], last)
    return Call(run=lambda: ATEN._fft_c2r(x, dims, 2, size[-1]), reads=(x,))  # noqa: SLF001


def _fft_c2c(pool: Pool, size: tuple[int, ...], dims: tuple[int, ...]) -> Call:
    x = pool.complex_tensor(*size)
    return Call(run=lambda: ATEN._fft_c2c(x, dims, 0, False), reads=(x,))  # noqa: SLF001


def heavy_cases(dtype: str, *, full: bool) -> list[Case]:
    """Products, attention, convolutions and transforms."""
    cases = [
        Case(kernel_class=cls, op=op, shape=shape, dtype=dtype, flops=flops, build=build)
        for cls, op, shape, flops, build in _gemm_cases(full)
    ]
    cases += [
        Case(kernel_class="batched_gemm", op=op, shape=shape, dtype=own or dtype, flops=flops, build=build)
        for op, shape, flops, own, build in _batched_gemm_cases(full)
    ]
    for kernel_class, source in (("attention", _attention_cases), ("convolution", _convolution_cases)):
        cases += [
            Case(kernel_class=kernel_class, op=op, shape=shape, dtype=dtype, flops=flops, build=build)  # type: ignore[arg-type]
            for op, shape, flops, build in source(full)
        ]
    cases += [
        Case(kernel_class="fft", op=op, shape=shape, dtype=own, flops=0, build=build)
        for op, shape, own, build in _fft_cases(full)
    ]
    return cases
