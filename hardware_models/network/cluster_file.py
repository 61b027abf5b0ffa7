"""Clusters on disk: the catalogue and files of the user's own."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hardware_models.catalogue import THIS, catalogue_names
from hardware_models.errors import InputError, UnknownNameError
from hardware_models.network.cluster import Cluster, Fabric, Host, Network, Topology
from hardware_models.network.links import find_link
from hardware_models.profile import DeviceProfile
from hardware_models.profile_file import DEVICE_FILE
from hardware_models.toml_file import Count, MemoryBytes, Name, Section, SourcedSection, read_section

CLUSTERS = Path(__file__).parents[1] / "data" / "clusters"
SINGLE = "1x:"
"""Prefix of a name: one GPU of this profile and its host."""
FIRST_NVLS_GENERATION = 4
"""NVLink generation whose switches add (NVIDIA H100 data sheet: in-network reduction of the third NVSwitch)."""

_Index = Annotated[int, Field(ge=0)]


class _IntraNode(Section):
    topology: Topology
    link: Name
    in_network_reduction: bool = False
    domain_devices: Count | None = None


class _HostSection(Section):
    link: Name
    link_of_device: list[_Index]
    sockets: Count
    dram_bytes: MemoryBytes
    dram_link: Name
    num_nvme: _Index = 0
    nvme_link: Name | None = None
    nvme_bytes: MemoryBytes | None = None


class _NetworkSection(Section):
    link: Name
    nics_per_node: Count
    nic_of_device: list[_Index]
    oversubscription: Annotated[float, Field(ge=1, le=64, allow_inf_nan=False)] = 1.0
    in_network_reduction: bool = False


class _ClusterFile(SourcedSection):
    format: Literal[1]
    name: Name
    device: Name
    num_nodes: Count
    devices_per_node: Count
    intra_node: _IntraNode
    host: _HostSection
    network: _NetworkSection | None = None


def list_clusters() -> tuple[str, ...]:
    """Names that the catalogue holds, sorted."""
    return tuple(sorted(path.stem for path in CLUSTERS.glob("*.toml")))


def find_cluster(name: str) -> Cluster | None:
    """The cluster of a name that may also be a device's: None where it is one (of the catalogue, ``this``, or a profile's path).

    Raises:
        UnknownNameError: neither; lists both kinds.
        InputError: the cluster's file breaks a rule.
    """
    path = Path(name)
    if (
        name in list_clusters()
        or name.startswith(SINGLE)
        or (path.suffix == ".toml" and path.name != DEVICE_FILE and path.is_file())
    ):
        return load_cluster(name)
    known = (*catalogue_names(), THIS, *list_clusters())
    if name in known or path.exists():
        return None
    meant = get_close_matches(name, known, n=1)
    raise UnknownNameError(
        source="--hardware", key="name", value=name, known=known,
        remedy=(f"did you mean {meant[0]!r}? " if meant else "") + "Or give a profile's folder ('schedlab calibrate --device cuda --out DIR') or a cluster's file",
    )  # fmt: skip


def load_cluster(name_or_path: str | Path) -> Cluster:
    """The cluster of a catalogue name, of ``1x:PROFILE`` (one GPU and its host), or of a TOML file.

    Raises:
        UnknownNameError: neither a name in the catalogue nor a file.
        InputError: the file breaks a rule.
    """
    text = str(name_or_path)
    if text.startswith(SINGLE):
        return single_gpu_cluster(text.removeprefix(SINGLE))
    if text in list_clusters():
        return read_cluster(CLUSTERS / f"{text}.toml")
    path = Path(name_or_path)
    if path.is_file():
        return read_cluster(path)
    raise UnknownNameError(
        source="cluster", key="name", value=text, known=(*list_clusters(), f"{SINGLE}PROFILE"), remedy="or give a TOML file"
    )


def single_gpu_cluster(profile: str | DeviceProfile) -> Cluster:
    """One GPU of a profile and its host: the node of the first catalogued cluster that has the device, else PCIe 4.0 and 256 GB.

    Raises:
        UnknownNameError: no such profile in the catalogue.
    """
    name = profile if isinstance(profile, str) else profile.name
    if isinstance(profile, str) and name not in catalogue_names():
        raise UnknownNameError(
            source="cluster", key=SINGLE, value=name, known=catalogue_names(), remedy="name a device's profile"
        )
    for known in list_clusters():
        cluster = read_cluster(CLUSTERS / f"{known}.toml")
        if cluster.device == name:
            return replace(cluster, name=f"{SINGLE}{name}", num_gpus=1, network=None)
    generic = read_cluster(CLUSTERS / "generic-gpu-host.toml")
    return replace(generic, name=f"{SINGLE}{name}", device=name)


def cluster_of_device(name: str, *, num_gpus: int) -> Cluster:
    """So many GPUs of a device in the catalogued cluster whose nodes have the fastest network among those that have the device; ties to the first name.

    Raises:
        InputError: no catalogued cluster has so many of them.
    """
    known = [read_cluster(CLUSTERS / f"{one}.toml") for one in list_clusters()]
    same = [cluster for cluster in known if cluster.device == name]
    enough = [
        one for one in same if one.network is not None or num_gpus <= max(one.devices_per_node, one.fabric.domain_devices)
    ]
    if not enough:
        raise InputError(
            source="--hardware", key="name", value=name, rule=f"no catalogued cluster has {num_gpus} of this device",
            remedy=f"name a cluster ({', '.join(list_clusters())}) or give a cluster's file",
        )  # fmt: skip
    return max(enough, key=_network_bytes_per_s).with_gpus(num_gpus)


def _network_bytes_per_s(cluster: Cluster) -> float:
    """Of a node; 0 where there is no network."""
    network = cluster.network
    return 0.0 if network is None else network.nics_per_node * network.link.achieved_bytes_per_s.value


@lru_cache(maxsize=64)
def read_cluster(path: Path) -> Cluster:
    """The cluster of a TOML file.

    Raises:
        InputError: a key is missing or unknown, a value breaks a rule, or a list has another length than the node has devices.
        UnknownNameError: a link or device that is not catalogued.
    """
    file = read_section(_ClusterFile, path)
    source = str(path)
    _check_device(file.device, source)
    _check_lengths(file, source)
    per_node = file.devices_per_node
    host_link = find_link(file.host.link, source=source, key="host.link")
    intra = file.intra_node
    link = find_link(intra.link, source=source, key="intra_node.link")
    if intra.in_network_reduction and (intra.topology != "nvswitch" or link.generation < FIRST_NVLS_GENERATION):
        raise InputError(
            source=source, key="intra_node.in_network_reduction", value=True,
            rule=f"needs topology = 'nvswitch' and NVLink {FIRST_NVLS_GENERATION} or later, but got '{intra.topology}' and '{intra.link}'", remedy="set it to false",
        )  # fmt: skip
    return Cluster(
        name=file.name, device=file.device, num_gpus=file.num_nodes * per_node, devices_per_node=per_node,
        fabric=Fabric(
            topology=intra.topology, link=link, host_link=host_link, in_network_reduction=intra.in_network_reduction,
            domain_devices=intra.domain_devices or per_node,
        ),
        host_links=tuple(file.host.link_of_device), host=_host(file.host, source), network=_network(file.network, source),
        evidence=file.evidence, source=file.source, date=file.date,
    )  # fmt: skip


def _check_device(device: str, source: str) -> None:
    if device not in (*catalogue_names(), THIS) and not Path(device).is_dir():
        raise UnknownNameError(
            source=source,
            key="device",
            value=device,
            known=(*catalogue_names(), THIS),
            remedy="or give the folder of a profile",
        )


def _check_lengths(file: _ClusterFile, source: str) -> None:
    lists = {"host.link_of_device": file.host.link_of_device}
    if file.network is not None:
        lists["network.nic_of_device"] = file.network.nic_of_device
        if max(file.network.nic_of_device, default=0) >= file.network.nics_per_node:
            raise InputError(
                source=source, key="network.nic_of_device", value=file.network.nic_of_device,
                rule=f"adapters are numbered from 0 below nics_per_node = {file.network.nics_per_node}", remedy="correct the numbers",
            )  # fmt: skip
    elif file.num_nodes > 1 and (file.intra_node.domain_devices or 0) < file.num_nodes * file.devices_per_node:
        raise InputError(source=source, key="network", value=None, rule="several nodes need a [network]", remedy="add it")
    for key, values in lists.items():
        if len(values) != file.devices_per_node:
            raise InputError(
                source=source, key=key, value=values, rule=f"one number for each of devices_per_node = {file.devices_per_node}",
                remedy="give one for each device, equal ones where devices share",
            )  # fmt: skip


def _host(section: _HostSection, source: str) -> Host:
    if section.num_nvme and (section.nvme_link is None or section.nvme_bytes is None):
        raise InputError(
            source=source,
            key="host.nvme_link",
            value=section.nvme_link,
            rule="drives have nvme_link and nvme_bytes",
            remedy="add both",
        )
    nvme = None if section.nvme_link is None else find_link(section.nvme_link, source=source, key="host.nvme_link")
    return Host(
        sockets=section.sockets, dram_bytes=section.dram_bytes, dram_link=find_link(section.dram_link, source=source, key="host.dram_link"),
        num_nvme=section.num_nvme, nvme_link=nvme, nvme_bytes=section.nvme_bytes or 0,
    )  # fmt: skip


def _network(section: _NetworkSection | None, source: str) -> Network | None:
    if section is None:
        return None
    return Network(
        link=find_link(section.link, source=source, key="network.link"), nic_of_device=tuple(section.nic_of_device),
        nics_per_node=section.nics_per_node, oversubscription=section.oversubscription, in_network_reduction=section.in_network_reduction,
    )  # fmt: skip
