"""A pipeline stage for real: each micro-batch's passes through its blocks, on the user's own parameters and operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from simulator.parallel.stages import backward_start
from simulator.program import Kind
from simulator.sequence import Operation, runs_twice
from simulator.tracing.block_run import BlockTape, MicroBatch, set_random_state
from simulator.tracing.split_backward import WeightTape, input_gradient, weight_gradients
from simulator.tracing.trace import Traced

OnBlock = Callable[[Kind, int, int], None]
"""Told that a run of a block has ended: what it was, the block's number in the model, the micro-batch."""
OnGradients = Callable[[int, int], None]
"""Told that a block, by its number in the stage, has made the gradients of its parameters for a micro-batch."""


class Around(Protocol):
    """Told of what a pass of a stage runs, before and after."""

    def before(self, stage: int, operations: Sequence[Operation], place: int) -> None:
        """An operation of a pass comes next."""

    def after(self, stage: int, operations: Sequence[Operation], place: int) -> None:
        """It has run."""

    def made(self, stage: int, block: int) -> None:
        """A pass for the weights has made a block's gradients."""


RandomStates = Mapping[tuple[int, int], Any]
"""By (micro-batch, block of the model): the generator's state when the plain module comes to the block."""


@dataclass(slots=True, kw_only=True)
class _Flight:
    """A micro-batch between its forward and its backward pass."""

    micro_batch: MicroBatch
    boundaries: dict[int, torch.Tensor | None] = field(default_factory=dict)
    tapes: dict[int, BlockTape] = field(default_factory=dict)
    weight_tapes: list[tuple[int, WeightTape]] = field(default_factory=list)
    grad: torch.Tensor | None = None
    """That of the boundary where the backward pass is."""
    ran: set[int] = field(default_factory=set)


