"""Which plans of traced modules run over several devices, predicted or for real: every key that does not is refused by name."""

from __future__ import annotations

from simulator.plan import SCHEDULES_TWO_WAYS, Plan
from simulator.plan_sections import OFFLOADS, plan_refusal

COMPUTE = ("fp32", "tf32", "bf16", "fp16")
"""Precisions in which a traced module runs over several devices."""


def check_traced(plan: Plan, *, what: str, solved: bool = False) -> None:
    """Refuses what traced modules over several devices do not do, so that no key is accepted and then ignored.

    Args:
        plan: of any degrees.
        what: is done with it, for the message: ``replayed over several processes``.
        solved: whether what ``recompute = "optimal"`` stands for is known.

    Raises:
        InputError: names the first key.
    """
    parallel, memory, runtime, precision = plan.parallel, plan.memory, plan.runtime, plan.precision
    limits: dict[str, tuple[object, tuple[object, ...]]] = {
        "parallel.cp": (parallel.cp, (1,)), "parallel.ep": (parallel.ep, (1,)),
        "parallel.dp_shard": (parallel.dp_shard, (None, parallel.dp)),
        "parallel.sequence_parallel": (parallel.sequence_parallel and parallel.tp > 1, (False,)),
        "runtime.prefetch_blocks": (runtime.prefetch_blocks, (None,)), "memory.delayed_update": (memory.delayed_update, (False,)),
        **{f"memory.{name}": (getattr(memory, name), (0,)) for name in OFFLOADS},
        "precision.compute": (precision.compute, COMPUTE), "precision.master": (precision.master, ("fp32",)), "precision.grads": (precision.grads, ("fp32",)), "precision.comm": (precision.comm, ("same",)),
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
            raise plan_refusal(key, value, f"not {what} yet", f"leave it at {shown}")
    if memory.zero_stage and parallel.dp == 1:
        rule = "ZeRO splits what replicas hold alike, but got dp = 1"
        raise plan_refusal("memory.zero_stage", memory.zero_stage, rule, "take dp >= 2, or memory.zero_stage = 0")
    if memory.recompute == "optimal" and not solved:
        rule = "stands for what the search finds, as simulate and search do"
        remedy = "take none, selective, full, or file:SEQ with an operation a line (search --out writes one)"
        raise plan_refusal("memory.recompute", "optimal", rule, remedy)
    _check_schedule(plan)


def _check_schedule(plan: Plan) -> None:
    schedule = plan.pipeline.schedule
    if schedule in SCHEDULES_TWO_WAYS:
        rule = f"{schedule} keeps each stage on two ranks, and torch's pipeline runtime places a stage on one"
        raise plan_refusal("pipeline.schedule", schedule, rule, "take a schedule of one direction, such as zb-v or dualpipe-v")
    if schedule == "pipedream-2bw":
        rule = "pipedream-2bw keeps two versions of the weights, whose gradients are not those of the plain module"
        raise plan_refusal("pipeline.schedule", schedule, rule, "take 1f1b")
