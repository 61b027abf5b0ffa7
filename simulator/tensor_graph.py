"""TensorGraph: one block's forward pass as operators and the storages that flow between them, untimed."""

from __future__ import annotations

from dataclasses import dataclass

from hardware_models.kernel import Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTensor:
    """A storage that the forward pass makes or is given by the block before."""

    name: str
    """ATen operator that made it; ``input`` for the block's own input."""
    size_bytes: int
    is_saved: bool
    """Whether autograd keeps it for the backward pass."""
    is_boundary: bool
    """Whether the chain holds it anyway: the block's input, its output, or what it hands on to all later blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOperation:
    """An operator of the forward pass with those that change its results in place."""

    name: str
    kernels: tuple[Kernel, ...]
    reads: tuple[int, ...]
    """Tensors of the graph; parameters, buffers and inputs of the model are always there."""
    writes: tuple[int, ...]
    is_repeatable: bool
    """Whether it can run again: it draws no random numbers and changes nothing outside the graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGraph:
    """Operators in the order in which they ran, and their tensors."""

    tensors: tuple[GraphTensor, ...]
    operations: tuple[GraphOperation, ...]
