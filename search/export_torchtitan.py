"""A plan as a torchtitan configuration module (0.3), with the pipeline's order beside it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from search.export_case import Case, Exported, needed_partition, python_table, refuse_unless
from search.export_order import ORDER_FILE, is_v, order_file, schedule_order
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal

MODULE_NAME = "schedlab_plan"
REGISTRY = MappingProxyType(
    {
        "llama3-8b": ("llama3", "llama3_8b", "8B"), "llama3-70b": ("llama3", "llama3_70b", "70B"), "llama3-405b": ("llama3", "llama3_405b", "405B"),
        "deepseek-v3": ("deepseek_v3", "deepseek_v3_671b", "671B"),
    }
)  # fmt: skip
"""Module, configuration and flavour in torchtitan of a preset's name here."""
_FLOAT8 = ("llama3_405b",)
"""Configurations that convert their model to float8 themselves."""
_BY_NAME = MappingProxyType({"gpipe": "GPipe", "1f1b": "1F1B"})
"""Orders that torch makes alike; of the others the exact cells are given."""


def torchtitan_module(case: Case) -> Exported:
    """A Python module with a configuration function, as torchtitan's ``--module`` and ``--config`` take it.

    Args:
        case: checked against the trainer.

    Raises:
        InputError: a key has no place in it.

    Source: torchtitan/config/configs.py and manager.py, distributed/pipeline_parallel.py of 0.3.0; torch/distributed/pipelining/schedules.py (``_load_csv``).

    Not modelled: data, learning rate, checkpoints: those of the registry's configuration stay.
    """
    _refuse(case)
    text = "\n".join((*_head(case), *_tables(case), *_functions(case)))
    files = [(f"{MODULE_NAME}.py", text + "\n")]
    if _takes_cells(case):
        files.append((ORDER_FILE, order_file(case)))
    return Exported(files=tuple(files), notes=_notes(case))


def _refuse(case: Case) -> None:
    plan = case.plan
    refuse_unless(case, "memory.block", (), "torchtitan: activation checkpointing holds for all layers alike")
    refuse_unless(case, "runtime.overlap_grad_reduce", True, "torchtitan: FSDP2 always overlaps the gradients' reduction")
    refuse_unless(case, "runtime.overlap_param_gather", True, "torchtitan: FSDP2 always gathers ahead")
    refuse_unless(case, "runtime.bucket_bytes", None, "torchtitan: FSDP2 reduces block by block")
    refuse_unless(case, "runtime.prefetch_blocks", None, "torchtitan: FSDP2 gathers one block ahead")
    refuse_unless(case, "runtime.flash_attention", True, "torchtitan: attention is fused (FlexAttention)")
    if plan.memory.weight_offload:
        refuse_unless(case, "memory.offload_target", "host", "torchtitan: CPUOffloadPolicy keeps states in host memory")
    if plan.runtime.cuda_graphs and plan.parallel.pp > 1:
        raise plan_refusal("runtime.cuda_graphs", True, "torchtitan: CUDA graphs exclude pipelines", "leave it at False")
    if plan.precision.compute == "fp8" and case.model not in REGISTRY:
        rule = f"torchtitan: float8 is a converter of a registered model, but got --model {case.model}"
        raise plan_refusal("precision.compute", "fp8", rule, f"give --model, one of {', '.join(REGISTRY)}")


def _takes_cells(case: Case) -> bool:
    return case.plan.parallel.pp > 1 and case.plan.pipeline.schedule not in _BY_NAME


def _head(case: Case) -> list[str]:
    plan = case.plan
    lines = [f'"""torchtitan 0.3 configuration of a schedlab plan: {case.summary}."""', "", "from dataclasses import replace"]
    if _takes_cells(case):
        lines.append("from pathlib import Path")
    lines.append("")
    fp8 = plan.precision.compute == "fp8"
    if fp8:
        lines.append("from torchtitan.components.quantization import Float8LinearConverter")
    if plan.memory.recompute == "full":
        lines.append("from torchtitan.distributed.activation_checkpoint import FullAC")
    if case.model is not None and case.model in REGISTRY:
        module, function, _ = REGISTRY[case.model]
        lines += [f"from torchtitan.models.{module} import model_registry"] if fp8 or function in _FLOAT8 else []
        lines.append(f"from torchtitan.models.{module}.config_registry import {function}")
    return [*lines, "from torchtitan.trainer import Trainer", ""]


