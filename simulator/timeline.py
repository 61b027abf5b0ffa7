"""Timeline and MemoryProfile: the one form of a predicted and of a measured run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.program import Kind, MemoryClass, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One instruction's stay on a stream."""

    device: int
    stream: Stream
    kind: Kind
    name: str
    micro_batch: int
    block: int
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A transfer of one device and an instruction of another one that waits for it."""

    sent: Span
    awaited_by: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Spans in order of (start, device, stream)."""

    spans: tuple[Span, ...]
    messages: tuple[Message, ...] = ()
    """Of predicted runs, in the order of those that wait in the program; a measured run cannot tell who waited for what."""

    @property
    def makespan_s(self) -> float:
        """Seconds from time 0, the start of the step, to the last end; 0 without spans."""
        return max((span.end_s for span in self.spans), default=0.0)

    def busy_s(self, kind: Kind, *, device: int = 0) -> float:
        """Seconds that instructions of one kind take on a device."""
        return sum(span.duration_s for span in self.spans if span.kind is kind and span.device == device)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProfile:
    """Bytes alive on one device over time: a step function per `MemoryClass`.

    ``alive_bytes[e, c]`` holds from ``time_s[e]`` on, until ``time_s[e + 1]``. Times do not decrease; events at one instant keep
    their order. ``time_s[0]`` is the start of the step. A measured profile that cannot tell classes apart has a single column.
    """

    device: int
    time_s: NDArray[np.float64]
    alive_bytes: NDArray[np.int64]
    """Shape (events, classes); classes in the order of `MemoryClass`."""

    @property
    def total_bytes(self) -> NDArray[np.int64]:
        """Shape (events,): all classes together."""
        total: NDArray[np.int64] = self.alive_bytes.sum(axis=1)
        return total

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at one moment."""
        return int(self.total_bytes.max())

    @property
    def peak_breakdown_bytes(self) -> dict[str, int]:
        """Bytes of each class at the (first) moment of the peak, by lower-case name of the class."""
        row = self.alive_bytes[int(self.total_bytes.argmax())]
        return {memory_class.name.lower(): int(row[memory_class]) for memory_class in MemoryClass}
