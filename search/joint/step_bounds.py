"""Refined bounds: a plan's own cut, played in its own order under the memory of its ranks; dearer than `search.joint.bounds` and far cheaper than a simulation.

**Model.** Stages are those of the simulator's cut, passes take their compute and collectives, messages their latency and bytes over an idle link; gradients and updated parameters go over replicas bucket by bucket
(`played_step_kernels`). Each rank holds what its order says at each moment (those at which it holds most): bytes beyond its room must be made again, which takes the least time that the layers allow
(`LayerTable`), or travel to the host and back within the step. For several stages a rank, what is made again counts on the rank as a whole.

**Not counted**: slow-down of compute beside messages and copies, links that are shared, what ZeRO 3 hides of its first gathers, the host's launches, what a running pass adds to what it keeps. All of these only add.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardware_models.units import DTYPE_BYTES
from search.joint.bounds import limits_of
from search.joint.layer_tables import LayerTable, LayerTables, Split
from search.joint.played_step_kernels import Passes, Slowdown, StageSeconds, play_step
from search.joint.sharded_parameters import ShardedSeconds
from simulator.model_source import ModelSource
from simulator.parallel.default_cut import partition_of
from simulator.parallel.gradient_sync import MOST_CHUNKS, PARAMETERS_SHARDED, GradientSync, StageLoad, gradient_sync
from simulator.parallel.interference import overlap_of
from simulator.parallel.memory import static_memory
from simulator.parallel.messages import waits_for_messages
from simulator.parallel.offload import host_path
from simulator.parallel.offload_plan import host_update
from simulator.parallel.order_blocks import order_blocks
from simulator.parallel.orders import order_of
from simulator.parallel.rank_times import TIMED_SCHEDULES
from simulator.parallel.simulate_parallel import WEIGHT_SHARE
from simulator.parallel.simulate_source import parallel_case
from simulator.parallel.wire_format import WireFormat
from simulator.pipeline.action import Order
from simulator.plan import Memory, Plan
from simulator.precision import STORED_AS

Floats = NDArray[np.float64]
NOT_POSSIBLE = float("inf")
"""Seconds of a plan that does not fit."""


class Bound(NamedTuple):
    """Of a plan."""

    seconds: float
    """That it is not below; infinite where it does not fit."""
    needed_bytes: int
    """That it needs at least on its fullest rank, where it does not fit; else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stages:
    """A plan's stages; each of shape (stages,)."""

    cut: tuple[int, ...]
    forward_s: Floats
    backward_s: Floats
    weight_s: Floats
    compute_s: Floats
    """Of both passes, without collectives."""
    back_compute_s: Floats
    """Of the full backward pass, without collectives."""
    edges: NDArray[np.int64]
    """First piece of each, and the number of pieces; shape (stages + 1,)."""
    elements: Floats
    dense: Floats
    kept_bytes: Floats
    cheap_bytes: Floats
    moved: Floats
    """Parameters that may live on the host."""
    largest: Floats
    """Parameters of the largest piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What the ranks of an order hold, in micro-batches of each stage."""

    moments: Floats
    """When ranks hold most; shape (moments, stages)."""
    rank: NDArray[np.int64]
    """Of each moment."""
    owns: Floats
    """1 where a rank holds a stage; shape (ranks, stages)."""
    passes: Floats
    """Micro-batches that a rank runs through a stage; same shape."""


