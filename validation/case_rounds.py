"""Cases of one module measured together: what each needs alone first, then step times in rounds, so that drift (clocks, heat, other programs) meets all alike.

Needs the standard library, numpy and torch only.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hardware_models.microbench_environment import GpuMonitor
from hardware_models.microbench_yardstick import Yardstick
from simulator.host_schedule import host_shares
from simulator.sequence import check_sequence
from simulator.timeline import Timeline
from simulator.tracing.traced_model import traced_model
from simulator.workload_json import workload_to_json
from validation.bundle import BundleCase
from validation.measure import StepTimes
from validation.session import ReplaySession
from validation.step_runs import ScheduledRun, StepRun

ORDER_SEED = 0
"""Of the order of the cases in every round."""
NOT_BEGUN = "not begun: out of time"
_TRACED_KINDS = frozenset({"plan", "plain"})


@dataclass(slots=True, kw_only=True)
class MeasuredCase:
    """A case and what has been measured of it so far."""

    number: int
    """Its place in the bundle."""
    case: BundleCase
    found: dict[str, Any] = field(default_factory=dict)
    """What was measured beside the step's time; why it failed."""
    workload: dict[str, Any] | None = None
    """As traced on the device; of plans and the plain step."""
    seconds: list[float] = field(default_factory=list)
    """Step time by round."""
    yardstick_s: list[float] = field(default_factory=list)
    """Of the yardstick right after each of them, on a CPU."""
    intervals: list[tuple[float, float]] = field(default_factory=list)
    """Beginning and end of its steps, by `time.perf_counter`."""

    @property
    def failed(self) -> bool:
        """Whether it cannot be run."""
        return "failed" in self.found

    def fail(self, problem: Exception) -> None:
        """Writes down why it did not run."""
        self.found = {"failed": f"{type(problem).__name__}: {problem}", "traceback": traceback.format_exc()}

    def to_json(self, monitor: GpuMonitor | None) -> dict[str, Any]:
        """The case's file in the archive."""
        names = {"name": self.case.name, "kind": self.case.kind}
        if self.failed or not self.seconds:
            return names | (self.found if self.failed else {"failed": NOT_BEGUN})
        times = StepTimes(seconds=tuple(self.seconds))
        return names | {
            "step_time_s": times.to_json() | {"seconds": self.seconds}, "state": {} if monitor is None else monitor.during(self.intervals),
            "yardstick_s": StepTimes(seconds=tuple(self.yardstick_s)).to_json() | {"seconds": self.yardstick_s} if self.yardstick_s else None,
        } | self.found  # fmt: skip

    @property
    def text(self) -> str:
        """In a line of progress."""
        if self.failed:
            return str(self.found["failed"]).partition("\n")[0]
        return f"{np.median(self.seconds):.4f} s in {len(self.seconds)} rounds, {self.found['allocated_bytes'] / 2**30:.3f} GiB"


def groups_of(cases: Sequence[BundleCase]) -> list[list[MeasuredCase]]:
    """Cases that one module runs, in order of appearance: same model and batch, number format, optimizer and way to run blocks."""
    groups: dict[tuple[Any, ...], list[MeasuredCase]] = {}
    for number, case in enumerate(cases):
        precision = case.plan.precision
        key = (case.model, case.batch, case.seq_len, precision.mode, precision.optimizer, case.plan.runtime.compile)
        groups.setdefault(key, []).append(MeasuredCase(number=number, case=case))
    return list(groups.values())


def expected_seconds(group: Sequence[MeasuredCase]) -> float:
    """Of one round over a group, as predicted; a case without a prediction takes as long as the others on average, a second where none has one."""
    known = [float(one.case.predicted["step_time_s"]) for one in group if one.case.predicted]
    return len(group) * (sum(known) / len(known) if known else 1.0)


def run_of(session: ReplaySession, case: BundleCase) -> StepRun:
    """The step that a case means, on a session's module.

    Raises:
        InputError: the sequence is not one of the model's blocks as they are traced here.
    """
    if case.kind == "plain":
        return session.plain()
    if case.kind != "plan":
        return session.hand_made(case.kind, case.micro_batch)
    blocks = len(session.traced(case.micro_batch).workload.blocks)
    check_sequence(case.operations, blocks, source=f"bundle case {case.name}")
    shares = host_shares(case.plan, blocks)
    return session.scheduled(case.operations, case.micro_batch, shares if shares.any else None)


