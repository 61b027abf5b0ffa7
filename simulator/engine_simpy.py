"""The reference engine: what a Program means, in simpy. The compiled engine must agree with it.

**Streams.** Every (device, stream) is a queue: its instructions run one at a time, in index order. An instruction starts once the
one before it on its stream and all its dependencies have ended.

**Speed.** An instruction has ``duration_s`` of work and does it at speed 1, unless other streams of its device run something: then at
1 / f, f the greatest ``slowdown`` of its stream by theirs. A transfer does nothing for ``duration_s`` (its latency), then moves its bytes at its
max-min fair rate over all transfers that move at that time; its own limit is divided by f. Speeds change only between instants.

**Equal times.** At one instant, as long as some instruction can end, the one with the lowest index ends; else the ready one with the
lowest index starts. So ends precede starts, and an instruction without duration ends before anything else starts. Priority is end
before start, sequence is the index: no tie is left to chance. Equal means equal floating-point numbers. Then speeds are settled.

**Memory.** An instruction's memory events happen ``memory_time_s`` after its start (stretched where it was slowed; at its end where that is its
duration), in their order. The bytes alive on a device are its ``resident_bytes`` plus all events so far; a profile has one row for the start
and one for each event. On one device and at one instant, the order is

1. events in the midst of running instructions, if the first of that instruction at that instant frees,
2. events at ends and starts, in the order of those ends and starts,
3. events in the midst of running instructions that begin with an allocation,

and events of one instruction at one instant keep their order. So frees precede allocations wherever neither the order of a stream nor
a dependency says otherwise.

**Errors.** `run_record`: a Program whose instructions wait for each other ends in a `DeadlockError`, bytes below zero in a `MemoryBalanceError`.
Both are faults of whoever made the Program. Jitter and stragglers are durations sampled beforehand (`jitter`).
"""

from __future__ import annotations

from collections.abc import Generator
from heapq import heappush

import numpy as np
import simpy
from simpy.events import EventPriority, Process

from hardware_models.network.sharing import max_min_rates
from simulator.program import Program
from simulator.run_record import RunRecord, dependencies_of, outcome_of, queues_of
from simulator.timeline import MemoryProfile, Timeline

_FIRST_PRIORITY = 2
"""simpy's own events (an instruction is done, a process begins) take priorities 0 and 1: they precede ends and starts."""


def run(program: Program) -> tuple[Timeline, tuple[MemoryProfile, ...]]:
    """What happens when the program runs: spans of all instructions, and bytes over time of each device, by device.

    Raises:
        DeadlockError: instructions wait for each other.
        MemoryBalanceError: more bytes of a class are freed than are alive.
    """
    return outcome_of(program, record(program))


def record(program: Program) -> RunRecord:
    """When each instruction starts and ends."""
    return _Machine(program).run()


class _Clock(simpy.Environment):
    """An environment whose events can be set for a time instead of a delay, so that equal times stay equal."""

    def moment(self, time_s: float, priority: int) -> simpy.Event:
        """An event at a time; where several happen at one time, the lowest priority number comes first."""
        event = simpy.Event(self)
        event._ok, event._value = True, None  # noqa: SLF001 - as simpy's own Timeout does
        heappush(self._queue, (time_s, EventPriority(_FIRST_PRIORITY + priority), next(self._eid), event))
        return event


