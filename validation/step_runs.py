"""Whole steps on one module: plain, or under a sequence with what goes to the host, each ready to be run, measured and compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from simulator.host_schedule import SHARED, HostSchedule
from simulator.sequence import Operation
from simulator.timeline import Timeline
from simulator.tracing.capture import loss_of
from simulator.tracing.compute_mode import compute_mode, float32_products
from simulator.tracing.trace import Traced
from validation.host_traffic import HostTraffic
from validation.lanes import lanes_of
from validation.measure import SpanRecorder
from validation.module_state import module_kept
from validation.optimizer import FusedOptimizer
from validation.run_step import ScheduledStep


class StepRun(ABC):
    """A kind of step on one module."""

    def __init__(self, module: torch.nn.Module, pieces: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self._module, self._pieces, self._device = module, pieces, device

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Any number of steps; a failure in between gives the module back as it was."""
        with module_kept(self._module, self._device):
            try:
                self._enter()
                yield
            finally:
                self._leave()
                self._module.zero_grad(set_to_none=True)

    @abstractmethod
    def _enter(self) -> None:
        """Brings the module into the state in which a step begins."""

    @abstractmethod
    def _leave(self) -> None:
        """Brings it back, whatever has happened."""

    @abstractmethod
    def gradients(self) -> torch.Tensor:
        """The passes without the optimizer; the mean loss."""

    @abstractmethod
    def __call__(self) -> None:
        """The whole step."""

    def gradient_of(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:  # noqa: ARG002 - others need the name
        """A parameter's gradient after `gradients`, wherever it is."""
        return parameter.grad

    @abstractmethod
    def optimizers(self) -> tuple[FusedOptimizer, ...]:
        """Those of the device."""

    @property
    def host_bytes(self) -> int:
        """Bytes that it holds on the host."""
        return 0


class PlainRun(StepRun):
    """The module as it is, called on the whole batch or on each micro-batch."""

    def __init__(
        self,
        module: torch.nn.Module,
        pieces: Sequence[Mapping[str, Any]],
        device: torch.device,
        optimizer: FusedOptimizer,
        precision: str,
    ) -> None:
        super().__init__(module, pieces, device)
        self._optimizer, self._precision = optimizer, precision

    def _enter(self) -> None:
        """Nothing moves."""

    def _leave(self) -> None:
        """Nothing has moved."""

    def gradients(self) -> torch.Tensor:
        """Forward and backward."""
        total: torch.Tensor | float = 0.0
        for piece in self._pieces:
            with compute_mode(self._precision, self._device):
                loss = loss_of(self._module(**piece))
            loss = loss * (1.0 / len(self._pieces))
            with float32_products(self._precision, self._device):
                (loss * self._optimizer.loss_scale if self._optimizer.loss_scale != 1.0 else loss).backward()
            total = total + loss.detach()
        return torch.as_tensor(total)

    def __call__(self) -> None:
        """Forward, backward, update."""
        self.gradients()
        self._optimizer.step()

    def optimizers(self) -> tuple[FusedOptimizer, ...]:
        """Of all parameters."""
        return (self._optimizer,)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOrder:
    """What a scheduled step follows."""

    traced: Traced
    operations: tuple[Operation, ...]
    """Of each micro-batch."""
    host: HostSchedule | None = None
    """What goes to the host; None: nothing."""


class ScheduledRun(StepRun):
    """The blocks under a sequence, micro-batch by micro-batch, with what goes to the host.

    Args:
        module: holds the parameters.
        pieces: inputs of each micro-batch.
        device: of the module.
        order: to follow.
        optimizer: of all parameters, where nothing goes to the host.
    """

    def __init__(
        self, module: torch.nn.Module, pieces: Sequence[Mapping[str, Any]], device: torch.device, order: StepOrder, optimizer: FusedOptimizer
    ) -> None:  # fmt: skip
        super().__init__(module, pieces, device)
        self.lanes = lanes_of(device)
        self._traffic: HostTraffic | None = None
        self._optimizers = {SHARED: optimizer}
        if order.host is not None:
            self._traffic = HostTraffic(order.host, module, order.traced, optimizer.like, self.lanes)
            self._optimizers = _device_optimizers(self._traffic, order.host, module, optimizer)
        self._step = ScheduledStep(
            module=module,
            traced=order.traced,
            operations=order.operations,
            traffic=self._traffic,
            loss_scale=optimizer.loss_scale,
        )

    def _enter(self) -> None:
        if self._traffic is not None:
            self._traffic.enter()

    def _leave(self) -> None:
        if self._traffic is not None:
            self._traffic.leave()

    def gradients(self, recorder: SpanRecorder | None = None) -> torch.Tensor:
        """Forward and backward under the sequence."""
        if self._traffic is not None:
            self._traffic.begin()
        return self._step(self._pieces, recorder)

    def __call__(self, recorder: SpanRecorder | None = None) -> None:
        """The whole step."""
        self.gradients(recorder)
        for block, optimizer in self._optimizers.items():
            if self._traffic is not None:
                self._traffic.before()
            if recorder is not None:
                recorder.begin()
            optimizer.step()
            if recorder is not None:
                recorder.update(block)
            if self._traffic is not None:
                self._traffic.after()
        if self._traffic is not None:
            self._traffic.end()

    def timeline(self) -> Timeline:
        """Spans of one whole step."""
        recorder = SpanRecorder(self.lanes)
        self(recorder)
        return recorder.timeline()

    def gradient_of(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """On the device or on the host."""
        if self._traffic is None or name not in self._traffic.hosted_names or parameter.grad is not None:
            return parameter.grad
        self.lanes.drain()
        return self._traffic.gradients()[name].to(parameter.device, copy=True)

    def optimizers(self) -> tuple[FusedOptimizer, ...]:
        """Of the parameters that the device updates."""
        return tuple(self._optimizers.values())

    @property
    def host_bytes(self) -> int:
        """Parameters, gradients, states and activations there."""
        return 0 if self._traffic is None else self._traffic.host_bytes


def _device_optimizers(
    traffic: HostTraffic, host: HostSchedule, module: torch.nn.Module, optimizer: FusedOptimizer
) -> dict[int, FusedOptimizer]:
    """One for the parameters that stay on the device, then one for each block whose parameters come for their update."""
    returning = {
        moment.block: traffic.updated_names(moment.block)
        for moment in host.moments
        if moment.kind == "update" and moment.block != SHARED
    }
    apart = traffic.hosted_names.union(*returning.values())
    parameters = dict(module.named_parameters())
    staying = [parameter for name, parameter in parameters.items() if name not in apart]
    return {SHARED: optimizer.like(staying)} | {
        block: optimizer.like([parameters[name] for name in names]) for block, names in returning.items()
    }
