"""Writes the arrays of a `Program` of many devices: instructions, what they wait for, what they allocate, which links they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from simulator.program import Kind, MemoryClass, Program, Stream, Transfers

Change = tuple[float, int, MemoryClass]
"""Offset in seconds from the instruction's start, bytes, class."""


class ProgramWriter:
    """Instructions in issue order; an index is given back for others to wait for."""

    def __init__(self, link_bytes_per_s: Sequence[float] = ()) -> None:
        self._rows: list[tuple[Kind, int, Stream, float, int, int, str]] = []
        self._waits: list[tuple[int, ...]] = []
        self._changes: list[tuple[Change, ...]] = []
        self._transfers: list[tuple[int, float, float, tuple[int, ...]]] = []
        self._links = tuple(link_bytes_per_s)

    def issue(
        self, kind: Kind, device: int, stream: Stream, duration_s: float, *, after: Iterable[int] = (), micro_batch: int = -1, stage: int = -1,
        label: str = "", memory: Iterable[Change] = (),
    ) -> int:  # fmt: skip
        """Adds an instruction and returns its index."""
        self._rows.append((kind, device, stream, duration_s, micro_batch, stage, label))
        self._waits.append(tuple(sorted(set(after))))
        self._changes.append(tuple(change for change in memory if change[1]))
        return len(self._rows) - 1

    def change_at_end(self, index: int, delta_bytes: int, memory_class: MemoryClass) -> None:
        """Bytes that come or go with the end of an instruction that was issued before."""
        if delta_bytes:
            self._changes[index] += ((self._rows[index][3], delta_bytes, memory_class),)

    def wait(self, index: int, other: int) -> None:
        """Makes an instruction wait for one that was issued later."""
        self._waits[index] = tuple(sorted({*self._waits[index], other}))

    def route(self, index: int, size_bytes: float, limit_bytes_per_s: float, links: Sequence[int]) -> None:
        """Makes an instruction a transfer of bytes over links, after its duration as latency."""
        self._transfers.append((index, size_bytes, limit_bytes_per_s, tuple(links)))

    def program(self, resident_bytes: Sequence[tuple[int, ...]], slowdown: NDArray[np.float64]) -> Program:
        """The program so far."""
        kinds, devices, streams, durations, micro_batches, stages, labels = zip(*self._rows, strict=True)
        changes = [change for own in self._changes for change in own]
        names = tuple(dict.fromkeys(labels))
        transfers = sorted(self._transfers)
        return Program(
            kind=np.array(kinds, np.int8), device=np.array(devices, np.int32), stream=np.array(streams, np.int8), duration_s=np.array(durations, np.float64),
            micro_batch=np.array(micro_batches, np.int32), block=np.array(stages, np.int32), option_index=np.array([names.index(label) for label in labels], np.int16), option_names=names,
            dependency_offsets=np.cumsum([0, *(len(own) for own in self._waits)], dtype=np.int64),
            dependencies=np.array([other for own in self._waits for other in own], np.int64),
            memory_offsets=np.cumsum([0, *(len(own) for own in self._changes)], dtype=np.int64),
            memory_time_s=np.array([change[0] for change in changes], np.float64), memory_bytes=np.array([change[1] for change in changes], np.int64),
            memory_class=np.array([change[2] for change in changes], np.int8), resident_bytes=tuple(resident_bytes), slowdown=slowdown,
            transfers=Transfers(
                instruction=np.array([one[0] for one in transfers], np.int64), size_bytes=np.array([one[1] for one in transfers], np.float64),
                limit_bytes_per_s=np.array([one[2] for one in transfers], np.float64),
                route_offsets=np.cumsum([0, *(len(one[3]) for one in transfers)], dtype=np.int64),
                routes=np.array([link for one in transfers for link in one[3]], np.int64), link_bytes_per_s=np.array(self._links, np.float64),
            ),
        )  # fmt: skip
