"""What ends a step on a pipeline rank: gradients are looked through and agreed on, then the optimizer updates what the rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hardware_models.kernel import Kernel
from hardware_models.network.cluster import CommGroup
from hardware_models.network.collectives import collective_seconds
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from hardware_models.units import DTYPE_BYTES
from simulator.parallel.framework import AA_SCALING
from simulator.parallel.gradient_sync import WHOLE_SUMS
from simulator.parallel.memory import GRADIENT_BYTES, MASTER_BYTES, STATE_BYTES
from simulator.parallel.mesh import Mesh
from simulator.parallel.parameter_gathers import DEEPSPEED
from simulator.parallel.recompute import MEGATRON
from simulator.plan import Plan

CLIPPING = (*MEGATRON, *AA_SCALING, "torchtitan", *DEEPSPEED)
"""Frameworks that take the norm of all gradients before each step: ``--clip-grad`` 1.0 unless set (Megatron-LM), ``max_norm`` 1.0 (torchtitan), in any case (DeepSpeed's
ZeRO, ``scaled_global_norm``; ``scale_grads_and_get_global_grad_norm``, Aleph-Alpha/scaling @01b9d21dba). A bare module does not."""
_RESCALING = (*AA_SCALING, "torchtitan", *DEEPSPEED)
"""Those that multiply gradients by a factor whatever it is (torch ``clip_grads_with_norm_``; DeepSpeed ``unscale_and_clip_grads``); Megatron does so only above the bound."""
_NORM_BYTES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientCheck:
    """Gradients are looked through before the optimizer steps."""

    read_s: tuple[float, ...]
    """Per pipeline rank: norm, loss scale and clipping factor."""
    agree_s: float
    """All-reduce of the norm and of whether a number overflowed, among the ranks that hold different gradients."""
    waits: bool
    """The optimizer waits until all have agreed; else it steps on what its rank knows, and a step that turns out wrong is rolled back."""


def gradient_check(plan: Plan, mesh: Mesh, device: DeviceProfile, elements: Sequence[float]) -> GradientCheck | None:
    """What is done to gradients between their reduction and the optimizer's step; None: nothing.

    **Model**: the norm reads a rank's gradients once, all of them where they are summed everywhere. In fp16 the loss scale is taken out (read and written) and an overflow looked for. Then one number for each is
    summed over tensor and pipeline ranks, and over the ranks that ZeRO shards gradients among. ``optimizer_sync`` "pre" waits for that, so that no rank steps before the
    last one has its gradients; "post-validation" does not.

    **Source**: Qi et al. 2024, "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), section 4; frameworks as in `CLIPPING`.

    **Not modelled**: the host's wait for the number; clipping in Megatron; a roll-back.

    Args:
        plan: degrees, precision, framework, what waits.
        mesh: of the plan.
        device: that prices the kernels.
        elements: parameters of each pipeline rank, before sharding.
    """
    runtime, scaled = plan.runtime, plan.precision.compute == "fp16"
    norm = runtime.framework in CLIPPING
    if not norm and not scaled:
        return None
    grads = GRADIENT_BYTES[plan.precision.grads]
    rewritten = grads * (scaled + (runtime.framework in _RESCALING))
    whole = runtime.framework in WHOLE_SUMS
    seconds = tuple(
        _light_seconds("gradient_norm", round(own) if whole else _held(plan, own), grads * norm + rewritten, rewritten, device)
        for own in elements
    )
    messages = norm + scaled
    return GradientCheck(
        read_s=seconds, agree_s=messages * _agree_seconds(plan, mesh), waits=runtime.optimizer_sync == "pre"
    )  # fmt: skip


def optimizer_seconds(plan: Plan, device: DeviceProfile, *, elements: float, dtype: str) -> float:
    """Seconds of a rank's optimizer step.

    **Model**: one fused step over the rank's shard: gradient, master copy and moments read, master copy, moments and parameter written. Megatron copies master to
    parameter in a pass of its own and zeroes the gradient buffers.

    Args:
        plan: degrees, ZeRO stage, precision, framework, what the host updates.
        device: that prices the kernel.
        elements: parameters of the rank, before sharding.
        dtype: of the parameters.
    """
    width, grads = DTYPE_BYTES[dtype], GRADIENT_BYTES[plan.precision.grads]
    own = _held(plan, elements)
    kept = max(width, MASTER_BYTES) + STATE_BYTES[plan.precision.optimizer]
    read_bytes, written_bytes = own * (grads + kept), own * (kept + (width if width < MASTER_BYTES else 0))
    if plan.runtime.framework in MEGATRON:
        read_bytes += own * MASTER_BYTES
        written_bytes += max(1, round(elements)) * grads
    kernel = Kernel(
        kernel_class="optimizer", op="adamw", shape=(own,), dtype="float32", flops=0, read_bytes=read_bytes, written_bytes=written_bytes
    )  # fmt: skip
    return float(price([kernel], device)[0])


def _held(plan: Plan, elements: float) -> int:
    """Parameters that a rank's device updates."""
    shards = plan.parallel.shard_ranks if plan.memory.zero_stage else 1
    return max(1, round(max(1, round(elements)) // shards * (1.0 - float(plan.memory.optimizer_offload))))


def _light_seconds(op: str, elements: int, read_bytes: int, written_bytes: int, device: DeviceProfile) -> float:
    """Seconds of a kernel that reads and writes so many bytes an element."""
    kernel = Kernel(
        kernel_class="pointwise", op=op, shape=(elements,), dtype="float32", flops=0, read_bytes=elements * read_bytes,
        written_bytes=elements * written_bytes,
    )  # fmt: skip
    return float(price([kernel], device)[0])


def _agree_seconds(plan: Plan, mesh: Mesh) -> float:
    """Seconds of the all-reduce of one number among the ranks that hold different gradients."""
    split = plan.parallel
    ranks = split.tp * split.pp * (split.shard_ranks if plan.memory.zero_stage else 1)
    if ranks == 1:
        return 0.0
    group = CommGroup(num_ranks=ranks, ranks_per_node=min(ranks, mesh.cluster.devices_per_node))
    return collective_seconds("all_reduce", _NORM_BYTES, group, mesh.cluster)
