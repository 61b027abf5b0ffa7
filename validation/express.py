"""A published row as model, cluster and plan: from the row's own configuration and facts of its framework, nothing tuned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, cast

from hardware_models.aliases import device_named
from hardware_models.network.cluster import Cluster
from simulator.plan import SCHEDULES, Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.plan_sections import SCHEDULES_TWO_CHUNKS, ComputePrecision
from simulator.presets import TransformerConfig
from validation.cluster_of_row import cluster_of
from validation.framework_facts import FrameworkFacts, facts_of
from validation.model_of_row import model_of
from validation.published_row import PublishedRow
from validation.software_of_run import flash_generation

_PRECISIONS = {
    "half": "fp16",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "mxfp8": "fp8",
    "float8": "fp8",
    "nvfp4": "fp4",
    "mxfp4": "fp4",
}
_MOST_CHUNKS_ASSUMED = 3
"""Chunks of a rank in an interleaved order of which a row does not say: as Megatron's larger runs had (arXiv 2205.05198, table 3)."""
_TWO_BYTES = frozenset({"fp16", "bf16", "fp8", "fp4"})
_SHARDED_AFTER_FORWARD = re.compile(r"shard_grad_op|not resharded|zero-?2", re.IGNORECASE)
_NORM_KERNEL = re.compile(r"\brms ?(norm)? kernel", re.IGNORECASE)
_PRECISION_OPEN = re.compile(r"precision:[^;]*not stated", re.IGNORECASE)
_OFFLOADS = (
    ("optimizer", "optimizer_offload"),
    ("activation", "activation_offload"),
    ("param", "weight_offload"),
    ("weight", "weight_offload"),
    ("grad", "grad_offload"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expressed:
    """A row in the simulator's terms."""

    config: TransformerConfig
    plan: Plan
    cluster: Cluster
    seq_len: int
    facts: FrameworkFacts
    assumed: tuple[str, ...]
    """What the row does not state and was taken from elsewhere, in words."""
    recompute_stated: bool
    flash_generation: int


def express(row: PublishedRow, siblings: Sequence[PublishedRow] = ()) -> Expressed:
    """The row's configuration.

    **Model**: what is blank is taken, in this order, from the framework's facts, from rows of the same table and model that state it, or from a rule below; each
    is listed in ``assumed``. Layers that do not divide into stages while layers + 2 do leave one less at either end.

    Args:
        row: as published.
        siblings: other rows of its table.

    Raises:
        InputError: something that the simulator needs is not stated, or is not simulated.
    """
    if re.search(r"\blora\b", f"{row.text('table_id')} {row.text('notes')}", re.IGNORECASE):
        raise row.cells.error("table_id", row.text("table_id"), "low-rank adapters on frozen weights are not simulated")
    facts = facts_of(row.text("framework"))
    assumed: list[str] = []
    tp, layers = row.count("tp") or 1, _layers(row, siblings, assumed)
    config = model_of(row, facts, layers=layers, tp=tp)
    if not row.text("n_heads"):
        assumed.append(f"n_heads = {config.heads}" + (f": {facts.heads_source}" if facts.heads else ""))
    if facts.recompute and not row.text("recompute"):
        assumed.append(f"recompute = {facts.recompute}: the framework's own recipes")
    if not row.text("vocab"):
        assumed.append(f"vocab = {config.vocab}: {facts.vocab_source}")
    plan = plan_of(row, facts, layers=config.layers, has_experts=config.experts is not None, assumed=assumed)
    num_gpus = row.count("n_gpus")
    if num_gpus is not None and num_gpus != plan.num_gpus:
        rule = f"tp * cp * pp * dp == n_gpus must hold, but got {plan.num_gpus} != {num_gpus}"
        raise row.cells.error("n_gpus", num_gpus, rule)
    device = device_named(row.text("gpu"), memory_gb=_memory_gb(row), source=row.row_id)
    cluster = _cluster(device, plan.num_gpus, row.count("gpus_per_node"), row.text("interconnect"))
    return Expressed(
        config=config, plan=plan, cluster=cluster, seq_len=config.max_positions, facts=facts, assumed=tuple(assumed), recompute_stated=bool(row.text("recompute") or facts.recompute), flash_generation=flash_generation(row, facts),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _cluster(device: str, num_gpus: int, per_node: int | None, interconnect: str) -> Cluster:
    return cluster_of(device, num_gpus=num_gpus, gpus_per_node=per_node, interconnect=interconnect)


def _memory_gb(row: PublishedRow) -> float | None:
    """The size beside the name where names of boards need one."""
    return row.number("gpu_mem_gb")


def _layers(row: PublishedRow, siblings: Sequence[PublishedRow], assumed: list[str]) -> int | None:
    """The row's layers, or those of the one size that rows of the same model and width state."""
    stated = row.count("n_layers")
    if stated is not None:
        return stated
    same = {
        other.count("n_layers")
        for other in siblings
        if (other.text("model"), other.text("hidden")) == (row.text("model"), row.text("hidden")) and other.text("n_layers")
    }
    if len(same) != 1:
        return None
    (layers,) = same
    assumed.append(f"n_layers = {layers}: as other rows of this model")
    return layers


def plan_of(row: PublishedRow, facts: FrameworkFacts, *, layers: int, has_experts: bool, assumed: list[str]) -> Plan:
    """The row's plan; what it leaves open is appended to ``assumed``.

    Raises:
        InputError: a value that no plan has, or degrees that break a rule.
    """
    tp, pp, cp, ep = (row.count(key) or 1 for key in ("tp", "pp", "cp", "ep"))
    dp = row.count("dp") or max(1, (row.count("n_gpus") or tp * pp * cp) // (tp * pp * cp))
    schedule = _schedule(row, assumed)
    chunks = _chunks(row, schedule, layers=layers, pp=pp, assumed=assumed)
    if pp == 1:
        schedule, chunks = "1f1b", 1
    elif schedule == "interleaved" and chunks == 1:
        schedule = "1f1b"
    batch = _batch(row, facts, dp=dp, pp=pp, assumed=assumed)
    compute = _precision(row, facts, assumed)
    return Plan(
        parallel=Parallel(
            tp=tp, pp=pp, dp=dp, cp=cp, ep=ep if has_experts else 1, virtual_stages=chunks, sequence_parallel=_sequence_parallel(row, facts, tp=tp, assumed=assumed), cp_method=facts.cp_method,
        ),
        batch=batch,
        pipeline=Pipeline(schedule=schedule, partition=_partition(layers, pp * chunks) if pp > 1 else None),
        memory=_memory(row, facts, pp=pp),
        precision=Precision(compute=compute, grads=_grads(facts, compute), comm=_comm(row, compute, assumed)),
        runtime=Runtime(
            framework=_runtime(row, facts), flash_attention=_flash_attention(row, facts, assumed), overlap_grad_reduce=_overlaps(row, stated=facts.overlap_grad_reduce),
            overlap_param_gather=_overlaps(row, stated=facts.overlap_param_gather), overlap_tp=tp > 1 and (facts.overlap_tp or _overlaps_tp(row)), compile=_compiles(row),
            optimizer_sync="post-validation" if facts.validates_afterwards and pp > 1 and schedule.startswith("zb") else "pre",
        ),
    )  # fmt: skip


def _runtime(row: PublishedRow, facts: FrameworkFacts) -> str:
    """The framework's runtime, with a fused norm where the row names its kernel."""
    named = _NORM_KERNEL.search(f"{row.text('flash_attention')} {row.text('notes')}")
    return facts.fused_norm_runtime if named and facts.fused_norm_runtime else facts.runtime


def _schedule(row: PublishedRow, assumed: list[str]) -> str:
    text = row.text("pipeline_schedule").lower()
    if text in {"", "none"}:
        return "interleaved" if _is_chunked(row) else "1f1b"
    if text == "other":
        found = "interleaved" if _is_chunked(row) or "interleaved" in row.text("notes").lower() else "1f1b"
        assumed.append(f"pipeline_schedule = {found}: the source's own is not simulated")
        return found
    if text not in SCHEDULES:
        raise row.cells.error("pipeline_schedule", text, f"known schedules are {', '.join(SCHEDULES)}")
    return text


def _is_chunked(row: PublishedRow) -> bool:
    text = row.text("virtual_pp")
    return bool(text) and text not in {"1", "1.0"}


def _chunks(row: PublishedRow, schedule: str, *, layers: int, pp: int, assumed: list[str]) -> int:
    """Model chunks of a rank."""
    text = row.text("virtual_pp").lower()
    if schedule in SCHEDULES_TWO_CHUNKS:
        return 2
    if schedule not in {"interleaved", "looped-bfs"}:
        return 1
    ends = 2 if layers % pp and (layers + 2) % pp == 0 else 0
    each = (layers + ends) // pp
    if "max" in text or "1 layer per chunk" in text:
        return each
    stated = row.count("virtual_pp")
    if stated is not None:
        return stated
    fitting = [chunks for chunks in range(1, _MOST_CHUNKS_ASSUMED + 1) if each % chunks == 0]
    assumed.append(f"virtual_pp = {fitting[-1]}")
    return fitting[-1]


def _partition(layers: int, stages: int) -> tuple[int, ...] | None:
    """One layer less at either end where that makes stages equal; None: the simulator's own."""
    if layers % stages == 0 or (layers + 2) % stages:
        return None
    each = (layers + 2) // stages
    return (each - 1, *[each] * (stages - 2), each - 1)


def _batch(row: PublishedRow, facts: FrameworkFacts, *, dp: int, pp: int, assumed: list[str]) -> Batch:
    micro, whole, count = row.count("micro_batch"), row.count("global_batch"), row.count("n_microbatches")
    if whole is None:
        whole = row.required("micro_batch") * row.required("n_microbatches") * dp
        assumed.append(f"global_batch = {whole}")
    if micro is None:
        wanted = count or (facts.micro_batches_per_stage * pp if facts.micro_batches_per_stage and pp > 1 else 0)
        micro = max(1, whole // (dp * wanted)) if wanted else 1
        assumed.append(f"micro_batch = {micro}")
    return Batch(global_batch=whole, micro_batch=micro, seq_len=row.required("seq_len"))


def _precision(row: PublishedRow, facts: FrameworkFacts, assumed: list[str]) -> ComputePrecision:
    if facts.precision and _PRECISION_OPEN.search(row.text("notes")):
        assumed.append(f"precision = {facts.precision}: {facts.name}")
        return cast("ComputePrecision", facts.precision)
    text = row.text("precision").lower() or "bf16"
    found = _PRECISIONS.get(
        text, next((name for name in ("fp8", "fp4", "bf16", "fp16", "tf32", "fp32", "int8") if text.startswith(name)), None)
    )
    if found is None:
        raise row.cells.error("precision", text, "known formats are fp32, tf32, bf16, fp16, fp8, fp4, int8")
    return cast("ComputePrecision", found)


def _grads(facts: FrameworkFacts, compute: str) -> Literal["fp32", "bf16"]:
    """``bf16`` stands for any two-byte format."""
    kept = facts.bf16_grads if compute in {"bf16", "fp8"} else facts.grads
    return "bf16" if kept == "half" and compute in _TWO_BYTES else "fp32"


def _comm(row: PublishedRow, compute: str, assumed: list[str]) -> Literal["same", "bf16"]:
    """Tensors whose rows have scales of their own are gathered before they are cast, where the row says so."""
    if compute != "fp8" or not re.search(r"row-?wise", row.text("notes"), re.IGNORECASE):
        return "same"
    assumed.append("precision.comm = bf16: what has a scale for each row is gathered as it is")
    return "bf16"


def _sequence_parallel(row: PublishedRow, facts: FrameworkFacts, *, tp: int, assumed: list[str]) -> bool:
    text = row.text("seq_parallel").lower()
    if text in {"yes", "true", "1"}:
        return tp > 1
    if text in {"no", "false", "0"} or tp == 1:
        return False
    assumed.append(f"seq_parallel = {'yes' if facts.sequence_parallel else 'no'}")
    return facts.sequence_parallel


def _flash_attention(row: PublishedRow, facts: FrameworkFacts, assumed: list[str]) -> bool:
    text = row.text("flash_attention").lower()
    if text in {"yes", "true", "1"}:
        return True
    if text in {"no", "false", "0"}:
        return False
    assumed.append(f"flash_attention = {'yes' if facts.flash_attention else 'no'}")
    return facts.flash_attention


def _overlaps(row: PublishedRow, *, stated: bool) -> bool:
    """A row that says so does not overlap."""
    words = f"{row.text('zero_or_fsdp')} {row.text('notes')}".lower()
    return stated and not re.search(r"no overlap|without overlap|disables? all [\w/ ]*overlap", words)


def _overlaps_tp(row: PublishedRow) -> bool:
    """Asynchronous tensor parallelism of torch's, by the name that its tables give it."""
    return bool(re.search(r"async[ -]?tp", f"{row.text('zero_or_fsdp')} {row.text('notes')}", re.IGNORECASE))


def _compiles(row: PublishedRow) -> bool:
    words = f"{row.text('framework')} {row.text('notes')}".lower()
    return "torch.compile" in words and not re.search(
        r"torch\.compile\s*=\s*no|no torch\.compile|without torch\.compile", words
    )


def _memory(row: PublishedRow, facts: FrameworkFacts, *, pp: int) -> Memory:
    """Sharding, recompute and offload."""
    stage = _zero_stage(row, row.text("zero_or_fsdp"))
    if stage and pp > 1 and facts.zero_stage_in_pipelines is not None:
        stage = facts.zero_stage_in_pipelines
    recompute = row.text("recompute").lower() or facts.recompute or "none"
    if recompute not in {"none", "selective", "full"}:
        raise row.cells.error("recompute", recompute, "one of none, selective, full")
    if recompute == "selective":
        recompute = facts.selective_is
    return replace(Memory(zero_stage=stage, recompute=recompute), **_offload(row))  # type: ignore[arg-type]


def _zero_stage(row: PublishedRow, words: str) -> int:
    if _SHARDED_AFTER_FORWARD.search(words) and "megascale" not in words.lower():
        return 2
    stated = row.number("zero_stage")
    if stated is not None:
        return int(stated)
    plain = words.lower()
    known = ((3, r"zero-?3|stage ?3|fsdp|full.?shard"), (2, r"zero-?2"), (1, r"zero-?1|distributed optimizer"))
    return next((stage for stage, pattern in known if re.search(pattern, plain)), 0)


def _offload(row: PublishedRow) -> dict[str, object]:
    text = row.text("offload").lower()
    if text in {"", "none", "no"}:
        return {}
    found: dict[str, object] = {name: 1.0 for word, name in _OFFLOADS if word in text}
    if not found:
        raise row.cells.error(
            "offload", text, "words that name what is offloaded: optimizer, activations, parameters, gradients"
        )
    if "nvme" in text:
        found["offload_target"] = "nvme"
    return found
