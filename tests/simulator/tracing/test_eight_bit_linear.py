"""Linear layers in eight bits: near the exact ones, traced as the casts and products that run, refused by name where they cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from hardware_models.errors import InputError
from simulator.tracing import eight_bit_linear
from simulator.tracing.compute_mode import compute_mode, prepared
from simulator.tracing.eight_bit_linear import EIGHT_BIT, check_eight_bit, in_eight_bits
from simulator.tracing.trace import trace

ROUNDING = {"fp8": 0.07, "int8": 0.02}
"""Relative error of products of normally distributed numbers: e5m2 (gradients) keeps 3 bits of them, off by 2^-3 / sqrt(3) at the root mean square of the worst octave."""
CPU = torch.device("cpu")


class Layers(nn.Module):
    """Two layers in a list and a head outside it; one axis that is no multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 32), nn.Linear(32, 64, bias=False), nn.Linear(64, 24)])
        self.head = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102 - forward is forward
        x = self.layers[1](F.gelu(self.layers[0](x)))
        return F.pad(self.layers[2](x), (0, 8)) + self.head(x)


@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_a_layer_is_the_exact_one_up_to_rounding(precision: str) -> None:
    torch.manual_seed(0)
    exact, layer = nn.Linear(64, 32), nn.Sequential(nn.Linear(64, 32))
    layer[0].load_state_dict(exact.state_dict())
    in_eight_bits(layer, precision, name="layer")
    x, grad = torch.randn(2, 16, 64), torch.randn(2, 16, 32)
    results = []
    for module in (exact, layer):
        own = x.clone().requires_grad_()
        y = module(own)
        y.backward(grad.to(y.dtype))
        results.append((y, own.grad, *(value.grad for value in module.parameters())))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert mine is not None
        assert theirs is not None
        assert ((mine.float() - theirs).norm() / theirs.norm()).item() < ROUNDING[precision]
    assert results[1][0].dtype == torch.bfloat16
    assert all(value.grad.dtype == torch.float32 for value in layer.parameters() if value.grad is not None)


@pytest.mark.parametrize(("precision", "dtype", "products"), [("fp8", "float8_e4m3fn", 2), ("int8", "int8", 2)])
def test_a_trace_shows_the_products_that_run(precision: str, dtype: str, products: int) -> None:
    module, inputs = prepared(Layers(), {"x": torch.randn(16, 64)}, precision, name="layers")
    workload = trace(module, inputs, precision=precision).workload
    forward = [
        kernel for block in workload.blocks for kernel in block.options[0].forward.kernels if kernel.kernel_class == "gemm"
    ]
    assert [kernel.dtype for kernel in forward].count(dtype) == products
    assert [kernel.dtype for kernel in forward].count("bfloat16") == len(forward) - products == 2
    backward = [
        kernel for block in workload.blocks for kernel in block.options[0].backward.kernels if kernel.kernel_class == "gemm"
    ]
    narrow = [kernel for kernel in backward if kernel.dtype in {"float8_e5m2", "int8"}]
    assert len(narrow) == (
        2 * products - 1 if precision == "fp8" else products - 1
    )  # the first layer's input needs no gradient
    kept = {tensor.dtype for block in workload.blocks for tensor in block.options[0].saved}
    assert "float8_e4m3fn" not in kept


def test_a_tensor_of_zeros_has_a_scale() -> None:
    for precision in EIGHT_BIT:
        layer = in_eight_bits(nn.Sequential(nn.Linear(16, 16, bias=False)), precision, name="layer")
        assert torch.equal(layer(torch.zeros(16, 16)).float(), torch.zeros(16, 16))


def test_the_largest_number_stays_finite() -> None:
    values = torch.linspace(0.001, 3.0e4, 4096).to(torch.bfloat16)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for largest in values[::97]:
            cast, scale = eight_bit_linear._fp8(largest.reshape(1, 1), dtype)
            assert (cast.float() * scale).item() == pytest.approx(largest.item(), rel=0.01)


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no linear layer in a list or sequence of layers has axes that are multiples of 16"):
        prepared(nn.Linear(16, 16), {}, "fp8", name="alone")
    module, inputs = prepared(Layers(), {"x": torch.randn(3, 64)}, "int8", name="layers")
    with (
        pytest.raises(InputError, match="rows of a product in eight bits are a multiple of 16, but got 3"),
        compute_mode("int8", CPU),
    ):
        module(**inputs)

    def missing(*_: object, **__: object) -> torch.Tensor:
        raise NotImplementedError("'aten::_scaled_mm' is not for this backend")

    check_eight_bit("bf16", CPU)
    check_eight_bit("fp8", CPU)
    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(
        InputError,
        match=r"precision.compute = 'fp8': torch .* has no products in eight bits on this device \(cpu\): 'aten::_scaled_mm' is not",
    ):
        check_eight_bit("fp8", CPU)
