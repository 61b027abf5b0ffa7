"""Clusters: nodes of devices, how they are wired inside and between nodes, and how a group of ranks lies on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from hardware_models.errors import InputError
from hardware_models.network.links import Link
from hardware_models.profile import Evidence

Topology = Literal["nvswitch", "nvlink-pairs", "cube-mesh", "pcie", "none"]

CUBE_MESH_LANES = {2: 1.0, 3: 2.0, 4: 4.0, 5: 1.6, 6: 2.0, 7: 4.0, 8: 6.0}
"""NVLink lanes that rings over the first n of eight V100 use: bus rates of the largest all-reduces over 22.5 GB/s a lane
(VIA-Research/vTrain trace/v100 @f8dda8473a)."""
CUBE_MESH_MOST_LANES = 6.0
"""NVLink lanes of a V100."""
PAIR_RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """What joins the devices of a node, or of a rack where NVLink leaves the node."""

    topology: Topology
    link: Link
    """Of one device."""
    host_link: Link
    """What devices without NVLink between them use."""
    in_network_reduction: bool
    """The switch adds (NVLS): NVLink 4 and later."""
    domain_devices: int
    """Devices that reach each other without a network adapter."""

    def wire_bytes_per_s(self, num_ranks: int) -> float:
        """Achieved bytes/s per direction that a ring over the first ``num_ranks`` devices has."""
        if self.topology == "nvswitch" or (self.topology == "nvlink-pairs" and num_ranks <= PAIR_RANKS):
            return self.link.achieved_bytes_per_s.value
        if self.topology == "cube-mesh":
            lanes = CUBE_MESH_LANES.get(num_ranks, CUBE_MESH_MOST_LANES)
            return self.link.achieved_bytes_per_s.value * lanes / CUBE_MESH_MOST_LANES
        return self.host_link.achieved_bytes_per_s.value

    def has_nvlink(self, num_ranks: int) -> bool:
        """Whether a ring over the first ``num_ranks`` devices stays on NVLink."""
        return self.topology in {"nvswitch", "cube-mesh"} or (self.topology == "nvlink-pairs" and num_ranks <= PAIR_RANKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Host memory and drives of one node."""

    sockets: int
    dram_bytes: int
    dram_link: Link
    """Memory bus of one socket."""
    num_nvme: int
    nvme_link: Link | None
    nvme_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Adapters of one node and the switches between nodes."""

    link: Link
    nic_of_device: tuple[int, ...]
    """Adapter that each device of a node uses; equal numbers share one."""
    nics_per_node: int
    oversubscription: float
    """Bandwidth into a leaf switch over bandwidth out of it, at least 1."""
    in_network_reduction: bool
    """The switches add (SHARP)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """``num_gpus`` equal devices in equal nodes.

    **Not modelled**: nodes that differ; which leaf switch a node hangs on (oversubscription holds between any two nodes).
    """

    name: str
    device: str
    """Name of the device's profile."""
    num_gpus: int
    devices_per_node: int
    fabric: Fabric
    host_links: tuple[int, ...]
    """Host link (PCIe switch port) that each device of a node uses; equal numbers share one."""
    host: Host
    network: Network | None
    evidence: Evidence
    source: str
    date: str

    def __hash__(self) -> int:
        """Of what tells most clusters apart: prices of collectives are looked up by their cluster again and again."""
        return hash((self.name, self.device, self.num_gpus))

    @property
    def num_nodes(self) -> int:
        """Nodes that hold the GPUs."""
        return ceil(self.num_gpus / self.devices_per_node)

    def with_gpus(self, num_gpus: int) -> Cluster:
        """This cluster with another number of GPUs: part of a node, or whole nodes.

        Raises:
            InputError: not so, or more than the NVLink domain holds while there is no network.
        """
        if num_gpus < 1 or (num_gpus > self.devices_per_node and num_gpus % self.devices_per_node):
            raise InputError(
                source=self.name, key="num_gpus", value=num_gpus,
                rule=f"num_gpus is between 1 and {self.devices_per_node} or a multiple of devices_per_node = {self.devices_per_node}",
                remedy=f"ask for {max(1, round(num_gpus / self.devices_per_node)) * self.devices_per_node}",
            )  # fmt: skip
        most = max(self.devices_per_node, self.fabric.domain_devices)
        if self.network is None and num_gpus > most:
            raise InputError(
                source=self.name, key="num_gpus", value=num_gpus, rule=f"the cluster has no [network], so num_gpus <= {most}",
                remedy="add a [network] section to a cluster file of your own",
            )  # fmt: skip
        return replace(self, num_gpus=num_gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommGroup:
    """Ranks of one communicator and how they lie.

    Args:
        num_ranks: ranks of the group.
        ranks_per_node: of them in each node; a group inside a node has ``ranks_per_node == num_ranks``.
        concurrent_groups: such groups at work at once in each node; they share its adapters.
    """

    num_ranks: int
    ranks_per_node: int
    concurrent_groups: int = 1

    def __post_init__(self) -> None:
        if min(self.num_ranks, self.ranks_per_node, self.concurrent_groups) < 1 or self.ranks_per_node > self.num_ranks:
            raise InputError(
                source="group", key="ranks_per_node", value=(self.num_ranks, self.ranks_per_node, self.concurrent_groups),
                rule="1 <= ranks_per_node <= num_ranks and concurrent_groups >= 1 must hold", remedy="correct the placement",
            )  # fmt: skip

    @property
    def num_nodes(self) -> int:
        """Nodes that the group touches."""
        return ceil(self.num_ranks / self.ranks_per_node)

    def domains(self, cluster: Cluster) -> tuple[int, int]:
        """Number of NVLink domains that the group touches, and its ranks in each.

        Raises:
            InputError: more ranks in a node than it has devices, or several nodes without a network between them.
        """
        if self.ranks_per_node > cluster.devices_per_node:
            raise InputError(
                source=cluster.name, key="ranks_per_node", value=self.ranks_per_node,
                rule=f"ranks_per_node <= devices_per_node = {cluster.devices_per_node}", remedy="spread the group over more nodes",
            )  # fmt: skip
        nodes_per_domain = max(1, cluster.fabric.domain_devices // cluster.devices_per_node)
        ranks = min(self.num_ranks, self.ranks_per_node * nodes_per_domain)
        count = ceil(self.num_ranks / ranks)
        if count > 1 and cluster.network is None:
            raise InputError(
                source=cluster.name, key="network", value=None, rule=f"a group over {self.num_nodes} nodes needs a [network]",
                remedy="keep the group inside a node or add the section",
            )  # fmt: skip
        return count, ranks

    def network_bytes_per_s(self, cluster: Cluster) -> float:
        """Achieved bytes/s per direction between nodes that one node's part of the group has.

        **Model**: adapters that its ranks reach, each divided by the groups at work, and by the oversubscription.
        """
        network = cluster.network
        assert network is not None
        _, ranks = self.domains(cluster)
        reached = len(
            {network.nic_of_device[rank % cluster.devices_per_node] for rank in range(min(ranks, cluster.devices_per_node))}
        )
        nodes_per_domain = max(1, ranks // self.ranks_per_node)
        share = min(reached, network.nics_per_node / self.concurrent_groups)
        return network.link.achieved_bytes_per_s.value * share * nodes_per_domain / network.oversubscription
