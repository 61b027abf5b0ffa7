"""Kernels of operators: FLOPs against torch's counter where it is right, by hand where it is not; classes, shapes and bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hardware_models.kernel import Kernel
from simulator.tracing.kernels_of import kernels_of

FLOAT_BYTES, COMPLEX_BYTES = 4, 8


class Kernels(TorchDispatchMode):
    """Collects the kernels of all operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += kernels_of(func, (*args, *(kwargs or {}).values()), out)
        return out


def kernels(function: Callable[[], Any]) -> list[Kernel]:
    with Kernels() as mode:
        function()
    return mode.found


def kernel(function: Callable[[], Any]) -> Kernel:
    """The only kernel besides those that make operands."""
    (found,) = (one for one in kernels(function) if one.op != "randn")
    return found


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*shape, dtype=dtype).requires_grad_()


COUNTED: dict[str, Callable[[], Any]] = {
    "mm": lambda: leaf(3, 4) @ leaf(4, 5),
    "addmm": lambda: F.linear(leaf(3, 4), leaf(5, 4), leaf(5)),
    "linear-3d": lambda: F.linear(leaf(2, 3, 4), leaf(5, 4), leaf(5)),
    "bmm": lambda: leaf(2, 3, 4) @ leaf(2, 4, 5),
    "baddbmm": lambda: torch.baddbmm(leaf(2, 3, 5), leaf(2, 3, 4), leaf(2, 4, 5)),
    "conv1d": lambda: F.conv1d(leaf(2, 3, 9), leaf(5, 3, 4)),
    "conv2d": lambda: F.conv2d(leaf(2, 3, 8, 8), leaf(5, 3, 3, 3), leaf(5), stride=2, padding=1),
    "conv3d": lambda: F.conv3d(leaf(1, 2, 5, 5, 5), leaf(3, 2, 2, 2, 2)),
    "conv-transpose2d": lambda: F.conv_transpose2d(leaf(2, 3, 4, 4), leaf(3, 5, 2, 2), stride=2),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_products_count_as_torch_counts_them(name: str, *, backward: bool) -> None:
    def run() -> None:
        y = COUNTED[name]()
        if backward:
            y.square().sum().backward()

    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() > 0
    assert sum(one.flops for one in kernels(run)) == counter.get_total_flops()


def test_a_complex_product_is_four_real_ones() -> None:
    a, b = random(3, 4, dtype=torch.cfloat), random(4, 5, dtype=torch.cfloat)
    found = kernel(lambda: a @ b)
    assert found.flops == 8 * 3 * 4 * 5
    assert found.dtype == "complex64"
    assert (found.read_bytes, found.written_bytes) == ((3 * 4 + 4 * 5) * COMPLEX_BYTES, 3 * 5 * COMPLEX_BYTES)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_in_full_whether_causal_or_not(*, causal: bool) -> None:
    batch, heads, query_len, kv_len, head_dim = 2, 3, 6, 6, 8
    query, key, value = (leaf(batch, heads, query_len, head_dim) for _ in range(3))
    found = kernels(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal).sum().backward())
    attention = [one for one in found if one.kernel_class == "attention"]
    assert [one.op for one in attention] == ["attention", "attention_backward"]
    product = 2 * batch * heads * query_len * kv_len * head_dim
    assert [one.flops for one in attention] == [2 * product, 4 * product]
    assert {one.shape for one in attention} == {(batch, heads, heads, query_len, kv_len, head_dim, int(causal))}


def test_attention_to_fewer_keys_and_another_length() -> None:
    query, key = random(2, 4, 5, 8), random(2, 4, 9, 8)
    found = [one for one in kernels(lambda: F.scaled_dot_product_attention(query, key, key)) if one.flops]
    assert [one.shape for one in found] == [(2, 4, 4, 5, 9, 8, 0)]
    assert found[0].flops == 2 * 2 * 2 * 4 * 5 * 9 * 8


def test_shapes_of_products() -> None:
    assert kernel(lambda: torch.addmm(random(5), random(3, 4), random(4, 5))).shape == (3, 5, 4)
    assert kernel(lambda: torch.bmm(random(2, 3, 4), random(2, 4, 5))).shape == (2, 3, 5, 4)
    assert kernel(lambda: torch.mv(random(3, 4), random(4))).shape == (3, 1, 4)
    assert kernel(lambda: torch.dot(random(7), random(7))).flops == 2 * 7