class StageRun:
    """Runs the passes of one stage; gradients are left in ``.grad``.

    What each pass keeps and lets go is what `simulator.parallel.traced_stage` counts.

    Args:
        traced: of the stage.
        parameters: at least those that the stage uses, real ones.
        buffers: likewise.
        operations: of one micro-batch, indices counted from the stage's first block.
        first_block: its number in the model.
        receives: whether another stage comes before.
        sends: whether another comes after; the last stage's output is the loss.
        scale: of the loss, so that micro-batches and replicas sum to the mean.
        index: of the stage in the pipeline, for `around`.
    """

    def __init__(
        self, traced: Traced, parameters: Mapping[str, torch.nn.Parameter], buffers: Mapping[str, torch.Tensor], operations: tuple[Operation, ...],
        *, first_block: int, receives: bool, sends: bool, scale: float, index: int = 0,
    ) -> None:  # fmt: skip
        self.traced, self.operations, self.first_block, self.index = traced, operations, first_block, index
        self.receives, self.sends, self.scale = receives, sends, scale
        self.parameters = {name: parameters[name] for name in traced.chain.capture.parameters}
        self.buffers = {name: buffers[name] for name in traced.chain.capture.buffers}
        self.random_states: RandomStates = {}
        self.on_block: OnBlock | None = None
        self.on_gradients: OnGradients | None = None
        self.around: Around | None = None
        self._turn = backward_start(operations)
        blocks = traced.chain.blocks
        self._rerun = frozenset(blocks[index].name for index in runs_twice(operations))
        self._flights: dict[int, _Flight] = {}

    def forward(self, number: int, inputs: Mapping[str, torch.Tensor], x: torch.Tensor | None) -> torch.Tensor:
        """The boundary after the stage; of the last stage the loss, scaled and without a graph."""
        own = {name: inputs[name] for name in self.traced.chain.capture.inputs}
        micro_batch = MicroBatch(
            parameters=self.parameters,
            buffers=self.buffers,
            inputs=own,
            shared=self.traced.shared,
            rerun=self._rerun,
            precision=self.traced.chain.capture.precision,
        )
        flight = self._flights[number] = _Flight(micro_batch=micro_batch, boundaries={0: x})
        del x
        y = self._run(number, flight, 0, self._turn)
        assert y is not None
        return y if self.sends else (y * self.scale).detach()

    def backward(self, number: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient of the boundary before the stage.

        Args:
            number: of the micro-batch.
            grad: of the boundary after the stage; None for the last stage, and where `backward_inputs` has kept it.
        """
        flight = self._flights.pop(number)
        flight.grad = flight.grad if grad is None else grad
        del grad
        self._run(number, flight, self._turn, len(self.operations))
        flight.micro_batch.finish()
        return flight.grad

    def backward_inputs(self, number: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        """As `backward`, without the gradients of parameters; the model's first stage has none to make and keeps ``grad``."""
        flight = self._flights[number]
        flight.grad = flight.grad if grad is None else grad
        del grad
        if not self.receives:
            return None
        self._run(number, flight, self._turn, len(self.operations), split=True)
        result, flight.grad = flight.grad, None
        return result

    def backward_weights(self, number: int) -> None:
        """The gradients of parameters after `backward_inputs`."""
        if not self.receives:
            self.backward(number, None)
            return
        flight = self._flights.pop(number)
        while flight.weight_tapes:
            index, tape = flight.weight_tapes.pop(0)
            weight_gradients(tape)
            del tape
            self._ended(Kind.BACKWARD, index, number)
            self._made(index, number)
            if self.around is not None:
                self.around.made(self.index, index)
        flight.micro_batch.finish()

    def abandon(self) -> None:
        """Forgets what is in flight."""
        self._flights.clear()

    def _run(self, number: int, flight: _Flight, first: int, end: int, *, split: bool = False) -> torch.Tensor | None:
        """Operations from ``first`` up to ``end``; the last boundary where the forward pass comes to it."""
        last = len(self.traced.chain.blocks) - 1
        leaving: torch.Tensor | None = None
        for place in range(first, end):
            kind, index, option = self.operations[place]
            if self.around is not None:
                self.around.before(self.index, self.operations[first:end], place - first)
            if kind == "B":
                self._backward_of(flight, index, split=split)
                self._ended(Kind.BACKWARD, index, number)
                if not split:
                    self._made(index, number)
                if self.around is not None:
                    self.around.after(self.index, self.operations[first:end], place - first)
                continue
            y = self._forward_of(number, flight, kind, index, option)
            following = self.operations[place + 1] if place + 1 < len(self.operations) else None
            if index == last and first < self._turn:
                leaving = y
            if index == last and not self.sends and flight.grad is None:
                flight.grad = torch.full_like(y, self.scale)
            if index < last and following is not None and following.kind != "B" and following.block == index + 1:
                flight.boundaries[index + 1] = y
            del y
            self._ended(Kind.RECOMPUTE if index in flight.ran else Kind.FORWARD, index, number)
            flight.ran.add(index)
            if self.around is not None:
                self.around.after(self.index, self.operations[first:end], place - first)
        return leaving

    def _forward_of(self, number: int, flight: _Flight, kind: str, index: int, option: str) -> torch.Tensor:
        block, micro_batch = self.traced.chain.blocks[index], flight.micro_batch
        x = flight.boundaries[index]
        if kind != "F_ck" and (index or self.receives):
            del flight.boundaries[index]
        state = self.random_states.get((number, self.first_block + index))
        if state is not None and index not in flight.ran:
            set_random_state(next(iter(self.parameters.values())).device, state)
        if kind != "F_all":
            return micro_batch.discard(block, x)
        y, flight.tapes[index] = micro_batch.save(block, x, option)
        return y

    def _backward_of(self, flight: _Flight, index: int, *, split: bool) -> None:
        tape = flight.tapes.pop(index)
        grad, flight.grad = flight.grad, None
        assert grad is not None
        if split:
            flight.grad, left = input_gradient(tape, grad)
            flight.weight_tapes.append((index, left))
        else:
            flight.grad = flight.micro_batch.backward(tape, grad)

    def _ended(self, kind: Kind, index: int, number: int) -> None:
        if self.on_block is not None:
            self.on_block(kind, self.first_block + index, number)

    def _made(self, index: int, number: int) -> None:
        if self.on_gradients is not None:
            self.on_gradients(index, number)
