"""Tables of timings: the four formats, and what is said of bad cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_models.aliases import ALIASES_FILE, read_aliases
from hardware_models.errors import InputError, UnknownNameError
from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.network_tables import read_collectives, unread_rows
from hardware_models.network.platforms import NODES, platform_cluster, predict, predict_price

NCCL = "origin,source,provenance,device,nccl_version,n_gpus,n_nodes,collective,dtype,bytes,time_us,algbw_GBps,busbw_GBps\n"
NCCL_ROW = "read,aic x.parquet,0123,{device},{version},{n},1 (NVL domain),{collective},half,{size},{time},1,1\n"
VTRAIN = (
    "origin,source,provenance,gpu,n_gpus,n_nodes,collective,dtype,bytes,time_us,busbw_GBps,time_us_inplace,busbw_GBps_inplace\n"
)
VIDUR = (
    "origin,source,provenance,platform,collective,n_gpus,gpus_per_node,n_nodes,bytes,time_us_median,time_us_min,busbw_GBps\n"
)
MISC = "origin,source,provenance,platform,collective,n_gpus,n_nodes,bytes,time_us,busbw_GBps,notes\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def nccl_row(**changes: object) -> str:
    values = {
        "device": "NVIDIA H100 80GB HBM3",
        "version": "2.27.3",
        "n": 8,
        "collective": "alltoall",
        "size": 1048576,
        "time": 25.4,
    }
    return NCCL + NCCL_ROW.format(**(values | changes))


def test_nccl_tests_rows(tmp_path: Path) -> None:
    (row,) = read_collectives(write(tmp_path / "a.csv", nccl_row()))
    assert (row.device, row.stack, row.collective) == ("NVIDIA H100 80GB HBM3", "nccl-2.27.3", "all_to_all")
    assert (row.num_ranks, row.num_nodes, row.ranks_per_node, row.bytes, row.line) == (8, 1, 8, 1048576, 2)
    assert row.seconds == pytest.approx(25.4e-6)


def test_vtrain_and_vidur_rows(tmp_path: Path) -> None:
    (vtrain,) = read_collectives(
        write(tmp_path / "v.csv", VTRAIN + "read,vTrain t,0,A100,3,1,all_reduce,float,3145728,77,54,76,55\n")
    )
    assert (vtrain.stack, vtrain.num_ranks, vtrain.seconds) == ("vtrain", 3, pytest.approx(77e-6))
    (vidur,) = read_collectives(
        write(tmp_path / "w.csv", VIDUR + "read,vidur s,0,A100 DGX,all_reduce,16,8,2,2048,65.0,63.0,0.05\n")
    )
    assert (vidur.num_ranks, vidur.ranks_per_node, vidur.num_nodes, vidur.seconds) == (16, 8, 2, pytest.approx(65e-6))


def test_miscellaneous_rows(tmp_path: Path) -> None:
    text = MISC + (
        'read,stas00/ml-engineering b,0,"4 nodes x8 GPUs, fabric not stated",all_reduce,32,4,1048576,118.62,17.13,x\n'
        "read,bigscience b,0,Jean Zay V100-32 node (NVLink2),all_reduce (4 GB torch all_reduce_bench),4,1,,,165.5,x\n"
        'read,bigscience b,0,"Jean Zay 16x4 V100, 4xOPA100",all_reduce (4 GB torch all_reduce_bench),64,16,,,,23-55 Gbps\n'
        'read,NVIDIA/nvbandwidth r,0,"8-GPU A100-class node (PCIe 4.0)",H2D memcpy CE pinned,1,1,,,26.0,x\n'
        "read,NVIDIA/nvbandwidth r,0,same,H2D while D2H active (bidirectional CE),1,1,,,18.75,x\n"
        "read,NVIDIA/nvbandwidth r,0,same,D2D read CE over NVSwitch pairwise,2,1,,,276.3,x\n"
    )
    path = write(tmp_path / "m.csv", text)
    rows = read_collectives(path)
    assert [row.collective for row in rows] == [
        "all_reduce",
        "all_reduce",
        "host_to_device",
        "host_to_device_duplex",
        "device_to_device",
    ]
    assert rows[1].seconds == pytest.approx(2 * 4e9 / 165.5e9)
    assert rows[3].platform == rows[2].platform
    (unread,) = unread_rows(path)
    assert (unread.line, unread.reason) == (4, "no size and no single time (23-55 Gbps)")
    for row in rows[2:]:
        assert predict(row) == pytest.approx(row.seconds, rel=0.01)


def test_bandwidths_without_a_size_are_read_where_the_size_is_known(tmp_path: Path) -> None:
    head = 'read,PKU-DAIR/Hetu-Galvatron b,0,"Galvatron shipped profile (A100 8-GPU NVLink nodes, fabric not stated)",'
    text = MISC + (
        f"{head}all_reduce,8,1,,,154.203,allreduce_size_8_consec_1: x\n{head}all_reduce,4,2,,,157.984,allreduce_size_4_consec_1: x\n"
        f"{head}all_reduce,16,2,,,44.682,allreduce_size_16_consec_1: x\n{head}all_reduce,8,2,,,20.77,allreduce_size_8_consec_0: x\n"
        f"{head}p2p,2,1,,,163.671,pp_size_2: x\n{head}p2p,4,1,,,138.581,pp_size_4: x\n"
    )
    path = write(tmp_path / "g.csv", text)
    rows = read_collectives(path)
    assert [(row.collective, row.num_ranks, row.num_nodes) for row in rows] == [
        ("all_reduce", 8, 1),
        ("all_reduce", 4, 1),
        ("send_recv", 2, 1),
    ]
    assert rows[0].seconds == pytest.approx(2**24 * 1.75 / 154.203e9)
    assert [predict(row) / row.seconds for row in rows[:2]] == pytest.approx([1.0, 1.0], abs=0.2)
    assert [row.line for row in unread_rows(path)] == [4, 5, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "many"}, r"a\.csv: line 2, bytes = 'many': a number"),
        ({"size": ""}, r"a\.csv: line 2, bytes = '': a value is required"),
        ({"time": -1}, r"a\.csv: line 2, time_us = '-1': a positive, finite number"),
        ({"time": "nan"}, r"a\.csv: line 2, time_us = 'nan': a positive, finite number"),
        ({"n": "few"}, r"a\.csv: line 2, n_gpus = 'few': a whole number above 0"),
        ({"collective": "gossip"}, r"a\.csv: line 2, collective = 'gossip': unknown name; known are all_reduce"),
    ],
)
def test_bad_cells_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_collectives(write(tmp_path / "a.csv", nccl_row(**changes)))


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the columns hold one of"):
        read_collectives(write(tmp_path / "a.csv", "m,n,k,latency_us\n1,2,3,4\n"))
    with pytest.raises(InputError, match="no such file"):
        read_collectives(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("name", "cluster", "device"),
    [
        ("NVIDIA A100-SXM4-80GB", "dgx-a100-80gb", "a100-sxm-80gb"), ("NVIDIA A100-SXM4-40GB", "dgx-a100-40gb", "a100-sxm-40gb"),
        ("NVIDIA H100 80GB HBM3", "hgx-h100", "h100-sxm"), ("NVIDIA H200", "hgx-h200", "h200-sxm"), ("NVIDIA B200", "hgx-b200", "b200"),
        ("NVIDIA B300 SXM6 AC", "hgx-b200", "b300"), ("NVIDIA GB200", "gb200-nvl72", "gb200"), ("NVIDIA GB300", "gb200-nvl72", "gb300"),
        ("NVIDIA L40S", "l40s-8x", "l40s"), ("NVIDIA L4", "l4-workstation", "l4"), ("NVIDIA H100 PCIe", "h100-pcie-pairs", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-pcie-pairs", "h100-pcie"), ("NVIDIA GH200 480GB", "hgx-h200", "gh200"),
        ("A100 DGX", "a100-sxm-2x100gbe", "a100-sxm-80gb"), ("Jean Zay 4x8 A100, 4xOPA100", "dgx-a100-80gb", "a100-sxm-80gb"),
        ("some profile (A100 40GB, 8-GPU node)", "dgx-a100-40gb", "a100-sxm-40gb"),
    ],
)  # fmt: skip
def test_names_of_devices_find_their_cluster(name: str, cluster: str, device: str) -> None:
    found = platform_cluster(name)
    assert (found.name, found.device) == (cluster, device)


def test_every_alias_of_a_device_finds_the_node_of_that_device() -> None:
    names, _sizes = read_aliases(ALIASES_FILE)
    worded = {"a100dgx", "a100pairwisenvlink"}  # not their device's usual node
    for alias, device in names.items():
        if device in NODES and alias not in worded:
            assert platform_cluster(alias).device == device
    assert {load_cluster(cluster).name for cluster in NODES.values()} == set(NODES.values())


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"table: platform = 'Abacus'.*network/platforms\.py"):
        platform_cluster("Abacus")


@pytest.mark.parametrize(
    ("device", "n"), [("NVIDIA B300", 8), ("NVIDIA L40S", 4), ("NVIDIA GB200", 16), ("NVIDIA H200", 16), ("NVIDIA GB300", 6)]
)
@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter", "alltoall"])
def test_devices_that_nobody_timed_are_priced_by_transfer(tmp_path: Path, device: str, n: int, collective: str) -> None:
    rows = read_collectives(write(tmp_path / "a.csv", nccl_row(device=device, n=n, version="9.9.9", collective=collective)))
    price = predict_price(rows[0])
    assert 1e-6 < price.seconds < 1e-2
    assert price.evidence in {"published", "datasheet"}