class CaseRounds:
    """The cases of one module.

    Every step is run by a schedule that is built for it and let go after it, so that only one plan's buffers and optimizer states are alive at a time, and
    after one step that is not counted.

    Args:
        group: of `groups_of`.
        device: ``cpu`` or ``cuda``.
        yardstick: timed after every step; None: not (a GPU, whose clocks are read).

    Raises:
        Exception: what building the module raises.
    """

    def __init__(self, group: Sequence[MeasuredCase], *, device: str, yardstick: Yardstick | None) -> None:
        self.group, self._yardstick = group, yardstick
        case = group[0].case
        precision = case.plan.precision
        self._session = ReplaySession(
            traced_model(case.model, batch=case.batch, seq_len=case.seq_len), device=device, optimizer=precision.optimizer,
            precision=precision.mode, compiled=case.plan.runtime.compile,
        )  # fmt: skip

    def examine(self, measured: MeasuredCase, *, gradients: bool) -> None:
        """Memory, spans, gradients and the workload of a case."""
        started, case = time.perf_counter(), measured.case
        self._session.settle()
        with self._run(measured) as run:
            memory = self._session.peak(run)
            found: dict[str, Any] = {
                "allocated_bytes": memory.allocated_bytes, "reserved_bytes": memory.reserved_bytes, "host_bytes": memory.host_bytes,
            }  # fmt: skip
            if isinstance(run, ScheduledRun):
                found |= {"spans": spans_to_json(self._session.timeline(run))}
                if self._session.device.type == "cuda":
                    found |= {"host_time_s": self._host_times(run).to_json()}
            if gradients:
                found["gradients_match"] = [match.to_json() for match in self._session.match([(run, case.micro_batch)])[0]]
        if case.kind in _TRACED_KINDS:
            measured.workload = workload_to_json(self._session.traced(case.micro_batch).workload)
        measured.found = found | {"elapsed_s": time.perf_counter() - started}
        gc.collect()

    def rounds(self, most: int, deadline_s: float) -> Iterator[int]:
        """Times every case that has not failed once in each of at most ``most`` rounds, each in an order of its own; tells which round is over.

        Args:
            most: rounds.
            deadline_s: of `time.perf_counter`; no round but the first begins after it.
        """
        generator = np.random.default_rng(ORDER_SEED)
        for number in range(most):
            if number and time.perf_counter() > deadline_s:
                return
            for place in generator.permutation(len(self.group)):
                if not self.group[place].failed:
                    attempt(self.group[place], self._time)
            gc.collect()
            yield number

    def _time(self, measured: MeasuredCase) -> None:
        with self._run(measured) as run, run.inside(), _no_collection():
            entered = time.perf_counter()
            run()
            self._session.wait()
            begin = time.perf_counter()
            run()
            self._session.wait()
            end = time.perf_counter()
        measured.seconds.append(end - begin)
        measured.intervals.append((entered, end))
        if self._yardstick is not None:
            measured.yardstick_s.append(self._yardstick.seconds())

    def _run(self, measured: MeasuredCase) -> AbstractContextManager[StepRun]:
        return self._session.once(run_of(self._session, measured.case))

    def _host_times(self, run: ScheduledRun) -> StepTimes:
        """Seconds until the host has given one step to the device, without waiting for it."""
        with run.inside():
            run()
            self._session.wait()
            begin = time.perf_counter()
            run()
            given = time.perf_counter()
            self._session.wait()
        return StepTimes(seconds=(given - begin,))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Context in which Python looks for no cycles, as `timeit` has it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def attempt(measured: MeasuredCase, work: Callable[[MeasuredCase], None]) -> None:
    """Does something with a case; where that fails it is written down, and the others go on."""
    try:
        work(measured)
    except Exception as problem:  # noqa: BLE001 - one case that fails must not cost the others; it is written down whole
        measured.fail(problem)
        gc.collect()


def monitor_of(device: str) -> AbstractContextManager[GpuMonitor | None]:
    """What looks at a device's clocks meanwhile."""
    return GpuMonitor() if device == "cuda" else nullcontext()


def spans_to_json(timeline: Timeline) -> list[list[Any]]:
    """A row a span: stream, name, start and end in seconds."""
    return [[span.stream.name, span.name, span.start_s, span.end_s] for span in timeline.spans]
