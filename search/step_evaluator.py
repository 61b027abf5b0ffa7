"""The step time and peak of a sequence with what lives on the host: what a search asks for many plans of one workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hardware_models.profile import DeviceProfile
from search.sequence_levels import SequenceLevels, sequence_levels, timing_workload
from simulator import engine_compiled
from simulator.host_planner import host_schedule
from simulator.host_schedule import HostSchedule, HostShares
from simulator.lower import PassPrices, lower, policy_seconds, resident_bytes
from simulator.lower_host import device_resident, host_lanes
from simulator.optimizer_states import OPTIMIZER_STATES, STEP_COUNT_BYTES
from simulator.precision import price_in
from simulator.program import Kind, Program, Stream
from simulator.sequence import Operation, keep_all
from simulator.simulate import StepSetting, static_peak_bytes
from simulator.workload import Workload

LOWERED_ALONE = 2
"""Micro-batches that are lowered where nothing goes to the host: every later one repeats the second."""
LOWERED_WITH_HOST = 3
"""Micro-batches that are lowered where something does: the first has no gradients yet, the last sends them, those between repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A sequence, what goes to the host beside it, and what both come to."""

    name: str
    operations: tuple[Operation, ...]
    shares: HostShares | None = None
    """None: nothing goes to the host."""
    step_time_s: float
    peak_bytes: int
    """Most bytes of live tensors on the device."""
    host_bytes: int = 0
    """Most bytes on the host."""


class StepEvaluator:
    """Evaluates sequences of one workload on one device.

    Args:
        workload: one micro-batch.
        device: prices its kernels; its way to the host is needed only where something goes there.
        setting: number of micro-batches, optimizer, precision.

    **Model**: the lowered program of few micro-batches; the others are repetitions. Without the host durations add up, with it the engine plays a program without memory
    (`search.sequence_levels.timing_workload`), and the peak follows from the sequence's levels. Of more than `LOWERED_WITH_HOST` micro-batches the time is exact where the
    step has come to repeat itself by the second one; `exact` lowers all.
    """

    def __init__(self, workload: Workload, device: DeviceProfile, setting: StepSetting) -> None:
        self.workload, self.device, self.setting = workload, device, setting
        self.prices = PassPrices(price_in(setting.precision, device), policy_s=policy_seconds(device))
        self._timing = timing_workload(workload)
        self._known: dict[tuple[tuple[Operation, ...], HostShares | None], Candidate] = {}
        self._levels: dict[tuple[Operation, ...], SequenceLevels] = {}
        self._schedules: dict[tuple[tuple[Operation, ...], HostShares], HostSchedule] = {}

    def evaluate(self, name: str, operations: Sequence[Operation], shares: HostShares | None = None) -> Candidate:
        """The step time and peak of a sequence.

        Raises:
            InputError: the sequence is illegal for the workload, or something goes to the host and the way there is not known.
        """
        shares = shares if shares is not None and shares.any else None
        key = (tuple(operations), shares)
        if key not in self._known:
            self._known[key] = self._alone(name, key[0]) if shares is None else self._with_host(name, key[0], shares)
        known = self._known[key]
        return known if known.name == name else replace(known, name=name)

    def exact(self, candidate: Candidate) -> Candidate:
        """The same with all its micro-batches lowered."""
        count = self.setting.num_microbatches
        if candidate.shares is None or count <= LOWERED_WITH_HOST:
            return candidate
        schedule = self._host_schedule(candidate.operations, candidate.shares, count)
        program = self._program(self._timing, candidate.operations, schedule, count)
        return replace(
            candidate, step_time_s=float(engine_compiled.record(program).end_s.max()), host_bytes=schedule.host_bytes
        )

    def peak_bytes(self, operations: Sequence[Operation], shares: HostShares) -> int:
        """The peak alone, which does not depend on how fast anything is."""
        key = tuple(operations)
        if not shares.any:
            return self.evaluate("none", key).peak_bytes
        schedule = self._schedule(key, shares)
        if key not in self._levels:
            self._levels[key] = sequence_levels(self._program(self.workload, key, None, self._lowered))
        return self._resident(schedule) + self._levels[key].peak_bytes(self.workload, schedule)

    def resident_bytes(self, shares: HostShares) -> int:
        """Bytes that stay on the device through the step: parameters, states and the batch."""
        return self._resident(self._schedule(keep_all(len(self.workload.blocks)), shares) if shares.any else None)

    def compute_s(self, operations: Sequence[Operation]) -> float:
        """Seconds of a sequence's passes in all micro-batches, the optimizer left out: no plan with that sequence takes less."""
        later = first = 0.0
        options: dict[int, str] = {}
        for kind, index, name in operations:
            block = self.workload.blocks[index]
            if kind == "B":
                option = block.option(options[index])
                first += self.prices.seconds(option.backward)
                later += self.prices.seconds(option.backward_accumulate)
                continue
            if kind == "F_all":
                options[index] = name
            seconds = self.prices.seconds(block.option(name).forward if kind == "F_all" else block.discard)
            first, later = first + seconds, later + seconds
        return first + (self.setting.num_microbatches - 1) * later

    @property
    def _lowered(self) -> int:
        """Micro-batches that are lowered where something goes to the host."""
        return min(self.setting.num_microbatches, LOWERED_WITH_HOST)

    def _resident(self, schedule: HostSchedule | None) -> int:
        optimizer = self.setting.optimizer
        sizes = resident_bytes(self.workload, num_microbatches=self.setting.num_microbatches, optimizer=optimizer)
        states, step_bytes = OPTIMIZER_STATES[optimizer], STEP_COUNT_BYTES[optimizer]
        return sum(device_resident(self.workload, schedule, sizes, states=states, step_bytes=step_bytes))

    def _alone(self, name: str, operations: tuple[Operation, ...]) -> Candidate:
        count = self.setting.num_microbatches
        lowered = min(count, LOWERED_ALONE)
        program = self._program(self.workload, operations, None, lowered)
        second_s = float(program.duration_s[program.micro_batch == 1].sum())
        step_s = float(program.duration_s.sum()) + (count - lowered) * second_s
        peak = static_peak_bytes(program) + (count - lowered) * self.workload.batch_bytes
        return Candidate(name=name, operations=operations, step_time_s=step_s, peak_bytes=peak)

    def _with_host(self, name: str, operations: tuple[Operation, ...], shares: HostShares) -> Candidate:
        lowered, schedule = self._lowered, self._schedule(operations, shares)
        program = self._program(self._timing, operations, schedule, lowered)
        end_s = engine_compiled.record(program).end_s
        step_s = float(end_s.max())
        if self.setting.num_microbatches > lowered:
            compute = (program.stream == Stream.COMPUTE) & (program.kind != Kind.OPTIMIZER)
            ends = [float(end_s[compute & (program.micro_batch == number)].max()) for number in (0, 1)]
            step_s += (self.setting.num_microbatches - lowered) * (ends[1] - ends[0])
        return Candidate(
            name=name, operations=operations, shares=shares, step_time_s=step_s, peak_bytes=self.peak_bytes(operations, shares),
            host_bytes=schedule.host_bytes,
        )  # fmt: skip

    def _schedule(self, operations: tuple[Operation, ...], shares: HostShares) -> HostSchedule:
        key = (operations, shares)
        if key not in self._schedules:
            self._schedules[key] = self._host_schedule(operations, shares, self._lowered)
        return self._schedules[key]

    def _host_schedule(self, operations: tuple[Operation, ...], shares: HostShares, num_microbatches: int) -> HostSchedule:
        states = OPTIMIZER_STATES[self.setting.optimizer]
        found = host_schedule(self.workload, operations, shares, num_microbatches=num_microbatches, optimizer_states=states)
        assert found is not None, "shares send something"
        return found

    def _program(
        self, workload: Workload, operations: tuple[Operation, ...], schedule: HostSchedule | None, num_microbatches: int
    ) -> Program:
        lanes = None if schedule is None else host_lanes(self.device)
        return lower(
            workload, operations, self.prices, num_microbatches=num_microbatches, optimizer=self.setting.optimizer, host=schedule, lanes=lanes
        )  # fmt: skip
