"""Prices of collectives: conventions, hand-computed physics, limits, monotonicity and agreement with published timings."""

from __future__ import annotations

from dataclasses import replace
from time import process_time

import numpy as np
import pytest

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.network.cluster import CommGroup
from hardware_models.network.cluster_file import list_clusters, load_cluster
from hardware_models.network.collective_algorithms import (
    COLLECTIVES,
    ProtocolLine,
    Wire,
    bus_factor,
    canonical,
    network_factor,
    num_steps,
    physical_seconds,
)  # fmt: skip
from hardware_models.network.collective_curves import CollectiveCurve, CollectiveStack, catalogued_stacks
from hardware_models.network.collectives import collective_seconds, price_collective, price_collectives
from hardware_models.units import GIB, MIB

RING = ProtocolLine(algorithm="ring", base_s=1e-6, step_s=2e-6, inverse_efficiency=1.25)
NVLS = ProtocolLine(algorithm="nvls", base_s=30e-6, step_s=0.0, inverse_efficiency=1.5)


def eight(cluster: str = "hgx-h100", ranks: int = 8) -> tuple[CommGroup, object]:
    return CommGroup(num_ranks=ranks, ranks_per_node=ranks), load_cluster(cluster)


def wire(num_ranks: int, *, nvls: bool = False, rate: float = 100e9) -> Wire:
    return Wire(
        scope="intra",
        num_ranks=num_ranks,
        count=num_ranks,
        ranks_per_domain=num_ranks,
        bytes_per_s=rate,
        in_network_reduction=nvls,
    )


@pytest.mark.parametrize(
    ("alias", "name"), [("AllReduce", "all_reduce"), ("alltoall", "all_to_all"), ("all2all", "all_to_all"), ("p2p", "send_recv"), ("reduce-scatter", "reduce_scatter")]
)  # fmt: skip
def test_aliases(alias: str, name: str) -> None:
    assert canonical(alias) == name


def test_an_unknown_collective_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"gossip.*all_reduce, all_gather"):
        canonical("gossip")


def test_bus_factors_are_those_of_nccl_tests() -> None:
    assert [bus_factor(name, 4) for name in COLLECTIVES] == [1.5, 0.75, 0.75, 0.75, 1.0, 1.0]
    assert network_factor("all_to_all", 16, 8) == pytest.approx(4.0)
    assert network_factor("all_reduce", 16, 8) == bus_factor("all_reduce", 16)


def test_steps_of_rings_and_trees() -> None:
    assert [num_steps(name, 4, "intra") for name in COLLECTIVES] == [6, 3, 3, 3, 3, 1]
    assert num_steps("all_reduce", 64, "intra") == pytest.approx(28)
    assert num_steps("all_reduce", 16, "inter") == 8
    assert num_steps("all_gather", 2, "inter") == 1
    assert num_steps("all_gather", 281, "inter") == 140
    assert num_steps("all_gather", 281, "inter", num_ranks=8 * 281) == pytest.approx(140 + 7 * 281 / 8)
    assert num_steps("all_reduce", 16, "inter", num_ranks=128) == 8


def test_the_fastest_line_is_taken_and_switches_add_only_where_they_can() -> None:
    size = np.array([1e9])
    ring = 1e-6 + 14 * 2e-6 + 1.25 * 1.75 * 1e9 / 100e9
    in_switch = 30e-6 + 1.5 * 1.125 * 1e9 / 100e9
    assert physical_seconds([RING, NVLS], "all_reduce", size, wire(8)) == pytest.approx([ring])
    assert physical_seconds([RING, NVLS], "all_reduce", size, wire(8, nvls=True)) == pytest.approx([in_switch])
    half = 1e-6 + 7 * 2e-6 + 1.25 * 0.875 * 1e9 / 100e9
    assert physical_seconds([RING, NVLS], "all_gather", size, wire(8, nvls=True)) == pytest.approx([half])


def stack(**changes: object) -> CollectiveStack:
    curve = CollectiveCurve(
        collective="all_reduce", num_ranks=8, num_domains=1, log2_bytes=(10.0, 20.0), log_ratio=(0.0, float(np.log(2.0))),
        num_rows=2, relative_standard_error=0.05, median_error=0.03,
    )  # fmt: skip
    values = {
        "name": "made", "cluster": "dgx-a100-80gb", "nccl_version": "1", "automatic": ("intra",), "source": "made up", "commit": "0",
        "date": "2026-11-23", "lines": {("all_reduce", "intra"): (RING,)}, "curves": (curve,),
    }  # fmt: skip
    return CollectiveStack(**(values | changes))  # type: ignore[arg-type]


