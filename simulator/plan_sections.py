"""Sections of a Plan, each with the rules that concern it alone. Import them from `simulator.plan`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.units import MOST_BYTES

CpMethod = Literal["ring", "all-to-all"]
ChimeraMode = Literal["direct", "doubling", "halving"]
OffloadTarget = Literal["host", "nvme"]
ComputePrecision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4"]
Optimizer = Literal["adamw", "sgd", "adamw8bit"]
Fraction = float | Literal["optimal"]

PLAN = "plan"
"""What errors call a plan until its file is known."""
MESH_AXES = ("tp", "cp", "ep", "dp", "pp")
SCHEDULES_ONE_CHUNK = ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p", "pipedream-2bw")
"""Pipeline orders in which a rank holds one model chunk."""
SCHEDULES_TWO_CHUNKS = ("zb-v", "v-half", "v-min", "dualpipe-v")
"""Pipeline orders in which a rank holds two chunks, the second on the way back (a V)."""
SCHEDULES = (*SCHEDULES_ONE_CHUNK, "interleaved", "looped-bfs", "chimera", "dualpipe", *SCHEDULES_TWO_CHUNKS)
BLOCK_RECOMPUTES = ("none", "selective", "full")
RECOMPUTES = (*BLOCK_RECOMPUTES, "optimal")
FRAMEWORKS = (
    "pytorch",
    "megatron-lm@2021",
    "megatron-core",
    "megatron-core@2023",
    "deepspeed@2021",
    "deepspeed",
    "torchtitan",
    "aa-scaling",
    "aa-scaling@fused-norm",
)
PURE_BF16 = "pure-bf16"
"""Name of the mode in which a module's parameters, buffers and inputs are bfloat16 themselves."""
FILE_PREFIX = "file:"
"""Begins a value that names a file; relative paths start at the plan's folder."""
OFFLOADS = ("activation_offload", "weight_offload", "grad_offload", "optimizer_offload")

MOST_COUNT = 1e9
"""No count of devices, samples or tokens is larger: beyond it lie slips of the keyboard, and products that leave 64 bits."""

_RANGES = re.compile(r"all|\d+(-\d+)?(,\d+(-\d+)?)*")


def plan_refusal(key: str, value: object, rule: str, remedy: str = "") -> InputError:
    """The error for a plan whose ``key`` breaks ``rule``."""
    return InputError(source=PLAN, key=key, value=value, rule=rule, remedy=remedy)


