"""Which catalogued cluster stands for a machine that a table names, and the price of a table's row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

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
    """Pattern of a name in a table, the cluster that stands for it, and the device where that is another one."""

    pattern: str
    cluster: str
    device: str = ""


PLATFORMS = (
    Platform(pattern=r"4 nodes x8 GPUs, fabric not stated", cluster="a100-sxm-800gbps"),
    Platform(pattern=r"CoreWeave H100", cluster="hgx-h100-sharp"),
    Platform(pattern=r"Galvatron shipped profile \(A100", cluster="dgx-a100-80gb"),
    Platform(pattern=r"Jean Zay .*V100", cluster="jean-zay-v100"),
    Platform(pattern=r"8-GPU A100-class node", cluster="dgx-a100-80gb"),
    Platform(pattern=r"V100 PCIe.*PCIe 3", cluster="dgx1-v100"),
    Platform(pattern=r"GPU with PCIe 5\.0", cluster="hgx-h100"),
    Platform(pattern=r"GCP L4", cluster="l4-gcp-8x"),
    Platform(pattern=r"^A100 DGX", cluster="a100-sxm-2x100gbe"),
    Platform(pattern=r"^H100 DGX", cluster="hgx-h100"),
    Platform(pattern=r"^A100 pairwise", cluster="a100-pcie-pairs"),
    Platform(pattern=r"^H100 pairwise", cluster="h100-pcie-pairs"),
    Platform(pattern=r"^A40 pairwise", cluster="a40-pairs"),
    Platform(pattern=r"GB300", cluster="gb200-nvl72", device="gb300"),
    Platform(pattern=r"GB200", cluster="gb200-nvl72"),
    Platform(pattern=r"B300", cluster="hgx-b200", device="b300"),
    Platform(pattern=r"B200", cluster="hgx-b200"),
    Platform(pattern=r"GH200|H200", cluster="hgx-h200"),
    Platform(pattern=r"H100.*(PCIe|NVL)|h100-pcie", cluster="h100-pcie-pairs"),
    Platform(pattern=r"H100", cluster="hgx-h100"),
    Platform(pattern=r"H20\b", cluster="hgx-h100", device="h20"),
    Platform(pattern=r"L40S", cluster="l40s-8x"),
    Platform(pattern=r"RTX 4090", cluster="l40s-8x", device="rtx-4090"),
    Platform(pattern=r"L40\b", cluster="l40s-8x", device="l40"),
    Platform(pattern=r"A40\b", cluster="a40-pairs"),
    Platform(pattern=r"L4\b", cluster="l4-workstation"),
    Platform(pattern=r"A100.*PCIe|a100-pcie", cluster="a100-pcie-8x"),
    Platform(pattern=r"A100.*40GB|a100-sxm-40gb", cluster="dgx-a100-40gb"),
    Platform(pattern=r"A100|a100-sxm", cluster="dgx-a100-80gb"),
    Platform(pattern=r"V100", cluster="dgx1-v100", device="v100-sxm2-32gb"),
)  # fmt: skip
"""Tried in this order, without regard to case."""


@lru_cache(maxsize=256)
def platform_cluster(name: str) -> Cluster:
    """The cluster that stands for a device or platform of a table.

    Raises:
        UnknownNameError: no pattern fits.
    """
    for platform in PLATFORMS:
        if re.search(platform.pattern, name, flags=re.IGNORECASE):
            cluster = load_cluster(platform.cluster)
            return replace(cluster, device=platform.device) if platform.device else cluster
    known = tuple(platform.pattern for platform in PLATFORMS)
    raise UnknownNameError(source="table", key="platform", value=name, known=known, remedy="add it to network/platforms.py")


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
