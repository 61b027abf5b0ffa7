"""What a plan over several processes of one machine is predicted to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hardware_models.errors import InfeasibleError
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes
from search.stage_recompute import MOST_ATTEMPTS
from search.traced.plans import budget_bytes, sequence_of_stages
from simulator.lower import PassPrices
from simulator.model_source import ModelSource
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_traced import TracedSimulation, pass_prices, simulate_traced
from simulator.parallel.traced_replicas import Rings
from simulator.parallel.traced_stage import TracedStage
from simulator.parallel.traced_step import Link, TracedStep, step_of
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.program import Kind
from simulator.sequence import Operation
from simulator.timeline import Timeline
from simulator.tracing.capture import build_fake
from simulator.tracing.plan_stages import PlannedStage, plan_stages, sequence_of_file
from simulator.tracing.stage_chain import StageLibrary
from simulator.tracing.trace import Traced
from simulator.tracing.traced_model import TracedModel
from validation.distributed.check import check_order, check_processes, runs_whole_modules
from validation.distributed.fully_sharded import check_sharded
from validation.distributed.job import LinkFacts
from validation.distributed.module_prediction import ModuleSimulation, module_step, simulate_module
from validation.distributed.tensor_parallel import check_tensor_parallel

_UNKNOWN_LINK = LinkFacts(latency_s=0.0, bytes_per_s=float("inf"))
"""Memory does not depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepCase:
    """A `search.traced.plans.StepCase`."""

    plan: Plan
    device: DeviceProfile
    order: Order
    step: TracedStep
    prices: PassPrices