class _Machine:
    """All streams of a program, and what runs on them."""

    def __init__(self, program: Program) -> None:
        num = program.num_instructions
        self.program, self.clock = program, _Clock()
        self.transfer_row = {int(n): row for row, n in enumerate(program.transfers.instruction)}
        self.start_s, self.end_s = np.zeros(num), np.zeros(num)
        self.start_count, self.end_count = np.zeros(num, dtype=np.int64), np.full(num, -1, dtype=np.int64)
        self.count = 0
        self.done = [self.clock.event() for _ in range(num)]
        self.speed: dict[int, float] = {}
        """Of each running instruction: seconds of work a second; of a moving transfer bytes a second."""
        self.left: dict[int, float] = {}
        """Work or bytes left at ``since_s``."""
        self.since_s: dict[int, float] = {}
        self.moving: set[int] = set()
        """Transfers past their latency."""
        self.settles_s = -1.0

    def run(self) -> RunRecord:
        for _, queue in sorted(queues_of(self.program).items()):
            Process(self.clock, self._serve(queue))
        self.clock.run()
        return RunRecord(start_s=self.start_s, end_s=self.end_s, start_count=self.start_count, end_count=self.end_count)

    def _serve(self, queue: list[int]) -> Generator[simpy.Event]:
        """A stream: one instruction after the other."""
        for n in queue:
            for dependency in dependencies_of(self.program, n):
                yield self.done[dependency]
            yield self.clock.moment(self.clock.now, len(self.done) + n)
            self.start_s[n], self.start_count[n] = self.clock.now, self.count
            self.count += 1
            self._begin(n, work=float(self.program.duration_s[n]), speed=1.0)
            yield self.done[n]

    def _begin(self, n: int, *, work: float, speed: float) -> None:
        self.left[n], self.since_s[n] = work, self.clock.now
        self._go_on(n, speed)
        self._settle_after_this_instant()

    def _go_on(self, n: int, speed: float) -> None:
        """From now on at this speed; an earlier end is void."""
        self.speed[n] = speed
        self.end_s[n] = self.clock.now + self.left[n] / speed if speed > 0.0 else np.inf
        if speed > 0.0:
            end_s = float(self.end_s[n])
            self.clock.moment(end_s, n).callbacks.append(lambda _: self._reach(n, end_s))

    def _reach(self, n: int, end_s: float) -> None:
        """The end of an instruction, or of a transfer's latency, unless it has moved since."""
        if n not in self.speed or self.end_s[n] != end_s:
            return
        row = self.transfer_row.get(n)
        if row is not None and n not in self.moving:
            self.moving.add(n)
            self._begin(n, work=float(self.program.transfers.size_bytes[row]), speed=0.0)
            return
        self.end_count[n] = self.count
        self.count += 1
        for state in (self.speed, self.left, self.since_s):
            del state[n]
        self.moving.discard(n)
        self.done[n].succeed()
        self._settle_after_this_instant()

    def _settle_after_this_instant(self) -> None:
        if self.settles_s != self.clock.now:
            self.settles_s = self.clock.now
            self.clock.moment(self.clock.now, 2 * len(self.done)).callbacks.append(lambda _: self._settle())

    def _settle(self) -> None:
        """New speeds for what runs, where they differ."""
        self.settles_s = -1.0
        for n, speed in self._speeds().items():
            if speed != self.speed[n]:
                self.left[n] = max(0.0, self.left[n] - self.speed[n] * (self.clock.now - self.since_s[n]))
                self.since_s[n] = self.clock.now
                self._go_on(n, speed)

    def _speeds(self) -> dict[int, float]:
        """Speed of each running instruction, in index order: slowed by the other streams of its device; transfers share their links."""
        transfers, speeds = self.program.transfers, {n: 1.0 / self._slowdown(n) for n in sorted(self.speed)}
        moving = sorted(self.moving)
        rows = [self.transfer_row[n] for n in moving]
        routes = [transfers.routes[transfers.route_offsets[row] : transfers.route_offsets[row + 1]].tolist() for row in rows]
        limits = [float(transfers.limit_bytes_per_s[row]) * speeds[n] for n, row in zip(moving, rows, strict=True)]
        rates = max_min_rates(routes, transfers.link_bytes_per_s, limits=limits)
        return speeds | {n: float(rate) for n, rate in zip(moving, rates, strict=True)}

    def _slowdown(self, n: int) -> float:
        device, stream = self.program.device[n], self.program.stream[n]
        others = [self.program.stream[other] for other in self.speed if self.program.device[other] == device and other != n]
        return max((float(self.program.slowdown[stream, other]) for other in others), default=1.0)
