"""Plan: one point of the joint space of schedules. What the user (or the search) decides, and nothing that follows from it.

Sections are frozen; a change is a `dataclasses.replace`. A Plan that breaks a rule cannot be made. Rules that involve a model or a
device count are `check_model`, `check_gpus` and `check_single_device`. Files are read and written by `simulator.plan_file`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import prod

from simulator.plan_sections import (
    FILE_PREFIX,
    FRAMEWORKS,
    MESH_AXES,
    OFFLOADS,
    RECOMPUTES,
    SCHEDULES,
    SCHEDULES_ONE_CHUNK,
    SCHEDULES_TWO_CHUNKS,
    Batch,
    Memory,
    MemoryBlock,
    Parallel,
    Pipeline,
    Precision,
    Runtime,
    plan_refusal,
)

__all__ = [
    "FILE_PREFIX",
    "FRAMEWORKS",
    "RECOMPUTES",
    "SCHEDULES",
    "Batch",
    "Memory",
    "MemoryBlock",
    "Parallel",
    "Pipeline",
    "Plan",
    "Precision",
    "Runtime",
    "check_gpus",
    "check_model",
    "check_single_device",
    "expand_ranges",
    "resolve_batch",
]

SCHEDULES_TWO_WAYS = ("chimera", "dualpipe")
"""Schedules that keep each stage on two ranks."""
MOST_MICROBATCHES = 10**6
"""In a step of one replica; an order of more fills the memory of the machine that simulates it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One schedule: every section has defaults, which together are the plain module on one device."""

    parallel: Parallel = field(default_factory=Parallel)
    """How the model and the batch are split over devices."""
    batch: Batch = field(default_factory=Batch)
    """How many samples a step takes, and how many at a time."""
    pipeline: Pipeline = field(default_factory=Pipeline)
    """The order of micro-batches and the layers of each stage."""
    memory: Memory = field(default_factory=Memory)
    """What is sharded, recomputed and kept elsewhere."""
    precision: Precision = field(default_factory=Precision)
    """Number formats and the optimizer."""
    runtime: Runtime = field(default_factory=Runtime)
    """The trainer, what it fuses and what it overlaps."""

    def __post_init__(self) -> None:
        self._check_batch()
        self._check_stages()

    def _check_batch(self) -> None:
        whole, part, dp = self.batch.global_batch, self.batch.micro_batch or 1, self.parallel.dp
        if whole is not None and whole % (dp * part):
            rule = f"global_batch % (dp * micro_batch) == 0 must hold, but got {whole} % ({dp}*{part}) = {whole % (dp * part)}"
            raise plan_refusal("batch.global_batch", whole, rule)
        if whole is not None and self.num_microbatches > MOST_MICROBATCHES:
            rule = f"global_batch / (dp * micro_batch) <= {MOST_MICROBATCHES} must hold, but got {self.num_microbatches}"
            raise plan_refusal("batch.global_batch", whole, rule, "take a larger micro_batch")

    def _check_stages(self) -> None:
        pp, chunks, schedule = self.parallel.pp, self.parallel.virtual_stages, self.pipeline.schedule
        needed = 1 if schedule in SCHEDULES_ONE_CHUNK else 2 if schedule in SCHEDULES_TWO_CHUNKS else chunks
        if chunks != needed:
            rule = f"schedule {schedule} runs virtual_stages == {needed}, but got {chunks}"
            raise plan_refusal("parallel.virtual_stages", chunks, rule, "change it, or take another pipeline.schedule")
        partition = self.pipeline.partition
        if partition is not None and len(partition) != self.num_stages:
            rule = f"pp * virtual_stages entries must be given, but got {len(partition)} != {pp}*{chunks}"
            raise plan_refusal("pipeline.partition", partition, rule)
        for position, exception in enumerate(self.memory.block):
            if exception.stage >= self.num_stages:
                rule = f"stage < pp * virtual_stages must hold, but got {exception.stage} >= {pp}*{chunks}"
                raise plan_refusal(f"memory.block[{position}].stage", exception.stage, rule)

    @property
    def num_gpus(self) -> int:
        """Devices that the plan uses: ``tp * cp * pp * dp`` (experts live on ranks of the cp and dp axes)."""
        return self.parallel.tp * self.parallel.cp * self.parallel.pp * self.parallel.dp

    @property
    def num_stages(self) -> int:
        """Pipeline stages: ``pp * virtual_stages``."""
        return self.parallel.pp * self.parallel.virtual_stages

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that a replica runs in a step: ``global_batch / (dp * micro_batch)``, 1 without a ``micro_batch``.

        Raises:
            InputError: ``micro_batch`` is given and ``global_batch`` is the model's (see `resolve_batch`).
        """
        if self.batch.micro_batch is None:
            return 1
        if self.batch.global_batch is None:
            raise plan_refusal(
                "batch.global_batch", None, "the number of micro-batches needs it", "give it, or the model's batch"
            )
        return self.batch.global_batch // (self.parallel.dp * self.batch.micro_batch)


