"""A plan as command-line arguments of Megatron-LM (megatron-core 0.16)."""

from __future__ import annotations

from search.export_case import Case, Exported, refuse_unless
from simulator.parallel.gradient_sync import BUCKET_BYTES
from simulator.pipeline.sizes import round_size
from simulator.plan import Plan
from simulator.plan_sections import MemoryBlock, plan_refusal

FILE_NAME = "megatron.args"
Flag = tuple[str, ...]
_STRATEGIES = {2: "optim_grads", 3: "optim_grads_params"}
_GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
_DEFAULT_ORDER = "tp-cp-ep-dp-pp"


def megatron_arguments(case: Case) -> Exported:
    """The arguments, one a line.

    Args:
        case: checked against the trainer.

    Raises:
        InputError: a key has no argument.

    Source: megatron/training/arguments.py of Megatron-LM at 000c4ac; the fields of TransformerConfig, DistributedDataParallelConfig and OptimizerConfig of
    megatron-core 0.16.1 that they fill.

    Not modelled: arguments of the model, the data, the learning rate and checkpoints.
    """
    _refuse(case)
    flags = (
        *_degrees(case),
        *_batch(case),
        *_stages(case),
        *_sharding(case.plan),
        *_memory(case),
        *_precision(case.plan),
        *_runtime(case.plan),
    )
    lines = [f"# {case.summary}", *(" ".join(flag) for flag in flags)]
    return Exported(files=((FILE_NAME, "\n".join(lines) + "\n"),), notes=_notes(case))


def _refuse(case: Case) -> None:
    runtime, precision = case.plan.runtime, case.plan.precision
    refuse_unless(case, "runtime.compile", False, "megatron: compiles no layers (it brings fused kernels of its own)")
    refuse_unless(case, "runtime.prefetch_blocks", None, "megatron: gathers ahead by size, not by blocks")
    if case.plan.memory.optimizer_offload:
        refuse_unless(case, "memory.offload_target", "host", "megatron: the hybrid optimizer keeps its states in host memory")
    if precision.grads == "bf16" and precision.compute not in {"bf16", "fp8"}:
        rule = f"megatron: --grad-reduce-in-bf16 goes with --bf16, but got compute = {precision.compute}"
        raise plan_refusal("precision.grads", precision.grads, rule, "take fp32")
    if case.plan.memory.zero_stage and runtime.overlap_param_gather and not runtime.overlap_grad_reduce:
        rule = "megatron: --overlap-param-gather must come with --overlap-grad-reduce"
        raise plan_refusal("runtime.overlap_param_gather", True, rule, "set runtime.overlap_grad_reduce = true, or it to false")
    if runtime.cuda_graphs and case.plan.memory.recompute == "full":
        rule = "megatron: CUDA graphs exclude full recompute"
        raise plan_refusal("runtime.cuda_graphs", True, rule, "leave one of them out")


def _degrees(case: Case) -> list[Flag]:
    split = case.plan.parallel
    flags: list[Flag] = [
        ("--tensor-model-parallel-size", f"{split.tp}"),
        ("--pipeline-model-parallel-size", f"{split.pp}"),
        ("--context-parallel-size", f"{split.cp}"),
    ]
    if split.cp > 1:
        flags.append(("--cp-comm-type", {"ring": "p2p", "all-to-all": "a2a"}[split.cp_method]))
    if split.ep > 1:
        flags += [
            ("--expert-model-parallel-size", f"{split.ep}"),
            ("--expert-tensor-parallel-size", f"{split.tp}"),
            ("--moe-token-dispatcher-type", "alltoall"),
        ]
    if split.sequence_parallel and split.tp > 1:
        flags.append(("--sequence-parallel",))
    if split.order != _DEFAULT_ORDER:
        flags.append(("--use-tp-pp-dp-mapping",))
    return flags


def _batch(case: Case) -> list[Flag]:
    batch = case.plan.batch
    return [
        ("--micro-batch-size", f"{batch.micro_batch}"),
        ("--global-batch-size", f"{batch.global_batch}"),
        ("--seq-length", f"{batch.seq_len}"),
    ]


def _stages(case: Case) -> list[Flag]:
    split = case.plan.parallel
    if split.pp == 1:
        return []
    flags: list[Flag] = []
    lengths = case.partition
    if lengths is not None and len(set(lengths)) > 1:
        flags.append(("--pipeline-model-parallel-layout", layout_text(lengths)))
    elif split.virtual_stages > 1 and lengths is not None:
        flags.append(("--num-layers-per-virtual-pipeline-stage", f"{lengths[0]}"))
    elif split.virtual_stages > 1:
        flags.append(("--num-virtual-stages-per-pipeline-rank", f"{split.virtual_stages}"))
    if case.plan.pipeline.schedule == "interleaved":
        together = round_size("interleaved", split.pp, case.plan.num_microbatches)
        if together != split.pp:
            flags.append(("--microbatch-group-size-per-virtual-pipeline-stage", f"{together}"))
    return flags


