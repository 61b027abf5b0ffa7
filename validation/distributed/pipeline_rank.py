"""One rank of a pipeline: its stages of the user's module, its share of the batch, its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from simulator.parallel.traced_replicas import replicas_of, trained_in_order
from simulator.parallel.traced_shards import shards_of
from simulator.pipeline.action import Order, actions_of
from simulator.tracing.plan_stages import PlannedStage
from validation.distributed.job import Job
from validation.distributed.mesh import Place
from validation.distributed.pipeline_runtime import BlockStage, Layout, PipelineStep, layout_of
from validation.distributed.replicas import ReplicaExchange, agree_on_overflow
from validation.distributed.sharded_blocks import ShardedBlocks
from validation.distributed.stage_run import OnBlock, RandomStates, StageRun
from validation.optimizer import FusedOptimizer

Groups = Mapping[str, dist.ProcessGroup]


class PipelineRank:
    """Holds the parameters of a rank's stages and nothing else of the module, and runs steps.

    Gradients of a table that stages on several ranks share are summed when all passes are over; those of replicas as `ReplicaExchange` does it.

    Args:
        job: what is replayed.
        place: of this rank.
        module: real, with the weights that every rank draws alike; its other parameters may go afterwards.
        planned: all stages of the model.
        pieces: micro-batches of this replica.
        pipeline: processes of this replica, in the order of the pipeline; None: this one only.
        replicas: processes that hold the same stages; None: this one only.
        tied: per parameter that other ranks of the pipeline hold too, the processes that do.
    """

    def __init__(
        self, job: Job, place: Place, module: torch.nn.Module, planned: Sequence[PlannedStage], pieces: Sequence[Mapping[str, Any]],
        *, device: torch.device, pipeline: dist.ProcessGroup | None, replicas: dist.ProcessGroup | None, tied: Mapping[str, dist.ProcessGroup],
    ) -> None:  # fmt: skip
        self.tied = tied
        own = job.order.stages_of_rank[place.pp]
        names = {name for index in own for name in planned[index].stage.parameters}
        buffer_names = {name for index in own for name in planned[index].stage.buffers}
        input_names = {name for index in own for name in planned[index].stage.inputs}
        self.parameters = {
            name: torch.nn.Parameter(value.detach().to(device, copy=True), requires_grad=value.requires_grad)
            for name, value in module.named_parameters()
            if name in names
        }
        self.buffers = {name: value.to(device, copy=True) for name, value in module.named_buffers() if name in buffer_names}
        self.micro_batches = [{name: piece[name].to(device, copy=True) for name in sorted(input_names)} for piece in pieces]
        stages = [one.stage for one in planned]
        exchanges, shards = replicas_of(job.plan, stages, job.order.stages_of_rank), shards_of(job.plan, stages)
        self._early = trained_in_order(stages, own)[0].keys()
        self._exchange: ReplicaExchange | None = None
        self._sharded: ShardedBlocks | None = None
        self._splits = exchanges is not None and exchanges.splits
        updated: Iterable[torch.nn.Parameter] = self.parameters.values()
        if shards is not None and replicas is not None:
            self._sharded = ShardedBlocks(shards, {index: stages[index] for index in own}, self.parameters, replicas)
            updated = self._sharded.parts
        elif exchanges is not None and replicas is not None:
            self._exchange = ReplicaExchange(
                self.parameters, exchanges.buckets[place.pp], replicas, splits=exchanges.splits, overlaps=exchanges.overlaps
            )
            updated = self._exchange.parts if self._splits else updated
        self.optimizer = FusedOptimizer(updated, name=job.plan.precision.optimizer, learning_rate=0.0)
        self._step: Callable[[Sequence[Mapping[str, torch.Tensor]]], object]
        scale = 1.0 / (len(pieces) * job.plan.parallel.dp)
        self.runs = [self._run(planned[index], scale, _last_back(job.order, index)) for index in own]
        if pipeline is None:
            self._step = self._alone
            return
        pipeline_stages = [
            self._stage(run, planned, index, next_is_here=index + 1 in own, device=device, group=pipeline)
            for run, index in zip(self.runs, own, strict=True)
        ]
        self._step = PipelineStep(job.order, pipeline_stages)

    def _run(self, planned: PlannedStage, scale: float, last: int) -> StageRun:
        """A stage, whose gradients are final when micro-batch ``last`` has come back."""
        stage = planned.stage
        run = StageRun(
            planned.traced, self.parameters, self.buffers, stage.operations,
            first_block=planned.first_block, receives=stage.receives, sends=stage.sends, scale=scale, index=stage.index,
        )  # fmt: skip
        run.around = self._sharded
        exchange = self._exchange
        if exchange is not None:

            def made(block: int, number: int) -> None:
                if number == last:
                    exchange.final(sorted(stage.parameters_of_block[block] & self._early))

            run.on_gradients = made
        return run

    def _stage(
        self, run: StageRun, planned: Sequence[PlannedStage], index: int, *, next_is_here: bool, device: torch.device, group: dist.ProcessGroup | None
    ) -> BlockStage:  # fmt: skip
        return BlockStage(
            run, index=index, num_stages=len(planned), device=device, group=group, entering=_entering(planned, index),
            leaving=_entering(planned, index + 1), next_is_here=next_is_here,
        )  # fmt: skip

    def _alone(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """The passes of a rank that holds the whole model: each micro-batch forward and back."""
        (run,) = self.runs
        for number, inputs in enumerate(micro_batches):
            run.forward(number, inputs, None)
            run.backward(number, None)

    @property
    def resident(self) -> list[torch.Tensor]:
        """Tensors alive between steps."""
        batch = [value for piece in self.micro_batches for value in piece.values()]
        held = self.parameters.values() if self._sharded is None else self._sharded.resident
        return [*held, *self.buffers.values(), *self.optimizer.state_tensors, *batch]

    def watch(self, on_block: OnBlock | None) -> None:
        """Has the end of every block's runs told."""
        for run in self.runs:
            run.on_block = on_block

    def scale_loss(self, scale: float) -> None:
        """Has the loss multiplied, and its gradients divided where they update parameters: not at all where any rank's are not finite."""
        for run in self.runs:
            run.scale *= scale
        self.optimizer.loss_scale, self.optimizer.agree = scale, agree_on_overflow

    def draw_as(self, states: RandomStates) -> None:
        """Has blocks draw the random numbers that the plain module draws; without states whatever comes."""
        for run in self.runs:
            run.random_states = states

    def gradients(self) -> None:
        """All passes; the gradients are left in ``.grad``, with ZeRO 1 in that of this rank's parts."""
        if self._exchange is not None:
            self._exchange.begin()
        if self._sharded is not None:
            self._sharded.begin()
        self._step(self.micro_batches)
        for name, group in sorted(self.tied.items()):
            dist.all_reduce(_flat(self.parameters[name].grad), group=group)
        if self._exchange is not None:
            self._exchange.finish()
        if self._sharded is not None:
            self._sharded.finish()

    def step(self) -> None:
        """A whole step."""
        self.gradients()
        self.update()

    def update(self) -> None:
        """The optimizer's step with the gradients, which are let go."""
        self.optimizer.step()
        if self._sharded is not None:
            self._sharded.let_go()
        if self._exchange is not None and self._splits:
            self._exchange.gather()

    def take_gradients(self) -> dict[str, torch.Tensor | None]:
        """The gradients of whole parameters, which are let go here; with ZeRO 1 gathered from all replicas."""
        if self._sharded is not None:
            return self._sharded.take_gradients()
        if self._exchange is not None and self._splits:
            return dict.fromkeys(self.parameters) | self._exchange.take_gradients()
        found = {name: parameter.grad for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        return found


def _last_back(order: Order, stage: int) -> int:
    """The micro-batch whose backward pass through a stage is the last one."""
    back = [
        action.micro_batch
        for cells in order.ranks
        for action in actions_of(cells)
        if action.stage == stage and action.kind in {"BW", "W"}
    ]
    return back[-1]


def _entering(planned: Sequence[PlannedStage], index: int) -> Layout | None:
    """Layout of the boundary before a stage; None where there is none."""
    if not 0 < index < len(planned):
        return None
    boundary = planned[index].traced.chain.boundaries[0]
    assert boundary is not None
    return layout_of(boundary)


def _flat(grad: torch.Tensor | None) -> torch.Tensor:
    """A gradient as real numbers, which collectives sum."""
    assert grad is not None
    return torch.view_as_real(grad) if grad.is_complex() else grad
