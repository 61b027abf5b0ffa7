"""Compute modes: in which formats operators compute, from a plan's precision. Tracing, replay and the plain module enter the same one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hardware_models.errors import InputError, UnknownNameError
from simulator.plan_sections import PURE_BF16
from simulator.tracing.eight_bit_linear import EIGHT_BIT, in_eight_bits

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, **dict.fromkeys(EIGHT_BIT, torch.bfloat16)}
"""Mixed precision: parameters stay in float32, products compute in the lower format, as ``torch.autocast`` lists them; with eight bits those of layers do so in these."""
PRECISIONS = ("fp32", "tf32", *AUTOCAST, PURE_BF16)
LOSS_SCALED = ("fp16",)
"""Those whose loss is scaled before the backward pass, so that small gradients are not lost, and whose gradients are scaled back before the update."""


@contextmanager
def compute_mode(precision: str, device: torch.device) -> Iterator[None]:
    """The mode in which a forward pass and its loss run.

    Weights are cast at each use and not kept in autocast's cache, so that a block does the same wherever it runs. ``fp32`` means float32 on
    tensor cores too: torch's default takes TF32 for convolutions.

    Linear layers in eight bits choose their format themselves (`prepared`).

    Raises:
        UnknownNameError: a precision without a mode.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError(source="plan", key="precision.compute", value=precision, known=PRECISIONS)
    with float32_products(precision, device):
        if precision not in AUTOCAST:
            yield
            return
        with torch.autocast(device.type, AUTOCAST[precision], cache_enabled=False):
            yield


@contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Lets products and convolutions of a GPU take TF32 where the precision says so; also for backward passes, which autocast leaves alone."""
    if device.type != "cuda":
        yield
        return
    allowed = precision == "tf32"
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def prepared(
    module: torch.nn.Module, inputs: Mapping[str, Any], precision: str, *, name: str
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A module, real or fake, and its inputs as a precision stores them; the module is changed in place.

    **Model**: `PURE_BF16`: parameters, buffers and inputs of floating point are cast to bfloat16 once, gradients and optimizer states follow
    the parameters (``module.to(torch.bfloat16)``). Eight bits: linear layers compute in them (`eight_bit_linear.in_eight_bits`). Other precisions leave everything as it is.

    Raises:
        InputError: a complex parameter or buffer, for which bf16 has no format; no layer that computes in eight bits.
    """
    if precision in EIGHT_BIT:
        return in_eight_bits(module, precision, name=name), dict(inputs)
    if precision != PURE_BF16:
        return module, dict(inputs)
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_complex():
            rule = f"{key} is complex, and no complex format has parts in bf16"
            raise InputError(
                source=f"model {name}", key="precision.master", value="bf16", rule=rule, remedy='take precision.master = "fp32"'
            )
    cast = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return module.to(torch.bfloat16), cast