def _tables(case: Case) -> list[str]:
    compiling: dict[str, Any] = {"enable": case.plan.runtime.compile}
    if case.plan.runtime.compile:
        compiling["components"] = ["model", "loss"]
    if case.plan.parallel.tp > 1:
        compiling["enable_async_tensor_parallel"] = case.plan.runtime.overlap_tp
    tables = {"TRAINING": _training(case.plan), "PARALLELISM": _parallelism(case), "COMPILE": compiling}
    lines = [python_table(name, table) for name, table in tables.items()]
    if _takes_cells(case):
        lines.append(f'PARALLELISM["pipeline_parallel_schedule_csv"] = str(Path(__file__).with_name("{ORDER_FILE}"))')
    return lines


def _training(plan: Plan) -> dict[str, Any]:
    batch, per_turn = plan.batch, plan.num_microbatches if plan.parallel.pp > 1 else 1
    return {
        "local_batch_size": (batch.micro_batch or 1) * per_turn, "global_batch_size": batch.global_batch, "seq_len": batch.seq_len,
        "mixed_precision_param": "float32" if plan.precision.compute == "fp32" else "bfloat16",
        "enable_cpu_offload": bool(plan.memory.weight_offload), "disable_cuda_graphs": not plan.runtime.cuda_graphs,
    }  # fmt: skip


def _parallelism(case: Case) -> dict[str, Any]:
    plan, split = case.plan, case.plan.parallel
    shards = split.shard_ranks if plan.memory.zero_stage else 1
    found: dict[str, Any] = {
        "data_parallel_replicate_degree": split.dp // shards, "data_parallel_shard_degree": shards,
        "fsdp_reshard_after_forward": "always" if plan.memory.zero_stage == 3 else "never",  # noqa: PLR2004 - ZeRO's third stage
        "tensor_parallel_degree": split.tp, "enable_sequence_parallel": split.sequence_parallel and split.tp > 1,
        "context_parallel_degree": split.cp, "expert_parallel_degree": split.ep, "pipeline_parallel_degree": split.pp,
    }  # fmt: skip
    if split.pp > 1:
        found |= {
            "pipeline_parallel_schedule": _schedule_name(case), "pipeline_parallel_microbatch_size": plan.batch.micro_batch,
            "module_fqns_per_model_part": module_names(needed_partition(case, "torchtitan")),
        }  # fmt: skip
    return found


def _schedule_name(case: Case) -> str:
    """A schedule that places stages as the order does: torchtitan takes only the placement from it where a file gives the cells."""
    if not _takes_cells(case):
        return _BY_NAME[case.plan.pipeline.schedule]
    if case.plan.parallel.virtual_stages == 1:
        return "1F1B"
    return "ZBVZeroBubble" if is_v(schedule_order(case)) else "Interleaved1F1B"


def module_names(lengths: tuple[int, ...]) -> list[list[str]]:
    """Torchtitan's names of the modules of each stage, embedding and head at the ends."""
    starts = [sum(lengths[:stage]) for stage in range(len(lengths))]
    stages = [[f"layers.{start + n}" for n in range(length)] for start, length in zip(starts, lengths, strict=True)]
    stages[0] = ["tok_embeddings", *stages[0]]
    stages[-1] = [*stages[-1], "norm", "lm_head"]
    return stages


def _functions(case: Case) -> list[str]:
    checkpoint = "FullAC.Config()" if case.plan.memory.recompute == "full" else "None"
    lines = [
        "", "", "def configure(config: Trainer.Config) -> Trainer.Config:", '    """A model\'s configuration under the plan."""', "    return replace(",
        "        config,", "        training=replace(config.training, **TRAINING),", "        parallelism=replace(config.parallelism, **PARALLELISM),",
        "        compile=replace(config.compile, **COMPILE),", f"        activation_checkpoint={checkpoint},", "    )",
    ]  # fmt: skip
    if case.model is None or case.model not in REGISTRY:
        return lines
    _, function, flavour = REGISTRY[case.model]
    lines += ["", "", "def plan() -> Trainer.Config:", f'    """{function} under the plan."""', f"    config = {function}()"]
    if case.plan.precision.compute == "fp8":
        converter = f"Float8LinearConverter.Config(model_compile_enabled={case.plan.runtime.compile})"
        lines.append(f'    config.model_spec = model_registry("{flavour}", converters=[{converter}])')
    elif function in _FLOAT8:
        lines.append(f'    config.model_spec = model_registry("{flavour}")  # without the float8 of {function}')
    return [*lines, "    return configure(config)"]


def _notes(case: Case) -> tuple[str, ...]:
    run = f"torchrun over {case.plan.num_gpus} GPUs, in the folder of the files: -m torchtitan.train --module {MODULE_NAME} --config plan"
    if case.model in REGISTRY:
        return (run,)
    return (
        f"torchtitan has no configuration for --model {case.model}: return configure(yours) from a function plan() in {MODULE_NAME}.py",
        run,
    )