class Prediction:
    """A traced model under a plan.

    Args:
        traced: at the plan's micro-batch.
        plan: with its batch resolved.
        device: prices kernels; on a CPU all its cores.
        cores: of this machine.
        folder: where relative files of the plan begin.

    Raises:
        InputError: the plan cannot be run over processes.
    """

    def __init__(self, traced: Traced, plan: Plan, device: DeviceProfile, *, cores: int, folder: Path | None = None) -> None:
        check_processes(plan)
        self.plan, self.device, self.cores, self._tokens = plan, device, cores, traced.workload.tokens
        self.order: Order = order_of(plan, folder=folder)
        check_order(plan, self.order)
        library = StageLibrary(whole=traced)
        solves = plan.memory.recompute == "optimal"
        self.sequence = self._best_sequence(library) if solves else sequence_of_file(plan, folder)
        self.planned: tuple[PlannedStage, ...] = plan_stages(traced, plan, self.order, sequence=self.sequence, library=library)

    def _best_sequence(self, library: StageLibrary) -> tuple[Operation, ...]:
        """What ``recompute = "optimal"`` stands for: of each stage the fastest sequence under its rank's memory; solved again with less room where it holds more than it was thought to.

        Raises:
            InfeasibleError: no sequences fit.
        """
        plan, device = replace(self.plan, memory=replace(self.plan.memory, recompute="none")), self.device
        stages = plan_stages(library.whole, plan, self.order, library=library)
        case = _StepCase(
            plan=plan,
            device=device,
            order=self.order,
            step=self._step([one.stage for one in stages], _UNKNOWN_LINK),
            prices=pass_prices(plan, device),
        )
        spare = 0
        for _ in range(MOST_ATTEMPTS):
            found = sequence_of_stages(case, library, spare_bytes=spare)
            planned = plan_stages(library.whole, self.plan, self.order, sequence=found, library=library)
            step = self._step([one.stage for one in planned], _UNKNOWN_LINK)
            beyond = max(simulate_traced(step, self.plan, device, tokens=self._tokens).peak_memory_bytes) - budget_bytes(case)
            if beyond <= 0:
                break
            spare += beyond
        return found

    def memory(self) -> TracedSimulation:
        """With peaks as they will be and times without messages.

        Raises:
            InfeasibleError: the ranks together need more than this machine has, or a rank more than its device.
        """
        found = self._simulate(_UNKNOWN_LINK, 1.0)
        _check_fits(found)
        return found

    def times(self, link: LinkFacts) -> TracedSimulation:
        """With messages over a link that was measured.

        **Model**: a process has ``n = max(1, cores / processes)`` threads, so that a kernel takes ``cores / n`` times what all cores take. Where more ranks compute at a
        time (on average over the step) than there are cores for, they take turns: times again by ``ranks at a time * n / cores``. GPUs are not shared.

        **Not modelled**: kernels that gain nothing from more cores; memory bandwidth that one core alone could use.
        """
        if self.device.kind != "cpu":
            return self._simulate(link, 1.0)
        threads = max(1, self.cores // self.plan.num_gpus)
        alone = self._simulate(link, self.cores / threads)
        spans = alone.timeline
        busy_s = float(np.sum([_busy_s(spans, rank) for rank in range(len(alone.profiles))]))
        at_a_time = self.plan.parallel.dp * busy_s / alone.step_time_s
        return self._simulate(link, self.cores / threads * max(1.0, at_a_time * threads / self.cores))

    def _step(self, stages: Sequence[TracedStage], link: LinkFacts) -> TracedStep:
        rings = Rings(latency_s=link.latency_s, bytes_per_s=link.bytes_per_s)
        wire = Link(latency_s=link.latency_s, bytes_per_s=link.bytes_per_s)
        return step_of(self.plan, self.order, stages, wire, collective_s=rings, tied_s=rings)

    def _simulate(self, link: LinkFacts, slowdown: float) -> TracedSimulation:
        step = self._step([one.stage for one in self.planned], link)
        return simulate_traced(step, self.plan, self.device, tokens=self._tokens, slowdown=slowdown)


class ModulePrediction:
    """A model that every rank runs as a whole module, split by FSDP2 or parallel styles.

    Args:
        source: a traced model.
        plan: with its batch resolved.
        device: prices kernels; on a CPU all its cores.
        cores: of this machine.
        on: ``cpu`` (gloo) or ``cuda`` (NCCL).

    Raises:
        InputError: the plan cannot be run over processes, or the model not split that way.
    """

    def __init__(self, source: ModelSource, plan: Plan, device: DeviceProfile, *, cores: int, on: str = "cpu") -> None:
        check_processes(plan)
        self.plan, self.device, self.cores = plan, device, cores
        self.order: Order = order_of(plan)
        self.sequence = None
        traced: Traced = source.traced(plan.batch.micro_batch)
        definition: TracedModel = source.definition
        (module, _), _ = build_fake(definition.build)
        if plan.parallel.tp > 1:
            draws = any(block.uses_randomness for block in traced.chain.blocks)
            check_tensor_parallel(module, tp=plan.parallel.tp, name=source.name, draws=draws)
        if plan.memory.zero_stage:
            check_sharded(module, name=source.name)
        batches = self.order.num_microbatches * plan.parallel.dp
        self._flops, self._tokens = traced.workload.model_flops * batches, traced.workload.tokens * batches
        self._step = module_step(definition, plan, num_microbatches=self.order.num_microbatches, gloo=on == "cpu")

    def memory(self) -> ModuleSimulation:
        """With peaks as they will be and times without messages.

        Raises:
            InfeasibleError: the ranks together need more than this machine has, or a rank more than its device.
        """
        found = self._simulate(_UNKNOWN_LINK, 1.0)
        _check_fits(found)
        return found

    def times(self, link: LinkFacts) -> ModuleSimulation:
        """With messages over a link that was measured.

        **Model**: as `Prediction.times`, where all ranks compute all the time.
        """
        if self.device.kind != "cpu":
            return self._simulate(link, 1.0)
        threads = max(1, self.cores // self.plan.num_gpus)
        return self._simulate(link, self.cores / threads * max(1.0, self.plan.num_gpus * threads / self.cores))

    def _simulate(self, link: LinkFacts, slowdown: float) -> ModuleSimulation:
        return simulate_module(
            self._step, self.plan, self.device, link, slowdown=slowdown, model_flops=self._flops, tokens=self._tokens
        )


def prediction_of(
    source: ModelSource, plan: Plan, device: DeviceProfile, *, cores: int, folder: Path | None, on: str = "cpu"
) -> Prediction | ModulePrediction:
    """Of a traced model under a plan, by what its ranks run: blocks of the trace, or the module itself.

    Raises:
        InputError: the plan or the model cannot be run over processes.
    """
    if runs_whole_modules(plan):
        return ModulePrediction(source, plan, device, cores=cores, on=on)
    return Prediction(source.traced(plan.batch.micro_batch), plan, device, cores=cores, folder=folder)


def _check_fits(found: TracedSimulation | ModuleSimulation) -> None:
    if found.fits_device:
        return
    who = "all ranks together need" if found.device.kind == "cpu" else "a rank needs"
    raise InfeasibleError(
        limit=f"{who} {format_bytes(found.needed_bytes)} of {format_bytes(found.device.memory_bytes)}",
        smallest_change="take smaller micro-batches, recompute more, or fewer replicas",
        needed_bytes=found.needed_bytes,
    )


def _busy_s(timeline: Timeline, rank: int) -> float:
    return sum(
        timeline.busy_s(kind, device=rank)
        for kind in (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD, Kind.OPTIMIZER, Kind.REDUCE)
    )
