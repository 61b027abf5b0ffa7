"""Steps of equal chunks whose offloaded bytes travel at round rates, for the tests beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from hashlib import sha256

import numpy as np

from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.lower_step import StepParts, lower_step
from simulator.parallel.offload import HostPath, HostUpdate, Offload
from simulator.parallel.simulation import ParallelSimulation
from simulator.parallel.stages import ChunkCost, PassCost, StageCost
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.program import Kind, MemoryClass, Program, Transfers, no_slowdown
from tests.simulator.parallel.step_cases import FAST_BYTES_PER_S, parts_of, simulated

CHUNKS = 4
CHUNK_F_S, CHUNK_B_S = 1.0, 2.0
CHUNK_BYTES, CHUNK_RISE = 250, 400
CHUNK_ELEMENTS = 100
STAGE_S = CHUNKS * (CHUNK_F_S + CHUNK_B_S)


def path_of(
    rate: float = FAST_BYTES_PER_S, *, both: float | None = None, dram: float = FAST_BYTES_PER_S, latency_s: float = 0.0
) -> HostPath:
    """A way to the host with one rate both ways."""
    return HostPath(
        to_device_bytes_per_s=rate,
        to_host_bytes_per_s=rate,
        both_bytes_per_s=both or 2 * rate,
        dram_bytes_per_s=dram,
        latency_s=latency_s,
    )


def chunk() -> ChunkCost:
    """One of a stage's equal chunks."""
    return ChunkCost(
        forward=PassCost(seconds=((Kind.FORWARD, CHUNK_F_S),), rise_bytes=CHUNK_RISE, net_bytes=CHUNK_BYTES),
        backward=PassCost(seconds=((Kind.BACKWARD, CHUNK_B_S),), rise_bytes=CHUNK_RISE, net_bytes=-CHUNK_BYTES),
        parameter_elements=CHUNK_ELEMENTS,
    )  # fmt: skip


def stage() -> StageCost:
    """What the chunks are together."""
    whole = CHUNKS * CHUNK_BYTES
    rise = whole - CHUNK_BYTES + CHUNK_RISE
    return StageCost(
        forward=PassCost(seconds=((Kind.FORWARD, CHUNKS * CHUNK_F_S),), rise_bytes=rise, net_bytes=whole),
        backward=PassCost(seconds=((Kind.BACKWARD, CHUNKS * CHUNK_B_S),), rise_bytes=CHUNK_RISE, net_bytes=-whole),
        weight_s=CHUNKS * CHUNK_B_S / 4, recomputed=(), recomputed_flops=0,
    )  # fmt: skip


def offloading(
    order: Order, path: HostPath, *, activations: float = 0.0, weights: float = 0.0, updates: Sequence[HostUpdate] = (), returned: Sequence[float] = (),
    sync: Sequence[GradientSync] | None = None, optimizer_s: float = 0.0,
) -> StepParts:  # fmt: skip
    """A step of stages of equal chunks."""
    chunks = (tuple(chunk() for _ in range(CHUNKS)),) * order.num_stages
    own = Offload(
        path=path, activations=activations, weights=weights, element_bytes=2, updates=tuple(updates), returned_bytes=tuple(returned), chunks_of_stage=chunks
    )  # fmt: skip
    return replace(parts_of(order, sync=sync, optimizer_s=optimizer_s), costs=[stage()] * order.num_stages, offload=own)


def program_of(parts: StepParts) -> Program:
    """The step's program on ranks that hold 1 kB of parameters."""
    resident = [0] * len(MemoryClass)
    resident[MemoryClass.PARAMETERS] = 1000
    return lower_step(parts, [tuple(resident)] * parts.order.num_ranks, no_slowdown())


def digest(program: Program) -> str:
    """A text that changes when anything of a program does."""
    text = sha256()
    for one in fields(program):
        value = getattr(program, one.name)
        arrays = [getattr(value, own.name) for own in fields(value)] if isinstance(value, Transfers) else [value]
        for array in arrays:
            text.update(array.tobytes() if isinstance(array, np.ndarray) else repr(array).encode())
    return text.hexdigest()[:16]


def with_memory(plan: Plan, **memory: object) -> Plan:
    """The plan with other memory techniques."""
    return replace(plan, memory=replace(plan.memory, **memory))  # type: ignore[arg-type]


def run(plan: Plan, engine: str = "compiled", **memory: object) -> ParallelSimulation:
    """A plan of the small model with other memory techniques."""
    return simulated(with_memory(plan, **memory), engine=engine)
