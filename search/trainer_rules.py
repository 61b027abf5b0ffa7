"""Rules of one trainer that no table of values can say: each names the key that breaks it, why, and what would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from simulator.plan import Plan
from simulator.plan_sections import OFFLOADS


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A rule of a trainer that a plan breaks."""

    key: str
    """Of the plan."""
    value: object
    rule: str
    """The trainer's limit."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.rule}; {self.remedy}"


Rule = Callable[[Plan], Violation | None]


def _whole_offloads(plan: Plan) -> Violation | None:
    """A tensor lives on the host or it does not (FSDP2's CPUOffloadPolicy, DeepSpeed's offload_param and offload_optimizer.device)."""
    for name in OFFLOADS:
        if getattr(plan.memory, name) not in (0.0, 1.0):
            rule = "offload is all or nothing: 0 or 1"
            return Violation(key=f"memory.{name}", value=getattr(plan.memory, name), rule=rule, remedy="take 0 or 1")
    return None


def _torchtitan_offload(plan: Plan) -> Violation | None:
    """FSDP2's CPUOffloadPolicy moves parameters, gradients and optimizer states together (torchtitan: ``training.enable_cpu_offload``)."""
    memory = plan.memory
    together = (memory.weight_offload, memory.grad_offload, memory.optimizer_offload)
    if len(set(together)) == 1:
        return None
    rule = f"weight_offload == grad_offload == optimizer_offload must hold (CPUOffloadPolicy), but got {together}"
    return Violation(key="memory.weight_offload", value=memory.weight_offload, rule=rule, remedy="set all three to 1, or to 0")


def _torchtitan_experts(plan: Plan) -> Violation | None:
    """``ep`` borrows ranks of FSDP and of tp, never of replicas: efsdp = dp_shard * cp * tp / ep (config/configs.py, expert_parallel_degree)."""
    split = plan.parallel
    shards = split.shard_ranks if plan.memory.zero_stage else 1
    if split.ep == 1 or (split.tp == 1 and not shards % split.ep):
        return None
    if split.tp > 1:
        rule = f"experts are spread over the tensor-parallel ranks too and not split by them, but got tp = {split.tp}"
        return Violation(key="parallel.ep", value=split.ep, rule=rule, remedy="take tp = 1 or ep = 1")
    rule = f"ep must divide the ranks that share parameters, but got {shards} % {split.ep} = {shards % split.ep}"
    return Violation(key="parallel.ep", value=split.ep, rule=rule, remedy="take a smaller ep, or a larger dp_shard")


def _torchtitan_tensor(plan: Plan) -> Violation | None:
    """``compile.enable_async_tensor_parallel`` is a pass of the compiler (config/configs.py, CompileConfig)."""
    if not plan.runtime.overlap_tp or plan.parallel.tp == 1 or plan.runtime.compile:
        return None
    rule = "async tensor parallelism needs compiled layers"
    return Violation(key="runtime.overlap_tp", value=True, rule=rule, remedy="set runtime.compile = true, or leave it at false")


def _pytorch_axes(plan: Plan) -> Violation | None:
    """How a layer is split over tp, cp or ep is the layer's own code, which a plan does not hold."""
    for name in ("tp", "cp", "ep"):
        value = getattr(plan.parallel, name)
        if value > 1:
            rule = f"{name} splits layers, which only their own code can"
            return Violation(
                key=f"parallel.{name}", value=value, rule=rule, remedy=f"take {name} = 1, or a trainer whose layers know {name}"
            )
    return None


def _megatron_full_shards(plan: Plan) -> Violation | None:
    """Megatron-FSDP and the distributed optimizer cut the dp * cp ranks into equal instances (``--num-distributed-optimizer-instances``)."""
    if plan.memory.zero_stage and plan.parallel.shard_ranks % plan.parallel.cp:
        rule = f"ranks of one context-parallel group shard together, but got dp_shard % cp = {plan.parallel.shard_ranks % plan.parallel.cp}"
        return Violation(
            key="parallel.dp_shard", value=plan.parallel.dp_shard, rule=rule, remedy="take a dp_shard that cp divides"
        )
    return None


def _megatron_interleaved(plan: Plan) -> Violation | None:
    """A group of micro-batches that passes a chunk holds at least pp of them (pipeline_parallel/schedules.py, microbatch_group_size_per_vp_stage)."""
    count = plan.num_microbatches
    if plan.pipeline.schedule != "interleaved" or plan.parallel.pp == 1 or count >= plan.parallel.pp:
        return None
    rule = f"interleaved needs num_microbatches >= pp, but got {count} < {plan.parallel.pp}"
    return Violation(
        key="batch.micro_batch", value=plan.batch.micro_batch, rule=rule, remedy="take a smaller micro_batch, or schedule 1f1b"
    )


