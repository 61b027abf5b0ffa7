"""Clusters of published runs: the catalogue's node of the device, with the network that the row states."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.network.cluster import Cluster, Network
from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.links import Link, find_link
from hardware_models.profile import DeviceProfile

_NODES = {
    "a100-sxm-80gb": "dgx-a100-80gb", "a100-sxm-40gb": "dgx-a100-40gb", "a100-pcie-80gb": "a100-pcie-pairs", "a40": "a40-pairs",
    "h100-sxm": "hgx-h100", "h100-sxm-96gb": "hgx-h100", "h100-pcie": "h100-pcie-pairs", "h200-sxm": "hgx-h200", "gh200": "hgx-h200",
    "b200": "hgx-b200", "b300": "hgx-b200", "gb200": "gb200-nvl72", "gb300": "gb200-nvl72", "v100-sxm2-16gb": "dgx1-v100",
    "v100-sxm2-32gb": "dgx1-v100", "v100-pcie-32gb": "a100-pcie-no-bridge", "p100-sxm2": "dgx1-v100", "l4": "l4-workstation", "l40s": "l40s-8x", "l40": "l40s-8x",
}  # fmt: skip
"""Node of a device where a row says nothing else; devices without one in the catalogue take the nearest generation's."""
_PCIE_NODE = "a100-pcie-no-bridge"
_NAMED = (
    ("selene", "a100-sxm-80gb", "selene"),
    ("jean zay", "v100-sxm2-32gb", "jean-zay-v100"),
    ("dgx-2", "v100-sxm2-32gb", "dgx2-v100"),
)
"""Words of an interconnect, device and cluster of the catalogue."""
_FAMILIES = (
    ("omni-path", "omni-path-{}"), ("omnipath", "omni-path-{}"), ("slingshot", "slingshot-11"), ("efa", "efa-{}g"), ("roce", "roce-{}g"), ("rdma", "roce-{}g"),
    ("ethernet", "roce-{}g"), ("infiniband", "infiniband-{}"), ("hdr", "infiniband-{}"), ("ndr", "infiniband-{}"), ("edr", "infiniband-{}"), (" ib", "infiniband-{}"),
)  # fmt: skip
_INFINIBAND = {100: "edr", 200: "hdr", 400: "ndr"}
_RATES = (100, 200, 400)
"""Gb/s of one adapter that the catalogue holds."""
_UNIT = r"\s*(?:gb/s|gbps|gbit/s|gb\b)"
_MANY = re.compile(r"(\d+)\s*x\s*(?:hdr|ndr|edr|fdr)?\s*(\d+)(?:" + _UNIT + ")?", re.IGNORECASE)
_NODE_RATE = re.compile(r"(\d+)" + _UNIT + r"\s*(?:/|per )\s*(?:node|server|host)", re.IGNORECASE)
_GPU_RATE = re.compile(r"(\d+)" + _UNIT + r"\s*(?:/|per )\s*gpu", re.IGNORECASE)
_PLAIN_RATE = re.compile(r"(\d+)" + _UNIT, re.IGNORECASE)
_NO_LINK = "no catalogued adapter of that rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedNetwork:
    """Adapters of a node as a row's words give them."""

    num_adapters: int
    gigabits_per_s: int
    """Of one adapter."""


def cluster_of(device: str, *, num_gpus: int, gpus_per_node: int | None, interconnect: str) -> Cluster:
    """The cluster that a row describes, with the row's number of GPUs.

    **Model**: the catalogue's cluster where the words name one; else the catalogue's node of the device, with as many devices as the row says and the adapters that
    its words state (the node's own where they state none).

    Args:
        device: the catalogue's name.
        num_gpus: of the run.
        gpus_per_node: as stated; None: the node's.
        interconnect: the row's words.

    Raises:
        InputError: GPUs that do not fill nodes, or more nodes than there is a network for.
    """
    return _cluster_of(device, num_gpus, gpus_per_node, interconnect.lower())


