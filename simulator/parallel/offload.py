"""What of a step lives on the host: a rank's way there, the chunks that passes are staged in, and the bytes of each that go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from hardware_models.errors import InputError
from hardware_models.network.cluster import Cluster
from hardware_models.network.links import Link
from hardware_models.network.sharing import duplex_capacities
from simulator.parallel.stages import ChunkCost

STAGED_CHUNKS = 2
"""Chunks of a pass whose offloaded bytes are on the device at once: one computes, the other travels (double buffering)."""
LINKS_PER_RANK = 4
"""Towards the device, towards the host, both together, host memory: the order of `HostPath.capacities`."""

DRAM = 3
"""Place of host memory among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPath:
    """One rank's share of the way between its device and where offloaded bytes live, while all devices of its node do the same."""

    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    both_bytes_per_s: float
    """Most of both directions together."""
    dram_bytes_per_s: float
    latency_s: float

    @property
    def capacities(self) -> tuple[float, ...]:
        """Bytes/s of the rank's `LINKS_PER_RANK` links."""
        return (self.to_device_bytes_per_s, self.to_host_bytes_per_s, self.both_bytes_per_s, self.dram_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostUpdate:
    """The part of one rank's optimizer step that runs on the host."""

    down_bytes: tuple[float, ...]
    """Gradients that go to the host when the last micro-batch is over, of each of the rank's stages in their order."""
    each_bytes: tuple[float, ...] = ()
    """Of these, gradients that go after every micro-batch and that the host adds up; empty: none."""
    moved_bytes: float
    """Read and written by the host's step in its memory; where drives hold the states and need longer, what memory would move in their time."""
    up_bytes: float
    """Updated parameters that come back."""
    resident_bytes: float = 0.0
    """On the host (with its drives) through the whole step: master copy, moments, gradients."""
    state_bytes: float = 0.0
    """Of these, master copy and moments."""
    delayed: bool = False
    """The host updates with the gradients of the step before, beside this step's passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """What a step keeps on the host."""

    path: HostPath
    activations: float = 0.0
    """Part of what each micro-batch keeps from its forward to its backward pass."""
    weights: float = 0.0
    """Part of each chunk's parameters, fetched before each pass of the chunk and dropped after."""
    element_bytes: int = 0
    """Of one parameter."""
    updates: tuple[HostUpdate, ...] = ()
    """By pipeline rank; empty where the device updates everything."""
    returned_bytes: tuple[float, ...] = ()
    """By pipeline rank: parameters that the device has updated and that live on the host."""
    resident_bytes: tuple[float, ...] = ()
    """By pipeline rank: on the host through the whole step."""
    chunks_of_stage: tuple[tuple[ChunkCost, ...], ...] = field(default=())
    """By stage, where passes are staged."""

    @property
    def stages_passes(self) -> bool:
        """Whether passes are cut into chunks."""
        return self.activations > 0.0 or self.weights > 0.0


def host_path(cluster: Cluster, target: str = "host") -> HostPath:
    """The share of a device's way to host memory, or through it to the node's drives, that is left when all devices of the node use theirs.

    **Model**: devices on one PCIe switch port share it equally, those of a node its sockets' memory (the most crowded port and an even spread over sockets
    stand for all). Drives lie in series: the lesser rate counts, latencies add; all drives of a node work as one.

    **Source**: rates and latencies of ``hardware_models/data/links.toml``; drives behind host memory as in Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv 2104.07857).

    **Not modelled**: copies between sockets; what pageable memory costs (buffers are pinned); the buffers that bytes pass through on their way to drives.

    Raises:
        InputError: the target is drives and nodes have none.
    """
    used = min(cluster.num_gpus, cluster.devices_per_node)
    sharers = max(Counter(cluster.host_links[:used]).values())
    host, link = cluster.host, cluster.fabric.host_link
    forward, back, both = (rate / sharers for rate in duplex_capacities(link, 0)[1])
    dram = host.dram_link.achieved_bytes_per_s.value * host.sockets / used
    latency_s = link.latency_s.value
    if target == "nvme":
        drives = drive_share(cluster)
        forward, back, both = (
            min(forward, drives.reads_bytes_per_s),
            min(back, drives.writes_bytes_per_s),
            min(both, drives.both_bytes_per_s),
        )
        latency_s += drives.latency_s
    return HostPath(
        to_device_bytes_per_s=forward, to_host_bytes_per_s=back, both_bytes_per_s=both, dram_bytes_per_s=dram, latency_s=latency_s
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveShare:
    """One rank's share of its node's drives while all ranks of the node use theirs."""

    reads_bytes_per_s: float
    writes_bytes_per_s: float
    both_bytes_per_s: float
    latency_s: float

    def seconds(self, read_bytes: float, written_bytes: float) -> float:
        """Of reading and writing at the same time."""
        return max(
            read_bytes / self.reads_bytes_per_s,
            written_bytes / self.writes_bytes_per_s,
            (read_bytes + written_bytes) / self.both_bytes_per_s,
        )


def drive_share(cluster: Cluster) -> DriveShare:
    """The share of a node's drives; all of them work as one.

    Raises:
        InputError: nodes have none.
    """
    used, drive = min(cluster.num_gpus, cluster.devices_per_node), _drive(cluster)
    reads, writes, both = (rate * cluster.host.num_nvme / used for rate in duplex_capacities(drive, 0)[1])
    return DriveShare(
        reads_bytes_per_s=reads, writes_bytes_per_s=writes, both_bytes_per_s=both, latency_s=drive.latency_s.value
    )


def _drive(cluster: Cluster) -> Link:
    """The link of one of a node's drives."""
    if cluster.host.nvme_link is None or not cluster.host.num_nvme:
        raise InputError(
            source=cluster.name, key="host.num_nvme", value=cluster.host.num_nvme, rule='offload_target = "nvme" needs nodes that have drives',
            remedy='take offload_target = "host", or give the cluster file num_nvme, nvme_link and nvme_bytes',
        )  # fmt: skip
    return cluster.host.nvme_link


def weight_bytes(chunk: ChunkCost, part: float, element_bytes: int) -> int:
    """Bytes of a chunk's parameters that live on the host."""
    return int(part * chunk.parameter_elements * element_bytes)


def staged_bytes(chunks: Sequence[ChunkCost], part: float, share: float) -> tuple[int, ...]:
    """Bytes of each chunk that go to the host when it has run forward, and come back before it runs backward; shape (chunks,).

    **Model**: up to chunk k, as much may go as is still kept whenever k's bytes are on the host: at the end of every later chunk of the forward pass, and
    of the backward pass. Of all chunks together ``part`` goes.

    Args:
        chunks: of a stage, in forward order.
        part: of the bytes that the stage keeps.
        share: of a micro-batch that a pass runs.
    """
    after = [round(net * share) for net in accumulate(chunk.forward.net_bytes for chunk in chunks)]
    back = [after[-1] + round(net * share) for net in accumulate(chunk.backward.net_bytes for chunk in reversed(chunks))]
    back.reverse()  # back[k]: alive when the backward pass has run chunks k and later
    least = [min([*after[k:], *back[k + 1 :]]) for k in range(len(chunks))]
    gone = [int(part * max(0, one)) for one in least]
    return tuple(now - before for now, before in zip(gone, (0, *gone[:-1]), strict=True))
