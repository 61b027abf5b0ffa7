"""Which plans are simulated over several devices: every key that is not, or means nothing beside the others, is refused by name."""

from __future__ import annotations

from collections.abc import Collection

from simulator.plan import SCHEDULES_TWO_WAYS, Plan
from simulator.plan_sections import BLOCK_RECOMPUTES, OFFLOADS, Memory, Runtime, plan_refusal

_WAITING = frozenset(
    {"megatron-lm@2021", "megatron-core@2023", "deepspeed@2021", "deepspeed", "aa-scaling", "aa-scaling@fused-norm"}
)
"""Frameworks that capture no step in graphs and wait for collectives of tensor parallelism."""


def check_parallel(plan: Plan, *, compute: Collection[str]) -> None:
    """Refuses what cannot be simulated yet on several devices, so that no key is accepted and then ignored.

    Args:
        plan: to simulate.
        compute: number formats that workloads are made in.

    Raises:
        InputError: names the first key that is not simulated.
    """
    memory, runtime = plan.memory, plan.runtime
    limits: dict[str, tuple[object, tuple[object, ...]]] = {
        "precision.compute": (plan.precision.compute, tuple(compute)), "precision.master": (plan.precision.master, ("fp32",)),
    }  # fmt: skip
    _check_compiled_parallel(runtime)
    _check_graphs_parallel(plan)
    _check_sharding(plan)
    _check_overlap_tp(plan)
    _check_optimizer_sync(plan)
    _check_offload_parallel(memory)
    _check_gradients_parallel(plan)
    _check_blocks_parallel(memory)
    for key, (value, simulated) in limits.items():
        if value not in simulated:
            shown = " or ".join(str(one) for one in simulated if one not in {None, ()})
            raise plan_refusal(
                key, value, "not simulated yet on several devices", f"leave it at {shown}" if shown else "leave it out"
            )


def _check_blocks_parallel(memory: Memory) -> None:
    """Refuses what exceptions for blocks do not change on several devices."""
    for position, exception in enumerate(memory.block):
        key = f"memory.block[{position}]"
        for name in ("activation_offload", "weight_offload"):
            if getattr(exception, name) is not None:
                rule = "offload of single blocks is not simulated yet on several devices"
                raise plan_refusal(f"{key}.{name}", getattr(exception, name), rule, f"leave it out, or set memory.{name}")
        if exception.recompute is None:
            continue
        if memory.recompute not in BLOCK_RECOMPUTES:
            rule = f'exceptions are from a memory.recompute of {", ".join(BLOCK_RECOMPUTES)}, but that is "{memory.recompute}"'
            raise plan_refusal(f"{key}.recompute", exception.recompute, rule, "leave it out, or change memory.recompute")
        if memory.activation_offload or memory.weight_offload:
            rule = "recompute of single blocks beside offloaded activations or weights is not simulated yet on several devices"
            raise plan_refusal(f"{key}.recompute", exception.recompute, rule, "leave it out, or the offload at 0")


def _check_compiled_parallel(runtime: Runtime) -> None:
    """Refuses compiled layers where the trainer has none."""
    if runtime.compile and runtime.framework.startswith("megatron"):
        rule = f"{runtime.framework} compiles no layers (it brings fused kernels of its own)"
        raise plan_refusal("runtime.compile", runtime.compile, rule, "leave it at False, or take another runtime.framework")


def _check_graphs_parallel(plan: Plan) -> None:
    """Refuses captured graphs where the trainer has none, or the host takes part in a pass."""
    runtime, memory = plan.runtime, plan.memory
    if not runtime.cuda_graphs:
        return
    rule, remedy = "", "leave it at False"
    if runtime.framework in _WAITING:
        rule, remedy = f"{runtime.framework} captures no training step", "leave it at False, or take another runtime.framework"
    elif memory.activation_offload or memory.weight_offload:
        rule = "what leaves for the host inside a pass is not captured (Megatron-core refuses both together)"
    if rule:
        raise plan_refusal("runtime.cuda_graphs", runtime.cuda_graphs, rule, remedy)


