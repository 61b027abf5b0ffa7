"""Bytes that live on a rank through the whole step: parameters, gradients, master copy and optimizer states, as ZeRO shards them."""

from __future__ import annotations

from dataclasses import dataclass

from hardware_models.units import DTYPE_BYTES
from simulator.plan import Plan
from simulator.program import MemoryClass

MASTER_BYTES = 4
"""The float32 copy of a parameter that the optimizer updates where the model computes in less."""
STATE_BYTES = {"adamw": 8, "sgd": 0, "adamw8bit": 2}
"""Optimizer states of one parameter: two float32 moments; eight-bit moments (their scales, 1/2048 of it, left out)."""
SHARDED_MASTERS = ("pytorch", "torchtitan")
"""Frameworks whose third stage is FSDP."""
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticMemory:
    """Bytes of one rank."""

    parameters: float
    gradients: float
    states: float
    """Master copy and moments."""

    def by_class(self, batch_bytes: int, framework_bytes: int = 0) -> tuple[int, ...]:
        """In the order of `MemoryClass`."""
        sizes = [0] * len(MemoryClass)
        sizes[MemoryClass.PARAMETERS] = round(self.parameters)
        sizes[MemoryClass.GRADIENTS] = round(self.gradients)
        sizes[MemoryClass.OPTIMIZER_STATES] = round(self.states)
        sizes[MemoryClass.BATCH] = batch_bytes
        sizes[MemoryClass.FRAMEWORK] = framework_bytes
        return tuple(sizes)


def static_memory(
    dense: float, expert: float, plan: Plan, *, dtype: str, copies: float = 1.0, working: float = 0.0
) -> StaticMemory:
    """Of a rank that holds ``dense`` + ``expert`` parameters.

    **Model**: K = 12 bytes of float32 master copy and moments for AdamW; stage 1 shards these over ``dp_shard`` ranks (dp * cp unless given), 2 the gradients too, 3 the
    parameters too; experts are replicated ``dp * cp / ep`` times only, and sharded over the ``dp_shard / ep`` of them that are in one group. States and gradients that are offloaded are not on the device.

    FSDP shards the float32 parameters themselves and gathers them in the compute's format: its shards are the master copy (unless states or parameters are offloaded, which
    is counted as ZeRO's).

    **Source**: Rajbhandari et al. 2020 (ZeRO), section 5 and figure 1; ``MixedPrecisionPolicy(param_dtype)`` of torch.distributed.fsdp ``fully_shard``.

    Args:
        dense: parameters that all dp * cp ranks hold.
        expert: parameters that dp * cp / ep ranks hold.
        plan: degrees, ZeRO stage, precision.
        dtype: of the parameters.
        copies: of parameters and gradients that the schedule keeps (weight versions, two directions).
        working: gathered parameters that are alive at once under stage 3.
    """
    ranks = plan.parallel.shard_ranks
    stage, width = plan.memory.zero_stage, DTYPE_BYTES[dtype]
    master = MASTER_BYTES if width < MASTER_BYTES else 0
    states = master + STATE_BYTES[plan.precision.optimizer]
    grads = GRADIENT_BYTES[plan.precision.grads]

    def held(bytes_each: float, shards_from: int) -> float:
        return sum(
            elements * bytes_each / (replicas if stage >= shards_from else 1)
            for elements, replicas in ((dense, ranks), (expert, max(1, ranks // plan.parallel.ep)))
        )

    offloaded = plan.memory.optimizer_offload or plan.memory.weight_offload
    fsdp = stage >= 3 and plan.runtime.framework in SHARDED_MASTERS  # noqa: PLR2004 - ZeRO's third stage
    if fsdp and not offloaded:
        return StaticMemory(
            parameters=copies * held(max(width, MASTER_BYTES), 3) + working * width, gradients=(1.0 - float(plan.memory.grad_offload)) * held(grads, 2),
            states=held(STATE_BYTES[plan.precision.optimizer], 1),
        )  # fmt: skip
    on_device = 1.0 - float(plan.memory.optimizer_offload)
    gathered = working * width if stage >= 3 else 0.0  # noqa: PLR2004 - ZeRO's third stage
    return StaticMemory(
        parameters=copies * held(width, 3) + gathered,
        gradients=(1.0 - float(plan.memory.grad_offload)) * held(grads, 2),
        states=on_device * held(states, 1),
    )