def _megatron_offload(plan: Plan) -> Violation | None:
    """The hybrid optimizer runs as a precision-aware one: Adam, sharded (optimizer/optimizer_config.py, __post_init__)."""
    if not plan.memory.optimizer_offload or (plan.memory.zero_stage == 1 and plan.precision.optimizer == "adamw"):
        return None
    rule = f"--optimizer-cpu-offload needs the distributed optimizer and Adam, but got zero_stage = {plan.memory.zero_stage}, {plan.precision.optimizer}"
    return Violation(
        key="memory.optimizer_offload",
        value=plan.memory.optimizer_offload,
        rule=rule,
        remedy="take zero_stage = 1 and adamw, or 0",
    )


def _megatron_gather(plan: Plan) -> Violation | None:
    """``--tp-comm-overlap`` works on sequence-parallel activations only (training/arguments.py)."""
    split = plan.parallel
    if not plan.runtime.overlap_tp or split.tp == 1 or split.sequence_parallel:
        return None
    rule = "--tp-comm-overlap needs sequence parallelism"
    return Violation(key="runtime.overlap_tp", value=True, rule=rule, remedy="set parallel.sequence_parallel = true")


def _deepspeed_offload(plan: Plan) -> Violation | None:
    """Parameters leave the device at stage 3 only, optimizer states from stage 1 on, and their gradients with them (runtime/zero/config.py)."""
    memory = plan.memory
    if memory.weight_offload and memory.zero_stage != 3:  # noqa: PLR2004 - ZeRO's third stage
        rule = f"offload_param is valid with stage 3 only, but got zero_stage = {memory.zero_stage}"
        return Violation(
            key="memory.weight_offload",
            value=memory.weight_offload,
            rule=rule,
            remedy="take zero_stage = 3, or weight_offload = 0",
        )
    if memory.optimizer_offload and not memory.zero_stage:
        rule = "offload_optimizer is valid with stages 1 to 3, but got zero_stage = 0"
        return Violation(
            key="memory.optimizer_offload", value=memory.optimizer_offload, rule=rule, remedy="take zero_stage >= 1, or 0"
        )
    if memory.grad_offload != memory.optimizer_offload:
        rule = f"gradients go to the host with the optimizer states, but got grad_offload = {memory.grad_offload}, optimizer_offload = {memory.optimizer_offload}"
        return Violation(key="memory.grad_offload", value=memory.grad_offload, rule=rule, remedy="set both to 1, or to 0")
    return None


def _deepspeed_gradients(plan: Plan) -> Violation | None:
    """Without ZeRO gradients accumulate in the format of the parameters (runtime/engine.py, _do_optimizer_sanity_check)."""
    precision = plan.precision
    if plan.memory.zero_stage or precision.compute in {"fp32", precision.grads}:
        return None
    rule = f"zero_stage = 0 accumulates gradients in {precision.compute}, but got {precision.grads}"
    return Violation(key="precision.grads", value=precision.grads, rule=rule, remedy="take zero_stage >= 1, or bf16 for both")


def _deepspeed_axes(plan: Plan) -> Violation | None:
    """A pipeline's grid has the axes pipe, data and model, none for sequences or experts (runtime/pipe/topology.py)."""
    split = plan.parallel
    for name in ("cp", "ep"):
        if split.pp > 1 and getattr(split, name) > 1:
            rule = f"a PipelineModule knows no {name}, but got pp = {split.pp}"
            return Violation(key=f"parallel.{name}", value=getattr(split, name), rule=rule, remedy=f"take {name} = 1 or pp = 1")
    if split.ep > 1 and split.dp % split.ep:
        rule = f"ep must divide dp, but got {split.dp} % {split.ep} = {split.dp % split.ep}"
        return Violation(key="parallel.ep", value=split.ep, rule=rule, remedy="take an ep that divides dp")
    return None


def _deepspeed_sequence(plan: Plan) -> Violation | None:
    """AutoTP splits products; norms and dropout run on whole sequences (module_inject/layers.py)."""
    split = plan.parallel
    if split.tp == 1 or not split.sequence_parallel:
        return None
    rule = "tensor parallelism (AutoTP) keeps whole sequences"
    return Violation(key="parallel.sequence_parallel", value=True, rule=rule, remedy="leave it at false")


def _deepspeed_shards(plan: Plan) -> Violation | None:
    """States are shared by all replicas (zero_hpz_partition_size keeps a second copy of parameters only: runtime/zero/config.py)."""
    split = plan.parallel
    if not plan.memory.zero_stage or split.shard_ranks == split.cp * split.dp:
        return None
    rule = f"ZeRO shards over all cp * dp = {split.cp * split.dp} ranks, but got {split.dp_shard}"
    return Violation(key="parallel.dp_shard", value=split.dp_shard, rule=rule, remedy="leave dp_shard out")


SPECIAL_RULES: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {
        "any": (),
        "megatron": (_megatron_full_shards, _megatron_interleaved, _megatron_offload, _megatron_gather),
        "torchtitan": (_whole_offloads, _torchtitan_offload, _torchtitan_experts, _torchtitan_tensor),
        "pytorch": (_whole_offloads, _torchtitan_offload, _pytorch_axes),
        "deepspeed": (_whole_offloads, _deepspeed_offload, _deepspeed_gradients, _deepspeed_axes, _deepspeed_sequence, _deepspeed_shards),
    }
)  # fmt: skip
"""By trainer."""
