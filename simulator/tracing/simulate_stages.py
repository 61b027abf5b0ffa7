"""Simulate a traced module under a plan on a cluster: pipeline stages and replicas, each stage a stretch of the traced blocks. Imports torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster import Cluster, CommGroup
from hardware_models.network.collectives import collective_seconds
from hardware_models.profile import DeviceProfile
from simulator.lower import PassPrices
from simulator.model_source import ModelSource
from simulator.parallel.check_traced import check_traced
from simulator.parallel.interference import overlap_of, slowdown_of
from simulator.parallel.mesh import Mesh, mesh_of
from simulator.parallel.messages import message_link
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_traced import StagesOnCluster, TracedSimulation, pass_prices, simulate_traced
from simulator.parallel.traced_replicas import CollectiveSeconds
from simulator.parallel.traced_step import Link, TracedStep, step_of
from simulator.pipeline.action import Order
from simulator.plan import Plan, check_gpus, resolve_batch
from simulator.plan_sections import plan_refusal
from simulator.sequence import Operation
from simulator.tracing.plan_stages import plan_stages, sequence_of_file
from simulator.tracing.stage_chain import StageLibrary
from simulator.tracing.trace import Traced


def resolve_traced(plan: Plan, source: ModelSource) -> Plan:
    """The plan with the model's batch; micro-batches of one sample in a pipeline that gives none."""
    resolved = resolve_batch(plan, batch=source.global_batch, seq_len=source.seq_len)
    if plan.batch.micro_batch is None and plan.parallel.pp > 1:
        return replace(resolved, batch=replace(resolved.batch, micro_batch=1))
    return resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesCase:
    """A plan of a traced model, checked and resolved."""

    plan: Plan
    cluster: Cluster
    device: DeviceProfile
    order: Order
    mesh: Mesh
    step: TracedStep
    prices: PassPrices
    tokens: int
    """Of a micro-batch."""

    def simulate(self, engine: str = "compiled") -> StagesOnCluster:
        """What the step comes to."""
        found = simulate_traced(self.step, self.plan, self.device, tokens=self.tokens, engine=engine, prices=self.prices)
        known: dict[str, Any] = {one.name: getattr(found, one.name) for one in fields(TracedSimulation)}
        firsts = accumulate((len(one.workload.blocks) for one in self.step.stages), initial=0)
        sequence = tuple(
            operation._replace(block=first + operation.block)
            for first, one in zip(firsts, self.step.stages, strict=False)
            for operation in one.operations
        )
        return StagesOnCluster(**known, cluster=self.cluster, sequence=sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSimulator:
    """Cases of one traced model on one cluster: traces, stages and prices are made once for all plans that are asked for."""

    source: ModelSource
    cluster: Cluster
    device: DeviceProfile
    """Of the cluster's devices."""
    _sources: dict[Hashable, ModelSource] = field(default_factory=dict)
    _libraries: dict[Hashable, StageLibrary] = field(default_factory=dict)
    _prices: dict[str, PassPrices] = field(default_factory=dict)

    def on(self, cluster: Cluster, device: DeviceProfile) -> StageSimulator:
        """The same model on other hardware: what was traced is shared."""
        return StageSimulator(
            source=self.source, cluster=cluster, device=device, _sources=self._sources, _libraries=self._libraries
        )

    def stage_library(self, plan: Plan) -> StageLibrary:
        """Stages of the model at a resolved plan's micro-batch and precision."""
        batch = plan.batch
        key = (plan.precision.compute, batch.global_batch, batch.seq_len)
        if key not in self._sources:
            self._sources[key] = self.source.with_plan_batch(plan)
        if (key, batch.micro_batch) not in self._libraries:
            traced: Traced = self._sources[key].traced(batch.micro_batch)
            self._libraries[key, batch.micro_batch] = StageLibrary(whole=traced)
        return self._libraries[key, batch.micro_batch]

    def prices(self, plan: Plan) -> PassPrices:
        """Times of passes in a plan's precision."""
        compute = plan.precision.compute
        if compute not in self._prices:
            self._prices[compute] = pass_prices(plan, self.device)
        return self._prices[compute]

    def case(
        self, plan: Plan, *, gpus: int | None = None, folder: Path | None = None, sequence: Sequence[Operation] | None = None
    ) -> StagesCase:
        """The case of a plan; arguments and errors as in `simulate_stages`."""
        check_gpus(plan, gpus or plan.num_gpus)
        check_traced(plan, what="simulated of a traced model over several devices", solved=sequence is not None)
        if plan.parallel.tp > 1:
            rule = "a traced model is cut over pp and dp only"
            remedy = "take pp and dp, or name a preset ('schedlab models')"
            raise plan_refusal("parallel.tp", plan.parallel.tp, rule, remedy)
        resolved = resolve_traced(plan, self.source)
        sized = self.cluster.with_gpus(plan.num_gpus)
        library, order, mesh = self.stage_library(resolved), order_of(resolved, folder=folder), mesh_of(resolved, sized)
        known = sequence_of_file(resolved, folder) if sequence is None else sequence
        stages = [one.stage for one in plan_stages(library.whole, resolved, order, sequence=known, library=library)]
        rate, latency_s = message_link(mesh)
        step = step_of(
            resolved, order, stages, Link(latency_s=latency_s, bytes_per_s=rate), collective_s=_seconds_over(mesh.gradient_group(), sized),
            tied_s=_seconds_over(mesh.neighbours("pp"), sized), slowdown=slowdown_of(overlap_of(self.device, sized)),
        )  # fmt: skip
        return StagesCase(
            plan=resolved, cluster=sized, device=self.device, order=order, mesh=mesh, step=step, prices=self.prices(resolved),
            tokens=library.whole.workload.tokens,
        )  # fmt: skip


def simulate_stages(
    source: ModelSource, plan: Plan, cluster: Cluster, *, gpus: int | None = None, folder: Path | None = None, engine: str = "compiled",
    sequence: Sequence[Operation] | None = None,
) -> StagesOnCluster:  # fmt: skip
    """A traced model's step on a cluster: what replay over processes is compared with, the links and collectives being the cluster's.

    Args:
        source: a model that is traced.
        plan: its degrees say how many GPUs of the cluster it uses.
        cluster: with any number of GPUs.
        gpus: what the plan's degrees must give; None: whatever they give.
        folder: where relative files of the plan begin.
        engine: one of `simulate.ENGINES`.
        sequence: what ``recompute = "optimal"`` stands for, blocks counted over the whole model; a ``file:SEQ`` is read here.

    **Not modelled**: tensor parallelism of traced modules (replay runs it); that links are shared with other traffic than a message's own.

    Raises:
        InputError: names the rule that the plan breaks.
    """
    simulator = StageSimulator(source=source, cluster=cluster, device=load_hardware(cluster.device))
    return simulator.case(plan, gpus=gpus, folder=folder, sequence=sequence).simulate(engine)


def _seconds_over(group: CommGroup, cluster: Cluster) -> CollectiveSeconds:
    def seconds(collective: str, size_bytes: float, _ranks: int) -> float:
        return collective_seconds(collective, size_bytes, group, cluster) if group.num_ranks > 1 else 0.0

    return seconds
