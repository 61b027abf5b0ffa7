"""Builder: the instructions of one device as they are issued -> Program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from simulator.lower_host import HostLanes
from simulator.program import Kind, MemoryClass, Program, Stream, Transfers, no_slowdown, no_transfers


@dataclass(slots=True)
class Builder:
    """Instructions as they are issued on one device: those of the compute stream in order, and what runs beside them."""

    lanes: HostLanes | None = None
    """The way to the host, where something takes it."""
    kinds: list[int] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    memory: list[list[tuple[float, int, MemoryClass]]] = field(default_factory=list)
    waits: list[list[int]] = field(default_factory=list)
    transfers: list[tuple[int, float, tuple[int, ...]]] = field(default_factory=list)
    """(instruction, bytes, links)."""
    last: int = -1
    """The compute instruction issued last."""
    _promised_waits: list[int] = field(default_factory=list)
    _promised_changes: list[tuple[float, int, MemoryClass]] = field(default_factory=list)

    @property
    def last_duration_s(self) -> float:
        """Of the compute instruction issued last."""
        return self.durations[self.last]

    def issue(self, kind: Kind, duration_s: float, *, micro_batch: int = -1, block: int = -1, option: str = "") -> None:
        """Adds an instruction of the compute stream."""
        self.last = self._add(kind, Stream.COMPUTE, duration_s, micro_batch, block, option)
        self.waits[-1] = sorted(set(self._promised_waits))
        self.memory[-1] = self._promised_changes
        self._promised_waits, self._promised_changes = [], []

    def beside(
        self, kind: Kind, stream: Stream, duration_s: float, *, after: Sequence[int], label: str, micro_batch: int, block: int, size_bytes: float,
        links: Sequence[int],
    ) -> int:  # fmt: skip
        """Adds an instruction of another stream, a transfer where it has bytes, and returns its index."""
        index = self._add(kind, stream, duration_s, micro_batch, block, label)
        self.waits[-1] = sorted(set(after))
        if size_bytes:
            self.transfers.append((index, size_bytes, tuple(links)))
        return index

    def promise(self, *, wait: int = -1, delta_bytes: int = 0, memory_class: MemoryClass = MemoryClass.ACTIVATIONS) -> None:
        """What the next compute instruction waits for, and bytes that come or go at its start."""
        if wait >= 0:
            self._promised_waits.append(wait)
        if delta_bytes:
            self._promised_changes.append((0.0, delta_bytes, memory_class))

    def _add(self, kind: Kind, stream: Stream, duration_s: float, micro_batch: int, block: int, option: str) -> int:
        self.kinds.append(kind)
        self.streams.append(stream)
        self.durations.append(duration_s)
        self.micro_batches.append(micro_batch)
        self.blocks.append(block)
        self.options.append(option)
        self.memory.append([])
        self.waits.append([])
        return len(self.kinds) - 1

    def change(self, time_s: float, delta_bytes: int, memory_class: MemoryClass) -> None:
        """A memory event of the compute instruction issued last."""
        if delta_bytes:
            self.memory[self.last].append((time_s, delta_bytes, memory_class))

    def program(self, resident_bytes: tuple[int, ...]) -> Program:
        """The instructions so far, on one device."""
        count, names = len(self.kinds), tuple(dict.fromkeys(self.options))
        events = [event for group in self.memory for event in group]
        return Program(
            kind=np.array(self.kinds, np.int8), device=np.zeros(count, np.int32), stream=np.array(self.streams, np.int8),
            duration_s=np.array(self.durations, np.float64), micro_batch=np.array(self.micro_batches, np.int32),
            block=np.array(self.blocks, np.int32), option_index=np.array([names.index(option) for option in self.options], np.int16),
            option_names=names,
            dependency_offsets=np.cumsum([0, *(len(own) for own in self.waits)], dtype=np.int64),
            dependencies=np.array([other for own in self.waits for other in own], np.int64),
            memory_offsets=np.cumsum([0, *(len(group) for group in self.memory)], dtype=np.int64),
            memory_time_s=np.array([event[0] for event in events], np.float64),
            memory_bytes=np.array([event[1] for event in events], np.int64),
            memory_class=np.array([event[2] for event in events], np.int8),
            resident_bytes=(resident_bytes,), transfers=self._links(), slowdown=no_slowdown() if self.lanes is None else self.lanes.slowdown(),
        )  # fmt: skip

    def _links(self) -> Transfers:
        if self.lanes is None or not self.transfers:
            return no_transfers()
        lanes = self.lanes
        return Transfers(
            instruction=np.array([one[0] for one in self.transfers], np.int64), size_bytes=np.array([one[1] for one in self.transfers], np.float64),
            limit_bytes_per_s=np.full(len(self.transfers), np.inf), routes=np.array([link for one in self.transfers for link in one[2]], np.int64),
            route_offsets=np.cumsum([0, *(len(one[2]) for one in self.transfers)], dtype=np.int64),
            link_bytes_per_s=np.array([lanes.to_device_bytes_per_s, lanes.to_host_bytes_per_s, lanes.both_bytes_per_s]),
        )  # fmt: skip
