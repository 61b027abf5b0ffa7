"""Workload: what one micro-batch of a model asks of a device, block by block, untimed.

A model is a chain of blocks. Block ``i`` turns boundary ``i`` into boundary ``i + 1``; boundary 0 is the batch, the last one is
the loss. Each block can run forward without a graph, forward with a graph (under several options of what the graph keeps) and
backward; each such run is a `Pass`: kernels in order, and the bytes that come and go between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hardware_models.kernel import Kernel

Buffer = Literal[
    "internal",  # allocated and freed inside the block; where positive over a forward pass, saved for the backward pass
    "transient",  # allocated and freed by the same pass (a finer name than "internal", same arithmetic)
    "output",  # boundary i + 1, allocated by a forward pass
    "carried",  # allocated by the first forward pass, alive until the micro-batch ends (masks, positions, rotary tables)
    "saved_input",  # boundary i, let go by the graph
    "saved_output",  # boundary i + 1, let go by the graph
    "grad_input",  # gradient of boundary i, allocated by the backward pass
    "gradient",  # a parameter's .grad, allocated by the first micro-batch's backward pass, alive until the optimizer step
    "shared_gradient",  # gradient of a parameter that several blocks use, alive until the micro-batch's backward ends
    "kept_grad_input",  # gradient of boundary i, let go by what waits for the weights' gradients
    "kept_grad_output",  # gradient of boundary i + 1, let go by what waits for the weights' gradients
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEvent:
    """Bytes that come (positive) or go (negative) once ``kernel`` kernels of the pass have run."""

    kernel: int
    buffer: Buffer
    delta_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One run of a block in one mode: kernels in launch order and memory events in order of occurrence."""

    kernels: tuple[Kernel, ...]
    memory: tuple[MemoryEvent, ...]
    policy_calls: int = 0
    """Operators, views too, that selective checkpointing asks its policy about, in Python (`hardware_models.profile.DeviceProfile.checkpoint_policy_s`)."""

    @property
    def flops(self) -> int:
        """FLOPs of all kernels (project definition)."""
        return sum(kernel.flops for kernel in self.kernels)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """One storage that a block's graph keeps from its forward to its backward pass."""

    op: str
    """ATen operator that produced it; ``input`` for the block's own input."""
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    packed: int = -1
    """Place, from 0, in the order in which autograd first saves the storages that the block makes (`simulator.tracing.block_run.own_storages`);
    -1: its input or output, or held by something else than autograd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterTensor:
    """One parameter of a block."""

    elements: int
    size_bytes: int
    trained: bool
    """Whether a backward pass makes its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOption:
    """One way to run a block forward with a graph, and the backward passes that follow from it.

    ``name`` is ``all`` (the graph keeps what autograd keeps) or ``selective`` (keeps products only, recomputes the rest inside
    the backward pass). ``backward`` creates the parameters' gradients (first micro-batch), ``backward_accumulate`` adds to
    them (later ones).
    """

    name: str
    forward: Pass
    backward: Pass
    backward_accumulate: Pass
    keeps_input: bool
    keeps_output: bool
    saved: tuple[SavedTensor, ...]
    """All kept storages, the block's input and output among them where the graph keeps those."""

    @property
    def saved_internal_bytes(self) -> int:
        """Bytes kept between forward and backward beyond the boundaries."""
        return sum(event.delta_bytes for event in self.forward.memory if event.buffer == "internal")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitBackward:
    """A block's backward pass under the option ``all`` in two: its input's gradient, then its parameters' ones (zero-bubble pipelines)."""

    inputs: Pass
    weights: Pass
    """Creates the parameters' gradients (first micro-batch)."""
    weights_accumulate: Pass
    """Adds to them (later ones)."""
    keeps_grad_input: bool
    """Whether the gradient of boundary i stays until the weights' gradients are made."""
    keeps_grad_output: bool
    """Whether the gradient of boundary i + 1 does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A stretch of the model between two cuts. Identical blocks of a workload are the same object."""

    name: str
    input_bytes: int
    """Storage of boundary i; 0 for the first block, whose input is the batch."""
    output_bytes: int
    parameter_elements: int
    """Parameters that only this block uses."""
    parameter_bytes: int
    gradient_bytes: int
    discard: Pass
    """Forward without a graph."""
    options: tuple[BlockOption, ...]
    state_bytes: int = 0
    """Buffers that a forward pass changes; a block that runs twice keeps a copy of them."""
    parameters: tuple[ParameterTensor, ...] = ()
    """Those that only this block uses, in the order of its arguments; empty where tensors are not told apart."""

    def option(self, name: str) -> BlockOption:
        """The option called ``name``.

        Raises:
            KeyError: the block has no such option.
        """
        for option in self.options:
            if option.name == name:
                return option
        raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One micro-batch of a model on one device (of one tensor-parallel rank where ``tensor_parallel`` > 1)."""

    model: str
    micro_batch: int
    tokens: int
    """Tokens (or samples, for models without a sequence) in the micro-batch."""
    blocks: tuple[Block, ...]
    parameter_elements: int
    """All distinct trainable parameters, shared ones once."""
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    shared_gradient_bytes: int
    """Gradients of parameters that more than one block uses (tied embeddings)."""
    shared_accumulate: Pass
    """Adds the shared gradients of a micro-batch to the parameters' own; runs after each backward but the first."""
    optimizer_tensors: tuple[int, ...]
    """Elements of each parameter that gets a gradient."""
    batch_bytes: int
    """Bytes of one micro-batch's inputs."""
    mixes_samples: bool
    """Some operator's result for one sample depends on the others (BatchNorm in training)."""
    shared_parameters: tuple[ParameterTensor, ...] = ()
    """Those that several blocks use, in the order of their names."""
    notes: tuple[str, ...] = ()
    loss_scaled: bool = False
    """Whether gradients are scaled back, and looked through for overflow, before an update."""

    @property
    def forward_flops(self) -> int:
        """FLOPs of one forward pass over all blocks."""
        return sum(block.discard.flops for block in self.blocks)

    @property
    def model_flops(self) -> int:
        """FLOPs of forward and backward without recompute (what ``mfu`` counts)."""
        return sum(block.options[0].forward.flops + block.options[0].backward.flops for block in self.blocks)
