"""What a simulated step over many devices came to: time, memory per pipeline rank, and what explains them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardware_models.caching_allocator import AllocatorPeaks
from hardware_models.kernel import Kernel
from hardware_models.network.cluster import Cluster
from hardware_models.pricing import Price, price_together
from hardware_models.profile import EVIDENCE_KINDS, DeviceProfile, Evidence
from simulator.exposed_time import exposed_times, longest_span
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.program import Program
from simulator.run_record import RunRecord, timeline_of
from simulator.simulate import INTERVAL_Z
from simulator.timeline import MemoryProfile, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSimulation:
    """A step's predicted consequence on a cluster: one replica, one tensor-parallel rank of each pipeline rank."""

    plan: Plan
    cluster: Cluster
    device: DeviceProfile
    order: Order
    program: Program
    record: RunRecord
    profiles: tuple[MemoryProfile, ...]
    kernels: tuple[Kernel, ...]
    """Of one micro-batch on all stages."""
    tokens: int
    """Of a step, over all replicas."""
    model_flops: int
    """Of a step, without recompute, over all devices."""
    hardware_flops: int
    """The same with recompute."""
    peak_flops_per_s: float
    peak_host_bytes: int
    """Most bytes that the step keeps on the host of one node (on its drives, where they are the target)."""
    allocators: tuple[AllocatorPeaks, ...] = ()
    """Per pipeline rank, what a run of such steps does to CUDA's caching allocator; empty where that was not asked for."""

    @property
    def price(self) -> Price:
        """All kernels of one micro-batch on all stages, with its error: worked out with each call, a search asks for none."""
        return price_together(self.kernels, self.device)

    @property
    def step_time_s(self) -> float:
        """From the step's start to its last end; where ranks do not wait for each other between steps, the longest time that one of them needs for a step."""
        if self.staggered:
            _, start_s, end_s = longest_span(self.program, self.record)
            return end_s - start_s
        return self.record.makespan_s

    @property
    def staggered(self) -> bool:
        """Whether each rank begins its next step when it is ready: nothing keeps the ranks together (Qi et al. 2024, arXiv 2401.10241, section 4)."""
        return self.plan.runtime.optimizer_sync == "post-validation"

    @property
    def timeline(self) -> Timeline:
        """Spans of all instructions, made anew with each call: a search asks for none."""
        return timeline_of(self.program, self.record)

    @property
    def peak_memory_bytes(self) -> tuple[int, ...]:
        """Most bytes of live tensors, per pipeline rank."""
        return tuple(profile.peak_bytes for profile in self.profiles)

    @property
    def peak_reserved_bytes(self) -> tuple[int, ...]:
        """What the allocator holds, per pipeline rank; the bytes of live tensors where it was not replayed."""
        if not self.allocators:
            return self.peak_memory_bytes
        return tuple(
            max(live, one.peak_reserved_bytes) for live, one in zip(self.peak_memory_bytes, self.allocators, strict=True)
        )

    @property
    def fits(self) -> bool:
        """Reserved bytes and context within the device, live ones within the budget if there is one; offloaded ones within the node's memory or drives."""
        most = max(self.peak_memory_bytes)
        budget = self.plan.memory.budget_bytes
        host = self.cluster.host
        room = host.nvme_bytes if self.plan.memory.offload_target == "nvme" else host.dram_bytes
        if self.peak_host_bytes > room:
            return False
        return max(self.peak_reserved_bytes) + self.device.context_bytes <= self.device.memory_bytes and (
            budget is None or most <= budget
        )

    @property
    def breakdown_s(self) -> dict[str, float]:
        """Where the critical rank's time goes (`simulator.exposed_time`)."""
        return exposed_times(self.program, self.record, staggered=self.staggered)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Kinds that prices of kernels and of their launches rest on, strongest first."""
        dispatch = self.device.host_dispatch
        kinds = {*self.price.evidence, *([dispatch.evidence] if dispatch else [])}
        return tuple(kind for kind in EVIDENCE_KINDS if kind in kinds)

    @property
    def bottleneck(self) -> str:
        """The largest part of the breakdown."""
        breakdown = self.breakdown_s
        return max(breakdown, key=lambda name: breakdown[name])

    def to_json(self) -> dict[str, object]:
        """The keys of ``schedlab simulate --json``."""
        step_s, gpus = self.step_time_s, self.plan.num_gpus
        breakdown = self.breakdown_s
        price = self.price
        half = INTERVAL_Z * price.relative_standard_error * step_s
        worst = int(np.argmax(self.peak_memory_bytes))
        return {
            "step_time_s": step_s, "step_time_interval_s": [max(0.0, step_s - half), step_s + half], "tokens_per_s_per_gpu": self.tokens / step_s / gpus,
            "model_flops_per_s_per_gpu": self.model_flops / step_s / gpus, "mfu": self.model_flops / step_s / gpus / self.peak_flops_per_s,
            "hfu": self.hardware_flops / step_s / gpus / self.peak_flops_per_s, "peak_memory_bytes": list(self.peak_memory_bytes),
            "peak_reserved_bytes": list(self.peak_reserved_bytes), "peak_host_bytes": self.peak_host_bytes, "peak_memory_breakdown": self.profiles[worst].peak_breakdown_bytes,
            "fits": self.fits, "time_breakdown_s": breakdown, "bottleneck": max(breakdown, key=lambda name: breakdown[name]),
            "num_events": self.program.num_instructions + len(self.program.memory_bytes), "evidence": list(self.evidence),
        }  # fmt: skip
