"""Simulate a traced model over the ranks of a pipeline: stages x order x device -> step time and memory per rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardware_models.kernel import Kernel
from hardware_models.network.cluster import Cluster
from hardware_models.pricing import Price, price_together
from hardware_models.profile import DeviceProfile
from simulator.exposed_time import exposed_times
from simulator.lower import PassPrices, policy_seconds
from simulator.parallel.traced_step import TracedStep, lower_traced_step
from simulator.plan import Plan
from simulator.precision import PRODUCTS_IN, STORED_AS, price_in
from simulator.program import Program
from simulator.run_record import RunRecord, check_complete, profiles_of, timeline_of
from simulator.sequence import Operation
from simulator.simulate import ENGINES, INTERVAL_Z
from simulator.timeline import MemoryProfile, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedSimulation:
    """A step's predicted consequence on every rank of one replica."""

    plan: Plan
    device: DeviceProfile
    program: Program
    record: RunRecord
    profiles: tuple[MemoryProfile, ...]
    kernels: tuple[Kernel, ...]
    """Of one micro-batch on all stages, recompute included."""
    model_flops: int
    """Of a step, without recompute, over all ranks."""
    hardware_flops: int
    """The same with recompute."""
    tokens: int
    """Of a step, over all replicas."""

    @property
    def price(self) -> Price:
        """All kernels of one micro-batch on all stages, with its error: worked out with each call, a search asks for none."""
        return price_together(self.kernels, self.device)

    @property
    def timeline(self) -> Timeline:
        """Spans of all instructions, made anew with each call: a search asks for none."""
        return timeline_of(self.program, self.record)

    @property
    def step_time_s(self) -> float:
        """From the step's start to its last end."""
        return self.record.makespan_s

    @property
    def breakdown_s(self) -> dict[str, float]:
        """Where the critical rank's time goes (`simulator.exposed_time`)."""
        return exposed_times(self.program, self.record)

    @property
    def bottleneck(self) -> str:
        """The largest part of the breakdown."""
        breakdown = self.breakdown_s
        return max(breakdown, key=lambda name: breakdown[name])

    @property
    def fits(self) -> bool:
        """What is needed is there, and within the plan's budget if it has one."""
        budget = self.plan.memory.budget_bytes
        return self.fits_device and (budget is None or max(self.peak_memory_bytes) <= budget)

    @property
    def peak_memory_bytes(self) -> tuple[int, ...]:
        """Most bytes of live tensors, per pipeline rank."""
        return tuple(profile.peak_bytes for profile in self.profiles)

    def to_json(self) -> dict[str, object]:
        """The keys of ``schedlab simulate --json``."""
        step_s, ranks = self.step_time_s, self.plan.num_gpus
        breakdown, price = self.breakdown_s, self.price
        half = INTERVAL_Z * price.relative_standard_error * step_s
        worst = int(np.argmax(self.peak_memory_bytes))
        peak = compute_peak(self.plan, self.device)
        return {
            "step_time_s": step_s, "step_time_interval_s": [max(0.0, step_s - half), step_s + half], "tokens_per_s_per_gpu": self.tokens / step_s / ranks,
            "model_flops_per_s_per_gpu": self.model_flops / step_s / ranks, "mfu": self.model_flops / step_s / ranks / peak,
            "hfu": self.hardware_flops / step_s / ranks / peak, "peak_memory_bytes": list(self.peak_memory_bytes),
            "peak_reserved_bytes": list(self.peak_memory_bytes), "peak_host_bytes": 0, "peak_memory_breakdown": self.profiles[worst].peak_breakdown_bytes,
            "fits": self.fits,
            "time_breakdown_s": breakdown, "bottleneck": max(breakdown, key=lambda name: breakdown[name]),
            "num_events": self.program.num_instructions + len(self.program.memory_bytes), "evidence": list(price.evidence),
        }  # fmt: skip

    @property
    def fits_device(self) -> bool:
        """Whether what is needed is there."""
        return self.needed_bytes <= self.device.memory_bytes

    @property
    def needed_bytes(self) -> int:
        """What must fit the device: on a CPU all ranks together, which share its memory."""
        if self.device.kind == "cpu":
            return sum(self.peak_memory_bytes) * self.plan.parallel.dp
        return max(self.peak_memory_bytes) + self.device.context_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesOnCluster(TracedSimulation):
    """A step of a traced model on the devices of a cluster, each rank on one of its own."""

    cluster: Cluster
    sequence: tuple[Operation, ...]
    """In which each stage runs its blocks, counted over the whole model, one stage after the other."""

    @property
    def peak_reserved_bytes(self) -> tuple[int, ...]:
        """The bytes of live tensors: the allocator is not replayed."""
        return self.peak_memory_bytes


def compute_peak(plan: Plan, device: DeviceProfile) -> float:
    """FLOPs/s that ``mfu`` is a share of: the device's peak in the plan's precision."""
    return device.peak(PRODUCTS_IN.get(plan.precision.compute, STORED_AS[plan.precision.compute]))


def simulate_traced(
    step: TracedStep, plan: Plan, device: DeviceProfile, *, tokens: int, slowdown: float = 1.0, engine: str = "compiled", prices: PassPrices | None = None
) -> TracedSimulation:  # fmt: skip
    """One training step of a traced model's stages.

    **Model**: `simulator.parallel.traced_step`; a kernel takes ``slowdown`` times what the device's profile says, because ranks share the device.

    Args:
        step: order, stages, link.
        plan: with its batch resolved.
        device: prices kernels.
        tokens: of a micro-batch.
        slowdown: at least 1; 1 where every rank has a device of its own.
        engine: one of `simulate.ENGINES`.
        prices: of passes in the plan's precision at that slow-down, where several plans share them; None: made here.

    **Not modelled**: the host's dispatch beside compute; what the allocator reserves beyond live tensors; that a rank computes faster while others wait.
    """
    program = lower_traced_step(step, prices or pass_prices(plan, device, slowdown=slowdown))
    record = ENGINES[engine](program)
    check_complete(program, record)
    kernels = _kernels(step)
    batches = step.order.num_microbatches * plan.parallel.dp
    flops = sum(stage.workload.model_flops for stage in step.stages)
    return TracedSimulation(
        plan=plan, device=device, program=program, record=record, profiles=profiles_of(program, record), kernels=tuple(kernels), model_flops=flops * batches,
        hardware_flops=sum(kernel.flops for kernel in kernels) * batches, tokens=tokens * batches,
    )  # fmt: skip


def pass_prices(plan: Plan, device: DeviceProfile, *, slowdown: float = 1.0) -> PassPrices:
    """Times of passes on a device in a plan's precision, each ``slowdown`` times what the profile says."""
    priced = price_in(plan.precision.compute, device)

    def seconds(kernels: Sequence[Kernel]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = slowdown * priced(kernels)
        return result

    return PassPrices(seconds, policy_s=slowdown * policy_seconds(device))


def _kernels(step: TracedStep) -> list[Kernel]:
    """Of one micro-batch on all stages, recompute included."""
    kernels: list[Kernel] = []
    for stage in step.stages:
        options: dict[int, str] = {}
        for kind, index, name in stage.operations:
            block = stage.workload.blocks[index]
            if kind == "B":
                kernels.extend(block.option(options.pop(index)).backward_accumulate.kernels)
            elif kind == "F_all":
                options[index] = name
                kernels.extend(block.option(name).forward.kernels)
            else:
                kernels.extend(block.discard.kernels)
    return kernels
