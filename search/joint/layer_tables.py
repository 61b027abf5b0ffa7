"""Costs of layers for every way in which a space splits them: prefix sums, so that the cost of any stage is a difference."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hardware_models.profile import DeviceProfile
from search.joint.space import JointRequest
from simulator.parallel.communication import Behind, Communication
from simulator.parallel.interference import overlap_of
from simulator.parallel.mesh import Mesh, mesh_of
from simulator.parallel.priced_model import PricedModel, priced_model
from simulator.parallel.recompute import stage_operations
from simulator.parallel.stages import Stage, StageCost, layers_of, stages_of
from simulator.plan import Pipeline, Plan
from simulator.precision import STORED_AS

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Sums over the pieces before each one; shape (pieces + 1,): the embedding, each layer, the head.

    Times are of one micro-batch that recomputes nothing, collectives that a pass waits for included.
    """

    forward_s: Floats
    backward_s: Floats
    weight_s: Floats
    """Part of the backward pass that only makes parameters' gradients."""
    elements: Floats
    """Parameters; a table that embedding and head share counts with the embedding."""
    message_bytes: float
    """Of a boundary between stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """Pieces of a split model, priced; equal ones are one entry."""

    model: PricedModel
    stages: tuple[Stage, ...]
    """Different pieces, as stages of their own."""
    costs: tuple[StageCost, ...]
    kind: NDArray[np.int64]
    """Which of them each piece is."""


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

    def table(self, plan: Plan) -> LayerTable:
        """Of a plan's split, micro-batch, precision and framework."""
        mesh, split = mesh_of(plan, self.request.cluster), plan.parallel
        model = priced_model(self.request.config, plan, self.device, seq_len=self.request.seq_len)
        groups = tuple(mesh.group(axis) if mesh.degree(axis) > 1 else None for axis in ("tp", "cp", "ep"))
        priced = (id(model), split.cp_method)
        key = (*priced, split.pp > 1, groups, mesh.neighbours("cp") if split.cp > 1 else None)
        if key not in self._tables:
            if priced not in self._pieces:
                self._pieces[priced] = _pieces_of(model, plan)
            self._tables[key] = self._table(self._pieces[priced], plan, mesh)
        return self._tables[key]

    def _table(self, pieces: _Pieces, plan: Plan, mesh: Mesh) -> LayerTable:
        model, factors = pieces.model, overlap_of(self.device, self.request.cluster)
        product_s = model.product_s()
        spoken = Communication(
            plan, mesh, self.request.config, dtype=STORED_AS[plan.precision.compute], seq_len=self.request.seq_len, factors=factors,
            behind=None if product_s is None else Behind(product_s=product_s, factors=factors),
        )  # fmt: skip
        attention_s = model.attention_s()
        messages = [spoken.stage(stage, recomputed=(), attention_s=attention_s) for stage in pieces.stages]
        costs = list(zip(pieces.costs, messages, strict=True))

        def sums(values: Sequence[float]) -> Floats:
            each = np.array(values, dtype=np.float64)[pieces.kind]
            return np.concatenate([[0.0], np.cumsum(each)])

        return LayerTable(
            forward_s=sums([cost.forward.total_s + one.forward.total_s for cost, one in costs]),
            backward_s=sums([cost.backward.total_s + one.backward.total_s for cost, one in costs]),
            weight_s=sums([cost.weight_s for cost, _ in costs]),
            elements=sums([stage.parameter_elements - (stage.shared_elements if not stage.sends else 0) for stage in pieces.stages]),
            message_bytes=messages[0].message_bytes,
        )  # fmt: skip


def _pieces_of(model: PricedModel, plan: Plan) -> _Pieces:
    """The embedding, each layer and the head as stages of their own, priced."""
    count = len(layers_of(model.workload))
    parallel = replace(plan.parallel, pp=count + 2, virtual_stages=1)
    alone = replace(plan, parallel=parallel, pipeline=Pipeline(partition=(0, *(1,) * count, 0)))
    places: dict[tuple[object, ...], int] = {}
    stages: list[Stage] = []
    kinds: list[int] = []
    for stage in stages_of(model.workload, alone):
        key = (*(id(block) for block in stage.blocks), stage.receives, stage.sends)
        if key not in places:
            places[key] = len(stages)
            stages.append(stage)
        kinds.append(places[key])
    options = [block.options[0] for block in {id(block): block for stage in stages for block in stage.blocks}.values()]
    model.prices.fill([run for own in options for run in (own.forward, own.backward, own.backward_accumulate)])
    costs = tuple(model.stage_cost(stage, stage_operations(plan, stage)) for stage in stages)
    return _Pieces(model=model, stages=tuple(stages), costs=costs, kind=np.array(kinds, dtype=np.int64))
