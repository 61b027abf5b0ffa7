"""Run a bundle on this machine: ``python -m validation.replay BUNDLE --out ARCHIVE [--device cuda]``.

Needs the standard library, numpy and torch only. The cases of one model share its module, and are timed in rounds (`validation.case_rounds`); what went wrong with one is
written down and the next is run. The archive (zip) is rewritten after each round, so a run that is stopped keeps what it has; ``python -m validation.replay_suite
report`` reads it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from hardware_models.errors import InputError
from hardware_models.microbench import problem_of
from hardware_models.microbench_environment import GpuMonitor, environment
from hardware_models.microbench_yardstick import Yardstick
from validation.bundle import BundleCase, read_bundle
from validation.case_rounds import NOT_BEGUN, CaseRounds, MeasuredCase, attempt, expected_seconds, groups_of, monitor_of

CASE_FILE, ENVIRONMENT_FILE, WORKLOAD_FILE = "case-{:03d}.json", "environment.json", "workload-{:03d}.json"
NO_GPU_REMEDY = "install a build of torch for CUDA and check the driver, or take --device cpu"


class Archive:
    """The results so far; each file whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._files = path, dict[str, str]()

    def add(self, tables: Mapping[str, Any]) -> None:
        """Adds files by name, or puts them in the place of what they were, and writes everything."""
        self._files |= {name: json.dumps(table) for name, table in tables.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for known, text in self._files.items():
                archive.writestr(known, text)
        temporary.replace(self._path)

    def add_cases(self, group: Sequence[MeasuredCase], monitor: GpuMonitor | None) -> None:
        """Adds what is known of some cases."""
        tables = {CASE_FILE.format(one.number): one.to_json(monitor) for one in group}
        self.add(tables | {WORKLOAD_FILE.format(one.number): one.workload for one in group if one.workload is not None})


def replay_bundle(
    cases: Sequence[BundleCase], out: Path, *, device: str, rounds: int, gradients: bool = True, time_limit_s: float | None = None
) -> int:  # fmt: skip
    """Runs cases, model by model, into an archive; the number of those that failed or were not begun.

    Args:
        cases: to run.
        out: the archive.
        device: ``cpu`` or ``cuda``.
        rounds: timed steps of each.
        gradients: compare with the plain module.
        time_limit_s: begins no case after so long, and no further round of a model once its share of the time, by what its steps are predicted to take, is over.
    """
    archive, started = Archive(out), time.perf_counter()
    archive.add({ENVIRONMENT_FILE: environment(device)})
    yardstick = Yardstick() if device == "cpu" else None
    end_s = inf if time_limit_s is None else started + time_limit_s
    groups = groups_of(cases)
    for position, group in enumerate(groups):
        now = time.perf_counter()
        share = expected_seconds(group) / sum(map(expected_seconds, groups[position:]))
        measure_group(
            group, archive, device=device, rounds=rounds, gradients=gradients, yardstick=yardstick, end_s=end_s,
            deadline_s=now + share * (end_s - now),
        )  # fmt: skip
    return sum(one.failed for group in groups for one in group)


def measure_group(
    group: Sequence[MeasuredCase], archive: Archive, *, device: str, rounds: int, gradients: bool, yardstick: Yardstick | None, end_s: float,
    deadline_s: float,
) -> None:  # fmt: skip
    """Measures the cases of one module into an archive.

    Args:
        group: of `groups_of`.
        archive: gets what is known after each round.
        device: ``cpu`` or ``cuda``.
        rounds: at most.
        gradients: compare with the plain module.
        yardstick: of a CPU.
        end_s: no case is begun after it (`time.perf_counter`).
        deadline_s: no round but the first is.
    """
    measuring: CaseRounds | None = None
    with monitor_of(device) as monitor:
        for one in group:
            if time.perf_counter() > end_s:
                one.found = {"failed": NOT_BEGUN}
                continue
            try:
                measuring = measuring or CaseRounds(group, device=device, yardstick=yardstick)
            except Exception as problem:  # noqa: BLE001 - a model that cannot be built must not cost the others; it is written down whole
                one.fail(problem)
                continue
            attempt(one, partial(measuring.examine, gradients=gradients))
        if measuring is not None:
            for _ in measuring.rounds(rounds, deadline_s):
                archive.add_cases(group, monitor)
        archive.add_cases(group, monitor)
    for one in group:
        print(f"{one.number + 1} {one.case.name}: {one.text}", file=sys.stderr, flush=True)  # noqa: T201 - where only torch is
    del measuring
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m validation.replay", description="Runs bundles of plans on this machine.")
    parser.add_argument("bundles", nargs="+", type=Path, help="files that schedlab replay --bundle or the suite wrote")
    parser.add_argument("--out", required=True, type=Path, help="the archive (.zip) to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps of each case, one in every round over its model's cases"
    )
    parser.add_argument("--no-gradients", action="store_true", help="do not compare gradients with the plain module")
    parser.add_argument("--time-limit", type=float, help="seconds after which no case is begun; rounds are left out to keep it")
    options = parser.parse_args(arguments)
    if problem := problem_of(options.device):
        parser.error(f"--device {options.device}: {problem}; {NO_GPU_REMEDY}")
    try:
        cases = [case for path in options.bundles for case in read_bundle(path)]
    except InputError as problem:
        parser.error(str(problem))
    failures = replay_bundle(
        cases, options.out, device=options.device, rounds=options.steps, gradients=not options.no_gradients, time_limit_s=options.time_limit
    )  # fmt: skip
    print(f"{len(cases) - failures} of {len(cases)} cases ran: {options.out}", file=sys.stderr)  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
