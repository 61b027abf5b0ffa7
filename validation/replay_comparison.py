"""Replay: run a plan for real and set what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes
from search.plan_sequence import sequence_of
from simulator.host_schedule import HostShares
from simulator.model_source import ModelSource
from simulator.models import MODELS
from simulator.plan import Plan
from simulator.plan_file import plan_to_dict
from simulator.precision import repriced_in
from simulator.sequence import Operation, keep_all
from simulator.simulate import Simulation, StepSetting, simulate, step_setting
from simulator.timeline import Timeline
from simulator.tracing.trace import Traced
from validation.bundle import BundleCase, write_bundle
from validation.measure import PeakMemory, StepTimes, interleaved_times
from validation.session import GradientsMatch, ReplaySession


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayCase:
    """One schedule to run: a name for tables, its micro-batch and sequence."""

    name: str
    plan: Plan
    operations: tuple[Operation, ...]

    def shares(self, traced: Traced) -> HostShares | None:
        """Fractions of bytes on the host; None where nothing goes."""
        return step_setting(self.plan, len(traced.workload.blocks)).host


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """One schedule, predicted and measured."""

    case: ReplayCase
    predicted: Simulation
    times: StepTimes
    memory: PeakMemory
    timeline: Timeline
    matches: tuple[GradientsMatch, ...]

    @property
    def time_error(self) -> float:
        """Predicted step time over the measured median, minus 1."""
        return self.predicted.step_time_s / self.times.median_s - 1

    @property
    def memory_error(self) -> float:
        """Predicted peak of allocated bytes over the measured one, minus 1."""
        return self.predicted.peak_memory_bytes[0] / self.memory.allocated_bytes - 1

    def to_json(self) -> dict[str, Any]:
        """The keys of ``schedlab replay --json``."""
        return {
            "predicted": self.predicted.to_json(),
            "measured": {
                "step_time_s": self.times.to_json(), "peak_memory_bytes": [self.memory.allocated_bytes],
                "peak_reserved_bytes": [self.memory.reserved_bytes], "peak_host_bytes": self.memory.host_bytes,
            },
            "time_error": self.time_error, "memory_error": self.memory_error,
            "gradients_match": self.matches[0].to_json(), "gradients_match_unsplit": [match.to_json() for match in self.matches[1:]],
            "plan": plan_to_dict(self.case.plan),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Schedules of one module measured in turn, beside the module's plain step on the whole batch."""

    results: tuple[ReplayResult, ...]
    plain_predicted: Simulation
    plain_times: StepTimes
    plain_memory: PeakMemory

    def plain_json(self) -> dict[str, Any]:
        """The plain step, predicted and measured."""
        return {
            "predicted": {
                "step_time_s": self.plain_predicted.step_time_s, "peak_memory_bytes": list(self.plain_predicted.peak_memory_bytes),
            },
            "measured": {
                "step_time_s": self.plain_times.to_json(), "peak_memory_bytes": [self.plain_memory.allocated_bytes],
                "peak_reserved_bytes": [self.plain_memory.reserved_bytes],
            },
        }  # fmt: skip


def replay_case(
    plan: Plan, source: ModelSource, device: DeviceProfile, *, name: str = "plan", folder: Path | None = None
) -> ReplayCase:
    """The sequence that a plan means, ready to run.

    Raises:
        InputError: the plan breaks a rule of the model or of one device.
        InfeasibleError: ``optimal`` and nothing fits its budget.
    """
    resolved = source.resolve(plan)
    workload = source.workload(resolved.batch.micro_batch or source.global_batch)
    return ReplayCase(name=name, plan=resolved, operations=sequence_of(resolved, workload, device, folder=folder))


