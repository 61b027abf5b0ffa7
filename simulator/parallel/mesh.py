"""Where the ranks of each parallel axis lie on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from hardware_models.network.cluster import Cluster, CommGroup
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The axes of a plan on a cluster, innermost first: rank = sum of coordinate times stride.

    Experts live on the ranks of the cp and dp axes, those that hold the same dense parameters (`replicas`): the ep axis takes no ranks of its own. An ep group is
    made of neighbours among them, unless the order names ep behind both: then copies of one expert are neighbours.

    **Model**: groups of an axis are alike, and all of them are at work at the same time: those that have ranks in a node share its adapters.

    **Not modelled**: groups that lie differently because degrees and devices per node have no common divisor (the one that begins at rank 0 counts).
    """

    cluster: Cluster
    degrees: tuple[tuple[str, int], ...]
    """(axis, ranks), innermost first, without ep."""
    ep: int
    ep_outermost: bool = False
    """Whether copies of one expert, not different experts, are neighbours."""

    def degree(self, axis: str) -> int:
        """Ranks of a group of an axis."""
        return self.ep if axis == "ep" else self._degree_of[axis]

    def stride(self, axis: str) -> int:
        """Distance of neighbours along an axis, in ranks."""
        if axis == "ep":
            offsets = self.replicas()
            step = len(offsets) // self.ep if self.ep_outermost else 1
            return offsets[step] if self.ep > 1 else offsets[1] if len(offsets) > 1 else 1
        return self._stride_of[axis]

    def group(self, axis: str) -> CommGroup:
        """A group of an axis, and how many such groups share a node."""
        if axis == "ep":
            offsets = self.replicas()
            return self._placed(offsets[:: len(offsets) // self.ep] if self.ep_outermost else offsets[: self.ep])
        return self._counted(
            self.degree(axis), self._inside([(self.degree(axis), self.stride(axis))], self.cluster.devices_per_node)
        )

    def replicas(self) -> tuple[int, ...]:
        """Ranks, ascending from 0, that hold the same dense parameters: those of the dp and cp axes together."""
        return self._replicas

    @cached_property
    def _degree_of(self) -> dict[str, int]:
        return dict(self.degrees)

    @cached_property
    def _stride_of(self) -> dict[str, int]:
        return {name: prod(degree for _, degree in self.degrees[:place]) for place, (name, _) in enumerate(self.degrees)}

    @cached_property
    def _replicas(self) -> tuple[int, ...]:
        data, context = self.stride("dp"), self.stride("cp")
        return tuple(sorted(data * i + context * j for i in range(self.degree("dp")) for j in range(self.degree("cp"))))

    @cached_property
    def _gradient_groups(self) -> dict[int, CommGroup]:
        """By distance; a mesh serves many plans, and each asks for every stage."""
        return {}

    def gradient_group(self, distance: int = 0) -> CommGroup:
        """Ranks that hold the same dense parameters.

        Args:
            distance: of two pipeline ranks that hold the same stage, in orders of two directions.
        """
        if distance not in self._gradient_groups:
            axes, node = [(self.degree(axis), self.stride(axis)) for axis in ("dp", "cp")], self.cluster.devices_per_node
            ranks, inside = self.degree("dp") * self.degree("cp"), self._inside(axes, node)
            if distance:
                ranks, inside = 2 * ranks, inside + self._inside(axes, node - distance * self.stride("pp"))
            self._gradient_groups[distance] = self._counted(ranks, inside)
        return self._gradient_groups[distance]

    def expert_group(self, distance: int = 0) -> CommGroup:
        """Ranks that hold the same experts; ``distance`` as in `gradient_group`."""
        offsets = self.replicas()
        copies = len(offsets) // self.ep
        return self._placed(self._across(offsets[:copies] if self.ep_outermost else offsets[:: self.ep], distance))

    def shard_group(self, num_ranks: int) -> CommGroup:
        """Ranks that share one copy of what ZeRO shards: neighbours among the replicas, so that shards are gathered over the fastest links.

        Args:
            num_ranks: of the group; divides the number of replicas.

        Raises:
            InputError: such groups would lie differently.
        """
        offsets = self.replicas()
        chunks = [offsets[first : first + num_ranks] for first in range(0, len(offsets), num_ranks)]
        if any(offset - chunk[0] != own for chunk in chunks for offset, own in zip(chunk, chunks[0], strict=True)):
            rule = f"dp_shard must divide the inner one of cp and dp or be a multiple of it, but got {self.degree('cp')} and {self.degree('dp')}"
            raise plan_refusal("parallel.dp_shard", num_ranks, rule)
        return self._placed(chunks[0])

    def copy_group(self, num_ranks: int, distance: int = 0) -> CommGroup:
        """Ranks that hold the same shard where ``num_ranks`` share one copy; ``distance`` as in `gradient_group`."""
        return self._placed(self._across(self.replicas()[::num_ranks], distance))

    def neighbours(self, axis: str) -> CommGroup:
        """Two neighbours along an axis: how messages between them travel."""
        stride = self.stride(axis)
        inside = stride < self.cluster.devices_per_node
        return CommGroup(num_ranks=2, ranks_per_node=2 if inside else 1, concurrent_groups=1 if inside else self._used)

    @property
    def _used(self) -> int:
        """Devices of a node that the plan uses."""
        return min(self.cluster.num_gpus, self.cluster.devices_per_node)

    def _across(self, offsets: Sequence[int], distance: int) -> list[int]:
        step = distance * self.stride("pp")
        return sorted({offset + other for offset in offsets for other in (0, step)})

    def _placed(self, offsets: Sequence[int]) -> CommGroup:
        """The group of ranks at such distances from the first one, which begins a node."""
        return self._counted(len(offsets), sum(offset < self.cluster.devices_per_node for offset in offsets))

    def _counted(self, ranks: int, per_node: int) -> CommGroup:
        return CommGroup(num_ranks=ranks, ranks_per_node=per_node, concurrent_groups=max(1, self._used // per_node))

    def _inside(self, axes: Sequence[tuple[int, int]], room: int) -> int:
        """Ranks below a number among those at all sums of multiples of strides: counted, not listed, for there are thousands.

        Args:
            axes: (degree, stride).
            room: the number.
        """
        if room <= 0:
            return 0
        if not axes:
            return 1
        (degree, stride), *others = axes
        return sum(self._inside(others, room - place * stride) for place in range(min(degree, -(-room // stride))))


def mesh_of(plan: Plan, cluster: Cluster) -> Mesh:
    """The plan's axes in its order on the cluster."""
    order = plan.parallel.order.split("-")
    degrees = tuple((name, getattr(plan.parallel, name)) for name in order if name != "ep")
    last = max(order.index("cp"), order.index("dp"))
    return Mesh(cluster=cluster, degrees=degrees, ep=plan.parallel.ep, ep_outermost=order.index("ep") > last)


def two_steps(group: CommGroup) -> tuple[CommGroup, ...]:
    """The groups of a hierarchical exchange: ranks of one node, then those of equal place in all nodes; one group where nodes hold unequal parts, one rank, or all ranks."""
    inside, nodes = group.ranks_per_node, group.num_nodes
    if inside == 1 or nodes == 1 or inside * nodes != group.num_ranks:
        return (group,)
    return (
        CommGroup(num_ranks=inside, ranks_per_node=inside, concurrent_groups=group.concurrent_groups),
        CommGroup(num_ranks=nodes, ranks_per_node=1, concurrent_groups=group.concurrent_groups * inside),
    )
