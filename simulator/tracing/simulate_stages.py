"""Simulate a traced module under a plan on a cluster: pipeline stages and replicas, each stage a stretch of the traced blocks. Imports torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster import Cluster, CommGroup
from hardware_models.network.collectives import collective_seconds
from simulator.model_source import ModelSource
from simulator.parallel.check_traced import check_traced
from simulator.parallel.mesh import mesh_of
from simulator.parallel.messages import message_link
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_traced import TracedSimulation, simulate_traced
from simulator.parallel.traced_replicas import CollectiveSeconds
from simulator.parallel.traced_step import Link, step_of
from simulator.plan import Plan, check_gpus, resolve_batch
from simulator.plan_sections import plan_refusal
from simulator.tracing.plan_stages import plan_stages, sequence_of_file

_WHOLE_PARAMETERS = (0, 1)
"""ZeRO's stages in which every rank holds its parameters and gradients whole."""


def resolve_traced(plan: Plan, source: ModelSource) -> Plan:
    """The plan with the model's batch; micro-batches of one sample in a pipeline that gives none."""
    resolved = resolve_batch(plan, batch=source.global_batch, seq_len=source.seq_len)
    if plan.batch.micro_batch is None and plan.parallel.pp > 1:
        return replace(resolved, batch=replace(resolved.batch, micro_batch=1))
    return resolved


def simulate_stages(
    source: ModelSource, plan: Plan, cluster: Cluster, *, gpus: int | None = None, folder: Path | None = None, engine: str = "compiled"
) -> TracedSimulation:  # fmt: skip
    """A traced model's step on a cluster: what replay over processes is compared with, the links and collectives being the cluster's.

    Args:
        source: a model that is traced.
        plan: its degrees say how many GPUs of the cluster it uses.
        cluster: with any number of GPUs.
        gpus: what the plan's degrees must give; None: whatever they give.
        folder: where relative files of the plan begin.
        engine: one of `simulate.ENGINES`.

    **Not modelled**: tensor parallelism and ZeRO 2 and 3 of traced modules (replay runs them); that links are shared with other traffic than a message's own.

    Raises:
        InputError: names the rule that the plan breaks.
    """
    check_gpus(plan, gpus or plan.num_gpus)
    check_traced(plan, what="simulated of a traced model over several devices")
    for key, value, simulated in (
        ("parallel.tp", plan.parallel.tp, (1,)),
        ("memory.zero_stage", plan.memory.zero_stage, _WHOLE_PARAMETERS),
    ):
        if value not in simulated:
            rule = "a traced model is cut over pp and dp only, whose ranks hold whole parameters"
            raise plan_refusal(key, value, rule, "take pp, dp and memory.zero_stage <= 1, or name a preset ('schedlab models')")
    resolved = resolve_traced(plan, source)
    sized = cluster.with_gpus(plan.num_gpus)
    traced = source.traced(resolved.batch.micro_batch)
    order = order_of(resolved, folder=folder)
    stages = [one.stage for one in plan_stages(traced, resolved, order, sequence=sequence_of_file(resolved, folder))]
    mesh = mesh_of(resolved, sized)
    rate, latency_s = message_link(mesh)
    step = step_of(
        resolved, order, stages, Link(latency_s=latency_s, bytes_per_s=rate),
        collective_s=_seconds_over(mesh.gradient_group(), sized), tied_s=_seconds_over(mesh.neighbours("pp"), sized),
    )  # fmt: skip
    return simulate_traced(step, resolved, load_hardware(sized.device), tokens=traced.workload.tokens, engine=engine)


def _seconds_over(group: CommGroup, cluster: Cluster) -> CollectiveSeconds:
    def seconds(collective: str, size_bytes: float, _ranks: int) -> float:
        return collective_seconds(collective, size_bytes, group, cluster) if group.num_ranks > 1 else 0.0

    return seconds
