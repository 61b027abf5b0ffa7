"""Sequences of each kind for small models, the plain step that they are held against, and how a real step is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hardware_models.kernel import Kernel
from simulator.lower import PassPrices, lower
from simulator.sequence import Operation, checkpoint_blocks, keep_all
from simulator.tracing.capture import loss_of
from simulator.tracing.live_storages import LiveStorages
from simulator.tracing.trace import Traced
from validation.optimizer import FusedOptimizer
from validation.run_step import ScheduledStep


def nested(num_blocks: int) -> tuple[Operation, ...]:
    """A sequence as the chain solver makes them: the first half kept at one boundary, run again in full, halved again."""

    def run(first: int, last: int) -> list[Operation]:
        if first == last:
            return [Operation("F_all", first, "all"), Operation("B", first)]
        middle = (first + last + 1) // 2
        forward = [Operation("F_ck", first), *(Operation("F_e", block) for block in range(first + 1, middle))]
        return [*forward, *run(middle, last), *run(first, middle - 1)]

    return tuple(run(0, num_blocks - 1))


def sequences(trace_of: Traced) -> dict[str, tuple[Operation, ...]]:
    """Sequences of each kind for a traced model."""
    count = len(trace_of.workload.blocks)
    everything = ["all"] * count
    selective = [block.options[-1].name for block in trace_of.workload.blocks]
    return {
        "none": keep_all(count),
        "selective": checkpoint_blocks(count, (), selective),
        "full": checkpoint_blocks(count, range(count), everything),
        "nested": nested(count),
        "mixed": checkpoint_blocks(count, range(0, count, 2), selective),
    }


def plain_step(module: nn.Module, parts: Sequence[Mapping[str, Any]]) -> Tensor:
    """The unscheduled step: mean loss over the micro-batches, gradients in ``.grad``."""
    total = torch.zeros(())
    for inputs in parts:
        loss = loss_of(module(**inputs)) * (1.0 / len(parts))
        loss.backward()
        total = total + loss.detach()
    return total


def unit_times(kernels: Sequence[Kernel]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A price without a device: one second a kernel."""
    return np.ones(len(kernels))


def program_of(trace_of: Traced, operations: Sequence[Operation], num_microbatches: int, optimizer: str = "adamw") -> Any:
    """The lowered step at one second a kernel."""
    prices = PassPrices(unit_times)
    return lower(trace_of.workload, operations, prices, num_microbatches=num_microbatches, optimizer=optimizer)


@dataclass
class Level:
    """Live bytes now and at most."""

    now: int = 0
    peak: int = 0

    def change(self, _identity: int, delta_bytes: int) -> None:
        """What `LiveStorages` calls."""
        self.now += delta_bytes
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """Live bytes of a step: at most, before it and after it."""

    peak_bytes: int
    before_bytes: int
    after_bytes: int


def measured_step(
    module: nn.Module,
    trace_of: Traced,
    operations: Sequence[Operation],
    parts: Sequence[Mapping[str, Any]],
    optimizer_name: str = "adamw",
) -> MeasuredStep:
    """Live bytes of a real step; a step before it makes the optimizer's states."""
    step = ScheduledStep(module=module, traced=trace_of, operations=tuple(operations))
    optimizer = FusedOptimizer(module.parameters(), name=optimizer_name)
    step(parts)
    optimizer.step()
    level = Level()
    live = LiveStorages(level.change)
    batch = [value for part in parts for value in part.values() if isinstance(value, Tensor)]
    live.add([*module.parameters(), *module.buffers(), *batch, *optimizer.state_tensors])
    before = level.now
    with live:
        step(parts)
        optimizer.step()
    return MeasuredStep(peak_bytes=level.peak, before_bytes=before, after_bytes=level.now)