def test_ratio_is_linear_between_knots_and_constant_beyond() -> None:
    group, cluster = eight("dgx-a100-80gb")
    sizes = np.array([2.0**10, 2.0**15, 2.0**20, 2.0**30])
    prices = price_collectives("all_reduce", sizes, group, cluster, stacks=[stack()])
    physical = 1e-6 + 14 * 2e-6 + 1.25 * 1.75 * sizes / 276.3e9
    assert prices.seconds / physical == pytest.approx([1.0, np.sqrt(2.0), 2.0, 2.0])
    assert (prices.evidence, prices.relative_standard_error) == ("measured", 0.05)


def test_transfer_scales_rate_and_clock_and_says_so() -> None:
    """H100 from an A100 stack: 1.5 times the rate, 1.98 / 1.41 times the clock, the ratio at the size of the same duration."""
    group, cluster = eight("hgx-h100")
    prices = price_collectives("all_reduce", [2.0**30], group, cluster, stacks=[stack()])
    clock = 1.41 / 1.98
    assert prices.seconds == pytest.approx([2 * (clock * 29e-6 + 1.25 * 1.75 * 2**30 / (450e9 * 0.921))])
    assert prices.evidence == "published"
    assert prices.relative_standard_error == pytest.approx(np.hypot(0.05, 0.3))
    near = price_collectives("all_reduce", [2.0**30], group, load_cluster("dgx-a100-40gb"), stacks=[stack()])
    assert near.relative_standard_error == pytest.approx(np.hypot(0.05, 0.1))


def test_a_collective_that_nobody_timed_is_physics_alone() -> None:
    group, cluster = eight("dgx-a100-80gb")
    price = price_collectives("all_to_all", [1e9], group, cluster, stacks=[stack()])
    assert price.evidence == "datasheet"
    assert price.seconds == pytest.approx([1e-6 + 7 * 2e-6 + 1.25 * 0.875 * 1e9 / 276.3e9])


PUBLISHED = (
    ("dgx-a100-80gb", "all_reduce", 8, 2**29, 4225.9e-6), ("hgx-h100", "all_reduce", 8, MIB, 25.4e-6), ("hgx-h100", "all_gather", 4, 2**27, 352.4e-6),
    ("hgx-h200", "reduce_scatter", 2, 2**26, 164.8e-6), ("hgx-b200", "all_to_all", 8, 2**29, 834.2e-6), ("gb200-nvl72", "all_reduce", 4, 2**28, 662.9e-6),
)  # fmt: skip
"""Cells of ai-dynamo/aiconfigurator's nccl tables @095f58a51c."""


@pytest.mark.parametrize(("name", "collective", "ranks", "size", "seconds"), PUBLISHED)
def test_curves_agree_with_published_timings(name: str, collective: str, ranks: int, size: int, seconds: float) -> None:
    group, cluster = eight(name, ranks)
    price = price_collective(collective, size, group, cluster)
    assert price.evidence == "measured"
    assert price.seconds == pytest.approx(seconds, rel=0.06)


@pytest.mark.parametrize("name", list_clusters())
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_cluster_prices_every_collective(name: str, collective: str) -> None:
    cluster = load_cluster(name)
    ranks = 2 if collective == "send_recv" else cluster.devices_per_node
    if cluster.devices_per_node < ranks:
        return
    group = CommGroup(num_ranks=ranks, ranks_per_node=ranks)
    prices = price_collectives(collective, 2.0 ** np.arange(8, 36), group, cluster)
    if ranks == 1:
        assert (prices.seconds == 0).all()
        return
    assert np.isfinite(prices.seconds).all()
    assert (prices.seconds > 1e-6).all()
    busbw = 2.0**35 * bus_factor(collective, ranks) / prices.seconds[-1]
    limit = 2.0 if cluster.fabric.in_network_reduction else 1.1
    assert 0.1 < busbw / cluster.fabric.wire_bytes_per_s(ranks) < limit


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "all_to_all", "broadcast"])
def test_large_sizes_grow_in_proportion(collective: str) -> None:
    group, cluster = eight()
    one, two = (collective_seconds(collective, size, group, cluster) for size in (32 * GIB, 64 * GIB))
    assert two / one == pytest.approx(2.0, rel=0.01)


