"""Links of messages between pipeline ranks, against the collective that they are."""

from __future__ import annotations

import pytest

from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.collectives import collective_seconds
from simulator.parallel.mesh import mesh_of
from simulator.parallel.messages import message_link
from tests.simulator.parallel.step_cases import plan_of

LAYER_BYTES = 2.0**24


def test_a_message_between_nodes_takes_what_a_send_takes() -> None:
    mesh = mesh_of(plan_of(pp=2, tp=8), load_cluster("dgx-a100-80gb").with_gpus(16))
    group = mesh.neighbours("pp")
    rate, latency_s = message_link(mesh)
    assert latency_s + LAYER_BYTES / rate == pytest.approx(collective_seconds("send_recv", LAYER_BYTES, group, mesh.cluster))
    assert 0.5 < rate / group.network_bytes_per_s(mesh.cluster) < 0.9


def test_no_message_passes_the_wire() -> None:
    mesh = mesh_of(plan_of(pp=8), load_cluster("dgx-a100-80gb").with_gpus(8))
    assert message_link(mesh)[0] <= mesh.cluster.fabric.wire_bytes_per_s(2)


def test_one_stage_sends_nothing() -> None:
    assert message_link(mesh_of(plan_of(tp=8), load_cluster("dgx-a100-80gb").with_gpus(8)))[1] == 0.0


def test_replicas_may_fill_the_only_node() -> None:
    """Eight of them on a cluster of one node and no network: nothing is sent between stages."""
    cluster = load_cluster("a100-pcie-8x")
    assert cluster.network is None
    rate, latency_s = message_link(mesh_of(plan_of(dp=8), cluster.with_gpus(8)))
    assert rate > 0.0 == latency_s
