"""What the optimizer's step takes on a pipeline rank."""

from __future__ import annotations

from hardware_models.kernel import Kernel
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from hardware_models.units import DTYPE_BYTES
from simulator.parallel.memory import GRADIENT_BYTES, MASTER_BYTES, STATE_BYTES
from simulator.parallel.recompute import MEGATRON
from simulator.plan import Plan


def optimizer_seconds(plan: Plan, device: DeviceProfile, *, elements: float, dtype: str) -> float:
    """Seconds of a rank's optimizer step.

    **Model**: one fused step over the rank's shard: gradient, master copy and moments read, master copy, moments and parameter written. Megatron also takes the
    gradients' norm, copies master to parameter in a pass of its own, zeroes the gradient buffers and, in fp16, takes the loss scale out.

    Args:
        plan: degrees, ZeRO stage, precision, framework, what the host updates.
        device: that prices the kernel.
        elements: parameters of the rank, before sharding.
        dtype: of the parameters.
    """
    width, grads = DTYPE_BYTES[dtype], GRADIENT_BYTES[plan.precision.grads]
    shards = plan.parallel.shard_ranks if plan.memory.zero_stage else 1
    whole = max(1, round(elements))
    own = max(1, round(whole // shards * (1.0 - float(plan.memory.optimizer_offload))))
    kept = max(width, MASTER_BYTES) + STATE_BYTES[plan.precision.optimizer]
    read_bytes, written_bytes = own * (grads + kept), own * (kept + (width if width < MASTER_BYTES else 0))
    if plan.runtime.framework in MEGATRON:
        scaled = grads if plan.precision.compute == "fp16" else 0
        read_bytes += own * (grads + MASTER_BYTES + scaled)
        written_bytes += own * scaled + whole * grads
    kernel = Kernel(
        kernel_class="optimizer", op="adamw", shape=(own,), dtype="float32", flops=0, read_bytes=read_bytes, written_bytes=written_bytes
    )  # fmt: skip
    return float(price([kernel], device)[0])
