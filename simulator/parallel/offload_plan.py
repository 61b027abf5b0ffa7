"""What a plan's fractions put on the host: bytes of each pipeline rank, by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from hardware_models.network.cluster import Cluster
from simulator.parallel.gradient_sync import PARAMETERS_SHARDED
from simulator.parallel.memory import GRADIENT_BYTES, MASTER_BYTES, STATE_BYTES
from simulator.parallel.offload import DriveShare, HostPath, HostUpdate, Offload, drive_share, host_path, weight_bytes
from simulator.parallel.stages import ChunkCost
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.plan_sections import OFFLOADS


def offload_of(
    plan: Plan, cluster: Cluster, order: Order, chunks: Sequence[tuple[ChunkCost, ...]], elements: Sequence[int], *, width: int
) -> Offload | None:  # fmt: skip
    """What the plan keeps on the host; None: nothing.

    **Model**: parameters that live on the host and are updated there stay there; those that only the host updates go up, those that only live there come down. Where
    each rank updates a shard of parameters that all hold (ZeRO 1 and 2), shards go up, are gathered between devices, and all that lives on the host comes down again.
    Where parameters are shards too (ZeRO 3), a rank keeps its own on the host and fetches it for each pass, which gathers it (Rajbhandari et al. 2021, ZeRO-Infinity).

    **Not modelled**: the device's buffer for parameters that it has updated and that leave; that a gather waits for its shard (both are fetched a pass ahead).

    Args:
        plan: with fractions of each class.
        cluster: its links.
        order: of the pipeline.
        chunks: of each stage, where activations or parameters travel beside passes.
        elements: parameters of each stage.
        width: bytes of a parameter on the device.

    Raises:
        InputError: the target is drives and nodes have none.
    """
    memory, stages, shards = plan.memory, order.stages_of_rank, _shards(plan)
    if not any(getattr(memory, name) for name in OFFLOADS):
        return None
    own = [[elements[stage] for stage in stages[rank]] for rank in range(order.num_ranks)]
    path = host_path(cluster, memory.offload_target)
    updates = [host_update(plan, one, width=width) for one in own]
    if memory.offload_target == "nvme" and memory.optimizer_offload:
        updates = [from_drives(one, drive_share(cluster), path) for one in updates]
    away = [weights_away(plan, order, chunks, rank, width=width) for rank in range(order.num_ranks)]
    stays = [
        0.0 if shards.updates > shards.parameters else float(memory.optimizer_offload) * sum(one) * width / shards.updates
        for one in own
    ]
    kept_up = [
        replace(one, up_bytes=max(0.0, one.up_bytes - min(gone, stay)))
        for one, gone, stay in zip(updates, away, stays, strict=True)
    ]
    return Offload(
        path=path, activations=float(memory.activation_offload), weights=float(memory.weight_offload) / shards.parameters,
        element_bytes=width, updates=tuple(kept_up) if memory.optimizer_offload else (),
        returned_bytes=tuple(max(0.0, gone - one) for gone, one in zip(away, stays, strict=True)),
        resident_bytes=tuple(one.resident_bytes + order.weight_versions * gone for one, gone in zip(updates, away, strict=True)),
        chunks_of_stage=tuple(chunks),
    )  # fmt: skip


class _Shards(NamedTuple):
    """Ranks that share one copy of the parameters, and of what updates them."""

    parameters: int
    updates: int


def _shards(plan: Plan) -> _Shards:
    ranks, stage = plan.parallel.shard_ranks, plan.memory.zero_stage
    return _Shards(parameters=ranks if stage == PARAMETERS_SHARDED else 1, updates=ranks if stage else 1)


def weights_away(plan: Plan, order: Order, chunks: Sequence[Sequence[ChunkCost]], rank: int, *, width: int) -> int:
    """Bytes of one version of a rank's parameters that live on the host; arguments as in `offload_of`."""
    part = float(plan.memory.weight_offload) / _shards(plan).parameters
    return sum(weight_bytes(chunk, part, width) for stage in order.stages_of_rank[rank] for chunk in chunks[stage])


def host_update(plan: Plan, elements: Sequence[float], *, width: int) -> HostUpdate:
    """The part of a rank's optimizer step that the plan puts on the host.

    **Model**: of its part of the (sharded) parameters, gradients go down in the format that they accumulate in; the host reads these, the float32 copy and the
    moments, writes the copy, the moments and, where the model computes in less, the parameters that go up. All of it stays on the host; a delayed update
    reads the gradients of one step while those of the next arrive, so it keeps them twice. Gradients that have no place on the device go after every
    micro-batch and are added up by the host.

    **Source**: Ren et al. 2021 (ZeRO-Offload, arXiv 2101.06840), sections 4 and 5: 2 bytes down and 2 up for each 16-bit parameter and gradient.

    **Not modelled**: that a table of both ends is reduced before it goes; what the host computes (its memory is the limit); other processes on it.

    Args:
        plan: its ZeRO stage, precision and fraction.
        elements: parameters of each of the rank's stages.
        width: bytes of a parameter on the device.
    """
    shards = plan.parallel.shard_ranks if plan.memory.zero_stage else 1
    grads, kept = GRADIENT_BYTES[plan.precision.grads], max(width, MASTER_BYTES) + STATE_BYTES[plan.precision.optimizer]
    own = [float(plan.memory.optimizer_offload) * one / shards for one in elements]
    buffers = grads * (2 if plan.memory.delayed_update else 1)
    leaving = float(plan.memory.grad_offload) * grads / shards
    return HostUpdate(
        each_bytes=tuple(one * leaving for one in elements) if leaving else (),
        down_bytes=tuple(one * grads for one in own), moved_bytes=sum(own) * (grads + 2 * kept + (width if width < MASTER_BYTES else 0)),
        up_bytes=sum(own) * width, state_bytes=sum(own) * kept, resident_bytes=sum(own) * (kept + buffers), delayed=plan.memory.delayed_update,
    )  # fmt: skip


def from_drives(update: HostUpdate, drives: DriveShare, path: HostPath) -> HostUpdate:
    """The host's step whose master copy and moments live on drives.

    **Model**: they are read, updated and written piece by piece, so that drives and memory work at the same time: the step takes the longer of both. Each byte that a
    drive reads or writes also passes through memory.

    **Source**: Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv 2104.07857), section 5.1.1 and 6.2 (infinity offload engine: overlap of reads, compute and writes).

    **Not modelled**: the first piece's read and the last one's write; drives that activations use at the same moment; the pinned buffers (a few pieces).

    Args:
        update: as if all were in memory.
        drives: the rank's share.
        path: the rank's share of memory.
    """
    states = update.state_bytes
    through_memory = update.moved_bytes + 2 * states
    waits = drives.seconds(states, states) * path.dram_bytes_per_s
    return replace(update, moved_bytes=max(through_memory, waits))
