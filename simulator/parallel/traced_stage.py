"""A stage of a traced model on its rank: the blocks' passes of each micro-batch, byte by byte as replay runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from simulator.builder import Builder
from simulator.lower import MicroBatchLowering, PassPrices
from simulator.parallel.stages import backward_start
from simulator.program import Kind, MemoryClass
from simulator.sequence import Operation, runs_twice
from simulator.workload import BlockOption, MemoryEvent, Pass, SplitBackward, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A parameter on a rank."""

    size_bytes: int
    elements: int
    trained: bool
    dtype: str = "float32"
    """torch's name of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStage:
    """What one pipeline stage runs and holds."""

    index: int
    workload: Workload
    """Of its own blocks; the first one's input is the boundary that the stage receives."""
    operations: tuple[Operation, ...]
    """Of one micro-batch, indices counted from the stage's first block."""
    split: tuple[SplitBackward, ...]
    """Per block its backward pass in two; empty where the order does not split it."""
    receives: bool
    sends: bool
    parameters: Mapping[str, Holding]
    buffers: Mapping[str, int]
    """Bytes by name."""
    inputs: Mapping[str, int]
    """Bytes of one micro-batch by name."""
    parameters_of_block: tuple[frozenset[str], ...]
    """Names of those that only this block of the stage uses."""

    @property
    def turn(self) -> int:
        """The operation that begins the backward half."""
        return backward_start(self.operations)


@dataclass(slots=True, kw_only=True)
class RankLedger:
    """Instructions of one rank as they are issued, and what lives on it beyond the micro-batches."""

    builder: Builder = field(default_factory=Builder)
    sent_bytes: int = 0
    """Messages that left: their tensors live until the runtime waits for them, at the end of the passes."""
    gradients: dict[str, int] = field(default_factory=dict)
    """Parameters that have a gradient by now, with its bytes."""
    scatters: bool = False
    """Gradients leave with the block that makes them (`traced_shards`): every micro-batch makes them anew."""


