"""What ZeRO 3 takes of a micro-batch: parameters gathered for both passes, gradients scattered after the second."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hardware_models.network.cluster import CommGroup
from hardware_models.units import DTYPE_BYTES
from search.joint.layer_tables import LayerTables, Split
from simulator.parallel.gradient_sync import Replicas
from simulator.parallel.mesh import Mesh
from simulator.parallel.wire_format import WireFormat
from simulator.plan import Plan
from simulator.precision import STORED_AS

PASSES = 2
"""That parameters are gathered for."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """Collectives of a micro-batch, sums over the pieces before each one; shape (pieces + 1,)."""

    gather_s: Floats
    """Of one pass."""
    reduce_s: Floats
    copied_s: Floats
    """What compute does for it in a pass: parameters copied out of the buffer that they come in."""

    @property
    def total_s(self) -> Floats:
        """Of both passes."""
        return PASSES * self.gather_s + self.reduce_s


class ShardedSeconds:
    """Seconds of collectives by what they depend on; layers of one kind ask for the same ones.

    Args:
        tables: of the layers.
    """

    def __init__(self, tables: LayerTables) -> None:
        self.tables = tables
        self._known: dict[tuple[CommGroup, float, str], tuple[float, float, float]] = {}
        self._sums: dict[tuple[int, CommGroup], Sharded] = {}

    def sums(self, plan: Plan, split: Split, distance: int = 0) -> Sharded:
        """Of a micro-batch; routed experts, which fewer ranks share, are left out.

        Args:
            plan: any of the split, without recompute.
            split: the plan's.
            distance: of two pipeline ranks that hold the same stage, in orders of two directions.
        """
        group, table, compute = split.mesh.gradient_group(distance), split.table, plan.precision.compute
        if (id(table), group) not in self._sums:
            elements, kind = np.unique(np.diff(table.dense_elements), return_inverse=True)
            for own in elements.tolist():
                if (group, own, compute) not in self._known:
                    self._known[group, own, compute] = self._priced(plan, split.mesh, own, distance) if own else (0.0, 0.0, 0.0)
            each = np.array([self._known[group, own, compute] for own in elements.tolist()])[kind.ravel()]
            sums = np.concatenate([np.zeros((1, 3)), np.cumsum(each, axis=0)])
            self._sums[id(table), group] = Sharded(
                gather_s=sums[:, 0].copy(), reduce_s=sums[:, 1].copy(), copied_s=sums[:, 2].copy()
            )
        return self._sums[id(table), group]

    def least(self, plan: Plan, split: Split) -> Sharded:
        """Of a micro-batch in an order of two directions, whose stages are on ranks near and far: those of the distance that takes least."""
        found = (self.sums(plan, split, distance) for distance in self.distances(split))
        return min(found, key=lambda one: float(one.total_s[-1]))

    def distances(self, split: Split) -> range:
        """Of two pipeline ranks that hold the same stage, until they are on two nodes: farther ones are in like groups."""
        inside = -(-split.mesh.cluster.devices_per_node // split.mesh.stride("pp"))
        return range(1, min(split.mesh.degree("pp"), inside + 1))

    def _priced(self, plan: Plan, mesh: Mesh, elements: float, distance: int) -> tuple[float, float, float]:
        dtype, sharded = (
            STORED_AS[plan.precision.compute],
            replace(plan, memory=replace(plan.memory, zero_stage=3)),
        )
        wire = WireFormat(comm=plan.precision.comm, price=self.tables.model(plan).price)
        replicas = Replicas(
            sharded, self.tables.communication(plan, mesh), wire, distance=distance, width=DTYPE_BYTES[dtype], parts=0.0
        )
        return (
            replicas.gather_s(elements),
            replicas.copied_in_s(elements) + replicas.reduce_s(elements),
            replicas.copied_out_s(elements),
        )
