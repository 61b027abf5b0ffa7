"""A plan as DeepSpeed's JSON configuration (0.19)."""

from __future__ import annotations

import json
from typing import Any

from search.export_case import Case, Exported, needed_partition, refuse_unless
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal

FILE_NAME = "ds_config.json"
NVME_PATH = "/local_nvme"
"""Where drives are mounted in DeepSpeed's own examples; a plan does not say."""
_GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
_PARAMETERS_SHARDED = 3


def deepspeed_json(case: Case) -> Exported:
    """The configuration that ``deepspeed.initialize`` takes.

    Args:
        case: checked against the trainer.

    Raises:
        InputError: a key has no place in it.

    Source: deepspeed/runtime/config.py, runtime/zero/config.py and offload_config.py, module_inject/auto_ep_config.py of 0.19.8.

    Not modelled: the learning rate and its schedule.
    """
    _refuse(case)
    plan = case.plan
    text = json.dumps({**_batch(plan), **_precision(plan), "zero_optimization": _zero(plan), **_layers(plan)}, indent=2)
    return Exported(files=((FILE_NAME, text + "\n"),), notes=_notes(case))


def _refuse(case: Case) -> None:
    runtime = case.plan.runtime
    refuse_unless(case, "memory.block", (), "deepspeed: one rule of checkpointing holds for all layers")
    refuse_unless(case, "runtime.cuda_graphs", False, "deepspeed: captures no training step")
    refuse_unless(case, "runtime.prefetch_blocks", None, "deepspeed: stage3_prefetch_bucket_size counts elements, not blocks")
    if case.plan.precision.grads == "bf16" and case.plan.precision.compute != "bf16":
        rule = f"deepspeed: gradients accumulate in the format of parameters or fp32, but got compute = {case.plan.precision.compute}"
        raise plan_refusal("precision.grads", "bf16", rule, "take fp32")
    if case.plan.memory.zero_stage == _PARAMETERS_SHARDED and runtime.overlap_grad_reduce != runtime.overlap_param_gather:
        rule = "deepspeed: at stage 3 overlap_comm holds for gradients and parameters alike"
        raise plan_refusal("runtime.overlap_param_gather", runtime.overlap_param_gather, rule, "set it as overlap_grad_reduce")
    if case.plan.parallel.pp > 1:
        needed_partition(case, "deepspeed")


def _batch(plan: Plan) -> dict[str, Any]:
    return {
        "train_batch_size": plan.batch.global_batch,
        "train_micro_batch_size_per_gpu": plan.batch.micro_batch,
        "gradient_accumulation_steps": plan.num_microbatches,
    }


def _precision(plan: Plan) -> dict[str, Any]:
    precision = plan.precision
    found: dict[str, Any] = {} if precision.compute == "fp32" else {precision.compute: {"enabled": True}}
    if precision.compute == "bf16" or plan.memory.zero_stage:
        found["data_types"] = {"grad_accum_dtype": precision.grads}
    return {**found, "optimizer": {"type": {"adamw": "AdamW", "sgd": "SGD"}[precision.optimizer]}}


def _zero(plan: Plan) -> dict[str, Any]:
    memory, runtime = plan.memory, plan.runtime
    found: dict[str, Any] = {"stage": memory.zero_stage}
    if memory.zero_stage:
        found["overlap_comm"] = runtime.overlap_grad_reduce
    if runtime.bucket_bytes:
        found["reduce_bucket_size"] = runtime.bucket_bytes // _GRADIENT_BYTES[plan.precision.grads]
    device = {"host": "cpu", "nvme": "nvme"}[memory.offload_target]
    place = {"device": device, "pin_memory": True} | ({"nvme_path": NVME_PATH} if device == "nvme" else {})
    if memory.weight_offload:
        found["offload_param"] = place
    if memory.optimizer_offload:
        found["offload_optimizer"] = place
    return found


def _layers(plan: Plan) -> dict[str, Any]:
    """What concerns the model's own layers; a pipeline's axes are the PipelineModule's."""
    split, found = plan.parallel, dict[str, Any]()
    if split.tp > 1 and split.pp == 1:
        found["tensor_parallel"] = {"autotp_size": split.tp} | ({"tp_overlap_comm": True} if plan.runtime.overlap_tp else {})
    if split.cp > 1:
        found["sequence_parallel_size"] = split.cp
    if split.ep > 1:
        found["expert_parallel"] = {"enabled": True, "autoep_size": split.ep, "expert_tensor_parallel_size": split.tp}
    if plan.memory.recompute == "full":
        found["activation_checkpointing"] = {"partition_activations": False, "cpu_checkpointing": False}
    if split.pp > 1:
        found["pipeline"] = {"activation_checkpoint_interval": int(plan.memory.recompute == "full")}
    return found


def _notes(case: Case) -> tuple[str, ...]:
    plan, split = case.plan, case.plan.parallel
    notes = [
        f"deepspeed over {plan.num_gpus} GPUs: your script with --deepspeed_config {FILE_NAME}; add the learning rate to optimizer.params"
    ]
    if split.pp > 1:
        layers = needed_partition(case, "deepspeed")[0]
        notes.append(
            f"wrap the layers in PipelineModule(num_stages={split.pp}, partition_method='type:<your layer class>'): {layers} layers a stage"
        )
    if split.pp > 1 and split.tp > 1:
        notes.append(
            f"the PipelineModule's layers must be tensor parallel themselves: topology=PipeModelDataParallelTopology(num_pp={split.pp}, num_mp={split.tp}, num_dp={split.dp})"
        )
    if split.pp == 1 and plan.memory.recompute == "full":
        notes.append("call deepspeed.checkpointing.checkpoint (or the model's gradient_checkpointing_enable) around each layer")
    if split.cp > 1:
        notes.append("run attention through deepspeed.sequence.layer.DistributedAttention (Ulysses)")
    if plan.runtime.compile:
        notes.append("call engine.compile() after deepspeed.initialize")
    if plan.runtime.overlap_grad_reduce and split.dp * split.cp > 1 and (split.pp > 1 or not plan.memory.zero_stage):
        notes.append(
            "DeepSpeed reduces these gradients after the last backward pass; the plan overlaps them (runtime.overlap_grad_reduce)"
        )
    if plan.memory.offload_target == "nvme" and (plan.memory.weight_offload or plan.memory.optimizer_offload):
        notes.append(f"nvme_path is {NVME_PATH}: change it to where your drives are mounted")
    return tuple(notes)
