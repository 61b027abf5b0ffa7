"""What a micro-batch's passes add up to, without their instructions: the rules of `simulator.lower`, the bytes of each distinct pass summed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.builder import Builder
from simulator.lower import MicroBatchLowering, PassPrices
from simulator.program import Kind, MemoryClass
from simulator.sequence import Operation, runs_twice
from simulator.workload import Pass, Workload

_GRADIENTS = frozenset({"gradient", "shared_gradient"})
_LATER = 1
"""Any micro-batch but the first: it adds to gradients."""


class HalfSum(NamedTuple):
    """The forward or the backward half of a micro-batch."""

    seconds: tuple[tuple[Kind, float], ...]
    """By kind, in order of first use."""
    rise_bytes: int
    """Most bytes above those at its start, gradients of parameters not counted."""
    net_bytes: int
    """Bytes at its end above those at its start."""


NOTHING = HalfSum((), 0, 0)


@dataclass(slots=True)
class SumBuilder(Builder):
    """Seconds by kind and the level of bytes, in place of instructions."""

    turn: int = 0
    """Instruction that begins the backward half."""
    count: int = 0
    level: int = 0
    rise: int = 0
    runs: list[tuple[Kind, float]] = field(default_factory=list)
    """Instructions of a kind one after the other, as one."""
    forward: HalfSum = NOTHING
    duration_s: float = 0.0

    @property
    def last_duration_s(self) -> float:
        """Of the instruction issued last."""
        return self.duration_s

    def issue(self, kind: Kind, duration_s: float, **_labels: int | str) -> None:
        """Adds an instruction."""
        if self.count == self.turn:
            self.forward = self.half()
            self.level, self.rise, self.runs = 0, 0, []
        self.count += 1
        self.duration_s = duration_s
        if self.runs and self.runs[-1][0] is kind:
            self.runs[-1] = (kind, self.runs[-1][1] + duration_s)
        else:
            self.runs.append((kind, duration_s))

    def change(self, _time_s: float, delta_bytes: int, memory_class: MemoryClass) -> None:
        """Adds bytes that come or go."""
        if memory_class is not MemoryClass.GRADIENTS:
            self.shift(delta_bytes, delta_bytes)

    def shift(self, rise_bytes: int, net_bytes: int) -> None:
        """Adds several changes: their highest level and their sum."""
        self.rise = max(self.rise, self.level + rise_bytes)
        self.level += net_bytes

    def half(self) -> HalfSum:
        """What has come since the half began."""
        total: dict[Kind, float] = {}
        for kind, duration_s in self.runs:
            total[kind] = total.get(kind, 0.0) + duration_s
        return HalfSum(tuple(total.items()), self.rise, self.level)


class _Changes(NamedTuple):
    """What a pass does to bytes, and to what the lowering keeps count of."""

    rise_bytes: int
    net_bytes: int
    buffers: frozenset[str]
    carried_bytes: int
    shared_bytes: int
    grad_input_bytes: int


def _changes(run: Pass, freed_bytes: tuple[int, int]) -> _Changes:
    """Args: the pass; bytes of its input and output boundary that go where its graph lets go of them."""
    level = rise = 0
    sums = dict.fromkeys(("carried", "shared_gradient", "grad_input"), 0)
    for event in run.memory:
        delta = {"saved_input": -freed_bytes[0], "saved_output": -freed_bytes[1]}.get(event.buffer, event.delta_bytes)
        if event.buffer in sums:
            sums[event.buffer] += delta
        if event.buffer not in _GRADIENTS:
            level += delta
            rise = max(rise, level)
    return _Changes(rise, level, frozenset(event.buffer for event in run.memory), *sums.values())


class _SumLowering(MicroBatchLowering):
    """Adds a pass's changes at once."""

    def __init__(
        self, workload: Workload, prices: PassPrices, builder: SumBuilder, twice: frozenset[int], *, receives: bool, sends: bool
    ) -> None:
        super().__init__(workload, prices, builder, _LATER, twice, receives=receives, sends=sends)
        self.sums = builder

    def _changes(self, run: Pass, freed_bytes: tuple[int, int] = (0, 0)) -> _Changes:
        return self.prices.once(("changes", id(run), freed_bytes), lambda: (run, _changes(run, freed_bytes)))[1]

    def _forward_events(self, run: Pass, _offsets: NDArray[np.float64], index: int, *, again: bool) -> None:
        changes = self._changes(run)
        if "output" in changes.buffers:
            self.holders.setdefault(index + 1, set()).add("flow")
        self.carried_bytes += 0 if again else changes.carried_bytes
        self.sums.shift(changes.rise_bytes, changes.net_bytes)

    def _backward_events(self, run: Pass, _offsets: NDArray[np.float64], index: int) -> None:
        tape = self._tape(index)
        lets_go = [self.holders.get(boundary) == {tape} for boundary in (index, index + 1)]
        freed = [self._boundary_bytes(index + place) if goes else 0 for place, goes in enumerate(lets_go)]
        changes = self._changes(run, (freed[0], freed[1]))
        for boundary, buffer in ((index, "saved_input"), (index + 1, "saved_output")):
            if buffer in changes.buffers:
                self.holders.get(boundary, set()).discard(tape)
        self.shared_bytes += changes.shared_bytes
        if "grad_input" in changes.buffers:
            self.gradient_of[index] = self.gradient_of.get(index, 0) + changes.grad_input_bytes
        self.sums.shift(changes.rise_bytes, changes.net_bytes)


def lowered_sums(
    workload: Workload, operations: Sequence[Operation], prices: PassPrices, *, turn: int, receives: bool, sends: bool
) -> tuple[HalfSum, HalfSum]:
    """The forward and the backward half of a micro-batch that is not the first, as `MicroBatchLowering` would issue them.

    Args:
        workload: of the stage.
        operations: order in which it runs its blocks.
        prices: of passes.
        turn: operation that begins the backward half.
        receives: whether its first boundary comes from another stage.
        sends: whether its last one goes to another.
    """
    builder = SumBuilder(turn=turn)
    lowering = _SumLowering(workload, prices, builder, runs_twice(operations), receives=receives, sends=sends)
    lowering.run(operations)
    return builder.forward, builder.half()