class StageLowering(MicroBatchLowering):
    """Issues one micro-batch's passes through a stage.

    **Model**: a boundary that is received from another rank exists from the moment at which receiving begins; one that is sent stays to the end of the passes, because the
    runtime keeps what it has sent until then. Stages on one rank hand tensors over. A pass for the input's gradient keeps each block's graph and the gradients that arrive
    where parameters branch off; of the model's first stage, which has no such gradient, the pass does nothing and the one for the weights is the whole backward pass.

    **Source**: ``torch.distributed.pipelining`` (torch 2.13): ``_PipelineScheduleRuntime._step_microbatches``, ``_backward.py``.

    **Not modelled**: copies of messages whose memory is not dense.
    """

    def __init__(self, stage: TracedStage, ledger: RankLedger, prices: PassPrices, micro_batch: int) -> None:
        super().__init__(
            stage.workload, prices, ledger.builder, micro_batch, runs_twice(stage.operations), receives=stage.receives, sends=stage.sends
        )  # fmt: skip
        self.stage, self.ledger = stage, ledger
        self.before: StageLowering | None = None
        """This micro-batch on the stage before, where that is on the same rank."""
        self.after: StageLowering | None = None
        self.gradient_holders: dict[int, set[str]] = {}
        self.second_holders: dict[int, set[str]] = {}
        """Of a boundary that a block made again while the first one was alive."""
        self.returning = False
        """Whether the forward pass is over."""

    def forward(self) -> None:
        """The forward pass."""
        self.run_part(self.stage.operations, 0, self.stage.turn)
        self.returning = True

    def backward(self, *, first: bool) -> None:
        """The full backward pass; ``first``: the stage's first micro-batch to come back."""
        self.first_micro_batch = first
        self.run_part(self.stage.operations, self.stage.turn, len(self.stage.operations))
        self._finish()

    def backward_inputs(self) -> None:
        """The pass for the input's gradient."""
        if not self.stage.receives:
            return
        operations = self.stage.operations
        for place in range(self.stage.turn, len(operations)):
            if operations[place].kind == "B":
                self._inputs_of(operations[place].block)
            else:
                self.run_part(operations, place, place + 1)
        self._hand_back()

    def backward_weights(self, *, first: bool) -> None:
        """The pass for the weights' gradients."""
        if not self.stage.receives:
            self.backward(first=first)
            return
        self.first_micro_batch = first
        for index in reversed(range(len(self.workload.blocks))):
            self._weights_of(index)
        self._finish()

    def receive_boundary(self) -> None:
        """Receiving the boundary before the stage begins."""
        self.builder.promise(delta_bytes=self._boundary_bytes(0))

    def receive_gradient(self) -> None:
        """Receiving the gradient of the boundary after the stage begins."""
        last = len(self.workload.blocks)
        self.gradient_of[last] = self._boundary_bytes(last)
        self.builder.promise(delta_bytes=self.gradient_of[last])

    def _forward(self, operation: Operation, *, output_needed: bool) -> None:
        """A block that runs again while a later block's graph, kept for its weights' gradients, still holds the first output makes a second one."""
        boundary = operation.block + 1
        first = self.holders.pop(boundary, None) if self.returning else None
        super()._forward(operation, output_needed=output_needed)
        if first:
            self.second_holders[boundary] = self.holders.pop(boundary, set())
            self.holders[boundary] = first

    def _let_go(self, boundary: int, holder: str, time_s: float) -> None:
        second = self.second_holders.get(boundary, set())
        if holder not in second:
            super()._let_go(boundary, holder, time_s)
            return
        second.remove(holder)
        if not second:
            self.builder.change(time_s, -self._boundary_bytes(boundary), MemoryClass.ACTIVATIONS)

    def _tape(self, index: int) -> str:
        return f"tape {self.stage.index}.{index}"

    def _receive_input(self) -> None:
        if self.before is None:
            self.holders[0] = {"flow"}

    def _hand_on(self, boundary: int, time_s: float) -> None:
        if boundary != len(self.workload.blocks) or not self.stage.sends or self.returning:
            super()._hand_on(boundary, time_s)
            return
        holders = self.holders.pop(boundary)
        if self.after is None:
            self.ledger.sent_bytes += self._boundary_bytes(boundary)
            return
        self.after.holders[0] = holders
        if len(holders) > 1:  # the last block's graph keeps it as well
            self.holders[boundary] = holders

    def _receive_gradient(self, boundary: int) -> None:
        if not self.stage.sends:
            super()._receive_gradient(boundary)

    def _backward_pass(self, option: BlockOption, index: int) -> Pass:
        return option.backward if self._makes_gradients(index) else option.backward_accumulate

    def _makes_gradients(self, index: int) -> bool:
        """Whether all of a block's parameters have no gradient yet; a table that another stage of the rank shares may have one."""
        if self.ledger.scatters:
            return True
        return self.first_micro_batch and not any(
            name in self.ledger.gradients for name in self.stage.parameters_of_block[index]
        )

    def _note_gradients(self, index: int, *, made: bool) -> None:
        """The block's parameters have gradients now; beside a table that had one, those that had none come at the end of the pass."""
        if not self.first_micro_batch or self.ledger.scatters:
            return
        held = {name: self.stage.parameters[name] for name in self.stage.parameters_of_block[index]}
        new = {name: one.size_bytes for name, one in held.items() if one.trained and name not in self.ledger.gradients}
        self.ledger.gradients |= new
        if not made:
            self.builder.change(self.builder.last_duration_s, sum(new.values()), MemoryClass.GRADIENTS)

    def _backward(self, index: int) -> None:
        made = self._makes_gradients(index)
        super()._backward(index)
        self._note_gradients(index, made=made)

    def _hand_back(self) -> None:
        if 0 not in self.gradient_of:  # handed back when it was made
            return
        size = self.gradient_of.pop(0)
        if self.before is not None:
            last = len(self.before.workload.blocks)
            self.before.gradient_of[last] = size
            if 0 in self.gradient_holders:
                self.before.gradient_holders[last] = self.gradient_holders[0]
        else:
            self.ledger.sent_bytes += size

    def _inputs_of(self, index: int) -> None:
        split, last = self.stage.split[index], len(self.workload.blocks)
        self.tapes.pop(index)
        offsets = self.prices.offsets(split.inputs)
        self.builder.issue(Kind.BACKWARD, offsets[-1], micro_batch=self.micro_batch, block=index)
        if index == last - 1:
            self._receive_gradient(last)
        after, here = self.gradient_holders.setdefault(index + 1, {"flow"}), self.gradient_holders.setdefault(index, {"flow"})
        if split.keeps_grad_output:
            after.add(self._tape(index) + " out")
        if split.keeps_grad_input:
            here.add(self._tape(index) + " in")
        for event in split.inputs.memory:
            self._backward_event(event, float(offsets[event.kernel]), index)
        self._drop_gradient(index + 1, "flow", float(offsets[-1]))

    def _weights_of(self, index: int) -> None:
        split = self.stage.split[index]
        made = self._makes_gradients(index)
        run = split.weights if made else split.weights_accumulate
        offsets = self.prices.offsets(run)
        self.builder.issue(Kind.BACKWARD, offsets[-1], micro_batch=self.micro_batch, block=index, option="W")
        for event in run.memory:
            self._backward_event(event, float(offsets[event.kernel]), index)
        self._note_gradients(index, made=made)

    def _backward_event(self, event: MemoryEvent, time_s: float, index: int) -> None:
        if event.buffer == "kept_grad_output":
            self._drop_gradient(index + 1, self._tape(index) + " out", time_s)
        elif event.buffer == "kept_grad_input":
            self._drop_gradient(index, self._tape(index) + " in", time_s)
        else:
            super()._backward_event(event, time_s, index)

    def _drop_gradient(self, boundary: int, holder: str, time_s: float) -> None:
        """One holder of a boundary's gradient lets go; a gradient that was sent is never let go by ``flow``."""
        holders = self.gradient_holders.get(boundary, set())
        if holder in holders:
            holders.remove(holder)
            if not holders:
                self.builder.change(time_s, -self._boundary_bytes(boundary), MemoryClass.ACTIVATIONS)
