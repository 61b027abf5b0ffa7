"""What of a plan can be run over several processes; the rest is refused by name."""

from __future__ import annotations

from hardware_models.errors import InputError
from simulator.parallel.check_traced import check_traced
from simulator.pipeline.action import Order, actions_of
from simulator.plan import Plan
from simulator.plan_sections import BLOCK_RECOMPUTES, plan_refusal

GRADIENTS_SHARDED = 2
"""ZeRO's stage that shards gradients too."""


def check_processes(plan: Plan) -> None:
    """Refuses what replay over several processes does not run.

    Raises:
        InputError: names the first key.
    """
    check_traced(plan, what="replayed over several processes", solved=True)
    _check_whole_modules(plan)


def runs_whole_modules(plan: Plan) -> bool:
    """Whether ranks run the module itself rather than its traced blocks: where parallel styles split it, or FSDP2 without a pipeline."""
    return plan.parallel.tp > 1 or (plan.memory.zero_stage >= GRADIENTS_SHARDED and plan.parallel.pp == 1)


def _check_whole_modules(plan: Plan) -> None:
    """Refuses what does not go with tensor parallelism or ZeRO 2 and 3, whose ranks run the module itself."""
    parallel, memory = plan.parallel, plan.memory
    if not runs_whole_modules(plan):
        return
    key, value = ("parallel.tp", parallel.tp) if parallel.tp > 1 else ("memory.zero_stage", memory.zero_stage)
    rule, remedy = "", ""
    if parallel.pp > 1:
        rule = f"tensor parallelism is replayed without a pipeline, but got pp = {parallel.pp}"
        remedy = "take pp = 1, or tp = 1"
    elif memory.recompute not in BLOCK_RECOMPUTES or memory.block:
        rule = "a rank runs the module as it is, whose layers all keep alike"
        remedy = 'take memory.recompute = "none", "selective" or "full", and no [[memory.block]]'
    if rule:
        raise plan_refusal(key, value, rule, remedy)


def check_order(plan: Plan, order: Order) -> None:
    """Refuses orders that make weights' gradients in a pass of their own where replicas split parameters.

    Raises:
        InputError: names the schedule.
    """
    split = any(action.kind == "W" for cells in order.ranks for action in actions_of(cells))
    if split and plan.memory.zero_stage >= GRADIENTS_SHARDED:
        rule = "passes for weights' gradients find no weights under ZeRO 2 and 3, and some kernels of torch read them there (layer norm)"
        remedy = "take gpipe, 1f1b or interleaved, or memory.zero_stage <= 1"
        raise plan_refusal("pipeline.schedule", plan.pipeline.schedule, rule, remedy)


def check_devices(plan: Plan, *, on: str, num_devices: int, processes_here: int) -> None:
    """Refuses more processes than this machine has devices; processes share a CPU.

    Raises:
        InputError: names both numbers.
    """
    if on == "cuda" and processes_here > num_devices:
        rule = f"each process needs a GPU of its own, but got {processes_here} > {num_devices}"
        raise InputError(
            source="--device",
            key="",
            value=on,
            rule=rule,
            remedy=f"change the plan's degrees ({plan.num_gpus} processes), or take --device cpu",
        )
