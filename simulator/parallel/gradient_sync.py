"""What data parallelism does for a stage: gradients go between replicas, and updated or sharded parameters come together again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hardware_models.network.collectives import collective_seconds
from hardware_models.units import DTYPE_BYTES
from simulator.parallel.communication import Communication
from simulator.parallel.memory import GRADIENT_BYTES
from simulator.parallel.mesh import Mesh
from simulator.plan import Plan
from simulator.precision import STORED_AS

BUCKET_BYTES = 40_000_000 * 4
"""Gradients of a bucket unless the plan says: Megatron-core's 40 million elements, in float32."""
MOST_CHUNKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSync:
    """What data parallelism does for one stage on one rank."""

    chunks: int
    """Buckets that the last micro-batch's backward pass is cut into; 1: the gradients go when it is over."""
    reduce_s: float
    """All-reduce or reduce-scatter of the stage's gradients."""
    gather_s: float
    """All-gather of updated parameters (ZeRO 1 and 2)."""
    gather_overlaps: bool = False
    """They are gathered behind the first passes of the next step, which a step in a row of them finds at its start; else the step ends with it."""
    reduce_overlaps: bool = True
    """Gradients go when their stage's last backward pass has made them; else when the rank's last pass is over."""
    first_gather_s: float = 0.0
    """ZeRO 3: the first block's parameters, which a pass waits for."""
    rest_gather_s: float = 0.0
    """ZeRO 3: the other blocks', gathered while the pass computes."""
    every_micro_batch: bool = False
    """ZeRO 3: gradients are scattered after each backward pass."""


def gradient_sync(
    plan: Plan, communication: Communication, *, elements: int, num_blocks: int, distance: int, dtype: str
) -> GradientSync:
    """What data parallelism does for a stage.

    Gradients of experts, on fewer replicas, are counted with the dense ones' group.

    Args:
        plan: degrees, ZeRO stage, buckets, what overlaps.
        communication: prices collectives over the replicas.
        elements: parameters of the stage on this rank.
        num_blocks: of the stage.
        distance: of two pipeline ranks that hold the stage, in orders of two directions; 0 in others.
        dtype: of the parameters.

    Not modelled: that the two ranks of a stage, in orders of two directions, wait for each other.
    """
    alone = plan.parallel.dp * plan.parallel.cp == 1 and not distance
    if alone and not plan.memory.optimizer_offload:
        return GradientSync(chunks=1, reduce_s=0.0, gather_s=0.0)
    reduce_bytes, gather_bytes = elements * _gradient_bytes(plan), elements * DTYPE_BYTES[dtype]
    bucket = plan.runtime.bucket_bytes or BUCKET_BYTES
    chunks = max(1, min(MOST_CHUNKS, round(reduce_bytes / bucket))) if plan.runtime.overlap_grad_reduce else 1
    if alone:
        return GradientSync(chunks=chunks, reduce_s=0.0, gather_s=0.0)
    seconds = partial(communication.gradient_seconds, distance=distance)
    overlaps, ahead = plan.runtime.overlap_grad_reduce, plan.runtime.overlap_param_gather
    if plan.memory.zero_stage == 0:
        reduce_s = chunks * seconds("all_reduce", reduce_bytes / chunks)
        return GradientSync(chunks=chunks, reduce_s=reduce_s, gather_s=0.0, reduce_overlaps=overlaps)
    reduce_s = chunks * seconds("reduce_scatter", reduce_bytes / chunks)
    if plan.memory.zero_stage < 3:  # noqa: PLR2004 - ZeRO's third stage
        gather_s = seconds("all_gather", gather_bytes)
        return GradientSync(
            chunks=chunks, reduce_s=reduce_s, gather_s=gather_s, gather_overlaps=ahead, reduce_overlaps=overlaps
        )
    blocks = max(1, num_blocks)
    one_s = seconds("all_gather", gather_bytes / blocks)
    return GradientSync(
        chunks=chunks, reduce_s=reduce_s, gather_s=0.0, first_gather_s=one_s, rest_gather_s=(blocks - 1) * one_s, every_micro_batch=True
    )  # fmt: skip


def tied_seconds(plan: Plan, mesh: Mesh, elements: int) -> float:
    """Seconds of the all-reduce, between first and last pipeline rank, of the gradient of a tied table of so many elements."""
    if not elements:
        return 0.0
    size = float(elements * GRADIENT_BYTES[plan.precision.grads])
    return collective_seconds("all_reduce", size, mesh.neighbours("pp"), mesh.cluster)


def _gradient_bytes(plan: Plan) -> int:
    """Bytes of one gradient on the wire."""
    if plan.precision.comm == "same":
        return GRADIENT_BYTES[plan.precision.grads]
    return DTYPE_BYTES[STORED_AS.get(plan.precision.comm, "int8")]
