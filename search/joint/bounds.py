"""Bounds of points before any simulation: no plan of a point takes less time than these say, whatever it recomputes or offloads and however its layers are cut.

**Model.** Rank r cannot begin before the first micro-batch has passed all stages before its first one; it is busy for all of its passes; after its last full backward pass the
gradient still travels back through all stages before the nearest of its own, and the rank's optimizer steps. Where weight gradients are passes of their own, a rank may end
with these, so either they or the way back counts.

    T >= max_r( start_r + m (F_r + B_r + R_r) + max(back_r, tail_r) )                           full backward passes
    T >= max_r( start_r + max(m (F_r + B_r + R_r) + tail_r, m (F_r + B_r - W_r) + back_r) )     split ones

The least over all cuts: for one chunk a rank, each stage in turn takes as many pieces as a time allows (more pieces behind a stage never make the next one's share smaller), and
that time is halved. For several chunks, and for stages on two ranks, the mean over ranks counts (R_r and tail_r of the mean rank: both are convex in what a rank holds, as long as all
ranks save memory in one way), one micro-batch's way through all stages, and that the rank with the head has at least one whole layer a stage.

**Memory.** A rank holds its parameters, gradients and optimizer states (as ZeRO shards them) and what at least k_r micro-batches keep: with n_r bytes beyond the device's room, each must keep
n_r / k_r less. R_r is the least time of making that again (`LayerTable`). Or activations and parameters leave as fast as the host link carries them in time T, or the optimizer's states do, and
with them its time on the device, tail_r. Where nothing of that fits, T is too small.

**Sharded parameters** (ZeRO 3). A rank gathers its parameters twice and scatters gradients once a micro-batch, D_r in all. Collectives beside compute C_r make it g times slower and are themselves h
times slower: T >= C_r + E_r + (D_r - E_r) min(1, h (1 - 1/g)) and T >= D_r + C_r min(1, g (1 - 1/h)), E_r what else a rank waits for.

**Not counted**: gradients between replicas once a step, waiting for messages, other slow-down under overlap, the host. All of these only add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from hardware_models.units import DTYPE_BYTES
from search.joint.bounds_kernels import (
    ALL,
    BOTH_WAYS,
    CLOSE,
    LOOPED,
    ONE,
    ONE_CHUNK,
    TWICE,
    VEE,
    WARM_UP,
    Case,
    Floats,
    Limits,
    Tables,
    least_times,
)
from search.joint.layer_tables import LayerTable
from search.joint.memory_variants import memory_variants
from search.trainers import Trainer
from simulator.parallel.interference import overlap_of
from simulator.parallel.memory import static_memory
from simulator.parallel.offload import host_path
from simulator.parallel.offload_plan import host_update
from simulator.plan import Plan
from simulator.precision import STORED_AS

SPLIT = frozenset({"zb-h1", "zb-h2", "zb-1p", "zb-2p", "zb-v", "v-half", "v-min", "dualpipe", "dualpipe-v"})
"""Schedules with weight gradients as passes of their own."""
TWO_WAYS = frozenset({"chimera", "dualpipe"})
"""Schedules that keep each stage on two ranks, each for half of the micro-batches."""
VEES = frozenset({"zb-v", "v-half", "v-min", "dualpipe-v"})
"""Schedules whose second chunk comes back the way of the first."""
IN_FLIGHT = {"gpipe": ALL, "1f1b": WARM_UP, "zb-h1": WARM_UP, "zb-h2": TWICE}
"""Micro-batches that ranks of one chunk hold at least; others: one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineShape:
    """What of a pipeline a time bound depends on."""

    schedule: str
    num_ranks: int
    chunks: int
    """Of a rank."""
    num_microbatches: int

    @property
    def kind(self) -> tuple[int, bool, int]:
        """Shape, whether backward passes are split, and micro-batches in flight: as `bounds_kernels.Case` numbers them; schedules that agree in it have one bound."""
        if self.schedule in TWO_WAYS:
            shape = BOTH_WAYS
        elif self.chunks == 1:
            shape = ONE_CHUNK
        else:
            shape = VEE if self.schedule in VEES else LOOPED
        return shape, self.schedule in SPLIT, IN_FLIGHT.get(self.schedule, ONE) if shape == ONE_CHUNK else ONE


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBytes:
    """Bytes that a rank holds of each of its parameters, at least, over a point's ways to save memory."""

    parameters: float = 0.0
    gradients: float = 0.0
    states: float = 0.0
    away_gradients: float = 0.0
    """Gradients where the optimizer's states are on the host."""
    away_s: float = 0.0
    """Least seconds of the host's step for each parameter, where it has the states."""


def held_bytes(trainer: Trainer, plan: Plan, cluster: Cluster) -> HeldBytes:
    """Of the points with a plan's ZeRO stage, degrees and precision."""
    dtype = STORED_AS[plan.precision.compute]
    variants = [replace(plan, memory=memory) for memory in memory_variants(trainer, plan)]
    costs = [(one, static_memory(1.0, 0.0, one, dtype=dtype)) for one in variants]
    on_device = [cost for one, cost in costs if not one.memory.optimizer_offload]
    away = [cost for one, cost in costs if one.memory.optimizer_offload]
    return HeldBytes(
        parameters=min(cost.parameters for _, cost in costs), gradients=min(cost.gradients for cost in on_device),
        states=min(cost.states for cost in on_device), away_s=_host_s(variants, cluster, width=DTYPE_BYTES[dtype]), away_gradients=min((cost.gradients for cost in away), default=0.0),
    )  # fmt: skip


