"""Stages of a pipeline run in one process, in an order that respects what each pass waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from simulator.parallel.orders import order_of
from simulator.pipeline.action import Action, Order
from simulator.pipeline.messages import passes_of, sender_of, with_messages
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan
from simulator.tracing.plan_stages import PlannedStage
from validation.distributed.stage_run import StageRun


def plan_of(schedule: str, *, chunks: int = 1, recompute: str = "none", num_microbatches: int = 3, pp: int = 2) -> Plan:
    """A pipeline over two ranks, two samples a micro-batch."""
    return Plan(
        parallel=Parallel(pp=pp, virtual_stages=chunks), batch=Batch(global_batch=2 * num_microbatches, micro_batch=2),
        pipeline=Pipeline(schedule=schedule), memory=Memory(recompute=recompute),
    )  # fmt: skip


def runs_of(module: nn.Module, planned: Sequence[PlannedStage], num_microbatches: int) -> list[StageRun]:
    """A run for each stage, all on the module's own parameters."""
    return [
        StageRun(
            one.traced, dict(module.named_parameters()), dict(module.named_buffers()), one.stage.operations, first_block=one.first_block,
            receives=one.stage.receives, sends=one.stage.sends, scale=1 / num_microbatches,
        )
        for one in planned
    ]  # fmt: skip


def play(
    order: Order,
    runs: Sequence[StageRun],
    pieces: Sequence[Mapping[str, Tensor]],
    on_pass: Callable[[Action], None] = lambda _: None,
) -> None:
    """Runs all passes of all ranks; boundaries and gradients are handed over."""
    queues = [list(passes_of(own)) for own in with_messages(order)]
    boundaries: dict[tuple[int, int], Tensor | None] = {}
    grads: dict[tuple[int, int], Tensor | None] = {}
    done: set[Action] = set()
    while any(queues):
        for queue in queues:
            while queue and _ready(queue[0], done, order.num_stages):
                action = queue.pop(0)
                stage, number = action.stage, action.micro_batch
                if action.kind == "F":
                    boundaries[stage + 1, number] = runs[stage].forward(
                        number, pieces[number], boundaries.pop((stage, number), None)
                    )
                elif action.kind == "W":
                    runs[stage].backward_weights(number)
                else:
                    backward = runs[stage].backward if action.kind == "BW" else runs[stage].backward_inputs
                    boundaries.pop((len(runs), number), None)
                    grads[stage - 1, number] = backward(number, grads.pop((stage, number), None))
                done.add(action)
                on_pass(action)


def _ready(action: Action, done: set[Action], num_stages: int) -> bool:
    needed = sender_of(action, num_stages)
    return needed is None or needed in done or needed._replace(kind="B") in done


def order_for(plan: Plan) -> Order:
    """The plan's order."""
    return order_of(plan)


def gradients_of(module: nn.Module) -> dict[str, Tensor | None]:
    """By name."""
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def one_thread() -> None:
    """On tensors of this size, threads only wait for each other."""
    torch.set_num_threads(1)