def replay(
    source: ModelSource,
    cases: Sequence[ReplayCase],
    device: DeviceProfile,
    *,
    repeats: int = 10,
    on: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> Replay:
    """Runs schedules for real, in turn with the plain step, and compares with the predictions.

    Args:
        source: a traced model.
        cases: schedules of it, all of the batch that the model has.
        device: predicts.
        repeats: timed steps of each.
        on: torch device to run on.
        progress: told what is being done.

    Raises:
        InputError: the model has no definition that can run.
        InfeasibleError: a schedule does not fit the device, as predicted (nothing is run) or when it is run.
    """
    with memory_kept(device):
        return _replay(source, cases, device, repeats=repeats, on=on, progress=progress)


def _replay(
    source: ModelSource, cases: Sequence[ReplayCase], device: DeviceProfile, *, repeats: int, on: str, progress: Callable[[str], None]
) -> Replay:  # fmt: skip
    progress(f"building {source.name}")
    session = ReplaySession(
        source.definition,
        device=on,
        optimizer=cases[0].plan.precision.optimizer,
        precision=source.precision,
        compiled=source.compiled,
    )
    predictions = [_predict(session, case, device) for case in cases]
    for case, prediction in zip(cases, predictions, strict=True):
        check_fits(case.name, prediction)
    plain_blocks = session.traced(session.global_batch).workload
    plain_predicted = simulate(
        plain_blocks,
        keep_all(len(plain_blocks.blocks)),
        device,
        StepSetting(optimizer=cases[0].plan.precision.optimizer, precision=repriced_in(source.precision)),
    )
    sizes = [case.plan.batch.micro_batch or session.global_batch for case in cases]
    progress(f"gradients of {len(cases)} schedules against the plain module")
    runs = [
        session.scheduled(case.operations, size, case.shares(session.traced(size)))
        for case, size in zip(cases, sizes, strict=True)
    ]
    matches = session.match(list(zip(runs, sizes, strict=True)))
    memories, timelines = [], []
    for case, run in zip(cases, runs, strict=True):
        progress(f"memory and timeline of {case.name}")
        memories.append(session.peak(run))
        timelines.append(session.timeline(run))
    plain = session.plain()
    plain_memory = session.peak(plain)
    progress(f"timing {1 + len(runs)} schedules x {repeats} steps")
    plain_times, *times = interleaved_times([plain, *runs], repeats=repeats, device=session.device)
    results = tuple(
        ReplayResult(case=case, predicted=predicted, times=measured, memory=memory, timeline=timeline, matches=match)
        for case, predicted, measured, memory, timeline, match in zip(
            cases, predictions, times, memories, timelines, matches, strict=True
        )
    )
    return Replay(results=results, plain_predicted=plain_predicted, plain_times=plain_times, plain_memory=plain_memory)


def _predict(session: ReplaySession, case: ReplayCase, device: DeviceProfile) -> Simulation:
    size = case.plan.batch.micro_batch or session.global_batch
    workload = session.traced(size).workload
    setting = replace(step_setting(case.plan, len(workload.blocks)), num_microbatches=session.global_batch // size)
    return simulate(workload, case.operations, device, setting)


@contextmanager
def memory_kept(device: DeviceProfile) -> Iterator[None]:
    """Turns torch's running out of memory into what the command line says of plans that do not fit.

    Raises:
        InfeasibleError: the device ran out of memory though the prediction fits, as others use it too or the prediction is wrong.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        change = "free the device of other processes, or take a smaller batch.micro_batch, memory.recompute or an offload"
        raise InfeasibleError(limit=f"{device.name} ran out of memory: {first}", smallest_change=change) from error


def check_fits(name: str, prediction: Simulation) -> None:
    """Refuses a schedule that needs more than its device has.

    Raises:
        InfeasibleError: says how much, and what takes less.
    """
    device = prediction.device
    needed = max(prediction.peak_reserved_bytes) + device.context_bytes
    if needed > device.memory_bytes:
        raise InfeasibleError(
            limit=f"{name} needs {format_bytes(needed)}, but {device.name} has {format_bytes(device.memory_bytes)}",
            smallest_change=f"{needed - device.memory_bytes} bytes less: a smaller batch.micro_batch, memory.recompute or an offload",
            needed_bytes=needed,
        )


def bundle_replay(case: ReplayCase, source: ModelSource, device: DeviceProfile, path: Path) -> dict[str, Any]:
    """Writes a case with its prediction to run on a machine that has only torch; what the command line says of it.

    Raises:
        InputError: the model is built by a package that such a machine does not have.
    """
    one = bundle_case(case, source, device)
    write_bundle([one], path)
    return {
        "bundle": str(path),
        "predicted": dict(one.predicted),
        "_table": f"python -m validation.replay {path} --out results.zip --device {device.kind}",
    }


def bundle_case(case: ReplayCase, source: ModelSource, device: DeviceProfile) -> BundleCase:
    """A case to run elsewhere, with its prediction from the trace that was made here."""
    needs = MODELS[source.name].needs if source.name in MODELS else ""
    if needs or source.config is not None:
        plain = [name for name, entry in MODELS.items() if not entry.needs]
        rule = f"this model is built by {needs or 'a configuration'}, which a bare machine does not have"
        raise InputError(
            source="--model",
            key="name",
            value=source.name,
            rule=rule,
            remedy=f"take one of {', '.join(plain)}, or package.module:function",
        )
    workload = source.workload(case.plan.batch.micro_batch or source.global_batch)
    simulation = simulate(workload, case.operations, device, step_setting(case.plan, len(workload.blocks)))
    program = simulation.program
    labels = [program.label(index) for index in range(program.num_instructions)]
    return BundleCase(
        name=case.name, model=source.name, batch=source.global_batch, seq_len=source.seq_len, plan=case.plan, operations=case.operations,
        predicted=simulation.to_json(),
        program={"label": labels, "stream": program.stream.tolist(), "duration_s": program.duration_s.tolist()},
    )  # fmt: skip
