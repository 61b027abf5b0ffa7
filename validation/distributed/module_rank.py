"""One rank that runs the user's module as a whole, split by torch's own means: FSDP2 or parallel styles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from simulator.plan import Plan
from simulator.program import Kind
from simulator.tracing.block_run import set_random_state
from simulator.tracing.capture import loss_of
from simulator.tracing.compute_mode import compute_mode, float32_products
from validation.distributed.checkpointed_units import checkpoint_units
from validation.distributed.fully_sharded import resizes_told, shard
from validation.distributed.mesh import module_mesh
from validation.distributed.stage_run import OnBlock, RandomStates
from validation.distributed.tensor_parallel import split, whole_order
from validation.optimizer import FusedOptimizer


class ModuleRank:
    """A module split over all processes, and steps of it.

    The optimizer steps on this rank's parts: an elementwise update of a split tensor is the update of its parts. Replicas that ZeRO does not split sum their gradients
    tensor by tensor when all passes are over.

    Args:
        plan: ``tp``, ``dp`` and ``zero_stage`` say how; the process group is that of all ranks.
        module: real or fake; it is changed, and belongs to this object from here on.
        pieces: micro-batches of this rank.
        device: where it runs.
    """

    def __init__(self, plan: Plan, module: nn.Module, pieces: Sequence[Mapping[str, Any]], *, device: torch.device) -> None:
        self.module = module.to(device)
        self._tp, self._scale, self._precision = plan.parallel.tp, 1.0 / len(pieces), plan.precision.compute
        self.mesh = module_mesh(device.type, plan)
        checkpoint_units(self.module, plan.memory.recompute)
        self._ordered = split(self.module, self.mesh["tp"]) if self._tp > 1 else {}
        self._replicas: DeviceMesh | None = None
        if plan.memory.zero_stage:
            shard(self.module, self.mesh["dp"], zero_stage=plan.memory.zero_stage)
        elif plan.parallel.dp > 1:
            self._replicas, self._scale = self.mesh["dp"], self._scale / plan.parallel.dp
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        self.buffers = dict(self.module.named_buffers())
        self.micro_batches = [
            {name: value.to(device, copy=True) if isinstance(value, torch.Tensor) else value for name, value in piece.items()}
            for piece in pieces
        ]
        self._parts = {
            name: nn.Parameter(_part(value.detach()), requires_grad=value.requires_grad)
            for name, value in self.parameters.items()
        }
        self.optimizer = FusedOptimizer(self._parts.values(), name=plan.precision.optimizer, learning_rate=0.0)
        self._device, self._states, self._on_block = device, {}, None  # type: tuple[torch.device, dict[int, Any], OnBlock | None]

    @property
    def resident(self) -> list[torch.Tensor]:
        """Tensors alive between steps."""
        batch = [value for piece in self.micro_batches for value in piece.values() if isinstance(value, torch.Tensor)]
        return [*self._parts.values(), *self.buffers.values(), *self.optimizer.state_tensors, *batch]

    def watch(self, on_block: OnBlock | None) -> None:
        """Has the end of every pass told, as that of block 0."""
        self._on_block = on_block

    def draw_as(self, states: RandomStates) -> None:
        """Has micro-batches draw the random numbers that the plain module draws; without states whatever comes."""
        self._states = {number: states[number, block] for number, block in sorted(states, reverse=True)}

    def gradients(self) -> None:
        """All passes; the gradients are left split in ``.grad``."""
        with resizes_told():
            for number, piece in enumerate(self.micro_batches):
                if number in self._states:
                    set_random_state(self._device, self._states[number])
                with compute_mode(self._precision, self._device):
                    loss = loss_of(self.module(**piece))
                loss = loss * self._scale
                self._ended(Kind.FORWARD, number)
                with float32_products(self._precision, self._device):
                    loss.backward()
                self._ended(Kind.BACKWARD, number)
        if self._replicas is not None:
            group = self._replicas.get_group()
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    dist.all_reduce(_part(parameter.grad), group=group)

    def update(self) -> None:
        """The optimizer's step with the gradients, which are let go."""
        for name, parameter in self.parameters.items():
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                self._parts[name].grad = _part(_placed_as(parameter, grad))
                del grad
        self.optimizer.step()

    def step(self) -> None:
        """A whole step."""
        self.gradients()
        self.update()

    def take_gradients(self) -> dict[str, torch.Tensor | None]:
        """The gradients of whole parameters, gathered from all ranks; they are let go here."""
        found: dict[str, torch.Tensor | None] = {}
        for name, parameter in self.parameters.items():
            grad, parameter.grad = parameter.grad, None
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            parts = self._ordered.get(name)
            found[name] = whole if parts is None or whole is None else whole_order(whole, parts, self._tp)
        return found

    def _ended(self, kind: Kind, number: int) -> None:
        if self._on_block is not None:
            self._on_block(kind, 0, number)


def _part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: torch.Tensor = tensor.to_local()
    return part


def _placed_as(parameter: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A gradient split as its parameter is; the styles leave that of an embedding unsummed."""
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
        placed: torch.Tensor = grad.redistribute(placements=parameter.placements)
        return placed
    return grad
