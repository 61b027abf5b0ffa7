"""Bounds of all points by arithmetic alone, before any layer is priced: most of a large space needs no more.

**Model**: a rank's products take their FLOPs at the device's best rate (`best_rate_seconds`), of one sample ``1 / (tp cp)``; experts compute whole rows. Collectives of tensor and expert
parallelism that nothing can hide are added, and what no block of attention hides of a ring. With p ranks, m micro-batches and W seconds of all stages for one of them, a rank is busy for
at least m W / p, and a micro-batch under way for W. With one stage a rank and full backward passes rank r waits for those before it, so that stages of ``(T / m) (1 - 1/m)^r`` fill a
step T: ``T >= W / (1 - (1 - 1/m)^p)``.

**Not counted**: all else that `search.joint.bounds` counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hardware_models.best_rates import best_rate_seconds
from hardware_models.kernel import Kernel
from search.joint.bounds import SPLIT, TWO_WAYS
from search.joint.layer_tables import LayerTables
from search.joint.points import Points, groups
from search.joint.space import JointSpace
from simulator.parallel.communication import Behind, Communication
from simulator.parallel.framework import FUSED_ACCUMULATION
from simulator.parallel.interference import overlap_of
from simulator.parallel.mesh import mesh_of
from simulator.parallel.priced_model import PRICED_IN
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan
from simulator.precision import STORED_AS, in_precision
from simulator.workload import Block

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LONG_S = 1e3
"""Seconds of compute behind which collectives hide as far as they can."""
_ROUNDING = 1.0 - 1e-9
"""Sums in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSeconds:
    """Least seconds of a model's products for one sample that no axis splits, forward and backward."""

    products: float
    attention: float
    grouped: float
    """Of routed experts, for one row of each."""
    blocks: tuple[tuple[Block, int], ...]
    """One of each name, and how many there are."""


