"""Clusters: the catalogue, files of one's own, placement of groups."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.network.cluster import CommGroup
from hardware_models.network.cluster_file import CLUSTERS, list_clusters, load_cluster, read_cluster, single_gpu_cluster

ASKED_FOR = (
    "dgx-a100-40gb dgx-a100-80gb hgx-h100 hgx-h200 hgx-b200 gb200-nvl72 selene dgx1-v100 dgx2-v100 a100-pcie-8x jean-zay-v100 l4-workstation"
).split()


@pytest.mark.parametrize("name", list_clusters())
def test_every_cluster_loads_and_is_whole(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.num_gpus == cluster.num_nodes * cluster.devices_per_node
    assert len(cluster.host_links) == cluster.devices_per_node
    assert cluster.source
    assert cluster.date
    if cluster.network is not None:
        assert max(cluster.network.nic_of_device) < cluster.network.nics_per_node


def test_the_catalogue_holds_what_was_asked_for() -> None:
    assert set(ASKED_FOR) <= set(list_clusters())


def test_one_gpu_and_its_host() -> None:
    cluster = load_cluster("1x:h100-sxm")
    assert (cluster.num_gpus, cluster.device, cluster.network) == (1, "h100-sxm", None)
    assert cluster.host.dram_bytes == load_cluster("hgx-h100").host.dram_bytes
    assert single_gpu_cluster("l4").fabric.host_link.name.startswith("pcie-gen4")
    with pytest.raises(UnknownNameError, match=r"1x: = 'h1000'.*h100-sxm"):
        load_cluster("1x:h1000")


def test_another_number_of_gpus() -> None:
    cluster = load_cluster("selene")
    assert cluster.with_gpus(4).num_nodes == 1
    assert cluster.with_gpus(1024).num_nodes == 128
    with pytest.raises(
        InputError, match=r"num_gpus = 12: num_gpus is between 1 and 8 or a multiple of devices_per_node = 8; ask for 16"
    ):
        cluster.with_gpus(12)
    with pytest.raises(InputError, match=r"the cluster has no \[network\], so num_gpus <= 4"):
        load_cluster("l4-workstation").with_gpus(8)


def test_an_unknown_cluster_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"cluster: name = 'selena'.*selene"):
        load_cluster("selena")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_nodes = 16", "", "num_nodes: this key is required"),
        ("num_nodes = 16", "num_nodes = -1", "num_nodes = -1: input should be greater than or equal to 1"),
        ("dram_bytes = 2000000000000", "dram_bytes = 2000", "give bytes, not GB or GiB"),
        ('link = "nvlink4"', 'link = "nvlink"', r"intra_node\.link = 'nvlink': unknown name; known are .*nvlink4"),
        (
            'link = "nvlink4"',
            'link = "nvlink3"',
            "needs topology = 'nvswitch' and NVLink 4 or later, but got 'nvswitch' and 'nvlink3'",
        ),
        (
            'device = "h100-sxm"',
            'device = "h1000"',
            r"device = 'h1000': unknown name; known are .*h100-sxm.*or give the folder of a profile",
        ),
        ('topology = "nvswitch"', 'topology = "torus"', r"intra_node\.topology = 'torus'.*choose one of these"),
        ("nics_per_node = 8", "nics_per_node = 4", "adapters are numbered from 0 below nics_per_node = 4"),
        ("devices_per_node = 8", "devices_per_node = 4", "one number for each of devices_per_node = 4"),
        ("oversubscription = 1.0", "oversubscription = 0.5", r"network\.oversubscription = 0\.5"),
        ("num_nvme = 8", "num_nvme = 8\nfans = 6", r"host\.fans = 6: unknown key"),
    ],
)
def test_bad_files_are_refused_with_key_and_rule(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (CLUSTERS / "hgx-h100.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "own.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_cluster(path)
    assert str(path) in str(caught.value)


def test_a_file_of_ones_own_loads_by_path(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    text = (CLUSTERS / "hgx-h100.toml").read_text(encoding="utf-8")
    path.write_text(
        text.replace('name = "hgx-h100"', 'name = "own"').replace("num_nodes = 16", "num_nodes = 3"), encoding="utf-8"
    )
    assert (load_cluster(path).name, read_cluster(path).num_gpus) == ("own", 24)


def test_groups_lie_on_domains_and_adapters() -> None:
    rack, nodes = load_cluster("gb200-nvl72"), load_cluster("hgx-h100")
    one = nodes.network.link.achieved_bytes_per_s.value
    assert CommGroup(num_ranks=72, ranks_per_node=4).domains(rack) == (1, 72)
    assert CommGroup(num_ranks=64, ranks_per_node=8).domains(nodes) == (8, 8)
    assert CommGroup(num_ranks=64, ranks_per_node=8).network_bytes_per_s(nodes) == pytest.approx(8 * one)
    assert CommGroup(num_ranks=8, ranks_per_node=1).network_bytes_per_s(nodes) == pytest.approx(one)
    assert CommGroup(num_ranks=8, ranks_per_node=1, concurrent_groups=16).network_bytes_per_s(nodes) == pytest.approx(one / 2)
    shared = load_cluster("dgx1-v100")
    assert CommGroup(num_ranks=4, ranks_per_node=2).network_bytes_per_s(shared) == pytest.approx(
        shared.network.link.achieved_bytes_per_s.value
    )


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(InputError, match="1 <= ranks_per_node <= num_ranks"):
        CommGroup(num_ranks=2, ranks_per_node=4)
    with pytest.raises(InputError, match=r"ranks_per_node <= devices_per_node = 4"):
        CommGroup(num_ranks=8, ranks_per_node=8).domains(load_cluster("l4-workstation"))
    with pytest.raises(InputError, match=r"a group over 2 nodes needs a \[network\]"):
        CommGroup(num_ranks=8, ranks_per_node=4).domains(load_cluster("l4-workstation"))


def test_a_cluster_loads_quickly() -> None:
    code = (
        "import time\nfrom hardware_models.network.cluster_file import load_cluster\n"
        "started = time.process_time()\nload_cluster('selene')\nprint(time.process_time() - started)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05
