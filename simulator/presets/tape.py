"""Tape: what eager autograd would record, written down without torch.

Operators append steps: the kernels that they launch, the storages that they make, the ones that autograd saves for their backward
pass, and what that backward pass launches. `simulator.presets.passes` turns a stretch of steps into a `Block`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal

from hardware_models.kernel import Kernel, KernelClass
from hardware_models.units import DTYPE_BYTES

Role = Literal["activation", "carried", "outside"]
"""Who owns a storage: the block; the micro-batch (tables, masks); or nobody that a block's passes count (batch, parameters)."""

INDEX_DTYPE = "int64"
FLOAT = "float32"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Storage:
    """Memory that one or more values share."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    role: Role = "activation"

    @property
    def size_bytes(self) -> int:
        """Bytes of the storage."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parameter:
    """A trainable tensor of one rank; ``shared`` when several blocks use it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shared: bool = False

    @property
    def elements(self) -> int:
        """Elements of the rank's shard."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the rank's shard."""
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Value:
    """A tensor: a shape over a storage."""

    shape: tuple[int, ...]
    storage: Storage
    needs_gradient: bool
    dtype: str

    @property
    def elements(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's own elements."""
        return self.elements * DTYPE_BYTES[self.dtype]


Target = Value | Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """One thing that a step's backward pass does: kernels that make the gradients of ``targets``."""

    targets: tuple[Target, ...]
    kernels: tuple[Kernel, ...] = ()
    scratch_bytes: int = 0
    """Memory that exists only while ``kernels`` run."""
    collective: bool = False
    """Made by communication: memory of its own without a kernel of the block's."""

    @property
    def passes_on(self) -> bool:
        """The incoming gradient itself is the targets' gradient: no kernel, no memory."""
        return not self.kernels and not self.collective


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One operator."""

    op: str
    kernels: tuple[Kernel, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    saved: tuple[Value, ...]
    gradients: tuple[Gradient, ...]


@dataclass(slots=True)
class Tape:
    """Steps and parameters in order of appearance."""

    steps: list[Step] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)

    def parameter(self, name: str, shape: tuple[int, ...], dtype: str, *, shared: bool = False) -> Parameter:
        """A new trainable tensor that this tape uses."""
        made = Parameter(name=name, shape=shape, dtype=dtype, shared=shared)
        self.parameters.append(made)
        return made

    def use(self, parameter: Parameter) -> Parameter:
        """Takes a parameter of another tape into this one."""
        self.parameters.append(parameter)
        return parameter

    def new(
        self, op: str, shape: tuple[int, ...], dtype: str, *, needs_gradient: bool = True, role: Role = "activation"
    ) -> Value:  # fmt: skip
        """A tensor over a storage of its own."""
        storage = Storage(op=op, shape=shape, dtype=dtype, role=role)
        return Value(shape=shape, storage=storage, needs_gradient=needs_gradient, dtype=dtype)

    def record(
        self,
        op: str,
        *,
        kernels: tuple[Kernel, ...],
        inputs: tuple[Value, ...],
        outputs: tuple[Value, ...],
        saved: tuple[Value, ...] = (),
        gradients: tuple[Gradient, ...] = (),
    ) -> None:
        """Appends a step; gradients of values that need none are left out."""
        wanted = tuple(
            gradient for gradient in gradients
            if any(isinstance(target, Parameter) or target.needs_gradient for target in gradient.targets)
        )  # fmt: skip
        self.steps.append(Step(op=op, kernels=kernels, inputs=inputs, outputs=outputs, saved=saved, gradients=wanted))


def view(tape: Tape, x: Value, shape: tuple[int, ...]) -> Value:
    """The same tensor under another shape with as many elements."""
    out = Value(shape=shape, storage=x.storage, needs_gradient=x.needs_gradient, dtype=x.dtype)
    tape.record("view", kernels=(), inputs=(x,), outputs=(out,), gradients=(Gradient(targets=(x,)),))
    return out


def kernel(
    kernel_class: KernelClass,
    op: str,
    shape: tuple[int, ...],
    dtype: str,
    *,
    read_bytes: int,
    written_bytes: int,
    flops: int = 0,
) -> Kernel:
    """A `Kernel` whose sizes are at least 1."""
    return Kernel(
        kernel_class=kernel_class, op=op, shape=tuple(max(1, size) for size in shape), dtype=dtype, flops=flops,
        read_bytes=read_bytes, written_bytes=written_bytes,
    )  # fmt: skip


def pointwise(op: str, elements: int, dtype: str, *, num_read: int = 1) -> Kernel:
    """A pointwise kernel that reads ``num_read`` tensors of the size that it writes."""
    size_bytes = elements * DTYPE_BYTES[dtype]
    return kernel("pointwise", op, (elements,), dtype, read_bytes=num_read * size_bytes, written_bytes=size_bytes)


def copy(op: str, elements: int, dtype: str) -> Kernel:
    """A kernel that writes a tensor from as many elements read."""
    size_bytes = elements * DTYPE_BYTES[dtype]
    return kernel("copy", op, (elements,), dtype, read_bytes=size_bytes, written_bytes=size_bytes)


def reduction(op: str, rows: int, columns: int, dtype: str) -> Kernel:
    """A kernel that reduces ``rows`` x ``columns`` to ``rows``."""
    itemsize = DTYPE_BYTES[dtype]
    return kernel(
        "reduction", op, (rows, columns), dtype, read_bytes=rows * columns * itemsize, written_bytes=rows * itemsize
    )  # fmt: skip
