"""Clusters of published runs from the words of their tables."""

from __future__ import annotations

import pytest

from hardware_models.errors import InputError
from validation.cluster_of_row import StatedNetwork, cluster_of, stated_network


@pytest.mark.parametrize(
    ("words", "adapters", "rate"),
    [
        ("nvlink3 + 8x200 gb/s hdr ib per node", 8, 200),
        ("4x 100 gb/s omni-path per node (measured 15-42 gbps)", 4, 100),
        ("nvlink; 800 gbps/node infiniband (4xhdr200)", 4, 200),
        ("nvlink + 400 gbps/node", 4, 100),
        ("nvlink intra; 1600 gbps/node roce", 8, 200),
        ("nvlink intra; 400 gb/s per gpu rdma", 8, 400),
        ("3200 gb/s per node efa", 8, 400),
    ],
)
def test_networks_in_the_words_of_sources(words: str, adapters: int, rate: int) -> None:
    assert stated_network(words, devices_per_node=8) == StatedNetwork(num_adapters=adapters, gigabits_per_s=rate)


@pytest.mark.parametrize(
    "words", ["", "nvlink/nvswitch intra; inter-node not stated", "roce rdma inter (bandwidth not stated)"]
)
def test_no_rate_is_no_network(words: str) -> None:
    assert stated_network(words, devices_per_node=8) is None


def test_a_cluster_that_the_catalogue_names_is_that_one() -> None:
    assert (
        cluster_of("a100-sxm-80gb", num_gpus=64, gpus_per_node=8, interconnect="Selene DGX A100: 8x200 Gb/s HDR").name
        == "selene"
    )


def test_stated_adapters_go_before_those_of_the_node() -> None:
    cluster = cluster_of("a100-sxm-80gb", num_gpus=16, gpus_per_node=8, interconnect="4x 100 Gb/s Omni-Path per node")
    assert cluster.network is not None
    assert (cluster.network.link.name, cluster.network.nics_per_node, cluster.network.nic_of_device) == (
        "omni-path-100",
        4,
        (0, 0, 1, 1, 2, 2, 3, 3),
    )


def test_nodes_have_as_many_devices_as_stated() -> None:
    cluster = cluster_of("v100-sxm2-32gb", num_gpus=8, gpus_per_node=4, interconnect="")
    assert (cluster.devices_per_node, cluster.num_nodes, len(cluster.host_links)) == (4, 2, 4)


@pytest.mark.parametrize(
    "device",
    [
        "h200-sxm",
        "b200",
        "gb200",
        "gb300",
        "b300",
        "h100-pcie",
        "a100-sxm-40gb",
        "v100-sxm2-16gb",
        "v100-pcie-32gb",
        "l4",
        "a40",
        "h100-sxm-96gb",
        "t4",
        "rtx-4090",
        "gh200",
    ],
)
def test_every_device_has_a_node(device: str) -> None:
    assert cluster_of(device, num_gpus=1, gpus_per_node=None, interconnect="").device == device


def test_devices_without_nvlink_do_not_get_it_from_a_stand_in() -> None:
    assert cluster_of("v100-pcie-32gb", num_gpus=4, gpus_per_node=4, interconnect="").fabric.topology == "pcie"


def test_gpus_fill_nodes() -> None:
    with pytest.raises(InputError, match="multiple of devices_per_node = 8"):
        cluster_of("a100-sxm-80gb", num_gpus=12, gpus_per_node=8, interconnect="")
