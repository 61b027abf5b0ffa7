"""Which catalogued cluster stands for a machine that a table names, and the price of a table's row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from hardware_models.aliases import device_named
from hardware_models.errors import UnknownNameError
from hardware_models.network.cluster import Cluster, CommGroup
from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.collective_curves import CollectiveStack
from hardware_models.network.collectives import CollectivePrice, price_collectives
from hardware_models.network.links import find_link
from hardware_models.network.network_tables import COPIES, TimedCollective

_COPY_ERROR = 0.1
"""Relative standard error of a copy by latency and rate: PCIe 3.0 copies of 64 KiB to 1 GiB lie within 6%; rounded up for other hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """Pattern of a machine's description in a table, the cluster that stands for it, and the device where that is another one."""

    pattern: str
    cluster: str
    device: str = ""


PLATFORMS = (
    Platform(pattern=r"4 nodes x8 GPUs, fabric not stated", cluster="a100-sxm-800gbps"),
    Platform(pattern=r"CoreWeave H100", cluster="hgx-h100-sharp"),
    Platform(pattern=r"Jean Zay .*V100", cluster="jean-zay-v100"),
    Platform(pattern=r"8-GPU A100-class node", cluster="dgx-a100-80gb"),
    Platform(pattern=r"GPU with PCIe 5\.0", cluster="hgx-h100"),
    Platform(pattern=r"GCP L4", cluster="l4-gcp-8x"),
    Platform(pattern=r"^A100 DGX", cluster="a100-sxm-2x100gbe"),
    Platform(pattern=r"^A100 pairwise", cluster="a100-pcie-pairs"),
    Platform(pattern=r"^H100 pairwise|H100 NVL", cluster="h100-pcie-pairs"),
    Platform(pattern=r"H20\b", cluster="hgx-h100", device="h20"),
)
"""Machines that more than the name of their device tells apart; tried in this order, without regard to case, before `NODES`."""
NODES = MappingProxyType(
    {
        "v100-sxm2-16gb": "dgx1-v100", "v100-sxm2-32gb": "dgx1-v100", "v100-pcie-32gb": "dgx1-v100", "a100-sxm-40gb": "dgx-a100-40gb",
        "a100-sxm-80gb": "dgx-a100-80gb", "a100-pcie-80gb": "a100-pcie-8x", "a40": "a40-pairs", "l4": "l4-workstation", "l40": "l40s-8x", "l40s": "l40s-8x",
        "rtx-4090": "l40s-8x", "h100-sxm": "hgx-h100", "h100-sxm-96gb": "hgx-h100", "h100-pcie": "h100-pcie-pairs", "h200-sxm": "hgx-h200", "gh200": "hgx-h200",
        "b200": "hgx-b200", "b300": "hgx-b200", "gb200": "gb200-nvl72", "gb300": "gb200-nvl72",
    }
)  # fmt: skip
"""The usual node of a device, where a table says no more: the vendor's own, else the like board's. Names of devices are those of `device_named`."""


@lru_cache(maxsize=256)
def platform_cluster(name: str) -> Cluster:
    """The cluster that stands for a device or platform of a table.

    Raises:
        UnknownNameError: no pattern fits and the name holds that of no device with a usual node.
    """
    for platform in PLATFORMS:
        if re.search(platform.pattern, name, flags=re.IGNORECASE):
            return _with_device(platform.cluster, platform.device)
    device = _device_within(name)
    if device in NODES:
        return _with_device(NODES[device], device)
    known = (*(platform.pattern for platform in PLATFORMS), *NODES)
    raise UnknownNameError(source="table", key="platform", value=name, known=known, remedy="add it to network/platforms.py")


def _with_device(cluster_name: str, device: str) -> Cluster:
    cluster = load_cluster(cluster_name)
    return replace(cluster, device=device) if device else cluster


def _device_within(name: str) -> str:
    """The device that the longest run of words of a name names; empty where none does."""
    words = [word for word in re.split(r"[\s,()]+", name) if word]
    runs = [words[start : start + length] for length in range(len(words), 0, -1) for start in range(len(words) - length + 1)]
    for run in runs:
        with suppress(UnknownNameError):
            return device_named(" ".join(run))
    return ""


def stack_name(row: TimedCollective) -> str:
    """Name of the stack that a row belongs to: cluster and software."""
    return f"{platform_cluster(row.platform).name}-{row.stack}"


def group_of(row: TimedCollective, cluster: Cluster) -> CommGroup:
    """Placement of a row's ranks; more ranks in a "node" than it has devices fill several (an NVLink domain may be larger)."""
    return CommGroup(num_ranks=row.num_ranks, ranks_per_node=min(row.ranks_per_node, cluster.devices_per_node))


def predict(row: TimedCollective) -> float:
    """Seconds of a row of a table.

    Raises:
        InputError: the platform, collective or placement cannot be expressed.
    """
    return predict_price(row).seconds


def predict_price(row: TimedCollective, stacks: Sequence[CollectiveStack] | None = None) -> CollectivePrice:
    """Price of a row: by the row's own stack where it is known and holds the collective, else as any cluster's.

    Args:
        row: of a table.
        stacks: what was measured; default: the catalogue.

    Raises:
        InputError: the platform, collective or placement cannot be expressed.
    """
    cluster = platform_cluster(row.platform)
    if row.collective in COPIES:
        return _copy_price(row, cluster)
    version = row.stack.removeprefix("nccl-") if row.stack.startswith("nccl-") else None
    prices = price_collectives(
        row.collective, [row.bytes], group_of(row, cluster), cluster, nccl_version=version, stack=stack_name(row), stacks=stacks
    )
    return CollectivePrice(
        seconds=float(prices.seconds[0]), evidence=prices.evidence,
        relative_standard_error=prices.relative_standard_error, stack=prices.stack,
    )  # fmt: skip


def _copy_price(row: TimedCollective, cluster: Cluster) -> CollectivePrice:
    """Price of a copy over the host link, or between two devices."""
    link = cluster.fabric.link if row.collective == "device_to_device" else cluster.fabric.host_link
    if row.device.startswith("V100 PCIe"):
        link = find_link("pcie-gen3-x16")
    seconds = float(link.seconds(row.bytes))
    if row.collective == "host_to_device_duplex":
        seconds = link.latency_s.value + row.bytes / (link.duplex_capacity_bytes_per_s / 2)
    return CollectivePrice(
        seconds=seconds, evidence=link.achieved_bytes_per_s.evidence, relative_standard_error=_COPY_ERROR, stack=link.name
    )