def _host_s(variants: Sequence[Plan], cluster: Cluster, *, width: int) -> float:
    rate = host_path(cluster).dram_bytes_per_s
    return min(
        (host_update(one, [1.0], width=width).moved_bytes / rate for one in variants if one.memory.optimizer_offload),
        default=0.0,
    )


def limits_of(trainer: Trainer, cluster: Cluster, device: DeviceProfile, *, budget_bytes: int | None) -> Limits:
    """What a device of the cluster has room and time for, and what a trainer allows."""
    room = device.memory_bytes - device.context_bytes
    path, factors = host_path(cluster), overlap_of(device, cluster)
    slow, slower = factors.compute_under_collectives, factors.collectives_under_compute
    return Limits(
        room_bytes=float(min(budget_bytes or room, room)),
        activation_bytes_per_s=min(path.to_device_bytes_per_s, path.to_host_bytes_per_s, path.both_bytes_per_s / 2, path.dram_bytes_per_s / 2),
        parameter_bytes_per_s=min(path.to_device_bytes_per_s, path.both_bytes_per_s, path.dram_bytes_per_s), states_leave="optimizer_offload" in trainer.offloads,
        activations_leave="activation_offload" in trainer.offloads, parameters_leave="weight_offload" in trainer.offloads,
        recomputes=set(trainer.recomputes) != {"none"}, update_s=2.0 / device.memory_bandwidth_bytes_per_s,
        slow_compute=min(1.0, slower * (1.0 - 1.0 / slow)), slow_collectives=min(1.0, slow * (1.0 - 1.0 / slower)),
    )  # fmt: skip


NO_LIMITS = Limits(
    room_bytes=np.inf, activation_bytes_per_s=0.0, parameter_bytes_per_s=0.0, states_leave=False, activations_leave=False, parameters_leave=False, recomputes=False,
    update_s=0.0, slow_compute=0.0, slow_collectives=0.0,
)  # fmt: skip
"""Of a device with all the memory that is wanted."""


def stacked(tables: Sequence[LayerTable], sharded_s: Sequence[Floats]) -> Tables:
    """Tables of one model as arrays.

    Args:
        tables: to stack.
        sharded_s: rows of `Tables.sharded_s`.
    """
    none = np.zeros((1, len(tables[0].forward_s)))

    def rows(name: str) -> Floats:
        return np.stack([getattr(one, name) for one in tables])

    return Tables(
        forward_s=rows("forward_s"), backward_s=rows("backward_s"), weight_s=rows("weight_s"), compute_s=rows("compute_s"), elements=rows("elements"),
        moved_elements=rows("moved_elements"),        kept_bytes=rows("kept_bytes"), cheap_bytes=rows("cheap_bytes"), cheap_s=np.array([one.cheap_s for one in tables]),
        dear_s=np.array([one.dear_s for one in tables]), sharded_s=np.stack(list(sharded_s)) if len(sharded_s) else none,
    )  # fmt: skip


def time_bound(
    table: LayerTable, shape: PipelineShape, *, message_s: float = 0.0, held: HeldBytes | None = None, limits: Limits = NO_LIMITS, most_s: float | None = None,
    sharded_s: Floats | None = None,
) -> float:  # fmt: skip
    """Seconds that no step is below, however the layers are cut into stages (module docstring).

    Args:
        table: of the layers.
        shape: of the pipeline.
        message_s: from one rank to the next.
        held: of each parameter; None: nothing.
        limits: of the device.
        most_s: above which no bound is looked for; None: twice the time of all passes one after the other.
        sharded_s: collectives of a micro-batch under ZeRO 3, sums over the pieces before each one; None: others.
    """
    kind, split, flight = shape.kind
    own = held or HeldBytes()
    whole_s = float(table.forward_s[-1] + table.backward_s[-1])
    high = (
        most_s
        if most_s is not None
        else 2.0 * (shape.num_microbatches + 1) * whole_s
        + 4.0 * shape.num_ranks * message_s
        + limits.update_s * own.states * table.elements[-1]
    )
    count = float(shape.num_microbatches)

    def number(value: int) -> NDArray[np.int64]:
        return np.array([value], dtype=np.int64)

    def size(value: float) -> Floats:
        return np.array([value], dtype=np.float64)

    case = Case(
        table=number(0), entry=number(-1 if sharded_s is None else 0), ranks=number(shape.num_ranks), chunks=number(shape.chunks), share=size(count),
        shape=number(kind), split=np.array([split]), flight=number(flight), message_s=size(message_s), parameter_bytes=size(own.parameters),
        gradient_bytes=size(own.gradients), state_bytes=size(own.states), away_gradient_bytes=size(own.away_gradients), away_s=size(own.away_s),
    )  # fmt: skip
    tables = stacked([table], [] if sharded_s is None else [sharded_s])
    return float(least_times(tables, case, limits, high, CLOSE)[0])
