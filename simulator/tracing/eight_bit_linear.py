"""Linear layers whose products torch computes in eight bits: fp8 with one scale a tensor, int8 with one scale a row.

A layer's call is one operator of torch's (``schedlab::linear_fp8``), so that a trace above autograd shows it as it shows ``linear``; below autograd it is the casts and
products that run, which is what tracing records and replay measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hardware_models.errors import InputError

ALIGNED = 16
"""What every axis of a product in eight bits is a multiple of: kernels of torch._scaled_mm want it of the summed and the column axis, and each axis is one of these once."""
_LEAST = 1e-12
"""Below this, a largest magnitude counts as this: a tensor of zeros has a scale too."""
_FP8_FORWARD, _FP8_BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_INT8_LARGEST = 127
_PROBE = 2 * ALIGNED
_MATRIX = 2


class _Fp8Products(torch.autograd.Function):
    """``y = x w^T`` with operands cast by one scale each; gradients in the format with the wider range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _fp8_product(*_fp8(x, _FP8_FORWARD), *_fp8(weight, _FP8_FORWARD), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        own, own_scale = _fp8(grad, _FP8_BACKWARD)
        grad_x = None
        if ctx.needs_input_grad[0]:
            other, scale = _fp8(weight, _FP8_FORWARD)
            grad_x = _fp8_product(own, own_scale, other.t().contiguous(), scale, x.dtype)
            del other
        other, scale = _fp8(x, _FP8_FORWARD)
        return grad_x, _fp8_product(own.t().contiguous(), own_scale, other.t().contiguous(), scale, x.dtype)


class _Int8Products(torch.autograd.Function):
    """``y = x w^T`` with operands cast by rows, as is the product for the input's gradient; that for the weight's gradient stays in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _int8_product(*_int8(x), *_int8(weight), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _int8_product(*_int8(grad), *_int8(weight.t().contiguous()), x.dtype)
        return grad_x, grad.t() @ x


def _fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor in eight bits and what it is to be multiplied by: ``x = cast * scale``, scale a float32 of no axis.

    The scale is rounded to the tensor's own format before it is used; what that adds to the largest value (2^-8 of it, twice) still rounds down to the format's largest.
    """
    largest = torch.linalg.vector_norm(x, torch.inf).float().clamp(min=_LEAST)
    scale = (torch.finfo(dtype).max / largest).to(x.dtype)
    return (x * scale).to(dtype), scale.float().reciprocal()


def _fp8_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b^T``; both lie row by row."""
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)  # noqa: SLF001 - torch's only eager product in eight bits


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in eight bits and what its rows are to be multiplied by, shape (rows, 1), float32."""
    scale = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).float().clamp(min=_LEAST) / _INT8_LARGEST
    return (x / scale.to(x.dtype)).round().clamp(-_INT8_LARGEST, _INT8_LARGEST).to(torch.int8), scale.to(x.dtype).float()


def _int8_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b^T``; both lie row by row."""
    return (torch._int_mm(a, b.t()) * a_scale * b_scale.t()).to(dtype)  # noqa: SLF001 - torch's only product of signed bytes


_PRODUCTS: Mapping[str, type[torch.autograd.Function]] = MappingProxyType({"fp8": _Fp8Products, "int8": _Int8Products})
EIGHT_BIT = tuple(_PRODUCTS)
"""Precisions whose linear layers compute in eight bits."""
EIGHT_BIT_NODES = tuple(function._backward_cls for function in _PRODUCTS.values())  # noqa: SLF001 - torch's only name of the classes
"""Nodes of autograd's graph that these layers make."""
EIGHT_BIT_OPERATORS = tuple(f"linear_{precision}" for precision in EIGHT_BIT)
"""Names of the operators above autograd."""


def _linear(precision: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
    if rows.shape[0] % ALIGNED:
        rule = f"rows of a product in eight bits are a multiple of {ALIGNED}, but got {rows.shape[0]}"
        remedy = "take another batch.micro_batch or batch.seq_len, or bf16"
        raise InputError(source="plan", key="precision.compute", value=precision, rule=rule, remedy=remedy)
    with torch.autocast(
        x.device.type, enabled=False
    ):  # a CPU's product in eight bits is made of others, which autocast would round
        out: Tensor = _PRODUCTS[precision].apply(rows, weight)
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out.dtype)


_LIBRARY = torch.library.Library("schedlab", "DEF")
for _precision, _operator in zip(EIGHT_BIT, EIGHT_BIT_OPERATORS, strict=True):
    _LIBRARY.define(f"{_operator}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _LIBRARY.impl(_operator, partial(_linear, _precision), "CompositeImplicitAutograd")


def in_eight_bits(module: nn.Module, precision: str, *, name: str) -> nn.Module:
    """Has a module's linear layers compute in eight bits; it is changed in place.

    **Model**: layers inside lists and sequences (a network's layers; not its head) whose two axes are multiples of `ALIGNED`. ``fp8``: a tensor is looked through for its largest
    magnitude and cast by one scale, in every pass; activations and weights in e4m3, gradients in e5m2; the input and the weight are kept as they are and cast again, in the other order, in the
    backward pass. ``int8``: scales of rows; the product for the weight's gradient in bfloat16. Everything else runs as under bf16 (autocast).

    **Source**: torchao: ``matmul_with_hp_or_float8_args`` (torchao/float8/float8_linear.py; recipe ``tensorwise``) and ``Int8MixedPrecisionTrainingConfig``
    (torchao/prototype/quantized_training/int8_mixed_precision.py; ``grad_weight`` off).

    Raises:
        InputError: there is no such layer.
    """
    operator: Callable[..., Tensor] = getattr(torch.ops.schedlab, f"linear_{precision}").default
    holders = [prefix for prefix, part in module.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    changed = 0
    for path, part in module.named_modules():
        held = any(prefix == "" or path.startswith(f"{prefix}.") for prefix in holders)
        if type(part) is nn.Linear and held and not (part.in_features % ALIGNED or part.out_features % ALIGNED):
            part.forward = partial(_forward, operator, part)  # type: ignore[method-assign]
            changed += 1
    if not changed:
        rule = f"no linear layer in a list or sequence of layers has axes that are multiples of {ALIGNED}"
        raise InputError(source=f"model {name}", key="precision.compute", value=precision, rule=rule, remedy="take bf16")
    return module


def _forward(operator: Callable[..., Tensor], layer: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
    return operator(input, layer.weight, layer.bias)


def check_eight_bit(precision: str, device: torch.device) -> None:
    """Refuses a device on which torch has no such products: one is tried.

    Raises:
        InputError: what torch says.
    """
    if precision not in EIGHT_BIT:
        return
    probe = torch.ones(_PROBE, _PROBE, dtype=torch.bfloat16, device=device)
    try:
        function: Any = _PRODUCTS[precision]
        weight = probe.clone().requires_grad_()
        function.apply(probe, weight).sum().backward()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        rule = f"torch {torch.__version__} has no products in eight bits on this device ({where}): {said}"
        raise InputError(
            source="plan",
            key="precision.compute",
            value=precision,
            rule=rule,
            remedy="take bf16, or a GPU of Ada, Hopper or later",
        ) from error
