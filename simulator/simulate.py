"""Simulate: workload, sequence and device -> step time and memory, with the breakdown that explains them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np

from hardware_models.caching_allocator import DEFAULT_SETTINGS, AllocatorPeaks, AllocatorSettings
from hardware_models.kernel import Kernel
from hardware_models.pricing import Price, price_together
from hardware_models.profile import DeviceProfile
from simulator import engine_compiled, engine_simpy
from simulator.exposed_time import exposed_times
from simulator.host_planner import host_schedule
from simulator.host_schedule import HostSchedule, HostShares, host_shares
from simulator.lower import PassPrices, lower, optimizer_pass, policy_seconds
from simulator.lower_host import host_lanes
from simulator.optimizer_states import OPTIMIZER_STATES
from simulator.plan import Plan
from simulator.precision import in_precision, peak_dtype, price_in, repriced_in
from simulator.program import Kind, MemoryClass, Program
from simulator.reserved_memory import reserved_peaks, resident_tensors
from simulator.run_record import RunRecord, outcome_of
from simulator.sequence import Operation
from simulator.timeline import MemoryProfile, Timeline
from simulator.workload import Workload

ENGINES = MappingProxyType({"compiled": engine_compiled.record, "simpy": engine_simpy.record})
"""The engines by name: one meaning, `engine_simpy` says which."""
INTERVAL_Z = 1.2816
"""Half-width of an 80% interval in standard errors of a normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSetting:
    """What a step does beyond its workload."""

    num_microbatches: int = 1
    optimizer: str = "adamw"
    budget_bytes: int | None = None
    """Most bytes allocated on the device; None: what the device has."""
    host: HostShares | None = None
    """What lives on the host; None: nothing."""
    precision: str = "fp32"
    """The plan's: how products of float32 tensors compute (workloads say the rest)."""
    dtype: str = "float32"
    """In which ``mfu`` counts the device's peak."""
    allocator: AllocatorSettings = DEFAULT_SETTINGS
    """PYTORCH_ALLOC_CONF, on CUDA."""