def test_broadcast_is_an_all_gather_of_the_same_wire_bytes() -> None:
    group, cluster = eight()
    assert collective_seconds("broadcast", 7e6, group, cluster) == pytest.approx(
        collective_seconds("all_gather", 8e6, group, cluster)
    )


def test_other_numbers_of_ranks_lie_between() -> None:
    cluster = load_cluster("dgx-a100-80gb")
    times = [collective_seconds("all_gather", 64 * MIB, CommGroup(num_ranks=n, ranks_per_node=n), cluster) for n in range(2, 9)]
    assert times == sorted(times)


def test_a_rack_is_one_domain_and_nodes_are_several() -> None:
    group = CommGroup(num_ranks=64, ranks_per_node=4)
    rack = price_collective("all_gather", GIB, group, load_cluster("gb200-nvl72"))
    nodes = price_collective("all_gather", GIB, CommGroup(num_ranks=64, ranks_per_node=8), load_cluster("hgx-b200"))
    assert rack.seconds < nodes.seconds


def test_adapters_bound_what_crosses_nodes() -> None:
    cluster = load_cluster("hgx-h100")
    whole = collective_seconds("all_reduce", GIB, CommGroup(num_ranks=16, ranks_per_node=8), cluster)
    thin = collective_seconds("all_reduce", GIB, CommGroup(num_ranks=2, ranks_per_node=1), cluster)
    crowded = collective_seconds("all_reduce", GIB, CommGroup(num_ranks=2, ranks_per_node=1, concurrent_groups=16), cluster)
    assert thin > 2 * GIB / 2 / 50e9
    assert whole < thin < crowded
    narrow = replace(cluster, network=replace(cluster.network, oversubscription=4.0))
    assert collective_seconds("all_reduce", GIB, CommGroup(num_ranks=16, ranks_per_node=8), narrow) > 2 * whole


def test_small_messages_of_stacks_that_lack_them_come_from_one_that_has_them() -> None:
    """V100's table begins at 1 MiB; nothing jumps there, and a kilobyte costs latency, not the fit's intercept."""
    group, cluster = eight("dgx1-v100")
    sizes = MIB * (1.0 + np.array([-1e-6, 1e-6]))
    before, after = price_collectives("all_reduce", sizes, group, cluster).seconds
    assert before == pytest.approx(after, rel=1e-3)
    assert 10e-6 < collective_seconds("all_reduce", 1024, group, cluster) < 40e-6


def test_the_version_asked_for_is_preferred() -> None:
    group, cluster = eight("hgx-h100")
    assert price_collective("all_reduce", MIB, group, cluster, nccl_version="2.27.3").stack == "hgx-h100-nccl-2.27.3"
    assert price_collective("all_reduce", MIB, group, cluster).stack == "hgx-h100-nccl-2.29.2"


def test_one_rank_costs_nothing_and_bad_arguments_are_refused() -> None:
    group, cluster = eight()
    assert collective_seconds("all_reduce", 1e9, CommGroup(num_ranks=1, ranks_per_node=1), cluster) == 0.0
    with pytest.raises(InputError, match="sizes are finite and >= 0"):
        collective_seconds("all_reduce", -1.0, group, cluster)
    with pytest.raises(UnknownNameError, match="dtype = 'fp7'"):
        collective_seconds("all_reduce", 1.0, group, cluster, dtype="fp7")
    with pytest.raises(InputError, match="send_recv has two ranks"):
        collective_seconds("send_recv", 1.0, group, cluster)


def test_a_hundred_thousand_sizes_are_quick() -> None:
    group, cluster = eight()
    sizes = np.logspace(2, 10, 100_000)
    price_collectives("all_reduce", sizes[:1], group, cluster)
    started = process_time()
    price_collectives("all_reduce", sizes, group, cluster)
    assert process_time() - started < 0.1


@pytest.mark.parametrize("one", catalogued_stacks(), ids=lambda one: one.name)
def test_every_stack_states_source_and_residuals(one: CollectiveStack) -> None:
    assert one.source
    assert one.commit
    assert one.machine.name == one.cluster
    assert all(curve.median_error <= curve.relative_standard_error + 1e-9 for curve in one.curves)
    assert all(0 < curve.relative_standard_error < 1.2 for curve in one.curves if curve.num_rows > 1)