def _check_positive(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise plan_refusal(f"{section}.{name}", value, f"{name} > 0 must hold")
        most = MOST_BYTES if name.endswith("_bytes") else MOST_COUNT
        if value is not None and value > most:
            raise plan_refusal(f"{section}.{name}", value, f"{name} <= {most:.3g} must hold")


def _check_known(key: str, value: str, known: tuple[str, ...], *, files: bool = False) -> None:
    if files and value.startswith(FILE_PREFIX) and value != FILE_PREFIX:
        return
    if value not in known:
        raise UnknownNameError(source="plan", key=key, value=value, known=(*known, FILE_PREFIX + "PATH") if files else known)


def _check_fraction(key: str, value: float | str | None) -> None:
    if value is None or value == "optimal":
        return
    if isinstance(value, str) or not 0.0 <= value <= 1.0:
        raise plan_refusal(key, value, "0 <= fraction <= 1 must hold", 'write a fraction or "optimal"')


def _check_ranges(key: str, text: str) -> None:
    if not _RANGES.fullmatch(text):
        raise plan_refusal(key, text, 'indices are "all" or ranges with both ends included', 'write "0-11", "3" or "0-3,7"')
    for part in text.split(","):
        low, _, high = part.partition("-")
        if high and int(low) > int(high):
            raise plan_refusal(key, text, f"low <= high must hold, but got {low} > {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How the model and the batch are split over devices."""

    tp: int = 1
    """Tensor-parallel degree."""
    pp: int = 1
    """Pipeline-parallel degree (ranks of a pipeline)."""
    dp: int = 1
    """Data-parallel degree."""
    cp: int = 1
    """Context-parallel degree (the sequence is split)."""
    ep: int = 1
    """Expert-parallel degree; experts are spread over ranks of the cp and dp axes, so ``ep`` divides ``cp * dp``."""
    virtual_stages: int = 1
    """Model chunks per pipeline rank."""
    sequence_parallel: bool = False
    """Norms and dropout run on a 1/tp slice of the sequence; without effect at ``tp`` 1."""
    order: str = "-".join(MESH_AXES)
    """Placement of the mesh on the topology, innermost axis first."""
    cp_method: CpMethod = "ring"
    """How context-parallel ranks share keys and values."""
    dp_shard: int | None = None
    """Ranks that share one copy of what ZeRO or FSDP shards, of the ``cp * dp`` that hold the same parameters; None is all of them."""

    def __post_init__(self) -> None:
        _check_positive(
            "parallel", tp=self.tp, pp=self.pp, dp=self.dp, cp=self.cp, ep=self.ep,
            virtual_stages=self.virtual_stages, dp_shard=self.dp_shard,
        )  # fmt: skip
        for name, value in (("ep", self.ep), ("dp_shard", self.shard_ranks)):
            if (self.cp * self.dp) % value:
                rule = f"{name} must divide cp * dp, but got {self.cp}*{self.dp} % {value} = {self.cp * self.dp % value}"
                raise plan_refusal(f"parallel.{name}", value, rule)
        if sorted(self.order.split("-")) != sorted(MESH_AXES):
            raise plan_refusal("parallel.order", self.order, f"order is a permutation of {'-'.join(MESH_AXES)}")
        _check_known("parallel.cp_method", self.cp_method, get_args(CpMethod))

    @property
    def shard_ranks(self) -> int:
        """Ranks that share one copy of what ZeRO shards."""
        return self.dp_shard or self.cp * self.dp


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """How many samples a step takes, and how many at a time."""

    global_batch: int | None = None
    """Samples per step over all replicas; None is the model's batch."""
    micro_batch: int | None = None
    """Samples per micro-batch; None is the replica's whole share, ``global_batch / dp``."""
    seq_len: int | None = None
    """Tokens per sample; None is the model's."""

    def __post_init__(self) -> None:
        _check_positive("batch", global_batch=self.global_batch, micro_batch=self.micro_batch, seq_len=self.seq_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """In which order a pipeline runs its micro-batches, and which layers each stage holds. Without effect at ``pp`` 1."""

    schedule: str = "1f1b"
    """One of `SCHEDULES`, or ``file:ORDER.csv``."""
    memory_limit: float | None = None
    """Most activations of a rank, in units of one micro-batch's (M_B); None is the schedule's own."""
    chimera_mode: ChimeraMode = "direct"
    """How Chimera runs more micro-batches than stages."""
    partition: tuple[int, ...] | None = None
    """Layers of each stage in stage order, ``pp * virtual_stages`` entries, zeros allowed; None is the solver's."""

    def __post_init__(self) -> None:
        _check_known("pipeline.schedule", self.schedule, SCHEDULES, files=True)
        _check_known("pipeline.chimera_mode", self.chimera_mode, get_args(ChimeraMode))
        _check_positive("pipeline", memory_limit=self.memory_limit)
        if self.partition is not None and min(self.partition, default=0) < 0:
            raise plan_refusal("pipeline.partition", self.partition, f"layers >= 0 must hold, but got {min(self.partition)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBlock:
    """An exception to `Memory` for some blocks of a stage and some micro-batches; None keeps the section's value."""

    stage: int = 0
    """Pipeline stage, from 0 to ``pp * virtual_stages - 1``."""
    blocks: str = "all"
    """Blocks of the stage: ``all`` or ranges with both ends included (``0-3,7``)."""
    microbatches: str = "all"
    """Micro-batches, in the same form."""
    recompute: str | None = None
    """One of `BLOCK_RECOMPUTES`."""
    activation_offload: float | None = None
    """Fraction of the blocks' saved activations that go to the host."""
    weight_offload: float | None = None
    """Fraction of the blocks' parameters that live on the host."""

    def __post_init__(self) -> None:
        if self.stage < 0:
            raise plan_refusal("memory.block.stage", self.stage, "stage >= 0 must hold")
        _check_ranges("memory.block.blocks", self.blocks)
        _check_ranges("memory.block.microbatches", self.microbatches)
        if self.recompute is not None:
            _check_known("memory.block.recompute", self.recompute, BLOCK_RECOMPUTES)
        _check_fraction("memory.block.activation_offload", self.activation_offload)
        _check_fraction("memory.block.weight_offload", self.weight_offload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is sharded, recomputed and kept elsewhere."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What data-parallel ranks shard: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    recompute: str = "none"
    """One of `RECOMPUTES`, or ``file:SEQ`` with an operation a line (`simulator.sequence`)."""
    activation_offload: Fraction = 0.0
    """Fraction of the saved activations' bytes that go to the host between forward and backward."""
    weight_offload: Fraction = 0.0
    """Fraction of the parameters' bytes that live on the host."""
    grad_offload: Fraction = 0.0
    """Fraction of the gradients' bytes that live on the host."""
    optimizer_offload: Fraction = 0.0
    """Fraction of the optimizer states' bytes that live, and are updated, on the host."""
    offload_target: OffloadTarget = "host"
    """Where offloaded bytes go."""
    delayed_update: bool = False
    """The offloaded optimizer's update overlaps the next step, which uses parameters one step old."""
    budget_bytes: int | None = None
    """Most bytes allocated on a device; None is what the device has."""
    block: tuple[MemoryBlock, ...] = ()
    """Exceptions; where several match, the last one counts."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise plan_refusal("memory.zero_stage", self.zero_stage, "0 <= zero_stage <= 3 must hold")
        _check_known("memory.recompute", self.recompute, RECOMPUTES, files=True)
        for name in OFFLOADS:
            _check_fraction(f"memory.{name}", getattr(self, name))
        _check_known("memory.offload_target", self.offload_target, get_args(OffloadTarget))
        _check_positive("memory", budget_bytes=self.budget_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In which number formats a step computes, keeps and sends."""

    compute: ComputePrecision = "fp32"
    """Format of activations and of the parameters that kernels read; the default is what a module does unasked."""
    master: Literal["fp32", "bf16"] = "fp32"
    """Format of the parameters that the optimizer updates, and of its states; bf16: there are no others ("pure bf16", one device only so far)."""
    grads: Literal["fp32", "bf16"] = "fp32"
    """Format in which gradients accumulate."""
    comm: Literal["same", "bf16", "fp8", "int8"] = "same"
    """Format of gradients and parameters on the wire."""
    optimizer: Optimizer = "adamw"
    """Decides the optimizer's states and the price of its step."""

    def __post_init__(self) -> None:
        _check_known("precision.compute", self.compute, get_args(ComputePrecision))
        _check_known("precision.master", self.master, ("fp32", "bf16"))
        if self.master == "bf16" and (self.compute, self.grads) != ("bf16", "bf16"):
            rule = f'parameters in bf16 are computed with, and have gradients, in bf16, but got compute = "{self.compute}", grads = "{self.grads}"'
            raise plan_refusal("precision.master", self.master, rule, 'set both to "bf16", or master to "fp32"')
        _check_known("precision.grads", self.grads, ("fp32", "bf16"))
        _check_known("precision.comm", self.comm, ("same", "bf16", "fp8", "int8"))
        _check_known("precision.optimizer", self.optimizer, get_args(Optimizer))

    @property
    def mode(self) -> str:
        """The mode in which a traced module runs (`simulator.tracing.compute_mode.PRECISIONS`): ``compute``, unless parameters are in bf16 too."""
        return PURE_BF16 if self.master == "bf16" else self.compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Which trainer runs the step, and what it fuses and overlaps."""

    framework: str = "pytorch"
    """One of `FRAMEWORKS`."""
    flash_attention: bool = True
    """Attention keeps no score matrix."""
    compile: bool = False
    """The module runs compiled, not eagerly."""
    cuda_graphs: bool = False
    """The host launches a captured graph instead of single kernels."""
    overlap_grad_reduce: bool = True
    """Gradients are reduced while the backward pass goes on."""
    overlap_param_gather: bool = True
    """Sharded parameters are gathered while earlier blocks compute."""
    overlap_tp: bool = False
    """Tensor-parallel collectives overlap the products that they feed."""
    bucket_bytes: int | None = None
    """Bytes of gradients reduced at once; None is the framework's."""
    prefetch_blocks: int | None = None
    """Blocks whose parameters are fetched ahead; None is the framework's."""
    optimizer_sync: Literal["pre", "post-validation"] = "pre"
    """Whether stages agree on the gradient norm before the optimizer steps, or validate afterwards and roll back."""

    def __post_init__(self) -> None:
        _check_known("runtime.framework", self.framework, FRAMEWORKS)
        _check_known("runtime.optimizer_sync", self.optimizer_sync, ("pre", "post-validation"))
        _check_positive("runtime", bucket_bytes=self.bucket_bytes)
        if self.prefetch_blocks is not None and self.prefetch_blocks < 0:
            raise plan_refusal("runtime.prefetch_blocks", self.prefetch_blocks, "prefetch_blocks >= 0 must hold")