def test_shape_of_a_convolution() -> None:
    found = kernel(lambda: F.conv2d(random(2, 4, 8, 8), random(6, 2, 3, 3), groups=2, stride=2))
    assert found.shape == (2, 4, 6, 2, 9, 9, 2)
    assert found.kernel_class == "convolution"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_backward_of_a_grouped_convolution_is_twice_its_forward(groups: int) -> None:
    """Torch's counter takes the weight's gradient for ungrouped."""
    x, weight = leaf(2, 4, 8, 8), leaf(8, 4 // groups, 3, 3)
    forward = sum(one.flops for one in kernels(lambda: F.conv2d(x, weight, groups=groups)))
    assert forward == 2 * 2 * (6 * 6) * (3 * 3) * 4 * 8 // groups
    y = F.conv2d(x, weight, groups=groups)
    assert sum(one.flops for one in kernels(lambda: y.backward(torch.ones_like(y)))) == 2 * forward


def test_a_convolution_backward_is_one_kernel_per_gradient() -> None:
    x, weight, bias = leaf(2, 3, 8, 8), leaf(5, 3, 3, 3), leaf(5)
    y = F.conv2d(x, weight, bias)
    found = [one for one in kernels(lambda: y.backward(torch.ones_like(y))) if one.kernel_class in {"convolution", "reduction"}]
    assert [one.op for one in found] == ["convolution_backward_input", "convolution_backward_weight", "sum"]
    y = F.conv2d(x.detach(), weight)
    found = [one for one in kernels(lambda: y.backward(torch.ones_like(y))) if one.kernel_class == "convolution"]
    assert [one.op for one in found] == ["convolution_backward_weight"]


def test_fourier_transforms_by_the_length_of_the_signal() -> None:
    found = kernels(lambda: torch.fft.irfft(torch.fft.rfft(random(3, 5, 16)), n=16))
    transforms = [one for one in found if one.kernel_class == "fft"]
    assert [(one.op, one.shape, one.flops) for one in transforms] == [("_fft_r2c", (15, 16), 0), ("_fft_c2r", (15, 16), 0)]


@pytest.mark.parametrize(
    ("strides", "copies"),
    [
        ((1024, 256, 16, 1), []),  # in order
        ((1024, 1, 64, 4), ["transposed_copy"]),  # channels innermost: samples and channels are no one axis
        ((256, 512, 16, 1), []),  # channels outermost: they still are
        ((2048, 256, 16, 1), ["_to_copy"]),  # every other sample
    ],
)
def test_a_transform_collects_the_axes_that_it_leaves(strides: tuple[int, ...], copies: list[str]) -> None:
    x = torch.as_strided(random(4096), (2, 4, 16, 16), strides)
    found = kernels(lambda: torch.fft.rfft2(x))
    assert [one.op for one in found] == [*copies, "_fft_r2c"]
    assert all(
        (one.shape, one.read_bytes, one.written_bytes) == ((x.numel(),), 4 * x.numel(), 4 * x.numel()) for one in found[:-1]
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(2, 6), lambda x: x.t(), lambda x: x[1:], lambda x: x.detach(), lambda x: x.expand(2, 3, 4),
        lambda x: x.unsqueeze(0), lambda x: x.split(1), torch.empty_like,
    ],
)  # fmt: skip
def test_views_and_bare_allocations_launch_nothing(function: Callable[[Tensor], Any]) -> None:
    x = random(3, 4)
    assert kernels(lambda: function(x)) == []


@pytest.mark.parametrize(
    ("function", "kernel_class", "shape"),
    [
        (lambda x: x + 1, "pointwise", (24,)),
        (lambda x: x.relu_(), "pointwise", (24,)),
        (lambda x: x.softmax(-1), "softmax", (6, 4)),
        (lambda x: x.log_softmax(-1), "softmax", (6, 4)),
        (lambda x: x.sum(), "reduction", (1, 24)),
        (lambda x: x.sum(-1), "reduction", (6, 4)),
        (lambda x: F.layer_norm(x, (4,)), "normalization", (6, 4)),
        (lambda x: x.clone(), "copy", (24,)),
        (lambda x: x.zero_(), "copy", (24,)),
        (lambda x: torch.cat((x, x)), "copy", (48,)),
        (lambda x: F.embedding(torch.tensor([0, 2]), x[0]), "embedding", (2, 4, 3)),
    ],
)
def test_classes_and_shapes(function: Callable[[Tensor], Any], kernel_class: str, shape: tuple[int, ...]) -> None:
    x = random(2, 3, 4)
    found = kernels(lambda: function(x))[-1]
    assert (found.kernel_class, found.shape, found.flops) == (kernel_class, shape, 0)


def test_bytes_are_each_operand_once() -> None:
    x = random(6, 4)
    found = kernel(lambda: x + x)
    assert (found.read_bytes, found.written_bytes) == (2 * 24 * FLOAT_BYTES, 24 * FLOAT_BYTES)
    assert kernel(x.clone).moved_bytes == 2 * 24 * FLOAT_BYTES
    assert kernel(x.zero_).moved_bytes == 24 * FLOAT_BYTES


def test_an_embedding_reads_the_rows_that_it_takes() -> None:
    weight = random(1000, 4)
    tokens = torch.tensor([1, 2, 3])
    found = kernel(lambda: F.embedding(tokens, weight))
    assert found.read_bytes == tokens.numel() * (tokens.element_size() + 4 * FLOAT_BYTES)


def test_rows_of_batch_normalisation_are_channels() -> None:
    found = kernels(lambda: F.batch_norm(random(2, 3, 4, 4), None, None, training=True))
    assert [one.shape for one in found if one.kernel_class == "normalization"] == [(3, 2 * 4 * 4)]
