"""What torch's own runtimes keep on a rank beside model states and activations: buffers of FSDP's streams and of pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hardware_models.caching_allocator import AllocatorPeaks
from hardware_models.units import DTYPE_BYTES
from simulator.parallel.framework import AA_SCALING
from simulator.parallel.memory import GRADIENT_BYTES
from simulator.parallel.parameter_gathers import FLAT_BUFFERS, Unit
from simulator.parallel.stages import Stage
from simulator.pipeline.action import Order, actions_of
from simulator.plan import Plan

_HEAD = "head"
_REDUCED_ONCE = 1
"""ZeRO stage under which FSDP keeps gradients whole until the last micro-batch, and parameters gathered for the step."""


def stream_pool_bytes(units: Sequence[Unit], plan: Plan, *, dtype: str) -> int:
    """Bytes that the allocator reserves for FSDP's streams on a rank: freed blocks serve the stream that they were allocated on only.

    **Model**: a unit is gathered into one flat buffer, on the stream that copies shards in, and copied out; the buffer stays until the next unit has been copied out. The most is
    the unit of the model's own parameters beside a layer's, or two layers. Where gradients are reduced once a step, their shards come on a stream of their own, while the
    whole ones are there; where each pass reduces them, they are the gradients that count anyway.

    **Source**: ``foreach_all_gather``, ``foreach_reduce`` (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, 2.13), ``FSDPParamGroup.wait_for_unshard``; pools per stream: c10/cuda/CUDACachingAllocator.cpp.

    **Not modelled**: a layer's whole gradients and their float32 copy on the way to the reduction, which are on the compute stream and small beside the loss.

    Args:
        units: of all stages of the rank, as FSDP gathers them.
        plan: its framework, ZeRO stage, gradients.
        dtype: in which parameters are gathered.
    """
    if plan.runtime.framework not in FLAT_BUFFERS or not plan.memory.zero_stage or plan.parallel.shard_ranks == 1:
        return 0
    own = sum(unit.elements for unit in units if unit.root)
    layers = sorted((unit.elements for unit in units if not unit.root), reverse=True)
    gathered = max(own + sum(layers[:1]), sum(layers[:2]))
    shards = (
        sum(unit.elements for unit in units) / plan.parallel.shard_ranks if plan.memory.zero_stage == _REDUCED_ONCE else 0.0
    )
    return round(gathered * DTYPE_BYTES[dtype] + shards * GRADIENT_BYTES[plan.precision.grads])


def with_pool(peaks: AllocatorPeaks, pool_bytes: int) -> AllocatorPeaks:
    """The peaks of a rank on which other streams than the compute's have reserved so much, in blocks that are free when the compute's peak is reached."""
    return replace(
        peaks,
        peak_reserved_bytes=peaks.peak_reserved_bytes + pool_bytes,
        final_reserved_bytes=peaks.final_reserved_bytes + pool_bytes,
    )


def pipeline_bytes(order: Order, rank: int, stages: Sequence[Stage], plan: Plan, *, dtype: str) -> int:
    """Bytes of messages and results that torch's pipeline runtime keeps on a rank, beside the ones that passes hold.

    **Model**: a stage that receives has a buffer for each micro-batch of the step, forward, and one that sends has one for each gradient. What a stage has handed on, or the last
    one's logits, stays until its backward pass. Of these, passes count the inputs of micro-batches in flight and one gradient.

    **Source**: ``_prepare_forward_infra``, ``_setup_backward_recv_info`` and ``fwd_cache`` (torch/distributed/pipelining/stage.py, 2.13).

    **Not modelled**: results that the last stage keeps until the end where the trainer has ``step`` return them; versions before 2.8 kept them on all stages.

    Args:
        order: of the pipeline.
        rank: of it.
        stages: of the rank.
        plan: its framework.
        dtype: of activations.
    """
    if plan.runtime.framework in AA_SCALING:
        return _earlier_logits_bytes(order, stages, plan, dtype=dtype)
    if plan.runtime.framework not in FLAT_BUFFERS or order.num_stages == 1:
        return 0
    total, count = 0, order.num_microbatches
    for stage in stages:
        if not stage.blocks:
            continue
        flight = order.once(f"in flight {rank} {stage.index}", partial(_most_in_flight, order, rank, stage.index))
        if stage.receives:
            total += (count - flight) * stage.blocks[0].input_bytes
        if stage.sends:
            total += (count - 1 + flight) * stage.blocks[-1].output_bytes
        else:
            total += flight * _logits_bytes(stage, dtype=dtype)
    return total // order.microbatch_parts


def _earlier_logits_bytes(order: Order, stages: Sequence[Stage], plan: Plan, *, dtype: str) -> int:
    """The logits of the micro-batch before, in the second of two buffers for the last stage's results, which are overwritten and never given up.

    **Source**: ``required_buffer_count`` and ``_execute_loss_fn`` (Aleph-Alpha/scaling @01b9d21dba src/scaling/core/nn/pipeline_schedule/train.py, nn/parallel_module/parallel_module.py).
    """
    if order.num_microbatches == 1 or not stages or stages[-1].index != order.num_stages - 1:
        return 0
    return plan.parallel.tp * _logits_bytes(stages[-1], dtype=dtype)


def _most_in_flight(order: Order, rank: int, stage: int) -> int:
    """Most micro-batches that are on their way through a stage at once."""
    most = alive = 0
    for action in actions_of(order.ranks[rank]):
        if action.stage == stage and action.kind != "W":
            alive += 1 if action.kind == "F" else -1
            most = max(most, alive)
    return most


def _logits_bytes(stage: Stage, *, dtype: str) -> int:
    """The result of the head's product, as the model returns it."""
    head = next((block for block in stage.blocks if block.name == _HEAD), None)
    product = next((kernel for kernel in head.discard.kernels if kernel.kernel_class == "gemm"), None) if head else None
    return product.shape[0] * product.shape[1] * DTYPE_BYTES[dtype] if product else 0
