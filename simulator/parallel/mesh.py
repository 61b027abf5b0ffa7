"""Where the ranks of each parallel axis lie on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hardware_models.network.cluster import Cluster, CommGroup
from simulator.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The axes of a plan on a cluster, innermost first: rank = sum of coordinate times stride.

    Experts live on the ranks of the cp and dp axes: the ep axis takes no ranks of its own and lies where those begin.
    """

    cluster: Cluster
    degrees: tuple[tuple[str, int], ...]
    """(axis, ranks), innermost first, without ep."""
    ep: int

    def degree(self, axis: str) -> int:
        """Ranks of a group of an axis."""
        return self.ep if axis == "ep" else dict(self.degrees)[axis]

    def stride(self, axis: str) -> int:
        """Distance of neighbours along an axis, in ranks."""
        order = [name for name, _ in self.degrees]
        if axis == "ep":
            return min(self.stride("cp"), self.stride("dp"))
        return prod(degree for _, degree in self.degrees[: order.index(axis)])

    def group(self, axis: str) -> CommGroup:
        """A group of an axis, and how many such groups share a node."""
        size, stride = self.degree(axis), self.stride(axis)
        per_node = max(1, min(size, self.cluster.devices_per_node // stride)) if stride < self.cluster.devices_per_node else 1
        used = min(self.cluster.num_gpus, self.cluster.devices_per_node)
        return CommGroup(num_ranks=size, ranks_per_node=per_node, concurrent_groups=max(1, used // per_node))

    def gradient_group(self, distance: int = 0) -> CommGroup:
        """Ranks that hold the same dense parameters: those of the dp and cp axes together.

        Args:
            distance: of two pipeline ranks that hold the same stage, in orders of two directions.
        """
        offsets = [
            data * self.stride("dp") + context * self.stride("cp") + across * self.stride("pp")
            for data in range(self.degree("dp"))
            for context in range(self.degree("cp"))
            for across in ((0, distance) if distance else (0,))
        ]
        per_node = sum(offset < self.cluster.devices_per_node for offset in offsets)
        used = min(self.cluster.num_gpus, self.cluster.devices_per_node)
        return CommGroup(num_ranks=len(offsets), ranks_per_node=per_node, concurrent_groups=max(1, used // per_node))

    def neighbours(self, axis: str) -> CommGroup:
        """Two neighbours along an axis: how messages between them travel."""
        stride = self.stride(axis)
        inside = stride < self.cluster.devices_per_node
        used = min(self.cluster.num_gpus, self.cluster.devices_per_node)
        return CommGroup(num_ranks=2, ranks_per_node=2 if inside else 1, concurrent_groups=1 if inside else used)


def mesh_of(plan: Plan, cluster: Cluster) -> Mesh:
    """The plan's axes in its order on the cluster."""
    names = [name for name in plan.parallel.order.split("-") if name != "ep"]
    return Mesh(cluster=cluster, degrees=tuple((name, getattr(plan.parallel, name)) for name in names), ep=plan.parallel.ep)
