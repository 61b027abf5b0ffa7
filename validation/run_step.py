"""Run a training step for real under a sequence: the user's own parameters and operators, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from simulator.sequence import Operation, runs_twice
from simulator.tracing.block_run import BlockTape, MicroBatch
from simulator.tracing.trace import Traced
from validation.host_traffic import HostTraffic


class OnOperation(Protocol):
    """Told of each operation of a step."""

    def begin(self) -> None:
        """The next operation is given to the device."""

    def end(self, operation: Operation, micro_batch: int) -> None:
        """It has been."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """Forward and backward passes of one batch under a plan; gradients are left in the module's ``.grad``.

    ``module`` holds the parameters that ``traced`` describes. ``operations`` is the sequence of each micro-batch.
    """

    module: torch.nn.Module
    traced: Traced
    operations: tuple[Operation, ...]
    traffic: HostTraffic | None = None
    """What goes to the host meanwhile."""
    loss_scale: float = 1.0
    """What gradients are multiplied by (`FusedOptimizer.loss_scale`)."""

    def __call__(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]], on_operation: OnOperation | None = None
    ) -> torch.Tensor:
        """Mean loss over the micro-batches.

        Args:
            micro_batches: inputs of each, in order; all of the size that was traced.
            on_operation: told of each operation as it begins and ends.
        """
        scale = 1.0 / len(micro_batches)
        total: torch.Tensor | float = 0.0
        for number, inputs in enumerate(micro_batches):
            total = total + self._run(inputs, scale, number, on_operation)
        return torch.as_tensor(total)

    def _run(self, inputs: Mapping[str, Any], scale: float, number: int, on_operation: OnOperation | None) -> torch.Tensor:
        blocks = self.traced.chain.blocks
        micro_batch = MicroBatch(
            parameters=dict(self.module.named_parameters()), buffers=dict(self.module.named_buffers()), inputs=inputs,
            shared=self.traced.shared, precision=self.traced.chain.capture.precision, rerun=frozenset(blocks[index].name for index in runs_twice(self.operations)),
        )  # fmt: skip
        loss: torch.Tensor | None = None
        boundaries: dict[int, torch.Tensor | None] = {0: None}
        tapes: dict[int, BlockTape] = {}
        grad: torch.Tensor | None = None
        for position, operation in enumerate(self.operations):
            kind, index, option = operation
            if self.traffic is not None:
                self.traffic.before()
            if on_operation is not None:
                on_operation.begin()
            if kind == "B":
                if grad is None:
                    grad = torch.full_like(_known(loss), scale * self.loss_scale)
                grad = micro_batch.backward(tapes.pop(index), grad)
                self._after(on_operation, operation, number, None)
            else:
                x = boundaries[index]
                if kind == "F_all":
                    y, tapes[index] = micro_batch.save(
                        blocks[index], x, option, None if self.traffic is None else self.traffic.saver()
                    )
                else:
                    y = micro_batch.discard(blocks[index], x)
                self._after(on_operation, operation, number, x)
                del x
                if kind != "F_ck" and index:
                    del boundaries[index]
                following = self.operations[position + 1] if position + 1 < len(self.operations) else None
                if index == len(blocks) - 1:
                    loss = (y * scale).detach() if loss is None else loss
                    grad = torch.full_like(y, scale * self.loss_scale) if kind == "F_all" else None
                elif following is not None and following.kind != "B" and following.block == index + 1:
                    boundaries[index + 1] = y
                del y
        micro_batch.finish()
        return _known(loss)

    def _after(self, on_operation: OnOperation | None, operation: Operation, number: int, x: torch.Tensor | None) -> None:
        if on_operation is not None:
            on_operation.end(operation, number)
        if self.traffic is not None:
            self.traffic.after(x)


def _known(loss: torch.Tensor | None) -> torch.Tensor:
    assert loss is not None
    return loss