class CrudeBounds:
    """Bounds of a space.

    Args:
        space: whose points are bounded.
        tables: of its models; only the one that nothing splits is built.
    """

    def __init__(self, space: JointSpace, tables: LayerTables) -> None:
        self.space, self.tables = space, tables
        self._models: dict[int, ModelSeconds] = {}
        self._waits: dict[tuple[int, ...], float] = {}
        self._products_s = self._products()

    def alone(self) -> Floats:
        """Seconds that no step of each point is below by its products; shape ``(points,)``."""
        return self._step_seconds(self._products_s)

    def with_collectives(self, below_s: float) -> Floats:
        """The same by products and collectives for points that products alone leave below a time."""
        points, whole = self.space.points, self._products_s.copy()
        rows = np.flatnonzero(self.alone() < below_s)
        if len(rows):
            columns = self._collective_columns(points.take(rows))
            first, group_of = groups(columns)
            waits = np.empty(len(first))
            for place, (one, key) in enumerate(
                zip(first.tolist(), np.stack([own[first] for own in columns], axis=1).tolist(), strict=True)
            ):
                if tuple(key) not in self._waits:
                    self._waits[tuple(key)] = self._waits_s(self.space.plan(int(rows[one])))
                waits[place] = self._waits[tuple(key)]
            whole[rows] += waits[group_of]
        return self._step_seconds(whole)

    def _products(self) -> Floats:
        """Seconds of a micro-batch's products on all stages; shape ``(points,)``."""
        points, request = self.space.points, self.space.request
        found = np.zeros(len(points))
        for compute in np.unique(points.compute).tolist():
            own = points.compute == compute
            model, part = self._model(compute), points.take(own)
            fused = np.where(part.cp < request.seq_len, model.attention, 0.0)  # of one token is another kernel
            found[own] = (model.products + fused) * part.micro_batch / (part.tp.astype(np.float64) * part.cp)
            if model.grouped:
                found[own] += model.grouped / part.tp * self._rows(part)
        return found * _ROUNDING

    def _rows(self, points: Points) -> Floats:
        """Rows of all experts together on the busiest rank over their number: whole ones of each expert."""
        experts = self.space.request.config.experts
        assert experts is not None
        load = np.array([experts.load(ep) for ep in range(1, int(points.ep.max()) + 1)])[points.ep - 1]
        tokens = points.micro_batch * self.space.request.seq_len / points.cp.astype(np.float64)
        local = experts.num_experts / points.ep.astype(np.float64)
        each = np.floor(np.maximum(1.0, np.rint(tokens * experts.top_k * load)) / local)
        found: Floats = np.maximum(1.0, each) / points.ep
        return found

    def _model(self, compute: int) -> ModelSeconds:
        if compute not in self._models:
            self._models[compute] = self._made_model(self.space.plan(int(np.argmax(self.space.points.compute == compute))))
        return self._models[compute]

    def _made_model(self, plan: Plan) -> ModelSeconds:
        alone = replace(
            plan, parallel=Parallel(), batch=Batch(global_batch=1, micro_batch=1, seq_len=plan.batch.seq_len), pipeline=Pipeline(), memory=Memory(),
        )  # fmt: skip
        blocks = self.tables.model(alone).workload.blocks
        counts, one = Counter(id(block) for block in blocks), {id(block): block for block in blocks}
        sums = {"products": 0.0, "attention": 0.0, "grouped": 0.0}
        for place, count in counts.items():
            option = one[place].options[0]
            kernels = [*option.forward.kernels, *option.backward_accumulate.kernels]
            own = PRICED_IN.get(plan.precision.compute, plan.precision.compute)
            seconds = best_rate_seconds([in_precision(kernel, own) for kernel in kernels], self.tables.device)
            for kernel, each in zip(kernels, seconds.tolist(), strict=True):
                sums[_part(kernel)] += count * each
        named = Counter(block.name for block in blocks)
        experts, rows = self.space.request.config.experts, 1.0
        if experts is not None:
            rows = max(1.0, np.rint(self.space.request.seq_len * experts.top_k * experts.load(1)) // experts.num_experts)
        return ModelSeconds(
            products=sums["products"], attention=sums["attention"], grouped=sums["grouped"] / rows,
            blocks=tuple((block, named[name]) for name, block in {block.name: block for block in blocks}.items()),
        )  # fmt: skip

    def _collective_columns(self, points: Points) -> list[Ints]:
        """What the collectives of a layer depend on: degrees, sizes, and how far apart ranks are, in devices of a node."""
        node, orders = self.space.request.cluster.devices_per_node, [text.split("-") for text in self.space.placements]
        strides = {"cp": np.ones(len(points), np.int64), "dp": np.ones(len(points), np.int64)}
        for index, order in enumerate(orders):
            own = points.placement == index
            for axis, found in strides.items():
                for inner in order[: order.index(axis)]:
                    found[own] *= 1 if inner == "ep" else getattr(points, inner)[own]
        behind = np.array([order.index("ep") > max(order.index("cp"), order.index("dp")) for order in orders])[points.placement]
        return [
            *(getattr(points, name).astype(np.int64) for name in ("tp", "cp", "ep", "micro_batch", "cp_method", "compute")),
            np.minimum(strides["cp"], node), np.minimum(strides["dp"], node), np.minimum(points.dp, points.ep), behind.astype(np.int64),
        ]  # fmt: skip

    def _waits_s(self, plan: Plan) -> float:
        """Seconds of all layers' collectives that a micro-batch waits for whatever compute stands beside them."""
        request, factors = self.space.request, overlap_of(self.tables.device, self.space.request.cluster)
        slow, slower = factors.compute_under_collectives, factors.collectives_under_compute
        beside_s = (
            LONG_S if slow * slower < slow + slower else 0.0
        )  # what is exposed shrinks with what stands beside it, or grows
        blocks = self._model(self.space.computes.index(plan.precision.compute)).blocks
        hides = plan.runtime.framework in FUSED_ACCUMULATION
        spoken = Communication(
            plan, mesh_of(plan, request.cluster), request.config, dtype=STORED_AS[plan.precision.compute], seq_len=request.seq_len, factors=factors,
            behind=Behind(product_s={block.name: beside_s for block, _ in blocks}, factors=factors) if hides else None,
        )  # fmt: skip
        seconds = sum(
            count * spoken.block(block, beside_s, backward=backward).total_s
            for block, count in blocks
            for backward in (False, True)
        )
        return max(0.0, seconds) * _ROUNDING

    def _step_seconds(self, whole_s: Floats) -> Floats:
        """Least seconds of a step whose micro-batches take so long on all stages together."""
        points = self.space.points
        number, ranks = points.num_microbatches.astype(np.float64), points.pp.astype(np.float64)
        split = np.array([name in SPLIT for name in self.space.schedules])[points.schedule]
        two_ways = np.array([name in TWO_WAYS for name in self.space.schedules])[points.schedule]
        ordered = ~split & ~two_ways & (points.virtual_stages == 1)
        busy_s = whole_s * number / ranks
        filled_s = whole_s / (1.0 - np.where(ordered, (1.0 - 1.0 / number) ** ranks, 0.0))
        found: Floats = np.maximum(busy_s, np.where(split, 0.0, filled_s))
        return found


def _part(kernel: Kernel) -> str:
    if kernel.kernel_class == "attention":
        return "attention"
    return "grouped" if kernel.op == "_grouped_mm" else "products"
