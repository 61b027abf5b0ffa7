"""Refined bounds: a plan's own cut, played in its own order under the memory of its ranks; dearer than `search.joint.bounds` and far cheaper than a simulation.

**Model.** Stages are those of the simulator's cut, passes take their compute and collectives, messages their latency and bytes over an idle link; gradients and updated parameters go over replicas bucket by bucket
(`played_step_kernels`). Each rank holds what its order says at each moment (those at which it holds most): bytes beyond its room must be made again, which takes the least time that the layers allow
(`LayerTable`), or travel to the host and back within the step. For several stages a rank, what is made again counts on the rank as a whole.

Passes beside which activations or parameters travel to the host and back run chunk by chunk (`staged_passes`), each with the copies that it waits for.

**Traffic of data parallelism**: whatever a rank makes again, and whenever: a second of traffic takes c = t (1 - 1 / k) seconds from compute that it goes beside (both take t and k times as long), c <= 1, or none where the rank computes
nothing: beside the E seconds of collectives that passes wait for, or while it waits, which is dearer. Nothing is made again before a rank's first backward pass, at b in the play; with U seconds of passes from then on, A made again (C of it
collectives) and D seconds of traffic that is left or comes, it is over after b + U + A + c max(0, D - E - C) at the earliest.

**Not counted**: slow-down of compute beside messages and copies, links that are shared, what ZeRO 3 hides of its first gathers, the host's launches, what a running pass adds to what it keeps. All of these only add.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hardware_models.units import DTYPE_BYTES
from search.joint.bounds import limits_of
from search.joint.layer_tables import LayerTable, LayerTables, Split
from search.joint.memory_variants import memory_variants
from search.joint.played_stages import (
    Floats,
    Held,
    Stages,
    Sync,
    held_of,
    no_sync,
    passes_of,
    stage_seconds,
    stages_of_cut,
    sync_of,
)
from search.joint.played_step_kernels import Played, Slowdown, play_step
from search.joint.sharded_parameters import ShardedSeconds
from search.joint.staged_passes import StagedTables, not_staged
from simulator.model_source import ModelSource
from simulator.parallel.default_cut import partition_of
from simulator.parallel.gradient_sync import MOST_CHUNKS, PARAMETERS_SHARDED, GradientSync, StageLoad, gradient_sync
from simulator.parallel.interference import overlap_of
from simulator.parallel.memory import static_memory
from simulator.parallel.messages import waits_for_messages
from simulator.parallel.offload import host_path
from simulator.parallel.offload_plan import host_update
from simulator.parallel.orders import order_of
from simulator.parallel.rank_times import TIMED_SCHEDULES
from simulator.parallel.simulate_source import parallel_case
from simulator.parallel.wire_format import WireFormat
from simulator.pipeline.action import Order
from simulator.plan import Memory, Plan
from simulator.precision import STORED_AS

NOT_POSSIBLE = float("inf")
"""Seconds of a plan that does not fit."""


class Bound(NamedTuple):
    """Of a plan."""

    seconds: float
    """That it is not below; infinite where it does not fit."""
    needed_bytes: int
    """That it needs at least on its fullest rank, where it does not fit; else 0."""


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
        self._path, self._staged = path, StagedTables(tables, path)
        self._alive: dict[int, object] = {}
        """Orders and models whose identity stands for them below."""
        self._cuts: dict[Hashable, Stages] = {}
        self._known_stages: dict[tuple[int, tuple[int, ...]], Stages] = {}
        self._syncs: dict[Hashable, Sync] = {}
        self._stage_syncs: dict[Hashable, GradientSync] = {}
        self.sharded = ShardedSeconds(tables)
        self._plays: dict[Hashable, Played] = {}
        self._alone: dict[Hashable, float] = {}
        self._ways: dict[Hashable, list[tuple[Hashable, Memory]]] = {}
        self._timed: dict[Plan, Order] = {}

    def order(self, plan: Plan) -> Order:
        """The order of a plan's pipeline; one that is made for the times of passes depends on the cut, and so on what memory is saved.

        Raises:
            InputError: the simulator refuses the plan.
        """
        if plan.pipeline.schedule not in TIMED_SCHEDULES:
            return order_of(plan)
        alike = replace(plan, memory=replace(plan.memory, activation_offload=0.0, recompute=_decided(plan.memory)))
        if alike not in self._timed:
            self._timed[alike] = parallel_case(self.source, alike, self.request.cluster, device=self.device).order
        return self._timed[alike]

    def bounds(self, plan: Plan, orders: Mapping[Memory, Order], best_s: float) -> list[Bound]:
        """Bounds of a point's plans.

        Args:
            plan: of the request, without recompute or offload.
            orders: of the pipelines of plans, by how these save memory (`order`).
            best_s: of a plan that is known: a bound that reaches it is not looked at further.

        Returns:
            One for each of ``orders``.
        """
        split, least = self.tables.split(plan), dict[Hashable, float]()
        plans = [replace(plan, memory=memory) for memory in orders]
        for one, order in zip(plans, orders.values(), strict=True):  # of those alike in what decides cut and traffic, once
            self._alive[id(order)] = order
            memory = one.memory
            key = (
                id(order),
                memory.optimizer_offload,
                memory.grad_offload,
                bool(memory.weight_offload),
                memory.recompute == "full",
                _is_staged(memory),
            )
            if key not in least:
                stages = self._stages(one, order, split.table)
                least[key] = (
                    float(self._passes(one, order, split, stages).end.max())
                    if _is_staged(memory)
                    else self._played(one, order, split, stages, np.zeros(order.num_ranks))
                )
        if min(least.values(), default=best_s) >= best_s:
            return [Bound(min(least.values()), 0)] * len(plans)
        return [self._bound(one, order, split, best_s) for one, order in zip(plans, orders.values(), strict=True)]

    def alone(self, plan: Plan, order: Order) -> float:
        """Seconds that none of a point's plans is below, by its passes in their order alone: no data parallelism, no memory; arguments as for `bounds`."""
        self._alive[id(order)] = order
        split, ways = self.tables.split(plan), self._ways_to_cut(plan)
        whole = (id(order), id(split.table), split.message_s(1.0 / order.microbatch_parts), tuple(held for held, _ in ways))
        if whole not in self._alone:
            plans = [replace(plan, memory=memory) for _, memory in ways]
            stages = [self._stages(one, order, split.table) for one in plans]
            self._alone[whole] = min(
                float(self._passes(one, order, split, own).end.max()) for one, own in zip(plans, stages, strict=True)
            )
        return self._alone[whole]

    def _passes(self, plan: Plan, order: Order, split: Split, stages: Stages) -> Played:
        """A plan's passes in their order alone."""
        message_s = split.message_s(1.0 / order.microbatch_parts)
        key = (id(order), id(stages), message_s)
        if key not in self._plays:
            seconds = stage_seconds(stages, no_sync(order.num_stages), 1.0 / order.microbatch_parts, 0.0)
            self._plays[key] = play_step(
                passes_of(order), seconds, not_staged(order.num_stages), message_s, waits_for_messages(plan), False, False, self._slowdown
            )  # fmt: skip
        return self._plays[key]

    def _ways_to_cut(self, plan: Plan) -> list[tuple[Hashable, Memory]]:
        """Ways to save memory that may come to different cuts into stages, by what decides these."""
        own = plan.parallel
        key = (plan.memory.zero_stage, own.dp, own.cp, own.pp > 1, own.ep, plan.precision)
        if key not in self._ways:
            found: dict[Hashable, Memory] = {}
            for memory in memory_variants(self.request.trainer, plan):
                each = static_memory(1.0, 0.0, replace(plan, memory=memory), dtype=STORED_AS[plan.precision.compute])
                found.setdefault((each.parameters + each.gradients + each.states, memory.recompute == "full"), memory)
            self._ways[key] = list(found.items())
        return self._ways[key]

    def cut(self, plan: Plan, order: Order) -> tuple[int, ...]:
        """Layers of each stage of a plan."""
        return self._stages(plan, order, self.tables.table(_plain(plan))).cut

    def _bound(self, plan: Plan, order: Order, split: Split, best_s: float) -> Bound:
        stages, staged = self._stages(plan, order, split.table), _is_staged(plan.memory)
        found = (
            self._unplayed(plan, order, split, stages)
            if staged
            else self._played(plan, order, split, stages, np.zeros(order.num_ranks))
        )
        if found >= best_s:
            return Bound(found, 0)
        again, needed = self._again(plan, order, split.table, stages)
        if needed:
            return Bound(NOT_POSSIBLE, needed)
        if staged:
            found = max(found, self._copied(plan, order, stages))
        if found < best_s and (again.any() or staged):
            found = max(found, self._played(plan, order, split, stages, again))
        return Bound(found, 0)

    def _stages(self, plan: Plan, order: Order, table: LayerTable) -> Stages:
        own, memory = plan.parallel, plan.memory
        recompute = _decided(memory)
        states = (memory.zero_stage, memory.optimizer_offload, memory.grad_offload, memory.weight_offload)
        key = (id(table), id(order), own.dp, own.cp, own.ep, plan.precision, plan.pipeline.partition, states, recompute)
        if key not in self._cuts:
            cut_as = plan if memory.recompute == recompute else _plain(plan)
            model, dtype = self.tables.model(cut_as), STORED_AS[plan.precision.compute]
            cut = partition_of(model.workload, cut_as, model.prices, order, self.device, dtype=dtype)
            if (id(table), cut) not in self._known_stages:
                self._known_stages[id(table), cut] = stages_of_cut(table, cut)
            self._cuts[key] = self._known_stages[id(table), cut]
        return self._cuts[key]

    def _again(self, plan: Plan, order: Order, table: LayerTable, stages: Stages) -> tuple[Floats, int]:
        """Least seconds a micro-batch that each rank makes again; or what the fullest rank needs, where that is more than it can have."""
        held, stays = held_of(order), 1.0 - float(plan.memory.activation_offload)
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

    def _static_bytes(self, plan: Plan, order: Order, stages: Stages, held: Held) -> Floats:
        """Of each rank; linear in its parameters."""
        dtype, copies = STORED_AS[plan.precision.compute], float(order.weight_versions)
        dense, routed = (static_memory(*sizes, plan, dtype=dtype, copies=copies) for sizes in ((1.0, 0.0), (0.0, 1.0)))
        stays = 1.0 - float(plan.memory.weight_offload)
        each, expert = (one.parameters * stays + one.gradients + one.states for one in (dense, routed))
        found: Floats = held.owns @ (each * stages.dense + expert * (stages.elements - stages.dense))
        if plan.memory.zero_stage >= PARAMETERS_SHARDED:
            found += DTYPE_BYTES[dtype] * (held.owns * stages.largest).max(axis=1)
        return found

    def _copied(self, plan: Plan, order: Order, stages: Stages) -> float:
        """Least seconds of a rank's copies, all of them together."""
        memory, passes, path = plan.memory, held_of(order).passes, self._path
        shards = plan.parallel.shard_ranks if memory.zero_stage >= PARAMETERS_SHARDED else 1
        width = DTYPE_BYTES[STORED_AS[plan.precision.compute]]
        kept = _ALMOST * float(memory.activation_offload) * (memory.recompute == "none") * (passes @ stages.kept_bytes)
        fetched = (
            _ALMOST * float(memory.weight_offload) * 2.0 * order.microbatch_parts * (passes @ stages.moved) * width / shards
        )
        both = min(path.both_bytes_per_s, path.dram_bytes_per_s)
        ways = (kept / path.to_host_bytes_per_s, (kept + fetched) / path.to_device_bytes_per_s, (2.0 * kept + fetched) / both)
        return float(max(seconds.max() for seconds in ways))

    def _played(self, plan: Plan, order: Order, split: Split, stages: Stages, again: Floats) -> float:
        alone, held, memory = order.num_stages == order.num_ranks and order.weight_copies == 1.0, held_of(order), plan.memory
        share = 1.0 / order.microbatch_parts
        message_s = split.message_s(share)
        sync = self._sync(plan, order, split, stages)
        away = (memory.activation_offload, memory.weight_offload, memory.recompute) if _is_staged(memory) else ()
        each = bool(memory.grad_offload and memory.optimizer_offload)
        key = (id(order), id(stages), id(sync), message_s, again.tobytes() if alone else b"", away, each)
        every = memory.zero_stage >= PARAMETERS_SHARDED
        if key not in self._plays:
            extra = again[[ranks[0] for ranks in order.ranks_of_stage]] if alone else 0.0
            seconds = stage_seconds(stages, sync, share, extra)
            staged = self._staged.of(plan, order, stages) if away else not_staged(order.num_stages)
            self._plays[key] = play_step(
                passes_of(order), seconds, staged, message_s, waits_for_messages(plan), every, each, self._slowdown
            )
        played = self._plays[key]
        more = np.zeros(order.num_ranks) if alone else held.passes.max(axis=1) * again
        beside = np.maximum(0.0, played.traffic - played.spoken - np.minimum(more, played.spoken))
        end = np.maximum(played.end, played.turned + more + self._slowdown.price * beside)
        return float((end + self._late_s(plan, order, sync, stages)).max())

    def _unplayed(self, plan: Plan, order: Order, split: Split, stages: Stages) -> float:
        """Least seconds by what there is to do: passes, as played without traffic, and all traffic of the rank beside them; arguments as for `_played`."""
        held, sync, played = held_of(order), self._sync(plan, order, split, stages), self._passes(plan, order, split, stages)
        passes = held.passes @ (stages.forward_s + stages.backward_s)
        spoken = passes - held.passes @ stages.compute_s
        early = held.owns @ (sync.reduce_s * sync.reduce_early + sync.gather_s * sync.gather_early)
        early *= plan.memory.zero_stage < PARAMETERS_SHARDED
        beside = self._slowdown.price * np.maximum(0.0, early - spoken - played.begun)
        end = np.maximum(played.end, played.begun + passes + beside)
        return float((end + self._late_s(plan, order, sync, stages)).max())

    def _late_s(self, plan: Plan, order: Order, sync: Sync, stages: Stages) -> Floats:
        """Seconds of what each rank does when its passes are over."""
        owns = held_of(order).owns
        late: Floats = owns @ (sync.reduce_s * ~sync.reduce_early + sync.gather_s * ~sync.gather_early)
        return late + self._update_s(plan) * (owns @ stages.dense)

    def _update_s(self, plan: Plan) -> float:
        """Least seconds of the optimizer's step for each parameter of a rank, wherever it runs."""
        dtype = STORED_AS[plan.precision.compute]
        states = static_memory(1.0, 0.0, plan, dtype=dtype).states
        host = host_update(plan, [1.0], width=DTYPE_BYTES[dtype]).moved_bytes / self._path.dram_bytes_per_s
        return self.limits.update_s * states + host

    def _sync(self, plan: Plan, order: Order, split: Split, stages: Stages) -> Sync:
        """What data parallelism does for each stage."""
        group, stage = split.replicas, plan.memory.zero_stage
        key = (id(stages), id(order), group, stage, bool(plan.memory.optimizer_offload))
        if key not in self._syncs:
            if stage >= PARAMETERS_SHARDED:
                found = self._gathered(plan, split, stages, order)
            else:
                asked = [
                    (int(own), ranks[-1] - ranks[0]) for own, ranks in zip(stages.dense, order.ranks_of_stage, strict=True)
                ]
                known = {one: self._stage_sync(plan, split, *one) for one in dict.fromkeys(asked)}
                found = sync_of([known[one] for one in asked])
            self._syncs[key] = found
        return self._syncs[key]

    def _gathered(self, plan: Plan, split: Split, stages: Stages, order: Order) -> Sync:
        """Under ZeRO 3: a pass waits for its first unit at least, and for what compute copies of each one; as much of the gathers is then over."""
        plain, edges, count = _plain(plan), stages.edges, order.num_stages
        apart = np.array([ranks[-1] - ranks[0] for ranks in order.ranks_of_stage])
        gather_s, reduce_s, first_s, first_back_s, copied_s = np.zeros((5, count))
        for distance in np.unique(apart).tolist():
            sums, own = self.sharded.sums(plain, split, distance), apart == distance
            each = np.diff(sums.gather_s)
            gather_s[own], reduce_s[own] = np.diff(sums.gather_s[edges])[own], np.diff(sums.reduce_s[edges])[own]
            first_s[own], first_back_s[own] = each[edges[:-1]][own], each[edges[1:] - 1][own]
            copied_s[own] = np.diff(sums.copied_s[edges])[own]
        whole, yes = plan.runtime.framework != "deepspeed", np.ones(count, np.bool_)  # whose units are less than a piece
        first_s, first_back_s = whole * first_s + copied_s, whole * first_back_s + copied_s
        return Sync(
            chunks=np.clip(np.diff(edges), 1, MOST_CHUNKS) if whole else np.full(count, MOST_CHUNKS), gather_s=np.maximum(gather_s, np.minimum(first_s, first_back_s)), reduce_s=reduce_s,
            gather_early=yes, reduce_early=yes, first_s=first_s, first_back_s=first_back_s,
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


def _is_staged(memory: Memory) -> bool:
    """Whether passes run in chunks, beside which copies travel."""
    return bool(memory.activation_offload or memory.weight_offload)


_ALMOST = 1.0 - 1e-6
"""Copies of rounded bytes may be a little less than what is asked for."""


def _decided(memory: Memory) -> str:
    """What is recomputed, as far as it is known before it is solved for."""
    return "none" if memory.recompute == "optimal" else memory.recompute


def _plain(plan: Plan) -> Plan:
    """The plan without recompute."""
    return replace(plan, memory=replace(plan.memory, recompute="none"))
