"""Costs of layers for every way in which a space splits them: prefix sums, so that the cost of any stage is a difference."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hardware_models.network.cluster import CommGroup
from hardware_models.profile import DeviceProfile
from search.joint.processes import num_processes, shared_out
from search.joint.space import JointRequest
from simulator.lower import PassPrices
from simulator.parallel.communication import Behind, Communication
from simulator.parallel.early_stop import STOPPED, option_again, stops_early
from simulator.parallel.experts import expert_elements
from simulator.parallel.interference import overlap_of
from simulator.parallel.mesh import Mesh, mesh_of
from simulator.parallel.messages import message_link
from simulator.parallel.priced_model import PricedModel, priced_model
from simulator.parallel.recompute import MEGATRON, stage_operations
from simulator.parallel.stages import Stage, StageCost, layers_of, stage_between, stage_edges
from simulator.plan import Pipeline, Plan
from simulator.precision import STORED_AS
from simulator.workload import BlockOption, Pass

Floats = NDArray[np.float64]
FEW_MODELS = 32
"""Ways to split a layer up to which one process prices all of them."""
TOGETHER = 16
"""Ways to split a layer whose kernels are priced at once, between two looks at the clock."""
FAR_BELOW = 0.5
"""Part of a slope below which another one counts as cheap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Sums over the pieces before each one; shape (pieces + 1,): the embedding, each layer, the head.

    Times are of one micro-batch that recomputes nothing, collectives that a pass waits for included.

    **Recompute** is known from below: a byte that is not kept costs at least ``cheap_s``, and ``dear_s`` beyond the ``cheap_bytes`` that may cost less. Both are slopes of options
    (what a block keeps less, over what it then takes longer) and of a second forward pass, which keeps nothing.
    """

    forward_s: Floats
    backward_s: Floats
    weight_s: Floats
    """Part of the backward pass that only makes parameters' gradients."""
    compute_s: Floats
    """Of both passes, without collectives."""
    back_compute_s: Floats
    """Of these, the backward pass."""
    elements: Floats
    """Parameters; a table that embedding and head share counts with the embedding."""
    dense_elements: Floats
    """Of these, what all replicas hold: no routed experts."""
    moved_elements: Floats
    """Parameters that may live on the host: no table that embedding and head share."""
    kept_bytes: Floats
    """By a micro-batch from its forward to its backward pass."""
    cheap_bytes: Floats
    """Of these, what may be made again for less than ``dear_s`` a byte."""
    cheap_s: float
    dear_s: float
    message_bytes: float
    """Of a boundary between stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A model split over a cluster."""

    mesh: Mesh
    table: LayerTable
    replicas: CommGroup
    """Ranks that hold the same parameters."""
    message_bytes_per_s: float
    message_latency_s: float

    def message_s(self, part: float = 1.0) -> float:
        """Seconds of a message between neighbouring stages, of such a part of a micro-batch; 0 where there is one stage."""
        return (
            self.message_latency_s + part * self.table.message_bytes / self.message_bytes_per_s
            if self.mesh.degree("pp") > 1
            else 0.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """Pieces of a split model, priced; equal ones are one entry."""

    model: PricedModel
    stages: tuple[Stage, ...]
    """Different pieces, as stages of their own."""
    costs: tuple[StageCost, ...]
    kind: NDArray[np.int64]
    """Which of them each piece is."""
    options: Mapping[int, tuple[BlockOption, ...]]
    """All options of each block, by its id, whichever recompute they are there for."""
    again: Mapping[int, tuple[Pass, bool]]
    """What runs of it in a second forward pass at least, and whether that is all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """Pieces before they are priced; fields as of `_Pieces`."""

    model: PricedModel
    plan: Plan
    stages: tuple[Stage, ...]
    kind: NDArray[np.int64]
    options: Mapping[int, tuple[BlockOption, ...]]
    again: Mapping[int, tuple[Pass, bool]]

    @property
    def runs(self) -> list[Pass]:
        """Passes whose prices a table needs."""
        blocks = {id(block): block for stage in self.stages for block in stage.blocks}
        found = [
            run
            for block in blocks.values()
            for own in block.options[:1]
            for run in (own.forward, own.backward, own.backward_accumulate)
        ]
        found += [run for place in blocks for own in self.options[place] for run in (own.forward, own.backward_accumulate)]
        return found + [run for run, _ in self.again.values()]

    def priced(self) -> _Pieces:
        """With what the stages cost."""
        self.model.prices.fill(self.runs)
        costs = tuple(self.model.stage_cost(stage, stage_operations(self.plan, stage)) for stage in self.stages)
        return _Pieces(
            model=self.model, stages=self.stages, costs=costs, kind=self.kind, options=self.options, again=self.again
        )


class LayerTables:
    """Tables by what they depend on, made when first asked for.

    Args:
        request: model, batch and cluster.
        device: profile of the cluster's devices.
    """

    def __init__(self, request: JointRequest, device: DeviceProfile) -> None:
        self.request, self.device = request, device
        self._pieces: dict[Hashable, _Pieces] = {}
        self._tables: dict[Hashable, LayerTable] = {}
        self._splits: dict[Hashable, Split] = {}

    def table(self, plan: Plan) -> LayerTable:
        """Of a plan's split, micro-batch, precision and framework."""
        return self.split(plan).table

    def split(self, plan: Plan) -> Split:
        """What points share that differ in the pipeline's order and in the ZeRO stage only."""
        own = plan.parallel
        key = (
            own.tp,
            own.cp,
            own.pp,
            own.dp,
            own.ep,
            own.order,
            own.cp_method,
            own.sequence_parallel,
            plan.batch.micro_batch,
            plan.precision,
            plan.runtime,
            plan.memory.recompute,
        )
        if key not in self._splits:
            mesh = mesh_of(plan, self.request.cluster)
            table = self._table_of(plan, mesh)
            rate, latency_s = message_link(mesh)
            self._splits[key] = Split(
                mesh=mesh, table=table, replicas=mesh.gradient_group(), message_bytes_per_s=rate, message_latency_s=latency_s
            )
        return self._splits[key]

    def price(self, plans: Sequence[Plan], *, end: float = float("inf")) -> int:
        """Makes the tables of many plans at once, on all processors.

        Args:
            plans: in the order in which their tables are wanted.
            end: moment (`time.monotonic`) at which no other model is priced.

        Returns:
            How many of the plans, from the first on, have their tables now.
        """
        keys = [_keys(plan, mesh_of(plan, self.request.cluster)) for plan in plans]
        wanted: dict[Hashable, dict[Hashable, Plan]] = {}
        for plan, (model, key) in zip(plans, keys, strict=True):
            if key not in self._tables:
                wanted.setdefault(model, {})[key] = plan
        models = list(wanted.values())
        processes = num_processes() if len(models) >= FEW_MODELS else 1

        def priced(part: Sequence[Mapping[Hashable, Plan]]) -> list[tuple[Hashable, LayerTable]]:
            found = []
            for place in range(0, len(part), TOGETHER):
                if time.monotonic() > end:
                    break
                own = part[place : place + TOGETHER]
                self._price_models([next(iter(one.values())) for one in own])
                found += [
                    (key, self._table_of(plan, mesh_of(plan, self.request.cluster))) for one in own for key, plan in one.items()
                ]
            return found

        for found in shared_out(priced, [models[first::processes] for first in range(processes)]):
            for key, table in found:
                self._tables.setdefault(key, table)
        return next((place for place, (_, key) in enumerate(keys) if key not in self._tables), len(plans))

    def _price_models(self, plans: Sequence[Plan]) -> None:
        """The pieces of plans that split the model in different ways, kernels of all of them priced at once."""
        alike: dict[Hashable, list[tuple[Hashable, _Cut]]] = {}
        for plan in plans:
            key, _ = _keys(plan, mesh_of(plan, self.request.cluster))
            if key not in self._pieces:
                alike.setdefault((plan.precision, plan.runtime), []).append((key, _cut(self.model(plan), plan)))
        for own in alike.values():
            PassPrices.fill_all([(cut.model.prices, cut.runs) for _, cut in own])
            self._pieces.update((key, cut.priced()) for key, cut in own)

    def _table_of(self, plan: Plan, mesh: Mesh) -> LayerTable:
        priced, key = _keys(plan, mesh)
        if key not in self._tables:
            if priced not in self._pieces:
                self._pieces[priced] = _cut(self.model(plan), plan).priced()
            self._tables[key] = self._table(self._pieces[priced], plan, mesh)
        return self._tables[key]

    def model(self, plan: Plan) -> PricedModel:
        """The priced model of a plan."""
        return priced_model(self.request.config, plan, self.device, seq_len=self.request.seq_len)

    def communication(self, plan: Plan, mesh: Mesh) -> Communication:
        """Prices of a plan's collectives."""
        factors, product_s = overlap_of(self.device, self.request.cluster), self.model(plan).product_s()
        return Communication(
            plan, mesh, self.request.config, dtype=STORED_AS[plan.precision.compute], seq_len=self.request.seq_len, factors=factors,
            behind=None if product_s is None else Behind(product_s=product_s, factors=factors),
        )  # fmt: skip

    def _table(self, pieces: _Pieces, plan: Plan, mesh: Mesh) -> LayerTable:
        model, spoken = pieces.model, self.communication(plan, mesh)
        attention_s = model.attention_s()
        messages = [spoken.stage(stage, recomputed=(), attention_s=attention_s) for stage in pieces.stages]
        costs = list(zip(pieces.costs, messages, strict=True))

        def sums(values: Sequence[float]) -> Floats:
            each = np.array(values, dtype=np.float64)[pieces.kind]
            return np.concatenate([[0.0], np.cumsum(each)])

        again = [self._again(pieces, stage, spoken, attention_s) for stage in pieces.stages]
        cheap_s, dear_s = _slopes(again)
        elements = [stage.parameter_elements - (stage.shared_elements if not stage.sends else 0) for stage in pieces.stages]
        experts = [expert_elements(stage, self.request.config, plan.parallel) for stage in pieces.stages]
        return LayerTable(
            forward_s=sums([cost.forward.total_s + one.forward.total_s for cost, one in costs]),
            backward_s=sums([cost.backward.total_s + one.backward.total_s for cost, one in costs]),
            weight_s=sums([cost.weight_s for cost, _ in costs]),
            compute_s=sums([cost.forward.total_s + cost.backward.total_s for cost, _ in costs]),
            back_compute_s=sums([cost.backward.total_s for cost, _ in costs]), elements=sums(elements), dense_elements=sums([own - routed for own, routed in zip(elements, experts, strict=True)]),
            moved_elements=sums([stage.parameter_elements - stage.shared_elements for stage in pieces.stages]),
            kept_bytes=sums([_kept_bytes(stage) for stage in pieces.stages]),
            cheap_bytes=sums([sum(size for slope, size in own if slope < dear_s) for own in again]), cheap_s=cheap_s, dear_s=dear_s,
            message_bytes=messages[0].message_bytes,
        )  # fmt: skip

    def _again(self, pieces: _Pieces, stage: Stage, spoken: Communication, attention_s: float) -> list[tuple[float, float]]:
        """What may be kept less of a piece: (seconds a byte, bytes), of each block the lower hull of its options and of a second forward pass."""
        found: list[tuple[float, float]] = []
        for block in stage.blocks:
            base = block.options[0]
            kept = base.saved_internal_bytes + block.input_bytes * base.keeps_input
            run, whole = pieces.again[id(block)]
            second_s = pieces.model.prices.seconds(run) + (spoken.block(block, attention_s).total_s if whole else 0.0)
            ways = [(float(kept), second_s)]
            for other in pieces.options[id(block)]:
                less = kept - other.saved_internal_bytes - block.input_bytes * other.keeps_input
                more_s = sum(map(pieces.model.prices.seconds, (other.forward, other.backward_accumulate))) - sum(
                    map(pieces.model.prices.seconds, (base.forward, base.backward_accumulate))
                )
                if less > 0:
                    ways.append((float(less), max(0.0, more_s)))
            found += _hull(ways)
        return found


def _keys(plan: Plan, mesh: Mesh) -> tuple[Hashable, Hashable]:
    """What the prices of a plan's layers depend on, and what their table does."""
    own = plan.parallel
    priced = (
        own.tp,
        own.cp,
        own.ep,
        own.cp_method,
        own.sequence_parallel,
        plan.batch.micro_batch,
        plan.memory.recompute,
        plan.memory.block,
        plan.precision,
        plan.runtime,
    )
    groups = tuple(mesh.group(axis) if mesh.degree(axis) > 1 else None for axis in ("tp", "cp", "ep"))
    return priced, (priced, own.pp > 1, groups, mesh.neighbours("cp") if own.cp > 1 else None)


def _cut(model: PricedModel, plan: Plan) -> _Cut:
    """The embedding, each layer and the head as stages of their own."""
    count = len(layers_of(model.workload))
    parallel = replace(plan.parallel, pp=count + 2, virtual_stages=1)
    edges = stage_edges(model.workload, replace(plan, parallel=parallel, pipeline=Pipeline(partition=(0, *(1,) * count, 0))))
    places: dict[tuple[object, ...], int] = {}
    stages: list[Stage] = []
    kinds: list[int] = []
    for index, (first, end) in enumerate(pairwise(edges)):
        key = (*(id(block) for block in model.workload.blocks[first:end]), index > 0, end < edges[-1])
        if key not in places:
            places[key] = len(stages)
            stages.append(stage_between(model.workload, edges, index))
        kinds.append(places[key])
    options = _options(model, plan, stages)
    return _Cut(
        model=model, plan=plan, stages=tuple(stages), kind=np.array(kinds, dtype=np.int64), options=options,
        again=_second_runs(model, plan, stages),
    )  # fmt: skip


def _options(model: PricedModel, plan: Plan, stages: Sequence[Stage]) -> dict[int, tuple[BlockOption, ...]]:
    """Options of each block; Megatron's blocks have that of ``selective`` only where a plan says so."""
    whole = model.workload
    if plan.runtime.framework in MEGATRON:
        asked = replace(plan, memory=replace(plan.memory, recompute="selective"))
        whole = priced_model(model.config, asked, model.device, seq_len=model.seq_len).workload
    return {
        id(block): whole.blocks[stage.first + place].options for stage in stages for place, block in enumerate(stage.blocks)
    }


def _second_runs(model: PricedModel, plan: Plan, stages: Sequence[Stage]) -> dict[int, tuple[Pass, bool]]:
    """What runs of each block in a second forward pass at least, and whether that is all of it: some frameworks stop a checkpointed layer early."""
    asked = replace(plan, memory=replace(plan.memory, recompute="full"))
    if not stops_early(asked):
        return {id(block): (block.discard, True) for stage in stages for block in stage.blocks}
    whole, found = priced_model(model.config, asked, model.device, seq_len=model.seq_len).workload, {}
    for stage in stages:
        for place, block in enumerate(stage.blocks):
            other = whole.blocks[stage.first + place]
            name = option_again(other)
            found[id(block)] = (other.option(name).forward, name != STOPPED)
    return found


def _kept_bytes(stage: Stage) -> int:
    return sum(
        block.options[0].saved_internal_bytes + block.input_bytes * block.options[0].keeps_input for block in stage.blocks
    )


def _hull(ways: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Segments (slope, bytes) of the lower convex hull from (0, 0) through (bytes, seconds), slopes ascending."""
    found: list[tuple[float, float]] = []
    size = seconds = 0.0
    left = [way for way in ways if way[0] > 0.0]
    while left:
        slope, most = min(((cost - seconds) / (less - size), -less) for less, cost in left)
        found.append((max(0.0, slope), -most - size))
        size, seconds = -most, seconds + slope * (-most - size)
        left = [way for way in left if way[0] > size]
    return found


def _slopes(again: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """The least slope, and the least of those that are not far below what most bytes cost."""
    every = sorted(one for own in again for one in own if one[1] > 0.0)
    if not every:
        return 0.0, 0.0
    usual = max(every, key=lambda one: one[1])[0]
    return every[0][0], next(slope for slope, _ in every if slope >= FAR_BELOW * usual)
