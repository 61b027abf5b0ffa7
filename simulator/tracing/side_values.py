"""Fake activations beside real side values, so that tracing follows the path that eager execution takes.

Floating-point tensors are fake (no memory, no arithmetic). Integer and boolean tensors that depend on no activation (positions,
masks, labels, lengths) stay real: they are small, and a model that branches on one (``if mask.all()``) branches as it does
when it runs. The branch then taken is part of the trace: it holds for inputs like the example's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SideValues(TorchDispatchMode):
    """Makes floating-point factory calls fake and leaves integer ones real."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = fake_mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with self.fake_mode:
            out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and not _is_activation_dtype(out.dtype):
            return func(*args, **kwargs)
        return out


@contextmanager
def fake_activations(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Context in which modules and tensors are built fake, save for side values."""
    with SideValues(fake_mode):
        yield


def new_fake_mode() -> FakeTensorMode:
    """A fake mode that lets real side values meet fake activations."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake(tensor: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    """A fake twin of a floating-point tensor; a copy of a side value; a fake tensor as it is."""
    if isinstance(tensor, FakeTensor):
        return tensor
    if _is_activation_dtype(tensor.dtype):
        return fake_mode.from_tensor(tensor)
    return tensor.clone()


def _is_activation_dtype(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
