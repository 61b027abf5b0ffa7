"""Compute modes: in which formats operators compute, from a plan's precision. Tracing, replay and the plain module enter the same one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hardware_models.errors import UnknownNameError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Mixed precision: parameters stay in float32, products compute in the lower format, as ``torch.autocast`` lists them."""
PRECISIONS = ("fp32", "tf32", *AUTOCAST)
LOSS_SCALED = ("fp16",)
"""Those whose loss is scaled before the backward pass, so that small gradients are not lost, and whose gradients are scaled back before the update."""


@contextmanager
def compute_mode(precision: str, device: torch.device) -> Iterator[None]:
    """The mode in which a forward pass and its loss run.

    Weights are cast at each use and not kept in autocast's cache, so that a block does the same wherever it runs. ``fp32`` means float32 on
    tensor cores too: torch's default takes TF32 for convolutions.

    **Not modelled**: formats of single layers.

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