def expand_ranges(text: str, count: int, *, key: str) -> tuple[int, ...]:
    """Indices, ascending, of a text such as ``all``, ``3`` or ``0-3,7`` among ``count`` of them.

    Raises:
        InputError: an index is not below ``count``.
    """
    if text == "all":
        return tuple(range(count))
    pairs = [part.partition("-") for part in text.split(",")]
    ends = [(int(low), int(high or low)) for low, _, high in pairs]
    last = max(high for _, high in ends)
    if last >= count:
        raise plan_refusal(key, text, f"index < {count} must hold, but got {last}")
    return tuple(sorted({index for low, high in ends for index in range(low, high + 1)}))


def resolve_batch(plan: Plan, *, batch: int, seq_len: int | None) -> Plan:
    """The plan with the model's batch (samples per step) and sequence length where it left them open; ``seq_len`` None: no sequence."""
    whole = plan.batch.global_batch or batch
    resolved = Batch(
        global_batch=whole,
        micro_batch=plan.batch.micro_batch or max(whole // plan.parallel.dp, 1),
        seq_len=plan.batch.seq_len or seq_len,
    )
    return replace(plan, batch=resolved)


def check_gpus(plan: Plan, num_gpus: int) -> None:
    """Refuses a plan that does not use exactly ``num_gpus`` devices.

    Raises:
        InputError: ``tp * cp * pp * dp == num_gpus`` does not hold.
    """
    if plan.num_gpus != num_gpus:
        degrees = (plan.parallel.tp, plan.parallel.cp, plan.parallel.pp, plan.parallel.dp)
        rule = f"tp * cp * pp * dp == gpus must hold, but got {'*'.join(map(str, degrees))} = {prod(degrees)} != {num_gpus}"
        raise plan_refusal("parallel", None, rule, "change a degree of the plan, or the number of devices")


def check_single_device(
    plan: Plan, *, compute: Collection[str] = ("fp32",), optimizers: Collection[str] = ("adamw", "sgd"), compiled: bool = False
) -> None:
    """Refuses what cannot be simulated yet, so that no key is accepted and then ignored.

    Args:
        plan: the plan to simulate on one device.
        compute: number formats that the device's profile prices.
        optimizers: optimizers that the device's profile prices.
        compiled: whether blocks can be compiled.

    Raises:
        InputError: names the first key that is not simulated.
    """
    degrees = {f"parallel.{axis}": getattr(plan.parallel, axis) for axis in MESH_AXES}
    limits: dict[str, tuple[object, tuple[object, ...]]] = {key: (value, (1,)) for key, value in degrees.items()}
    limits["parallel.virtual_stages"] = (plan.parallel.virtual_stages, (1,))
    _check_offload_single(plan.memory)
    limits["memory.offload_target"] = (plan.memory.offload_target, ("host",))
    limits["memory.delayed_update"] = (plan.memory.delayed_update, (False,))
    limits["precision.compute"] = (plan.precision.compute, tuple(compute))
    limits["precision.grads"] = (plan.precision.grads, (plan.precision.master,))
    limits["precision.optimizer"] = (plan.precision.optimizer, tuple(optimizers))
    limits["runtime.framework"] = (plan.runtime.framework, ("pytorch",))
    limits["runtime.compile"] = (plan.runtime.compile, (False, True) if compiled else (False,))
    _check_compiled_single(plan)
    limits["runtime.cuda_graphs"] = (plan.runtime.cuda_graphs, (False,))
    for key, (value, simulated) in limits.items():
        if value not in simulated:
            shown = " or ".join(str(one) for one in simulated if one is not None)
            raise plan_refusal(key, value, "not simulated yet on a single device", f"leave it at {shown}")
    if plan.pipeline.schedule.startswith(FILE_PREFIX):
        raise plan_refusal(
            "pipeline.schedule", plan.pipeline.schedule, "orders from files are not simulated yet", "name a schedule"
        )


def _check_compiled_single(plan: Plan) -> None:
    """Refuses what compiled blocks on one device do not do."""
    if not plan.runtime.compile:
        return
    memory = plan.memory
    parts: list[tuple[str, Memory | MemoryBlock]] = [("memory", memory)]
    parts += [(f"memory.block[{position}]", block) for position, block in enumerate(memory.block)]
    for prefix, one in parts:
        if one.recompute == "selective":
            rule = "a compiled block keeps what its partition chooses: products, and as little else as can be"
            raise plan_refusal(f"{prefix}.recompute", "selective", rule, 'take "none", which is that, or "full"')
        if one.activation_offload:
            rule = "what a compiled block keeps stays on the device"
            raise plan_refusal(f"{prefix}.activation_offload", one.activation_offload, rule, "leave it at 0")


def _check_offload_single(memory: Memory) -> None:
    """Refuses what offloading on one device does not simulate."""
    for name in OFFLOADS:
        if getattr(memory, name) == "optimal":
            rule = "which bytes are best offloaded is not solved yet on a single device"
            raise plan_refusal(f"memory.{name}", "optimal", rule, "give a fraction between 0 and 1")
    if memory.grad_offload:
        rule = "gradients leave a single device only with optimizer_offload, for the host's update"
        raise plan_refusal("memory.grad_offload", memory.grad_offload, rule, "leave it at 0")
    for position, exception in enumerate(memory.block):
        if exception.microbatches != "all" and (
            exception.activation_offload is not None or exception.weight_offload is not None
        ):
            rule = "what goes to the host is the same for all micro-batches of a single device"
            raise plan_refusal(f"memory.block[{position}].microbatches", exception.microbatches, rule, 'leave it at "all"')


def check_model(
    plan: Plan,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    layers: int | None = None,
    experts: int | None = None,
    seq_len: int | None = None,
) -> None:
    """Refuses a plan that the model cannot be cut by; None for what the model does not have.

    Args:
        plan: the plan to check.
        heads: attention heads.
        kv_heads: key and value heads (ranks share one when there are fewer than ``tp``).
        layers: layers that stages are made of.
        experts: routed experts of a layer.
        seq_len: tokens per sample; the plan's own counts where it gives one.

    Raises:
        InputError: names the relation with its values.
    """
    split = plan.parallel
    across = split.tp * (split.cp if split.cp_method == "all-to-all" else 1)
    shown = "tp * cp" if split.cp > 1 and split.cp_method == "all-to-all" else "tp"
    if heads is not None and heads % across:
        raise plan_refusal(
            "parallel.tp", split.tp, f"{shown} that does not divide heads: {heads} % {across} = {heads % across}"
        )
    if kv_heads is not None and kv_heads % across and across % kv_heads:
        rule = f"{shown} and kv_heads: one must divide the other, but got {across} and {kv_heads}"
        raise plan_refusal("parallel.tp", split.tp, rule)
    if experts is not None and experts % split.ep:
        raise plan_refusal(
            "parallel.ep", split.ep, f"ep that does not divide experts: {experts} % {split.ep} = {experts % split.ep}"
        )
    _check_sequence_split(split, plan.batch.seq_len or seq_len)
    partition = plan.pipeline.partition
    if layers is not None and partition is not None and sum(partition) != layers:
        raise plan_refusal(
            "pipeline.partition", partition, f"the sum must be the model's layers, but got {sum(partition)} != {layers}"
        )
    if layers is not None and partition is None and plan.num_stages > layers:
        rule = f"pp * virtual_stages <= layers must hold, but got {split.pp}*{split.virtual_stages} > {layers}"
        raise plan_refusal("parallel.pp", split.pp, rule, "give a pipeline.partition with zeros if stages may be empty")


def _check_sequence_split(split: Parallel, seq_len: int | None) -> None:
    ways = split.cp * (split.tp if split.sequence_parallel else 1)
    if seq_len is not None and seq_len % ways:
        shown = "cp * tp" if split.sequence_parallel else "cp"
        raise plan_refusal(
            "parallel.cp", split.cp, f"{shown} that does not divide seq_len: {seq_len} % {ways} = {seq_len % ways}"
        )
