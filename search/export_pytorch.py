"""A plan as a Python script on plain torch.distributed: mesh, sharding, accumulation or a pipeline's order, for any blocks."""

from __future__ import annotations

from string import Template
from typing import Any

from search.export_case import Case, Exported, needed_partition, refuse_unless
from search.export_order import ORDER_FILE, order_file, schedule_order, stages_of_ranks
from search.export_pytorch_text import ACCUMULATE, COMMON, PIPELINE
from simulator.plan import Plan

FILE_NAME = "train_plan.py"
STAND_INS = 2
"""Blocks that stand in for those of a model that is not named."""
_GRADIENTS_SHARDED, _PARAMETERS_SHARDED = 2, 3


def pytorch_script(case: Case) -> Exported:
    """A script that runs as it is, on stand-in blocks, and says where the caller's own go.

    Args:
        case: checked against the trainer.

    Raises:
        InputError: a key has no place in it.

    **Model**: the ZeRO stage in terms of FSDP2: 3 gathers for each pass, 2 keeps parameters whole through the step and scatters gradients at each
    micro-batch, 1 at the last one only, 0 shards over one rank.

    Source: torch 2.13, torch/distributed/fsdp/_fully_shard/_fully_shard.py (FSDPModule), torch/distributed/pipelining/schedules.py (``_load_csv``).

    Not modelled: what a block computes, data, learning rate, checkpoints.
    """
    _refuse(case)
    pipelined = case.plan.parallel.pp > 1
    head = [f'"""A schedlab plan on plain torch: {case.summary}."""', ""]
    constants = "\n".join(f"{name} = {value!r}" for name, value in _constants(case).items()).replace("'", '"')
    body = Template(COMMON).substitute(constants=constants) + (PIPELINE if pipelined else ACCUMULATE)
    files = [(FILE_NAME, "\n".join(head) + body)]
    if pipelined:
        files.append((ORDER_FILE, order_file(case)))
    return Exported(files=tuple(files), notes=_notes(case.plan))


def _refuse(case: Case) -> None:
    refuse_unless(case, "memory.block", (), "pytorch: the script wraps all blocks alike")
    refuse_unless(case, "runtime.overlap_grad_reduce", True, "pytorch: FSDP2 always overlaps the gradients' reduction")
    refuse_unless(case, "runtime.overlap_param_gather", True, "pytorch: FSDP2 always gathers ahead")
    refuse_unless(case, "runtime.bucket_bytes", None, "pytorch: FSDP2 reduces block by block")
    refuse_unless(case, "runtime.prefetch_blocks", None, "pytorch: FSDP2 gathers one block ahead")
    refuse_unless(case, "runtime.cuda_graphs", False, "pytorch: the script captures no graph")
    if case.plan.memory.weight_offload:
        refuse_unless(case, "memory.offload_target", "host", "pytorch: CPUOffloadPolicy keeps states in host memory")


def _constants(case: Case) -> dict[str, Any]:
    plan, split = case.plan, case.plan.parallel
    shards, stage = split.shard_ranks if plan.memory.zero_stage else 1, plan.memory.zero_stage
    found: dict[str, Any] = {
        "MESH": {"pp": split.pp, "dp_replicate": split.dp // shards, "dp_shard": shards}, "MICRO_BATCH": plan.batch.micro_batch,
        "NUM_MICROBATCHES": plan.num_microbatches, "COMPUTE": plan.precision.compute, "RECOMPUTE": plan.memory.recompute == "full",
        "COMPILE": plan.runtime.compile, "OFFLOAD": bool(plan.memory.weight_offload), "OPTIMIZER": {"adamw": "AdamW", "sgd": "SGD"}[plan.precision.optimizer],
        "GATHER_EACH_PASS": stage == _PARAMETERS_SHARDED, "SCATTER_EACH_MICRO_BATCH": stage >= _GRADIENTS_SHARDED,
        "LAYERS_OF_STAGE": [case.layers or STAND_INS],
    }  # fmt: skip
    if split.pp > 1:
        found["LAYERS_OF_STAGE"] = list(needed_partition(case, "pytorch"))
        found["STAGES_OF_RANK"] = [sorted(stages) for stages in stages_of_ranks(schedule_order(case))]
        found["ORDER_FILE"] = ORDER_FILE
    return found


def _notes(plan: Plan) -> tuple[str, ...]:
    return (
        f"torchrun over {plan.num_gpus} GPUs: {FILE_NAME} runs one step on stand-in blocks; put your own into blocks()",
        "attention is the blocks' own: the plan takes it " + ("fused" if plan.runtime.flash_attention else "unfused"),
    )
