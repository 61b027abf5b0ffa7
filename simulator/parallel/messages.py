"""Messages between neighbouring pipeline ranks: their link, and which frameworks wait for them."""

from __future__ import annotations

from hardware_models.network.collectives import collective_seconds
from simulator.parallel.framework import AA_SCALING
from simulator.parallel.mesh import Mesh
from simulator.parallel.recompute import MEGATRON
from simulator.plan import Plan

_BLOCKING = (*MEGATRON, *AA_SCALING)
"""Frameworks whose ranks wait for their messages in orders of one chunk (Aleph-Alpha/scaling @01b9d21dba: ``torch.distributed.send`` and ``recv`` on the stream that computes,
src/scaling/core/nn/parallel_module/communicator.py)."""
_ALWAYS_BLOCKING = ("megatron-lm@2021", "megatron-core@2023")
"""Those that also do so in interleaved orders; Megatron-core overlaps there (``overlap_p2p_comm``, on unless switched off: sail-sg/zero-bubble-pipeline-parallelism
examples/pretrain_zero_bubble.sh does so)."""
_FREE_ORDERS = ("zb-", "v-", "dualpipe")
"""How names of orders begin that split the backward pass: runtimes written for them send and receive beside computing (``fused_pipeline_ops``, sail-sg/zero-bubble-pipeline-parallelism
megatron/core/pipeline_parallel/zb_schedules.py)."""
_TINY_BYTES, _USUAL_BYTES = 8.0, 2.0**24
"""A message that is all latency, and one as large as a layer's boundary."""


def message_link(mesh: Mesh) -> tuple[float, float]:
    """Bytes/s and latency in seconds of messages between neighbouring pipeline ranks; no latency where there is one rank.

    **Model**: a message alone takes what a ``send_recv`` of 16 MiB does per byte (`collective_seconds`: one queue fills three quarters of an adapter), at most the wire's rate.
    """
    group, cluster = mesh.neighbours("pp"), mesh.cluster
    if mesh.degree("pp") == 1 and cluster.network is None:  # nothing is sent: replicas may fill the only node
        return cluster.fabric.wire_bytes_per_s(2), 0.0
    domains, _ = group.domains(cluster)
    wire = cluster.fabric.wire_bytes_per_s(2) if domains == 1 else group.network_bytes_per_s(cluster)
    if mesh.degree("pp") == 1:
        return wire, 0.0
    latency_s = collective_seconds("send_recv", _TINY_BYTES, group, cluster)
    return min(wire, _USUAL_BYTES / (collective_seconds("send_recv", _USUAL_BYTES, group, cluster) - latency_s)), latency_s


def waits_for_messages(plan: Plan) -> bool:
    """Whether a rank computes on only when its message has arrived."""
    framework, chunks = plan.runtime.framework, plan.parallel.virtual_stages
    if plan.pipeline.schedule.startswith(_FREE_ORDERS):
        return False
    return framework in _ALWAYS_BLOCKING or (framework in _BLOCKING and chunks == 1)