@lru_cache(maxsize=256)
def _cluster_of(device: str, num_gpus: int, gpus_per_node: int | None, words: str) -> Cluster:
    named = next((cluster for word, of_device, cluster in _NAMED if word in words and of_device == device), None)
    base = load_cluster(named or _NODES.get(device, _PCIE_NODE))
    profile = load_hardware(device)
    if profile.kind != "cuda":
        raise InputError(source="row", key="gpu", value=device, rule="a published run is on GPUs", remedy="name a GPU")
    base = replace(base, device=device)
    if _lacks_nvlink(profile, base):
        base = replace(base, fabric=load_cluster(_PCIE_NODE).fabric)
    sized = with_devices_per_node(base, _devices_per_node(base, num_gpus, gpus_per_node))
    stated = stated_network(words, devices_per_node=sized.devices_per_node)
    if named is None and stated is not None:
        sized = replace(sized, network=_network(sized, stated, words))
    return sized.with_gpus(num_gpus)


def _lacks_nvlink(profile: DeviceProfile, base: Cluster) -> bool:
    return not profile.peer_link.startswith("nvlink") and base.fabric.topology in {"nvswitch", "cube-mesh"}


def _devices_per_node(base: Cluster, num_gpus: int, stated: int | None) -> int:
    if stated is None or stated == num_gpus < base.devices_per_node:
        return base.devices_per_node
    return stated


def with_devices_per_node(cluster: Cluster, count: int) -> Cluster:
    """The cluster with so many devices in a node: host links and adapters are shared as before, spread over the new number."""
    if count == cluster.devices_per_node:
        return cluster
    links = _spread(cluster.host_links, count)
    network = cluster.network
    if network is not None:
        nics = _spread(network.nic_of_device, count)
        network = replace(network, nic_of_device=nics, nics_per_node=max(nics) + 1)
    fabric = cluster.fabric
    if fabric.domain_devices <= cluster.devices_per_node:
        fabric = replace(fabric, domain_devices=count)
    return replace(cluster, devices_per_node=count, host_links=links, network=network, fabric=fabric)


def _spread(owners: tuple[int, ...], count: int) -> tuple[int, ...]:
    sharing = max(1, round(len(owners) / (max(owners) + 1)))
    return tuple(device // sharing for device in range(count))


def stated_network(words: str, *, devices_per_node: int) -> StatedNetwork | None:
    """Adapters per node in the words of a row; None where they state no rate between nodes.

    **Model**: ``N x R`` as it stands; ``R per GPU``: one adapter each; ``R per node`` (or a rate alone): over 8, 4, 2 or 1 adapters, the most that are of a catalogued rate.
    """
    many = next((found for found in _MANY.finditer(words) if int(found[2]) in _RATES), None)
    if many:
        return StatedNetwork(num_adapters=int(many[1]), gigabits_per_s=int(many[2]))
    each = _GPU_RATE.search(words)
    if each and int(each[1]) in _RATES:
        return StatedNetwork(num_adapters=devices_per_node, gigabits_per_s=int(each[1]))
    whole = _NODE_RATE.search(words) or _PLAIN_RATE.search(words)
    if whole is None:
        return None
    total = int(whole[1])
    for count in (8, 4, 2, 1):
        if total % count == 0 and total // count in _RATES:
            return StatedNetwork(num_adapters=count, gigabits_per_s=total // count)
    return None


def _network(cluster: Cluster, stated: StatedNetwork, words: str) -> Network:
    devices, count = cluster.devices_per_node, min(stated.num_adapters, cluster.devices_per_node)
    owners = tuple(device * count // devices for device in range(devices))
    before = cluster.network
    return Network(
        link=_link(stated.gigabits_per_s, words, before), nic_of_device=owners, nics_per_node=count,
        oversubscription=1.0, in_network_reduction=False,
    )  # fmt: skip


def _link(rate: int, words: str, before: Network | None) -> Link:
    """The catalogued adapter of that rate and of the technology that the words name; InfiniBand where they name none."""
    pattern = next((pattern for word, pattern in _FAMILIES if word in words), "infiniband-{}")
    if pattern.startswith("infiniband"):
        return find_link(pattern.format(_INFINIBAND[rate]))
    name = pattern.format(rate)
    try:
        return find_link(name)
    except InputError:
        if before is not None and before.link.theoretical_bytes_per_s.value == rate * 1e9 / 8:
            return before.link
        return find_link(f"infiniband-{_INFINIBAND[rate]}")
