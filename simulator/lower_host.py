"""Lower the errands of a host schedule: transfers on their own streams, what waits for them, and the bytes that come and go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hardware_models.errors import InputError
from hardware_models.network.platforms import platform_cluster
from hardware_models.profile import DeviceProfile
from simulator.host_schedule import SHARED, HostSchedule, tensors_of
from simulator.program import Kind, MemoryClass, Stream, no_slowdown
from simulator.workload import Workload

TO_DEVICE, TO_HOST, BOTH = 0, 1, 2
"""Links of a program whose device has traffic with its host."""
STORE, LOAD, UPDATE, RETURN = "store", "load", "update", "return"
"""Labels of what the host lanes do."""
_BYTES_OF_A_COPY = 2.0
"""That one thread reads and writes for each byte that it copies: on a CPU the host's step is one thread's work, too."""
_CLASSES = {
    "activations": MemoryClass.ACTIVATIONS,
    "weights": MemoryClass.PARAMETERS,
    "gradients": MemoryClass.GRADIENTS,
    "updated": MemoryClass.PARAMETERS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLanes:
    """What one device's way to its host does.

    **Model**: a copy takes ``latency_s`` a tensor and then shares its direction's rate, and that of both directions together; kernels beside a copy
    take ``compute_slowdown`` times their time alone, the copy ``copy_slowdown`` times its own; the host's update moves its bytes at ``update_bytes_per_s``.

    **Source**: `hardware_models.profile.CopyEngine`, measured or published by device; memory of the host of the device's usual node.

    **Not modelled**: other processes on the host; copies of pageable memory (buffers are pinned); the computing thread's own time to queue an errand, about 0.1 ms on a CPU.
    """

    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    both_bytes_per_s: float
    latency_s: float
    compute_slowdown: float
    copy_slowdown: float
    update_bytes_per_s: float
    same_cores: bool = False
    """The device is a CPU, its own host: what the host does and the step's kernels share the cores, as a copy and kernels do."""

    def slowdown(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """The program's matrix of slow-down between streams."""
        matrix = no_slowdown()
        lanes = (Stream.H2D, Stream.D2H, Stream.HOST)
        for lane in lanes if self.same_cores else lanes[:2]:
            matrix[Stream.COMPUTE, lane], matrix[lane, Stream.COMPUTE] = self.compute_slowdown, self.copy_slowdown
        return matrix


def host_lanes(device: DeviceProfile) -> HostLanes:
    """The way between a device and its host.

    Raises:
        InputError: the profile knows no copies.
    """
    engine = device.copy_engine
    if engine is None:
        raise InputError(
            source=device.name, key="copy_engine", value=None, rule="offloading needs the rate of copies between device and host",
            remedy="measure this machine again with schedlab calibrate, or add [copy_engine] to device.toml",
        )  # fmt: skip
    on_cpu = device.kind == "cpu"
    both = engine.duplex_efficiency * (engine.to_device_bytes_per_s + engine.to_host_bytes_per_s)
    return HostLanes(
        to_device_bytes_per_s=engine.to_device_bytes_per_s, to_host_bytes_per_s=engine.to_host_bytes_per_s, both_bytes_per_s=both,
        latency_s=engine.latency_s, compute_slowdown=engine.compute_slowdown, copy_slowdown=engine.copy_slowdown,
        update_bytes_per_s=_BYTES_OF_A_COPY * engine.to_device_bytes_per_s if on_cpu else _host_memory_rate(device),
        same_cores=on_cpu,
    )  # fmt: skip


def _host_memory_rate(device: DeviceProfile) -> float:
    """Bytes/s of the memory of the usual node of a device, all of it for one device's step."""
    host = platform_cluster(device.name).host
    return host.dram_link.achieved_bytes_per_s.value * host.sockets


class Instructions(Protocol):
    """What `HostIssuer` needs of `simulator.lower.Builder`."""

    def issue(self, kind: Kind, duration_s: float, *, micro_batch: int = -1, block: int = -1, option: str = "") -> None:
        """Adds an instruction of the compute stream."""

    def beside(
        self, kind: Kind, stream: Stream, duration_s: float, *, after: Sequence[int], label: str, micro_batch: int, block: int, size_bytes: float,
        links: Sequence[int],
    ) -> int:  # fmt: skip
        """Adds an instruction of another stream and returns its index."""

    def change(self, time_s: float, delta_bytes: int, memory_class: MemoryClass) -> None:
        """A memory event of the compute instruction issued last."""

    def promise(self, *, wait: int = -1, delta_bytes: int = 0, memory_class: MemoryClass = MemoryClass.ACTIVATIONS) -> None:
        """What the next compute instruction waits for, and bytes that come or go at its start."""

    @property
    def last(self) -> int:
        """Index of the compute instruction issued last; -1 before the first."""

    @property
    def last_duration_s(self) -> float:
        """Its duration."""


@dataclass(slots=True)
class HostIssuer:
    """Issues the errands around each moment, in their order."""

    builder: Instructions
    schedule: HostSchedule
    lanes: HostLanes
    workload: Workload
    optimizer_states: int
    moment: int = 0
    stored: dict[int, int] = field(default_factory=dict)
    """By part, the instruction that took it to the host, or brought its gradients there."""
    loaded: dict[int, int] = field(default_factory=dict)
    updated: list[int] = field(default_factory=list)

    def before(self) -> None:
        """Errands before the next moment."""
        for verb, part in self.schedule.moments[self.moment].before:
            getattr(self, f"_{verb}")(part)

    def after(self) -> None:
        """Errands after it; the moment after that is next."""
        for verb, part in self.schedule.moments[self.moment].after:
            getattr(self, f"_{verb}")(part)
        self.moment += 1

    def end(self) -> None:
        """The step's end, which waits for all that is under way."""
        self.before()
        for index in [*self.stored.values(), *self.updated]:
            self.builder.promise(wait=index)
        self.builder.issue(Kind.OPTIMIZER, 0.0, option="end")

    def _copy(self, stream: Stream, part: int, size_bytes: int, *, label: str, after: Sequence[int]) -> int:
        own = self.schedule.parts[part]
        link = TO_HOST if stream is Stream.D2H else TO_DEVICE
        return self.builder.beside(
            Kind.TRANSFER, stream, self.lanes.latency_s * len(own.members), after=[index for index in after if index >= 0], label=label,
            micro_batch=own.micro_batch, block=own.block, size_bytes=size_bytes, links=(link, BOTH),
        )  # fmt: skip

    def _store(self, part: int) -> None:
        size = self.schedule.parts[part].size_bytes
        self.stored[part] = self._copy(Stream.D2H, part, size, label=STORE, after=(self.builder.last,))

    def _drop(self, part: int) -> None:
        own = self.schedule.parts[part]
        self.builder.promise(wait=self.stored.pop(part), delta_bytes=-own.size_bytes, memory_class=_CLASSES[own.kind])

    def _load(self, part: int) -> None:
        own = self.schedule.parts[part]
        self.loaded[part] = self._copy(Stream.H2D, part, own.size_bytes, label=LOAD, after=(self.builder.last,))
        self.builder.promise(delta_bytes=own.size_bytes, memory_class=_CLASSES[own.kind])

    def _use(self, part: int) -> None:
        self.builder.promise(wait=self.loaded.pop(part))

    def _release(self, part: int) -> None:
        own = self.schedule.parts[part]
        self.builder.change(self.builder.last_duration_s, -own.size_bytes, _CLASSES[own.kind])

    def _update(self, part: int) -> None:
        """**Model**: the host reads parameter, gradient and states and writes parameter and states, at the rate of its memory."""
        own = self.schedule.parts[part]
        moved = own.size_bytes * (2 + self.optimizer_states + 1 + self.optimizer_states)
        index = self.builder.beside(
            Kind.OPTIMIZER, Stream.HOST, moved / self.lanes.update_bytes_per_s, after=(self.stored[part],), label=UPDATE,
            micro_batch=-1, block=own.block, size_bytes=0.0, links=(),
        )  # fmt: skip
        self.updated.append(index)

    def _return(self, part: int) -> None:
        size = self.schedule.returned_bytes(part)
        self.updated.append(self._copy(Stream.HOST, part, size, label=RETURN, after=(self.updated[-1],)))


def device_resident(
    workload: Workload, schedule: HostSchedule | None, sizes: Sequence[int], *, states: int, step_bytes: int
) -> tuple[int, ...]:
    """Bytes by `MemoryClass` that stay on the device of those that a step would keep there without its host.

    Args:
        workload: of the step.
        schedule: None: all stays.
        sizes: without the host.
        states: tensors of a parameter's size that the optimizer keeps.
        step_bytes: of its step count, for each parameter.
    """
    if schedule is None:
        return tuple(sizes)
    found = list(sizes)
    for block, members in enumerate(schedule.away):
        found[MemoryClass.PARAMETERS] -= sum(workload.blocks[block].parameters[place].size_bytes for place in members)
    for block, members in zip([*range(len(workload.blocks)), SHARED], schedule.hosted, strict=True):
        tensors = tensors_of(workload, block)
        found[MemoryClass.OPTIMIZER_STATES] -= sum(states * tensors[place].size_bytes + step_bytes for place in members)
    return tuple(found)
