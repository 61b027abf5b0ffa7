"""Replay over several processes: predicted beside measured, rank by rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hardware_models.errors import InputError
from hardware_models.profile import DeviceProfile
from hardware_models.units import GIB
from simulator.model_source import ModelSource
from simulator.parallel.simulate_traced import TracedSimulation
from simulator.plan import Plan, check_gpus
from simulator.plan_file import plan_to_dict
from simulator.timeline import Timeline
from simulator.tracing.simulate_stages import resolve_traced
from validation.distributed.check import check_devices
from validation.distributed.job import DEFAULT_TIMEOUT_S, Job, JobReport
from validation.distributed.launch import launch
from validation.distributed.mesh import place_of
from validation.distributed.module_prediction import ModuleSimulation
from validation.distributed.prediction import ModulePrediction, Prediction, prediction_of
from validation.distributed.worker import run_job
from validation.reports import table_of
from validation.session import GradientsMatch

JOINED = ("RANK", "WORLD_SIZE")
"""Variables that torchrun sets: this process is one of several already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessesReplay:
    """A plan over several processes, predicted and measured."""

    model: str
    plan: Plan
    predicted: TracedSimulation | ModuleSimulation
    measured: JobReport

    @property
    def time_error(self) -> float:
        """Predicted step time over the measured median, minus 1."""
        return self.predicted.step_time_s / self.measured.times.median_s - 1

    @property
    def memory_errors(self) -> tuple[float, ...]:
        """Per rank, predicted peak over the measured one, minus 1."""
        peaks = self.predicted.peak_memory_bytes
        return tuple(peaks[place_of(report.rank, self.plan).pp] / report.peak_bytes - 1 for report in self.measured.ranks)

    @property
    def match(self) -> GradientsMatch:
        """Of all ranks together."""
        matches = [report.match for report in self.measured.ranks]
        return GradientsMatch(
            reference=matches[0].reference, bitwise=all(match.bitwise for match in matches),
            max_abs=max(match.max_abs for match in matches), max_rel=max(match.max_rel for match in matches),
        )  # fmt: skip

    @property
    def timeline(self) -> Timeline:
        """Measured spans of all ranks."""
        return Timeline(spans=tuple(span for report in self.measured.ranks for span in report.spans))

    def to_json(self) -> dict[str, Any]:
        """The keys of ``schedlab replay --json``; lists are per rank. ``memory_error`` is the rank's that is furthest off."""
        ranks, errors = self.measured.ranks, self.memory_errors
        return {
            "predicted": self.predicted.to_json(),
            "measured": {
                "step_time_s": self.measured.times.to_json(), "peak_memory_bytes": [report.peak_bytes for report in ranks],
                "peak_reserved_bytes": [report.reserved_bytes for report in ranks],
            },
            "time_error": self.time_error, "memory_error": max(errors, key=abs), "memory_errors": list(errors),
            "gradients_match": self.match.to_json(), "plan": plan_to_dict(self.plan),
            "processes": {
                "num": self.plan.num_gpus, "threads": self.measured.threads, "link_latency_s": self.measured.link.latency_s,
                "link_bytes_per_s": self.measured.link.bytes_per_s, **self.measured.environment,
            },
        }  # fmt: skip

    def table(self) -> Table:
        """A row per rank."""
        columns = ("rank", "step predicted", "measured", "error", "peak predicted", "measured", "error", "gradients")
        rows = []
        for report, error in zip(self.measured.ranks, self.memory_errors, strict=True):
            peak = self.predicted.peak_memory_bytes[place_of(report.rank, self.plan).pp]
            gradients = "bitwise" if report.match.bitwise else f"rel {report.match.max_rel:.1e}"
            rows.append((
                str(report.rank), f"{self.predicted.step_time_s:.4f} s", f"{self.measured.times.median_s:.4f} s", f"{self.time_error:+.2%}",
                f"{peak / GIB:.4f} GiB", f"{report.peak_bytes / GIB:.4f} GiB", f"{error:+.2%}", gradients,
            ))  # fmt: skip
        return table_of(f"{self.model} on {self.plan.num_gpus} processes, {_how(self.plan)}", columns, rows)


def _how(plan: Plan) -> str:
    """What splits the model, in words."""
    parallel = plan.parallel
    found = [f"tensor parallel {parallel.tp}"] if parallel.tp > 1 else []
    found += [plan.pipeline.schedule] if parallel.pp > 1 else []
    found += [f"{parallel.dp} replicas"] if parallel.dp > 1 else []
    return ", ".join([*found, *([f"ZeRO {plan.memory.zero_stage}"] if plan.memory.zero_stage else [])])


def replay_processes(
    source: ModelSource,
    plan: Plan,
    device: DeviceProfile,
    *,
    steps: int = 10,
    on: str = "cpu",
    folder: Path | None = None,
    bundle: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    progress: Callable[[str], None] = lambda _: None,
) -> ProcessesReplay:
    """Runs a plan on as many processes as its degrees say, and compares with the prediction.

    The processes are started here. Under torchrun this process is one of them already: it joins, and all but rank 0 end when their part is done.

    Args:
        source: a traced model.
        plan: degrees, pipeline, recompute.
        device: predicts.
        steps: timed ones.
        on: ``cpu`` (gloo) or ``cuda`` (NCCL).
        folder: where relative files of the plan begin.
        bundle: refused: a bundle runs on one device.
        timeout_s: longest wait for a rank.
        progress: told what is being done.

    Raises:
        InputError: the plan or the model cannot be run over processes.
        InfeasibleError: this machine has too little memory.
        RunFailedError: a process failed; all are ended.
    """
    if bundle is not None:
        rule = f"a bundle runs on one device, but the plan uses {plan.num_gpus}"
        raise InputError(
            source="--bundle", key="", value=str(bundle), rule=rule, remedy="install schedlab there and replay under torchrun"
        )
    joined = all(name in os.environ for name in JOINED)
    check_gpus(plan, int(os.environ["WORLD_SIZE"]) if joined else plan.num_gpus)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", plan.num_gpus)) if joined else plan.num_gpus
    check_devices(plan, on=on, num_devices=torch.cuda.device_count(), processes_here=here)
    progress(f"tracing {source.name}")
    prepared = prepare(source, plan, device, steps=steps, on=on, folder=folder, timeout_s=timeout_s)
    report = run_job(prepared.job, progress) if joined else launch(prepared.job, progress)
    if report is None:
        sys.exit(0)
    return prepared.result(report)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedReplay:
    """A replay that fits this machine, before any process is started."""

    prediction: Prediction | ModulePrediction
    job: Job

    def result(self, measured: JobReport) -> ProcessesReplay:
        """Beside what the processes measured."""
        job = self.job
        return ProcessesReplay(
            model=job.model, plan=job.plan, predicted=self.prediction.times(measured.link), measured=measured
        )


def prepare(
    source: ModelSource, plan: Plan, device: DeviceProfile, *, steps: int, on: str = "cpu", folder: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> PreparedReplay:  # fmt: skip
    """Predicts a plan over processes, and says what each is to do; arguments and errors as in `replay_processes`."""
    resolved = resolve_traced(plan, source)
    prediction = prediction_of(source, resolved, device, cores=len(os.sched_getaffinity(0)), folder=folder, on=on)
    prediction.memory()
    job = Job(
        model=source.name, batch=source.batch, seq_len=source.seq_len, plan=resolved, order=prediction.order, sequence=prediction.sequence, steps=steps, device=on,
        timeout_s=timeout_s,
    )  # fmt: skip
    return PreparedReplay(prediction=prediction, job=job)
