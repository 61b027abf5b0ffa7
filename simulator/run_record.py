"""What happened when a program ran, and what follows from it: spans, bytes over time, and the two ways in which a program can be wrong."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.memory_kernels import AT_BOUNDARY, boundary_kernel, by_device, moments_kernel
from simulator.program import Kind, MemoryClass, Program, Stream
from simulator.timeline import MemoryProfile, Message, Span, Timeline

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

    @property
    def makespan_s(self) -> float:
        """Seconds from the start of the step to the last end; 0 without instructions."""
        return float(self.end_s.max(initial=0.0))


def outcome_of(program: Program, record: RunRecord) -> tuple[Timeline, tuple[MemoryProfile, ...]]:
    """Spans of all instructions, and bytes over time of each device, by device.

    Raises:
        DeadlockError: instructions wait for each other.
        MemoryBalanceError: more bytes of a class are freed than are alive.
    """
    check_complete(program, record)
    return timeline_of(program, record), profiles_of(program, record)


def check_complete(program: Program, record: RunRecord) -> None:
    """Refuses a record in which instructions wait for each other.

    Raises:
        DeadlockError: shows which.
    """
    if not record.complete:
        raise DeadlockError(_grid(program, record))


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


def timeline_of(program: Program, record: RunRecord) -> Timeline:
    """Spans of all instructions of a complete record, and the messages between devices."""
    spans = [
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
    ]
    return Timeline(
        spans=tuple(sorted(spans, key=lambda span: (span.start_s, span.device, span.stream))),
        messages=tuple(Message(sent=spans[sent], awaited_by=spans[n]) for sent, n in _messages(program)),
    )


def _messages(program: Program) -> list[tuple[int, int]]:
    """Transfers that an instruction of another device waits for, each with that instruction."""
    waits = np.repeat(np.arange(program.num_instructions), np.diff(program.dependency_offsets))
    between = program.device[waits] != program.device[program.dependencies]
    chosen = between & (program.kind[program.dependencies] == Kind.TRANSFER)
    return list(zip(program.dependencies[chosen].tolist(), waits[chosen].tolist(), strict=True))


def profiles_of(program: Program, record: RunRecord) -> tuple[MemoryProfile, ...]:
    """Bytes over time of each device, by device, of a complete record.

    Raises:
        MemoryBalanceError: more bytes of a class are freed than are alive.
    """
    time_s, place, owner = moments_kernel(
        record.start_s, record.end_s, program.duration_s, program.memory_offsets, program.memory_time_s, program.memory_bytes
    )
    order = boundary_kernel(program.memory_offsets, time_s, place, record.start_s, record.start_count, record.end_count)
    if len(order) < len(time_s):  # stable: equal times and places keep the order of starts and ends, or of instructions
        order = np.concatenate([order, np.flatnonzero(place != AT_BOUNDARY)])
        order = order[np.lexsort((place[order], time_s[order]))]
    offsets, events = by_device(order, program.device[owner].astype(np.int64), program.num_devices)
    return tuple(
        _profile(program, device, events[offsets[device] : offsets[device + 1]], time_s, owner)
        for device in range(program.num_devices)
    )


def _profile(
    program: Program, device: int, events: NDArray[np.int64], time_s: NDArray[np.float64], owner: NDArray[np.int64]
) -> MemoryProfile:
    alive_bytes = np.zeros((len(events) + 1, len(MemoryClass)), dtype=np.int64)
    alive_bytes[0] = program.resident_bytes[device]
    alive_bytes[np.arange(1, len(events) + 1), program.memory_class[events]] = program.memory_bytes[events]
    np.cumsum(alive_bytes, axis=0, out=alive_bytes)
    _check_balance(program, device, alive_bytes, owner[events])
    return MemoryProfile(device=device, time_s=np.concatenate([[0.0], time_s[events]]), alive_bytes=alive_bytes)


def _check_balance(program: Program, device: int, alive_bytes: NDArray[np.int64], owner: NDArray[np.int64]) -> None:
    if (alive_bytes < 0).any():
        rows, classes = np.nonzero(alive_bytes < 0)
        n = int(owner[rows[0] - 1])
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
