"""What happened when a program ran, and what follows from it: spans, bytes over time, and the two ways in which a program can be wrong."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from simulator.program import Kind, MemoryClass, Program, Stream
from simulator.timeline import MemoryProfile, Span, Timeline

_GRID_NEIGHBOURS = 3
"""Instructions shown on either side of the stuck one."""


class DeadlockError(RuntimeError):
    """Instructions wait for each other; the message is the grid of streams with the stuck instruction of each marked."""


class MemoryBalanceError(RuntimeError):
    """An instruction frees bytes that are not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Per instruction, when it started and ended. Ends and starts are counted together: the count orders them where times are equal.

    An instruction that never ended has ``end_count`` -1.
    """

    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    start_count: NDArray[np.int64]
    end_count: NDArray[np.int64]

    @property
    def complete(self) -> bool:
        """Whether every instruction ended."""
        return bool((self.end_count >= 0).all())


def outcome_of(program: Program, record: RunRecord) -> tuple[Timeline, tuple[MemoryProfile, ...]]:
    """Spans of all instructions, and bytes over time of each device, by device.

    Raises:
        DeadlockError: instructions wait for each other.
        MemoryBalanceError: more bytes of a class are freed than are alive.
    """
    if not record.complete:
        raise DeadlockError(_grid(program, record))
    return _timeline(program, record), _profiles(program, record)


def queues_of(program: Program) -> dict[tuple[int, Stream], list[int]]:
    """Instructions of each device and stream, in their order."""
    queues: dict[tuple[int, Stream], list[int]] = defaultdict(list)
    for n in range(program.num_instructions):
        queues[int(program.device[n]), Stream(program.stream[n])].append(n)
    return queues


def dependencies_of(program: Program, n: int) -> list[int]:
    """Instructions that must end before ``n`` starts."""
    indices: list[int] = program.dependencies[program.dependency_offsets[n] : program.dependency_offsets[n + 1]].tolist()
    return indices


def _timeline(program: Program, record: RunRecord) -> Timeline:
    spans = (
        Span(
            device=int(program.device[n]),
            stream=Stream(program.stream[n]),
            kind=Kind(program.kind[n]),
            name=program.label(n),
            micro_batch=int(program.micro_batch[n]),
            block=int(program.block[n]),
            start_s=float(record.start_s[n]),
            end_s=float(record.end_s[n]),
        )
        for n in range(program.num_instructions)
    )
    return Timeline(spans=tuple(sorted(spans, key=lambda span: (span.start_s, span.device, span.stream))))


@dataclass(frozen=True, slots=True, kw_only=True)
class _MemoryMoment:
    """Memory events of one instruction at one instant."""

    order: tuple[float, int, int, int]
    """Time, place within the instant (the module's list), count of the end or start, instruction."""
    events: tuple[int, ...]

    @property
    def time_s(self) -> float:
        return self.order[0]

    @property
    def instruction(self) -> int:
        return self.order[-1]


def _moment_s(start_s: float, end_s: float, duration_s: float, offset_s: float) -> float:
    """When a memory event happens: its offset, stretched as the instruction was; at the end where it is the whole duration."""
    if offset_s <= 0.0:
        return start_s
    if offset_s >= duration_s:
        return end_s
    alone_end_s = start_s + duration_s
    return start_s + offset_s if end_s == alone_end_s else start_s + offset_s * ((end_s - start_s) / duration_s)


def _memory_moments(program: Program, record: RunRecord, n: int) -> list[_MemoryMoment]:
    start_s, end_s = float(record.start_s[n]), float(record.end_s[n])
    first, past = program.memory_offsets[n], program.memory_offsets[n + 1]
    moments: list[_MemoryMoment] = []
    for time_s, found in groupby(
        range(first, past),
        key=lambda event: _moment_s(start_s, end_s, float(program.duration_s[n]), float(program.memory_time_s[event])),
    ):
        events = tuple(found)
        if time_s == start_s:
            order = (time_s, 1, int(record.start_count[n]), n)
        elif time_s == end_s:
            order = (time_s, 1, int(record.end_count[n]), n)
        else:
            order = (time_s, 0 if program.memory_bytes[events[0]] < 0 else 2, 0, n)
        moments.append(_MemoryMoment(order=order, events=events))
    return moments


def _profiles(program: Program, record: RunRecord) -> tuple[MemoryProfile, ...]:
    moments: list[list[_MemoryMoment]] = [[] for _ in range(program.num_devices)]
    for n in range(program.num_instructions):
        moments[program.device[n]].extend(_memory_moments(program, record, n))
    return tuple(_profile(program, device, sorted(found, key=lambda one: one.order)) for device, found in enumerate(moments))


def _profile(program: Program, device: int, moments: list[_MemoryMoment]) -> MemoryProfile:
    events = [event for moment in moments for event in moment.events]
    change_bytes = np.zeros((len(events) + 1, len(MemoryClass)), dtype=np.int64)
    change_bytes[0] = program.resident_bytes[device]
    change_bytes[np.arange(1, len(events) + 1), program.memory_class[events]] = program.memory_bytes[events]
    alive_bytes = change_bytes.cumsum(axis=0)
    _check_balance(program, device, alive_bytes, [moment.instruction for moment in moments for _ in moment.events])
    time_s = np.array([0.0, *(moment.time_s for moment in moments for _ in moment.events)])
    return MemoryProfile(device=device, time_s=time_s, alive_bytes=alive_bytes)


def _check_balance(program: Program, device: int, alive_bytes: NDArray[np.int64], instructions: list[int]) -> None:
    rows, classes = np.nonzero(alive_bytes < 0)
    if len(rows):
        n = instructions[rows[0] - 1]
        name, left = MemoryClass(classes[0]).name.lower(), alive_bytes[rows[0], classes[0]]
        rule = f"bytes of every class >= 0 must hold, but {name} falls to {left}"
        msg = f"device {device}: {rule} in instruction {n} ({program.label(n)})"
        raise MemoryBalanceError(msg)


def _grid(program: Program, record: RunRecord) -> str:
    """A line for each stream: the neighbours of the stuck instruction, and what that one waits for."""
    lines = ["deadlock: >> << marks the instruction of each stream that cannot start"]
    for (device, stream), queue in sorted(queues_of(program).items()):
        position = next((place for place, n in enumerate(queue) if record.end_count[n] < 0), len(queue))
        low, high = max(position - _GRID_NEIGHBOURS, 0), min(position + _GRID_NEIGHBOURS + 1, len(queue))
        cells = [
            f">>{program.label(queue[place])}<<" if place == position else program.label(queue[place])
            for place in range(low, high)
        ]
        shown = " | ".join([*(["..."] if low else []), *cells, *(["..."] if high < len(queue) else [])])
        line = f"  device {device} {stream.name:<7} {shown}"
        if position < len(queue):
            waits = [other for other in dependencies_of(program, queue[position]) if record.end_count[other] < 0]
            line += "   waits for " + ", ".join(
                f"{program.label(other)} (device {program.device[other]} {Stream(program.stream[other]).name})"
                for other in waits
            )
        else:
            line += "   finished"
        lines.append(line)
    return "\n".join(lines)
