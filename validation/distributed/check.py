"""What of a plan can be run over several processes; the rest is refused by name."""

from __future__ import annotations

from hardware_models.errors import InputError
from simulator.plan import SCHEDULES_TWO_WAYS, Plan
from simulator.plan_sections import OFFLOADS, plan_refusal


def check_processes(plan: Plan) -> None:
    """Refuses what replay over several processes does not run, so that no key is accepted and then ignored.

    Raises:
        InputError: names the first key.
    """
    parallel, memory, runtime, precision = plan.parallel, plan.memory, plan.runtime, plan.precision
    limits: dict[str, tuple[object, tuple[object, ...]]] = {
        "parallel.cp": (parallel.cp, (1,)), "parallel.ep": (parallel.ep, (1,)),
        "parallel.dp_shard": (parallel.dp_shard, (None, parallel.dp)),
        "parallel.sequence_parallel": (parallel.sequence_parallel and parallel.tp > 1, (False,)),
        "memory.zero_stage": (memory.zero_stage, (0, 2, 3)), "runtime.prefetch_blocks": (runtime.prefetch_blocks, (None,)), "memory.delayed_update": (memory.delayed_update, (False,)),
        **{f"memory.{name}": (getattr(memory, name), (0,)) for name in OFFLOADS},
        "precision.compute": (precision.compute, ("fp32",)), "precision.grads": (precision.grads, ("fp32",)), "precision.comm": (precision.comm, ("same",)),
        "precision.optimizer": (precision.optimizer, ("adamw", "sgd")),
        "runtime.framework": (runtime.framework, ("pytorch",)), "runtime.compile": (runtime.compile, (False,)), "runtime.cuda_graphs": (runtime.cuda_graphs, (False,)),
        "runtime.optimizer_sync": (runtime.optimizer_sync, ("pre",)),
    }  # fmt: skip
    for position, exception in enumerate(memory.block):
        limits[f"memory.block[{position}].activation_offload"] = (exception.activation_offload, (0, None))
        limits[f"memory.block[{position}].weight_offload"] = (exception.weight_offload, (0, None))
    for key, (value, run) in limits.items():
        if value not in run:
            shown = " or ".join(str(one) for one in run if one is not None) or "its default"
            raise plan_refusal(key, value, "not replayed over several processes yet", f"leave it at {shown}")
    _check_schedule(plan)
    _check_whole_modules(plan)


def _check_schedule(plan: Plan) -> None:
    schedule = plan.pipeline.schedule
    if schedule in SCHEDULES_TWO_WAYS:
        rule = f"{schedule} keeps each stage on two ranks, and torch's pipeline runtime places a stage on one"
        raise plan_refusal("pipeline.schedule", schedule, rule, "take a schedule of one direction, such as zb-v or dualpipe-v")
    if schedule == "pipedream-2bw":
        rule = "pipedream-2bw keeps two versions of the weights, whose gradients are not those of the plain module"
        raise plan_refusal("pipeline.schedule", schedule, rule, "take 1f1b")


def _check_whole_modules(plan: Plan) -> None:
    """Refuses what does not go with tensor parallelism or ZeRO, whose ranks run the module itself."""
    parallel, memory = plan.parallel, plan.memory
    if parallel.tp == 1 and not memory.zero_stage:
        return
    key, value = ("parallel.tp", parallel.tp) if parallel.tp > 1 else ("memory.zero_stage", memory.zero_stage)
    rule, remedy = "", "leave the others at 1, or take pp and dp alone"
    if parallel.tp > 1 and (parallel.pp, parallel.dp, memory.zero_stage) != (1, 1, 0):
        rule = f"tensor parallelism is replayed alone, but got pp = {parallel.pp}, dp = {parallel.dp}, zero_stage = {memory.zero_stage}"
    elif parallel.tp == 1 and (parallel.pp > 1 or parallel.dp == 1):
        rule = f"ZeRO is replayed over replicas without a pipeline, but got pp = {parallel.pp}, dp = {parallel.dp}"
        remedy = "take pp = 1 and dp >= 2, or memory.zero_stage = 0"
    elif memory.recompute != "none" or memory.block:
        rule, remedy = (
            "a rank runs the module as it is, which keeps every activation",
            'take memory.recompute = "none" and no [[memory.block]]',
        )
    if rule:
        raise plan_refusal(key, value, rule, remedy)


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