class StepBounds:
    """Bounds of plans of a space.

    Args:
        tables: of the layers.
        source: of the model.
    """

    def __init__(self, tables: LayerTables, source: ModelSource) -> None:
        self.tables, self.source, self.request, self.device = tables, source, tables.request, tables.device
        self.limits = limits_of(self.request.trainer, self.request.cluster, self.device, budget_bytes=self.request.budget_bytes)
        path = host_path(self.request.cluster)
        factors = overlap_of(self.device, self.request.cluster)
        self._slowdown = Slowdown(compute=factors.compute_under_collectives, traffic=factors.collectives_under_compute)
        self._host_bytes_per_s = path.dram_bytes_per_s
        self._down, self._up = path.to_host_bytes_per_s, path.to_device_bytes_per_s
        self._alive: dict[int, object] = {}
        """Orders and models whose identity stands for them below."""
        self._cuts: dict[Hashable, _Stages] = {}
        self._syncs: dict[Hashable, _Sync] = {}
        self._stage_syncs: dict[Hashable, GradientSync] = {}
        self.sharded = ShardedSeconds(tables)
        self._plays: dict[Hashable, tuple[Floats, Floats]] = {}

    def order(self, plan: Plan) -> Order:
        """The order of a plan's pipeline.

        Raises:
            InputError: the simulator refuses the plan.
        """
        if plan.pipeline.schedule not in TIMED_SCHEDULES:
            return order_of(plan)
        return parallel_case(self.source, plan, self.request.cluster, device=self.device).order

    def bounds(self, plan: Plan, order: Order, memories: Sequence[Memory], best_s: float) -> list[Bound]:
        """Bounds of a point's plans.

        Args:
            plan: of the request, without recompute or offload.
            order: of its pipeline.
            memories: of the plans.
            best_s: of a plan that is known: a bound that reaches it is not looked at further.
        """
        self._alive[id(order)] = order
        split = self.tables.split(plan)
        plans = [replace(plan, memory=memory) for memory in memories]
        least: dict[Hashable, float] = {}
        for one in plans:  # of those alike in what decides cut and traffic, once
            key = (
                one.memory.optimizer_offload,
                one.memory.grad_offload,
                bool(one.memory.weight_offload),
                one.memory.recompute == "full",
            )
            if key not in least:
                least[key] = self._played(one, order, split, self._stages(one, order, split.table), np.zeros(order.num_ranks))
        if min(least.values(), default=best_s) >= best_s:
            return [Bound(min(least.values()), 0)] * len(plans)
        return [self._bound(one, order, split, best_s) for one in plans]

    def cut(self, plan: Plan, order: Order) -> tuple[int, ...]:
        """Layers of each stage of a plan."""
        return self._stages(plan, order, self.tables.table(_plain(plan))).cut

    def _bound(self, plan: Plan, order: Order, split: Split, best_s: float) -> Bound:
        stages = self._stages(plan, order, split.table)
        found = self._played(plan, order, split, stages, np.zeros(order.num_ranks))
        if found >= best_s:
            return Bound(found, 0)
        again, needed = self._again(plan, order, split.table, stages)
        if needed:
            return Bound(NOT_POSSIBLE, needed)
        if again.any():
            found = max(found, self._played(plan, order, split, stages, again))
        if plan.memory.activation_offload or plan.memory.weight_offload:
            found = max(found, self._copied(plan, order, stages))
        return Bound(found, 0)

    def _stages(self, plan: Plan, order: Order, table: LayerTable) -> _Stages:
        cut_as = plan if plan.memory.recompute != "optimal" else _plain(plan)
        model, dtype = self.tables.model(cut_as), STORED_AS[plan.precision.compute]
        each = static_memory(1.0, 0.0, plan, dtype=dtype)
        key = (id(table), id(model), id(order), each)
        if key not in self._cuts:
            cut = partition_of(model.workload, cut_as, model.prices, order, self.device, dtype=dtype)
            self._cuts[key] = _stages_of(table, cut)
            self._alive[id(model)] = model
        return self._cuts[key]

    def _again(self, plan: Plan, order: Order, table: LayerTable, stages: _Stages) -> tuple[Floats, int]:
        """Least seconds a micro-batch that each rank makes again; or what the fullest rank needs, where that is more than it can have."""
        held, stays = _held(order), 1.0 - float(plan.memory.activation_offload)
        static = self._static_bytes(plan, order, stages, held)
        room, kept = self.limits.room_bytes - static, held.moments @ (stays * stages.kept_bytes)
        needs = kept - room[held.rank]
        found = np.zeros(order.num_ranks)
        if (needs <= 0.0).all():
            return found, 0
        if plan.memory.recompute == "none" or (room < 0.0).any():
            return found, int((static[held.rank] + (kept if plan.memory.recompute == "none" else 0.0)).max())
        saved = np.maximum(0.0, needs) / held.moments.max(axis=1)
        cheap = (held.owns @ stages.cheap_bytes)[held.rank]
        again = np.minimum(saved, cheap) * table.cheap_s + np.maximum(0.0, saved - cheap) * table.dear_s
        np.maximum.at(found, held.rank, again)
        return found, 0

    def _static_bytes(self, plan: Plan, order: Order, stages: _Stages, held: _Held) -> Floats:
        """Of each rank; linear in its parameters."""
        dtype, copies = STORED_AS[plan.precision.compute], float(order.weight_versions)
        dense, routed = (static_memory(*sizes, plan, dtype=dtype, copies=copies) for sizes in ((1.0, 0.0), (0.0, 1.0)))
        stays = 1.0 - float(plan.memory.weight_offload)
        each, expert = (one.parameters * stays + one.gradients + one.states for one in (dense, routed))
        found: Floats = held.owns @ (each * stages.dense + expert * (stages.elements - stages.dense))
        if plan.memory.zero_stage >= PARAMETERS_SHARDED:
            found += DTYPE_BYTES[dtype] * (held.owns * stages.largest).max(axis=1)
        return found

    def _copied(self, plan: Plan, order: Order, stages: _Stages) -> float:
        """Least seconds of a rank's copies from and to its host."""
        memory, width, held = plan.memory, DTYPE_BYTES[STORED_AS[plan.precision.compute]], _held(order)
        shards = plan.parallel.shard_ranks if memory.zero_stage >= PARAMETERS_SHARDED else 1
        kept = float(memory.activation_offload) * (held.passes @ stages.kept_bytes)
        fetched = float(memory.weight_offload) * 2.0 * width / shards * (held.passes @ stages.moved)
        return float(_ALMOST * max((kept / self._down).max(), ((kept + fetched) / self._up).max()))

    def _played(self, plan: Plan, order: Order, split: Split, stages: _Stages, again: Floats) -> float:
        alone, held = order.num_stages == order.num_ranks and order.weight_copies == 1.0, _held(order)
        share = 1.0 / order.microbatch_parts
        message_s = split.message_s(share)
        sync = self._sync(plan, order, split, stages)
        key = (id(order), id(stages), id(sync), message_s, again.tobytes() if alone else b"")
        if key not in self._plays:
            extra = again[[ranks[0] for ranks in order.ranks_of_stage]] if alone else 0.0
            early = sync.reduce_s * sync.reduce_early
            seconds = StageSeconds(
                forward=share * stages.forward_s, forward_compute=share * (stages.compute_s - stages.back_compute_s),
                backward=share * (stages.backward_s + extra), backward_compute=share * (stages.back_compute_s + extra), weight=share * stages.weight_s,
                chunks=sync.chunks, gather=sync.gather_s * sync.gather_early, first=sync.first_s, first_back=sync.first_back_s, reduce=early,
            )  # fmt: skip
            sharded = plan.memory.zero_stage >= PARAMETERS_SHARDED
            self._plays[key] = play_step(_passes(order), seconds, message_s, waits_for_messages(plan), sharded, self._slowdown)
        begin, end = self._plays[key]
        busy = held.passes @ (stages.forward_s + stages.backward_s)
        if not alone:
            busy = busy + held.passes.max(axis=1) * again
        late = held.owns @ (sync.reduce_s * ~sync.reduce_early + sync.gather_s * ~sync.gather_early)
        updated = self._update_s(plan) * (held.owns @ stages.dense)
        return float((np.maximum(end, begin + busy) + late + updated).max())

    def _update_s(self, plan: Plan) -> float:
        """Least seconds of the optimizer's step for each parameter of a rank, wherever it runs."""
        dtype = STORED_AS[plan.precision.compute]
        states = static_memory(1.0, 0.0, plan, dtype=dtype).states
        host = host_update(plan, [1.0], width=DTYPE_BYTES[dtype]).moved_bytes / self._host_bytes_per_s
        return self.limits.update_s * states + host

    def _sync(self, plan: Plan, order: Order, split: Split, stages: _Stages) -> _Sync:
        """What data parallelism does for each stage."""
        group, stage = split.replicas, plan.memory.zero_stage
        key = (id(stages), id(order), group, stage, bool(plan.memory.optimizer_offload))
        if key not in self._syncs:
            if stage >= PARAMETERS_SHARDED:
                found = self._gathered(plan, split, stages, once=order.weight_copies == 1.0)
            else:
                asked = [
                    (int(own), ranks[-1] - ranks[0]) for own, ranks in zip(stages.dense, order.ranks_of_stage, strict=True)
                ]
                known = {one: self._stage_sync(plan, split, *one) for one in dict.fromkeys(asked)}
                found = _sync_of([known[one] for one in asked])
            self._syncs[key] = found
        return self._syncs[key]

    def _gathered(self, plan: Plan, split: Split, stages: _Stages, *, once: bool) -> _Sync:
        """Under ZeRO 3: a pass waits for its first unit at least; nothing is counted where each stage is on two ranks, whose groups lie otherwise."""
        sums, edges = self.sharded.sums(_plain(plan), split), stages.edges
        each, whole = np.diff(sums.gather_s), plan.runtime.framework != "deepspeed"  # whose units are less than a piece
        count, yes = len(stages.dense), np.ones(len(stages.dense), np.bool_)
        return _Sync(
            chunks=np.full(count, MOST_CHUNKS, np.int64), gather_s=once * np.diff(sums.gather_s[edges]), reduce_s=once * np.diff(sums.reduce_s[edges]),
            gather_early=yes, reduce_early=yes, first_s=once * whole * each[edges[:-1]], first_back_s=once * whole * each[edges[1:] - 1],
        )  # fmt: skip

    def _stage_sync(self, plan: Plan, split: Split, elements: int, distance: int) -> GradientSync:
        key = (
            split.replicas,
            plan.memory.zero_stage,
            bool(plan.memory.optimizer_offload),
            elements,
            distance,
            plan.precision.compute,
        )
        if key not in self._stage_syncs:
            plain, dtype = _plain(plan), STORED_AS[plan.precision.compute]
            wire = WireFormat(comm=plan.precision.comm, price=self.tables.model(plain).price)
            self._stage_syncs[key] = gradient_sync(
                plan,
                self.tables.communication(plain, split.mesh),
                StageLoad(elements=elements),
                wire,
                distance=distance,
                dtype=dtype,
            )
        return self._stage_syncs[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sync:
    """Data parallelism of all stages; each of shape (stages,)."""

    chunks: NDArray[np.int64]
    gather_s: Floats
    reduce_s: Floats
    gather_early: NDArray[np.bool_]
    """Parameters are gathered beside the first passes."""
    reduce_early: NDArray[np.bool_]
    """Gradients go beside the last ones."""
    first_s: Floats
    """Of the gathers, what a forward pass waits for."""
    first_back_s: Floats


def _sync_of(syncs: Sequence[GradientSync]) -> _Sync:
    chunks = np.array([one.chunks for one in syncs], np.int64)
    gather_s = np.array([one.gather_s for one in syncs])
    return _Sync(
        chunks=chunks, gather_s=gather_s, reduce_s=np.array([one.reduce_s for one in syncs]), gather_early=np.array([one.gather_overlaps for one in syncs]),
        reduce_early=np.array([one.reduce_overlaps for one in syncs]), first_s=gather_s / chunks, first_back_s=np.zeros(len(syncs)),
    )  # fmt: skip


_ALMOST = 1.0 - 1e-6
"""Copies of rounded bytes may be a little less than what is asked for."""


def _plain(plan: Plan) -> Plan:
    """The plan without recompute."""
    return replace(plan, memory=replace(plan.memory, recompute="none"))


def _stages_of(table: LayerTable, cut: tuple[int, ...]) -> _Stages:
    """Sums over the pieces of each stage: the embedding is on the first one, the head on the last."""
    edges = np.concatenate([[0], 1 + np.cumsum(cut)])
    edges[-1] += 1
    pieces = np.diff(table.dense_elements)

    def sums(values: Floats) -> Floats:
        return np.diff(values[edges])

    return _Stages(
        cut=cut, forward_s=sums(table.forward_s), backward_s=sums(table.backward_s), weight_s=sums(table.weight_s), compute_s=sums(table.compute_s), back_compute_s=sums(table.back_compute_s), edges=edges,
        elements=sums(table.elements), dense=sums(table.dense_elements), kept_bytes=sums(table.kept_bytes), cheap_bytes=sums(table.cheap_bytes), moved=sums(table.moved_elements),
        largest=np.array([pieces[first:end].max(initial=0.0) for first, end in pairwise(edges.tolist())]),
    )  # fmt: skip


def _held(order: Order) -> _Held:
    """Made once an order."""
    return order.once("held", partial(_made_held, order))


def _made_held(order: Order) -> _Held:
    passes = _passes(order)
    part, moments, ranks = 1.0 / order.microbatch_parts, [], []
    owns, ran = np.zeros((2, order.num_ranks, order.num_stages))
    change = part * np.array([1.0, WEIGHT_SHARE - 1.0, -WEIGHT_SHARE, -1.0])[passes.kind]
    for rank in range(order.num_ranks):
        own = slice(int(passes.first[rank]), int(passes.first[rank + 1]))
        stage, kind, alive = passes.stage[own], passes.kind[own], np.cumsum(change[own])
        owns[rank, stage] = 1.0
        ran[rank] = part * np.bincount(stage[kind == 0], minlength=order.num_stages)
        highest = np.flatnonzero((kind == 0) & (alive >= alive[kind == 0].max() - 1e-9))
        for place in dict.fromkeys((int(highest[0]), int(highest[-1]))):
            moments.append(np.bincount(stage[: place + 1], weights=change[own][: place + 1], minlength=order.num_stages))
            ranks.append(rank)
    return _Held(moments=np.array(moments), rank=np.array(ranks, np.int64), owns=owns, passes=ran)


def _passes(order: Order) -> Passes:
    return order.once("passes to play", partial(_made_passes, order))


def _made_passes(order: Order) -> Passes:
    blocks = order_blocks(order)
    own = blocks.stage >= 0
    rank_of = np.full((order.num_stages, order.num_microbatches), -1, np.int64)
    forward = own & (blocks.kind == 0)
    rank_of[blocks.stage[forward], blocks.micro_batch[forward]] = blocks.rank[forward]
    ranks = np.arange(order.num_ranks + 1)
    return Passes(
        first=blocks.first_block - 2 * ranks, stage=blocks.stage[own], kind=blocks.kind[own], micro_batch=blocks.micro_batch[own],
        sends=(blocks.receiver >= 0)[own] & (blocks.receiver != blocks.rank)[own], opens=blocks.first[own], closes=blocks.last[own], rank_of=rank_of,
    )  # fmt: skip