def _check_overlap_tp(plan: Plan) -> None:
    """Refuses overlapped tensor parallelism where nothing is gathered beside products."""
    runtime, split = plan.runtime, plan.parallel
    if not runtime.overlap_tp:
        return
    rule, remedy = "", "leave it at False"
    if split.tp == 1 or not split.sequence_parallel:
        rule, remedy = (
            "pieces of the stream are gathered and scattered with tp > 1 and sequence_parallel only",
            "set both, or leave it at False",
        )
    elif runtime.framework in _WAITING:
        rule = f"{runtime.framework} waits for its collectives"
    elif not runtime.framework.startswith("megatron") and not runtime.compile:
        rule, remedy = (
            "torch finds products beside collectives in compiled layers only",
            "set runtime.compile = true, or leave it at False",
        )
    if rule:
        raise plan_refusal("runtime.overlap_tp", runtime.overlap_tp, rule, remedy)


def _check_optimizer_sync(plan: Plan) -> None:
    """Refuses validation afterwards where nothing is agreed on before, or something else keeps ranks together."""
    runtime = plan.runtime
    if runtime.optimizer_sync == "pre":
        return
    rule = ""
    if not runtime.framework.startswith("megatron"):
        rule = f"{runtime.framework} cannot roll a step back"
    elif plan.parallel.pp == 1:
        rule = "ranks of one pipeline validate after each other, but pp = 1"
    elif plan.memory.optimizer_offload:
        rule = "a step on the host is not rolled back"
    if rule:
        raise plan_refusal("runtime.optimizer_sync", runtime.optimizer_sync, rule, 'leave it at "pre"')


def _check_sharding(plan: Plan) -> None:
    """Refuses keys of sharding where nothing is sharded."""
    stage, split = plan.memory.zero_stage, plan.parallel
    if split.shard_ranks != split.cp * split.dp and not stage:
        rule = "nothing is sharded at zero_stage = 0"
        raise plan_refusal("parallel.dp_shard", split.dp_shard, rule, "set memory.zero_stage, or leave dp_shard out")
    if plan.runtime.prefetch_blocks is not None and stage < 3:  # noqa: PLR2004 - ZeRO's third stage
        rule = f"parameters are gathered ahead of use at zero_stage = 3 only, but got {stage}"
        raise plan_refusal(
            "runtime.prefetch_blocks", plan.runtime.prefetch_blocks, rule, "set memory.zero_stage = 3, or leave it out"
        )


def _check_offload_parallel(memory: Memory) -> None:
    """Refuses what offloading on several devices does not simulate."""
    for name in OFFLOADS:
        if getattr(memory, name) == "optimal":
            rule = "which bytes are best offloaded is not solved yet on several devices"
            raise plan_refusal(f"memory.{name}", "optimal", rule, "give a fraction between 0 and 1")
    if memory.delayed_update and not memory.optimizer_offload:
        rule = "only an update on the host is delayed, but optimizer_offload = 0"
        raise plan_refusal(
            "memory.delayed_update", memory.delayed_update, rule, "set memory.optimizer_offload, or leave it at False"
        )
    if memory.offload_target == "nvme" and not (memory.activation_offload or memory.weight_offload or memory.optimizer_offload):
        rule = "drives hold what activation_offload, weight_offload and optimizer_offload send there, but all are 0"
        raise plan_refusal("memory.offload_target", "nvme", rule, "set one of them, or leave it at host")


def _check_gradients_parallel(plan: Plan) -> None:
    """Refuses gradients on the host where the step still needs them on the device."""
    memory = plan.memory
    if not memory.grad_offload:
        return
    part, updated = float(memory.grad_offload), float(memory.optimizer_offload)
    if part > updated:
        rule = f"grad_offload <= optimizer_offload must hold: the device updates the rest, but got {part} > {updated}"
        raise plan_refusal("memory.grad_offload", part, rule)
    copies = plan.parallel.dp * plan.parallel.cp
    if (copies > 1 and memory.zero_stage < 3) or plan.pipeline.schedule in SCHEDULES_TWO_WAYS:  # noqa: PLR2004 - ZeRO's third stage
        rule = "gradients that replicas reduce once a step stay on the device until then"
        raise plan_refusal(
            "memory.grad_offload", part, rule, "take memory.zero_stage = 3 without two-directional schedules, or leave it at 0"
        )