def step_setting(plan: Plan, num_blocks: int) -> StepSetting:
    """What a plan for one device says of a step beyond the order of its blocks."""
    shares = host_shares(plan, num_blocks)
    return StepSetting(
        num_microbatches=plan.num_microbatches, optimizer=plan.precision.optimizer, budget_bytes=plan.memory.budget_bytes,
        host=shares if shares.any else None, precision=repriced_in(plan.precision.mode),
        dtype=peak_dtype(plan.precision.compute),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A step's predicted consequence."""

    workload: Workload
    device: DeviceProfile
    setting: StepSetting
    timeline: Timeline
    profiles: tuple[MemoryProfile, ...]
    program: Program
    record: RunRecord
    price: Price
    """All kernels of the step together."""
    hardware_flops: int
    """FLOPs of a step with recompute."""
    host: HostSchedule | None
    """What goes to the host and when."""
    allocators: tuple[AllocatorPeaks, ...]
    """Per device, what a run of such steps does to CUDA's caching allocator; empty on a CPU."""

    @property
    def step_time_s(self) -> float:
        """From the step's start to the end of the optimizer."""
        return self.timeline.makespan_s

    @property
    def step_time_interval_s(self) -> tuple[float, float]:
        """80% interval from the residuals of the prices."""
        half = INTERVAL_Z * self.price.relative_standard_error * self.step_time_s
        return max(0.0, self.step_time_s - half), self.step_time_s + half

    @property
    def peak_memory_bytes(self) -> tuple[int, ...]:
        """Most bytes of live tensors, per device."""
        return tuple(profile.peak_bytes for profile in self.profiles)

    @property
    def peak_reserved_bytes(self) -> tuple[int, ...]:
        """What the allocator holds, per device: on a CPU, which keeps no pool, the bytes of live tensors."""
        if not self.allocators:
            return self.peak_memory_bytes
        return tuple(peaks.peak_reserved_bytes for peaks in self.allocators)

    @property
    def peak_allocated_bytes(self) -> tuple[int, ...]:
        """Most bytes in blocks, per device: ``peak_memory_bytes`` with the allocator's rounding, torch.cuda.max_memory_allocated."""
        if not self.allocators:
            return self.peak_memory_bytes
        return tuple(peaks.peak_allocated_bytes for peaks in self.allocators)

    @property
    def peak_host_bytes(self) -> int:
        """Most bytes that the step keeps on the host."""
        return 0 if self.host is None else self.host.host_bytes

    @property
    def fits(self) -> bool:
        """Reserved bytes and context within the device, allocated ones within the budget."""
        budget = self.setting.budget_bytes
        within_device = max(self.peak_reserved_bytes) + self.device.context_bytes <= self.device.memory_bytes
        return within_device and (budget is None or max(self.peak_memory_bytes) <= budget)

    @property
    def time_breakdown_s(self) -> dict[str, float]:
        """Exposed seconds by class; they sum to the step."""
        return exposed_times(self.program, self.record)

    def to_json(self) -> dict[str, object]:
        """The keys of ``schedlab simulate --json``."""
        step_s = self.step_time_s
        model_flops = self.workload.model_flops * self.setting.num_microbatches
        peak = self.device.peak(self.setting.dtype)
        breakdown = self.time_breakdown_s
        return {
            "step_time_s": step_s,
            "step_time_interval_s": list(self.step_time_interval_s),
            "tokens_per_s_per_gpu": self.workload.tokens * self.setting.num_microbatches / step_s,
            "model_flops_per_s_per_gpu": model_flops / step_s,
            "mfu": model_flops / step_s / peak,
            "hfu": self.hardware_flops / step_s / peak,
            "peak_memory_bytes": list(self.peak_memory_bytes),
            "peak_reserved_bytes": list(self.peak_reserved_bytes),
            "peak_host_bytes": self.peak_host_bytes,
            "peak_memory_breakdown": self.profiles[0].peak_breakdown_bytes,
            "fits": self.fits,
            "time_breakdown_s": breakdown,
            "bottleneck": max(breakdown, key=lambda name: breakdown[name]),
            "num_events": self.program.num_instructions + len(self.program.memory_bytes),
            "evidence": list(self.price.evidence),
        }


def simulate(
    workload: Workload, operations: Sequence[Operation], device: DeviceProfile, setting: StepSetting = StepSetting(), *, engine: str = "compiled"
) -> Simulation:  # fmt: skip
    """One training step on one device, on one of `ENGINES`.

    Raises:
        InputError: the sequence is illegal for the workload, or the device has no price for a dtype.
    """
    host = None
    if setting.host is not None:
        host = host_schedule(
            workload, operations, setting.host, num_microbatches=setting.num_microbatches, optimizer_states=OPTIMIZER_STATES[setting.optimizer]
        )  # fmt: skip
    program = lower(
        workload, operations, PassPrices(price_in(setting.precision, device), policy_s=policy_seconds(device)), num_microbatches=setting.num_microbatches,
        optimizer=setting.optimizer, host=host, lanes=None if host is None else host_lanes(device),
    )  # fmt: skip
    record = ENGINES[engine](program)
    timeline, profiles = outcome_of(program, record)
    kernels = step_kernels(workload, operations, setting)
    return Simulation(
        workload=workload, device=device, setting=setting, timeline=timeline, profiles=profiles, program=program, record=record,
        price=price_together([in_precision(kernel, setting.precision) for kernel in kernels], device), hardware_flops=sum(kernel.flops for kernel in kernels),
        host=host, allocators=_allocators(workload, program, device, setting, timeline, profiles),
    )  # fmt: skip


def _allocators(
    workload: Workload,
    program: Program,
    device: DeviceProfile,
    setting: StepSetting,
    timeline: Timeline,
    profiles: tuple[MemoryProfile, ...],
) -> tuple[AllocatorPeaks, ...]:
    """The allocator's peaks per device of a CUDA profile; what would be needed where the device has too little."""
    if device.kind == "cpu":
        return ()
    found = []
    for profile, resident_bytes in zip(profiles, program.resident_bytes, strict=True):
        updates = (span.start_s for span in timeline.spans if span.kind is Kind.OPTIMIZER and span.device == profile.device)
        tensors = resident_tensors(
            workload, resident_bytes, num_microbatches=setting.num_microbatches, optimizer=setting.optimizer
        )
        replay = partial(
            reserved_peaks, profile, tensors, update_s=min(updates, default=timeline.makespan_s), settings=setting.allocator
        )
        peaks = replay()
        capacity = device.memory_bytes - device.context_bytes
        if peaks.peak_reserved_bytes > capacity >= peaks.peak_allocated_bytes:  # the cache may be given back in time
            limited = replay(capacity_bytes=capacity)
            peaks = peaks if limited.out_of_memory_at is not None else limited
        found.append(peaks)
    return tuple(found)


def step_kernels(workload: Workload, operations: Sequence[Operation], setting: StepSetting) -> list[Kernel]:
    """All kernels of a step in launch order."""
    kernels: list[Kernel] = []
    for micro_batch in range(setting.num_microbatches):
        options: dict[int, str] = {}
        for kind, index, name in operations:
            block = workload.blocks[index]
            if kind == "B":
                option = block.option(options.pop(index))
                kernels.extend((option.backward if micro_batch == 0 else option.backward_accumulate).kernels)
            elif kind == "F_all":
                options[index] = name
                kernels.extend(block.option(name).forward.kernels)
            else:
                kernels.extend(block.discard.kernels)
        if micro_batch:
            kernels.extend(workload.shared_accumulate.kernels)
    kernels.extend(optimizer_pass(workload, optimizer=setting.optimizer).kernels)
    return kernels


def static_peak_bytes(program: Program) -> int:
    """Most bytes alive on the only device of a program whose bytes come and go on one stream, whose order its indices give.

    The engines' answer without running them: what a search asks for many sequences of one workload.
    """
    owners = np.repeat(program.stream, np.diff(program.memory_offsets))
    if program.num_devices != 1 or len(set(owners.tolist())) > 1:
        raise ValueError("static_peak_bytes needs a program of one device whose bytes come and go on one stream")
    base = sum(program.resident_bytes[0][memory_class] for memory_class in MemoryClass)
    return base + max(0, int(program.memory_bytes.cumsum().max(initial=0)))
