"""Run a bundle on this machine: ``python -m validation.replay BUNDLE --out ARCHIVE [--device cuda]``.

Needs the standard library, numpy and torch only. Each case gets a module of its own; what went wrong with one is written down and the next
is run. The archive (zip) is rewritten after each case, so a run that is stopped keeps what it has; ``python -m validation.replay_suite report`` reads it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch

from hardware_models.errors import InputError
from hardware_models.microbench import problem_of
from hardware_models.microbench_environment import GpuMonitor, environment
from hardware_models.microbench_yardstick import Yardstick
from simulator.host_schedule import host_shares
from simulator.sequence import check_sequence
from simulator.timeline import Timeline
from simulator.tracing.traced_model import TracedModel, traced_model
from simulator.workload_json import workload_to_json
from validation.bundle import BundleCase, read_bundle
from validation.measure import StepTimes, interleaved_times
from validation.session import ReplaySession
from validation.step_runs import ScheduledRun, StepRun

CASE_FILE, ENVIRONMENT_FILE, WORKLOAD_FILE = "case-{:03d}.json", "environment.json", "workload-{:03d}.json"
NO_GPU_REMEDY = "install a build of torch for CUDA and check the driver, or take --device cpu"


class Archive:
    """The results so far; each file whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._files = path, dict[str, str]()

    def add(self, name: str, table: Any) -> None:
        """Adds a file and writes everything."""
        self._files[name] = json.dumps(table)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for known, text in self._files.items():
                archive.writestr(known, text)
        temporary.replace(self._path)


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


def measure_case(case: BundleCase, *, device: str, steps: int, gradients: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Everything measured of one case, and the workload that was traced on the device (None for kinds other than ``plan``)."""
    started = time.perf_counter()
    model: TracedModel = traced_model(case.model, batch=case.batch, seq_len=case.seq_len)
    session = ReplaySession(model, device=device, optimizer=case.plan.precision.optimizer, precision=case.plan.precision.mode)
    run = run_of(session, case)
    memory = session.peak(run)
    clock = time.perf_counter()
    with GpuMonitor() if device == "cuda" else _Silence() as monitor:
        times, speed = _timed(run, steps=steps, device=session.device)
        state = monitor.between(clock, time.perf_counter())
    found: dict[str, Any] = {
        "name": case.name, "kind": case.kind, "step_time_s": times.to_json() | {"seconds": list(times.seconds)}, "allocated_bytes": memory.allocated_bytes,
        "reserved_bytes": memory.reserved_bytes, "host_bytes": memory.host_bytes, "state": state, "yardstick_s": None if speed is None else speed.to_json(),
    }  # fmt: skip
    if isinstance(run, ScheduledRun):
        found |= {"spans": spans_to_json(session.timeline(run)), "host_time_s": _host_times(session, run).to_json()}
    if gradients:
        found["gradients_match"] = [match.to_json() for match in session.match([(run, case.micro_batch)])[0]]
    workload = session.traced(case.micro_batch).workload if case.kind in {"plan", "plain"} else None
    found["elapsed_s"] = time.perf_counter() - started
    return found, None if workload is None else workload_to_json(workload)


class _YardstickStep:
    """The yardstick in the place of a step."""

    def __init__(self) -> None:
        self._yardstick = Yardstick()

    def inside(self) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def __call__(self) -> None:
        """Once."""
        self._yardstick.seconds()


def _timed(run: StepRun, *, steps: int, device: torch.device) -> tuple[StepTimes, StepTimes | None]:
    """Times of a step and, on a CPU, of the yardstick in turn with it."""
    if device.type == "cuda":
        return interleaved_times([run], repeats=steps, device=device)[0], None
    times, speed = interleaved_times([run, _YardstickStep()], repeats=steps, device=device)
    return times, speed


def _host_times(session: ReplaySession, run: StepRun) -> StepTimes:
    """Seconds until the host has given one step to the device, without waiting for it; on a CPU the step itself."""
    seconds = []
    with run.inside():
        for _ in range(2):
            session.wait()
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
            session.wait()
    return StepTimes(seconds=tuple(seconds[1:]))


def spans_to_json(timeline: Timeline) -> list[list[Any]]:
    """A row a span: stream, name, start and end in seconds."""
    return [[span.stream.name, span.name, span.start_s, span.end_s] for span in timeline.spans]


class _Silence:
    """A monitor of a device that has none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def between(self, _begin_s: float, _end_s: float) -> dict[str, Any]:
        """Nothing."""
        return {}


def replay_bundle(
    cases: Sequence[BundleCase],
    out: Path,
    *,
    device: str,
    steps: int,
    gradients: bool = True,
    time_limit_s: float | None = None,
) -> int:
    """Runs cases in order into an archive; the number of those that failed.

    Args:
        cases: to run.
        out: the archive.
        device: ``cpu`` or ``cuda``.
        steps: timed steps of each.
        gradients: compare with the plain module.
        time_limit_s: starts no case after so long; those not begun are written down as such.
    """
    archive, started, failures = Archive(out), time.perf_counter(), 0
    archive.add(ENVIRONMENT_FILE, environment(device))
    for number, case in enumerate(cases):
        if time_limit_s is not None and time.perf_counter() - started > time_limit_s:
            archive.add(CASE_FILE.format(number), {"name": case.name, "kind": case.kind, "failed": "not begun: out of time"})
            continue
        try:
            found, workload = measure_case(case, device=device, steps=steps, gradients=gradients)
            if workload is not None:
                archive.add(WORKLOAD_FILE.format(number), workload)
            shown = f"{found['step_time_s']['median']:.4f} s, {found['allocated_bytes'] / 2**30:.3f} GiB"
        except Exception as problem:  # noqa: BLE001 - one case that fails must not cost the others; it is written down whole
            failures += 1
            found = {
                "name": case.name,
                "kind": case.kind,
                "failed": f"{type(problem).__name__}: {problem}",
                "traceback": traceback.format_exc(),
            }
            shown = found["failed"].splitlines()[0]
        archive.add(CASE_FILE.format(number), found)
        print(f"{number + 1}/{len(cases)} {case.name}: {shown}", file=sys.stderr, flush=True)  # noqa: T201 - where only torch is
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m validation.replay", description="Runs bundles of plans on this machine.")
    parser.add_argument("bundles", nargs="+", type=Path, help="files that schedlab replay --bundle or the suite wrote")
    parser.add_argument("--out", required=True, type=Path, help="the archive (.zip) to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each case")
    parser.add_argument("--no-gradients", action="store_true", help="do not compare gradients with the plain module")
    parser.add_argument("--time-limit", type=float, help="seconds after which no case is begun")
    options = parser.parse_args(arguments)
    if problem := problem_of(options.device):
        parser.error(f"--device {options.device}: {problem}; {NO_GPU_REMEDY}")
    try:
        cases = [case for path in options.bundles for case in read_bundle(path)]
    except InputError as problem:
        parser.error(str(problem))
    failures = replay_bundle(
        cases, options.out, device=options.device, steps=options.steps, gradients=not options.no_gradients, time_limit_s=options.time_limit
    )  # fmt: skip
    print(f"{len(cases) - failures} of {len(cases)} cases ran: {options.out}", file=sys.stderr)  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
