"""One rank that runs the user's module as a whole, split by torch's own means: FSDP2 or parallel styles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from simulator.parallel.traced_replicas import ALIGNED_ELEMENTS, BUCKET_BYTES, buckets_of
from simulator.parallel.traced_stage import Holding
from simulator.plan import Plan
from simulator.program import Kind
from simulator.tracing.block_run import set_random_state
from simulator.tracing.capture import loss_of
from simulator.tracing.compute_mode import compute_mode, float32_products
from simulator.tracing.kernels_of import dtype_name
from validation.distributed.check import GRADIENTS_SHARDED
from validation.distributed.checkpointed_units import checkpoint_units
from validation.distributed.fully_sharded import resizes_told, shard
from validation.distributed.mesh import module_mesh
from validation.distributed.replicas import ReplicaExchange, agree_on_overflow
from validation.distributed.stage_run import OnBlock, RandomStates
from validation.distributed.tensor_parallel import split, whole_order
from validation.optimizer import FusedOptimizer


class ModuleRank:
    """A module split over all processes, and steps of it.

    The optimizer steps on this rank's parts: an elementwise update of a split tensor is the update of its parts. Replicas that ZeRO does not split sum their gradients
    tensor by tensor when all passes are over; with ZeRO 1 beside tensor parallelism (`ReplicaExchange` of these parts) in buckets, of which each replica gets and updates its share.

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
        if plan.memory.zero_stage >= GRADIENTS_SHARDED:
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
        self._exchange = self._shared_out(plan) if plan.memory.zero_stage == 1 else None
        updated = self._parts.values() if self._exchange is None else self._exchange.parts
        self.optimizer = FusedOptimizer(updated, name=plan.precision.optimizer, learning_rate=0.0)
        self._device, self._states, self._on_block = device, {}, None  # type: tuple[torch.device, dict[int, Any], OnBlock | None]

    def _shared_out(self, plan: Plan) -> ReplicaExchange:
        """ZeRO 1: moves the parts into one tensor for each bucket, where the module finds them too."""
        held = {
            name: Holding(
                dtype=dtype_name(part.dtype), size_bytes=part.numel() * part.element_size(), elements=part.numel(), trained=True
            )
            for name, part in reversed(self._parts.items())
            if part.requires_grad
        }
        limit, multiple = plan.runtime.bucket_bytes or BUCKET_BYTES, plan.parallel.dp * ALIGNED_ELEMENTS
        buckets = buckets_of(held, limit_bytes=limit, multiple=multiple)
        exchange = ReplicaExchange(self._parts, buckets, self.mesh["dp"].get_group(), splits=True, overlaps=False)
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor):
                parameter._local_tensor = self._parts[name].detach()  # noqa: SLF001 - as FSDP2 does with the parts of its parameters
            else:
                parameter.data = self._parts[name].detach()
        return exchange

    @property
    def resident(self) -> list[torch.Tensor]:
        """Tensors alive between steps."""
        batch = [value for piece in self.micro_batches for value in piece.values() if isinstance(value, torch.Tensor)]
        return [*self._parts.values(), *self.buffers.values(), *self.optimizer.state_tensors, *batch]

    def watch(self, on_block: OnBlock | None) -> None:
        """Has the end of every pass told, as that of block 0."""
        self._on_block = on_block

    def scale_loss(self, scale: float) -> None:
        """Has the loss multiplied, and its gradients divided where they update parameters: not at all where any rank's are not finite."""
        self._scale *= scale
        self.optimizer.loss_scale, self.optimizer.agree = scale, agree_on_overflow

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
        if self._exchange is not None:
            self._give_to_parts()
            self._exchange.begin()
            self._exchange.finish()
        elif self._replicas is not None:
            group = self._replicas.get_group()
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    dist.all_reduce(_part(parameter.grad), group=group)

    def _give_to_parts(self) -> None:
        for name, parameter in self.parameters.items():
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                self._parts[name].grad = _part(_placed_as(parameter, grad))
                del grad

    def update(self) -> None:
        """The optimizer's step with the gradients, which are let go."""
        if self._exchange is None:
            self._give_to_parts()
        self.optimizer.step()
        self.gather()

    def gather(self) -> None:
        """ZeRO 1: brings what each replica has updated to all."""
        if self._exchange is not None:
            self._exchange.gather()

    def step(self) -> None:
        """A whole step."""
        self.gradients()
        self.update()

    def take_gradients(self) -> dict[str, torch.Tensor | None]:
        """The gradients of whole parameters, gathered from all ranks; they are let go here."""
        found: dict[str, torch.Tensor | None] = {}
        local = {} if self._exchange is None else self._exchange.take_gradients()
        for name, parameter in self.parameters.items():
            grad, parameter.grad = parameter.grad, None
            if name in local:
                grad = _split_as(parameter, local[name])
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


def _split_as(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A part of a gradient as what its parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    whole: torch.Tensor = DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return whole


def _placed_as(parameter: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A gradient split as its parameter is; the styles leave that of an embedding unsummed."""
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
        placed: torch.Tensor = grad.redistribute(placements=parameter.placements)
        return placed
    return grad
