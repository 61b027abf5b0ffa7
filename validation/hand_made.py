"""Steps with torch's own means of saving memory, as set by hand: each layer checkpointed, saved tensors on the host, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from validation.step_runs import PlainRun

LEAST_ALIKE = 2
"""Modules of one class in a list that make it a list of layers."""


class HandMadeRun(PlainRun):
    """The plain step with ``torch.utils.checkpoint`` around each layer, ``torch.autograd.graph.save_on_cpu`` around the step, or both."""

    def __init__(self, *common: Any, means: str) -> None:
        super().__init__(*common)
        self.means = means

    def gradients(self) -> torch.Tensor:
        """Forward and backward."""
        with ExitStack() as stack:
            if "checkpoint" in self.means:
                stack.enter_context(layers_checkpointed(self._module))
            if "save_on_cpu" in self.means:
                stack.enter_context(save_on_cpu(pin_memory=self._device.type == "cuda"))
            return super().gradients()


def layers_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost repeated layers: members of lists and sequences that hold several of one class."""
    found: list[torch.nn.Module] = []

    def visit(part: torch.nn.Module) -> None:
        for child in part.children():
            members = list(child.children()) if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential) else []
            kinds = [type(member) for member in members]
            if any(kinds.count(kind) >= LEAST_ALIKE for kind in kinds):
                found.extend(member for member in members if kinds.count(type(member)) >= LEAST_ALIKE)
            else:
                visit(child)

    visit(module)
    return found


@contextmanager
def layers_checkpointed(module: torch.nn.Module) -> Iterator[None]:
    """Each layer keeps its input only and runs again in the backward pass; taken back on leaving."""
    layers = layers_of(module)
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
