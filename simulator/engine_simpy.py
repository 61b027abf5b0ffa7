"""The reference engine: what a Program means, in simpy. The compiled engine must agree with it.

**Streams.** Every (device, stream) is a queue: its instructions run one at a time, in index order. An instruction starts once the
one before it on its stream and all its dependencies have ended, and lasts its ``duration_s``. Nothing else delays it: durations
are priced beforehand.

**Equal times.** At one instant, as long as some instruction can end, the one with the lowest index ends; else the ready one with the
lowest index starts. So ends precede starts, and an instruction without duration ends before anything else starts. Priority is end
before start, sequence is the index: no tie is left to chance. Equal means equal floating-point numbers.

**Memory.** An instruction's memory events happen ``memory_time_s`` after its start, in their order. The bytes alive on a device are its
``resident_bytes`` plus all events so far; a profile has one row for the start and one for each event. On one device and at one
instant, the order is

1. events in the midst of running instructions, if the first of that instruction at that instant frees,
2. events at ends and starts, in the order of those ends and starts,
3. events in the midst of running instructions that begin with an allocation,

and events of one instruction at one instant keep their order. So frees precede allocations wherever neither the order of a stream nor
a dependency says otherwise.

**Errors.** A Program whose instructions wait for each other ends in a `DeadlockError`, which prints the grid of streams. Bytes below zero
in any class of a device end in a `MemoryBalanceError`, which names the instruction. Both are faults of whoever made the Program.

**Not modelled.** Links that concurrent transfers share, slowdown of overlapping streams, jitter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import EventPriority, Process

from simulator.program import Kind, MemoryClass, Program, Stream
from simulator.timeline import MemoryProfile, Span, Timeline

_FIRST_PRIORITY = 2
"""simpy's own events (an instruction is done, a process begins) take priorities 0 and 1: they precede ends and starts."""
_GRID_NEIGHBOURS = 3
"""Instructions shown on either side of the stuck one."""


class DeadlockError(RuntimeError):
    """Instructions wait for each other; the message is the grid of streams with the stuck instruction of each marked."""


class MemoryBalanceError(RuntimeError):
    """An instruction frees bytes that are not there."""


def run(program: Program) -> tuple[Timeline, tuple[MemoryProfile, ...]]:
    """What happens when the program runs: spans of all instructions, and bytes over time of each device, by device.

    Raises:
        DeadlockError: instructions wait for each other.
        MemoryBalanceError: more bytes of a class are freed than are alive.
    """
    history = _simulate(program)
    if not all(history.ended):
        raise DeadlockError(_grid(program, history))
    return _timeline(program, history), _profiles(program, history)


@dataclass(slots=True, kw_only=True)
class _History:
    """What has happened so far. Ends and starts are counted together: the count orders them where times are equal."""

    start_s: list[float]
    end_s: list[float]
    start_count: list[int]
    end_count: list[int]
    ended: list[bool]
    count: int = 0


class _Moment(simpy.Event):
    """Happens after a delay; where several happen at one time, the lowest priority number comes first."""

    def __init__(self, env: simpy.Environment, *, delay_s: float, priority: int) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        env.schedule(self, EventPriority(_FIRST_PRIORITY + priority), delay_s)


def _simulate(program: Program) -> _History:
    num = program.num_instructions
    history = _History(start_s=[0.0] * num, end_s=[0.0] * num, start_count=[0] * num, end_count=[0] * num, ended=[False] * num)
    env = simpy.Environment()
    done = [env.event() for _ in range(num)]

    def serve(queue: list[int]) -> Generator[simpy.Event]:
        for n in queue:
            for dependency in _dependencies(program, n):
                yield done[dependency]
            yield _Moment(env, delay_s=0.0, priority=num + n)
            history.start_s[n], history.start_count[n] = env.now, history.count
            history.count += 1
            yield _Moment(env, delay_s=float(program.duration_s[n]), priority=n)
            history.end_s[n], history.end_count[n], history.ended[n] = env.now, history.count, True
            history.count += 1
            done[n].succeed()

    for _, queue in sorted(_queues(program).items()):
        Process(env, serve(queue))
    env.run()
    return history


def _queues(program: Program) -> dict[tuple[int, Stream], list[int]]:
    queues: dict[tuple[int, Stream], list[int]] = defaultdict(list)
    for n in range(program.num_instructions):
        queues[int(program.device[n]), Stream(program.stream[n])].append(n)
    return queues


def _dependencies(program: Program, n: int) -> list[int]:
    indices: list[int] = program.dependencies[program.dependency_offsets[n] : program.dependency_offsets[n + 1]].tolist()
    return indices


def _timeline(program: Program, history: _History) -> Timeline:
    spans = (
        Span(
            device=int(program.device[n]),
            stream=Stream(program.stream[n]),
            kind=Kind(program.kind[n]),
            name=program.label(n),
            micro_batch=int(program.micro_batch[n]),
            block=int(program.block[n]),
            start_s=history.start_s[n],
            end_s=history.end_s[n],
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


def _memory_moments(program: Program, history: _History, n: int) -> list[_MemoryMoment]:
    start_s, end_s = history.start_s[n], history.end_s[n]
    first, past = program.memory_offsets[n], program.memory_offsets[n + 1]
    moments: list[_MemoryMoment] = []
    for time_s, found in groupby(range(first, past), key=lambda event: start_s + float(program.memory_time_s[event])):
        events = tuple(found)
        if time_s == start_s:
            order = (time_s, 1, history.start_count[n], n)
        elif time_s == end_s:
            order = (time_s, 1, history.end_count[n], n)
        else:
            order = (time_s, 0 if program.memory_bytes[events[0]] < 0 else 2, 0, n)
        moments.append(_MemoryMoment(order=order, events=events))
    return moments


def _profiles(program: Program, history: _History) -> tuple[MemoryProfile, ...]:
    moments: list[list[_MemoryMoment]] = [[] for _ in range(program.num_devices)]
    for n in range(program.num_instructions):
        moments[program.device[n]].extend(_memory_moments(program, history, n))
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


def _grid(program: Program, history: _History) -> str:
    """A line for each stream: the neighbours of the stuck instruction, and what that one waits for."""
    lines = ["deadlock: >> << marks the instruction of each stream that cannot start"]
    for (device, stream), queue in sorted(_queues(program).items()):
        position = next((place for place, n in enumerate(queue) if not history.ended[n]), len(queue))
        low, high = max(position - _GRID_NEIGHBOURS, 0), min(position + _GRID_NEIGHBOURS + 1, len(queue))
        cells = [
            f">>{program.label(queue[place])}<<" if place == position else program.label(queue[place])
            for place in range(low, high)
        ]
        shown = " | ".join([*(["..."] if low else []), *cells, *(["..."] if high < len(queue) else [])])
        line = f"  device {device} {stream.name:<7} {shown}"
        if position < len(queue):
            waits = [other for other in _dependencies(program, queue[position]) if not history.ended[other]]
            line += "   waits for " + ", ".join(
                f"{program.label(other)} (device {program.device[other]} {Stream(program.stream[other]).name})"
                for other in waits
            )
        else:
            line += "   finished"
        lines.append(line)
    return "\n".join(lines)