def layout_text(lengths: tuple[int, ...]) -> str:
    """The layout of stages in Megatron's letters: E embedding, t layer, L loss, a bar between stages."""
    stages = [f"t*{length}" if length > 1 else "t" * length for length in lengths]
    stages[0] = ",".join(part for part in ("E", stages[0]) if part)
    stages[-1] = ",".join(part for part in (stages[-1], "L") if part)
    return "|".join(stages)


def _sharding(plan: Plan) -> list[Flag]:
    split, stage, runtime = plan.parallel, plan.memory.zero_stage, plan.runtime
    ranks = split.cp * split.dp
    flags: list[Flag] = [("--use-distributed-optimizer",)] if stage else []
    if stage in _STRATEGIES:
        flags += [
            ("--use-megatron-fsdp",),
            ("--data-parallel-sharding-strategy", _STRATEGIES[stage]),
            ("--no-gradient-accumulation-fusion",),
            ("--init-model-with-meta-device",),
            ("--ckpt-format", "fsdp_dtensor"),
        ]
    if stage and split.shard_ranks != ranks:
        flags.append(("--num-distributed-optimizer-instances", f"{ranks // split.shard_ranks}"))
    if ranks > 1 and runtime.overlap_grad_reduce:
        flags.append(("--overlap-grad-reduce",))
    if ranks > 1 and runtime.overlap_param_gather and stage:
        flags.append(("--overlap-param-gather",))
    if ranks > 1:
        size = (runtime.bucket_bytes or BUCKET_BYTES) // _GRADIENT_BYTES[plan.precision.grads]
        flags.append(("--ddp-bucket-size", f"{size}"))
    return flags


def _memory(case: Case) -> list[Flag]:
    memory = case.plan.memory
    flags: list[Flag] = []
    if memory.block:
        flags += [
            ("--recompute-granularity", "full"),
            ("--recompute-method", "block"),
            ("--recompute-num-layers", f"{_first_layers(case)}"),
        ]
    elif memory.recompute == "full":
        flags += [("--recompute-granularity", "full"), ("--recompute-method", "uniform"), ("--recompute-num-layers", "1")]
    elif memory.recompute == "selective":
        flags += [("--recompute-granularity", "selective"), ("--recompute-modules", "core_attn")]
    if memory.optimizer_offload:
        flags += [
            ("--optimizer-cpu-offload",),
            ("--optimizer-offload-fraction", f"{memory.optimizer_offload}"),
            ("--use-precision-aware-optimizer",),
            ("--overlap-cpu-optimizer-d2h-h2d",),
        ]
    return flags


def _first_layers(case: Case) -> int:
    """Layers at the front of every stage that are recomputed: the one pattern of exceptions that Megatron knows (``block``)."""
    memory, found = case.plan.memory, [_leading_layers(one) for one in case.plan.memory.block]
    stages = sorted(one.stage for one in memory.block)
    if memory.recompute != "none" or stages != list(range(case.plan.num_stages)) or len({*found}) != 1 or found[0] is None:
        rule = "megatron: --recompute-method block recomputes the same number of first layers on every stage"
        remedy = 'take recompute = "none" with one exception a stage, blocks = "0-N", recompute = "full", or no exceptions'
        raise plan_refusal("memory.block", memory.block, rule, remedy)
    return found[0]


def _leading_layers(exception: MemoryBlock) -> int | None:
    low, _, high = exception.blocks.partition("-")
    if exception.recompute != "full" or exception.microbatches != "all" or low != "0" or not (high or "0").isdigit():
        return None
    return int(high or 0) + 1


def _precision(plan: Plan) -> list[Flag]:
    precision = plan.precision
    formats: dict[str, list[Flag]] = {
        "fp32": [], "bf16": [("--bf16",)], "fp16": [("--fp16",)], "fp8": [("--bf16",), ("--fp8-format", "hybrid")],
    }  # fmt: skip
    flags = formats[precision.compute]
    if precision.grads == "bf16":
        flags = [*flags, ("--grad-reduce-in-bf16",)]
    elif precision.compute != "fp32":
        flags = [*flags, ("--accumulate-allreduce-grads-in-fp32",)]
    return [*flags, ("--optimizer", {"adamw": "adam", "sgd": "sgd"}[precision.optimizer])]


def _runtime(plan: Plan) -> list[Flag]:
    runtime = plan.runtime
    flags: list[Flag] = [("--attention-backend", "flash" if runtime.flash_attention else "unfused")]
    if runtime.overlap_tp and plan.parallel.tp > 1:
        flags.append(("--tp-comm-overlap",))
    if runtime.cuda_graphs:
        flags.append(("--cuda-graph-impl", "local"))
    return flags


def _notes(case: Case) -> tuple[str, ...]:
    plan = case.plan
    notes = [
        f"torchrun over {plan.num_gpus} GPUs: pretrain_gpt.py $(grep -v '^#' {FILE_NAME}) and the arguments of the model, the data and the learning rate"
    ]
    if plan.memory.zero_stage in _STRATEGIES:
        notes.append("Megatron-FSDP must not find CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment")
    elif plan.parallel.tp > 1 or plan.parallel.cp > 1:
        notes.append("before Blackwell, set CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment")
    return tuple(notes)
