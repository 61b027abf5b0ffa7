"""Raw timings of this machine: ``python -m hardware_models.microbench --out DIR [--device cpu|cuda] [--quick]``.

Needs the standard library, numpy and torch only, so it runs from a bare checkout; ``python -m hardware_models.calibration --raw
DIR/raw.json --out PROFILE`` fits the file, there or elsewhere. Cases are timed in rounds, so that a disturbance spoils one sample of
many cases rather than all of one. The file is rewritten again and again, whole each time; a second run on the same folder goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hardware_models.host_memory import keep_freed_pages
from hardware_models.microbench_cases import Case, Pool, heavy_cases
from hardware_models.microbench_copies import cpu_copy_timings
from hardware_models.microbench_environment import environment
from hardware_models.microbench_gpu import RAW_FORMAT, cuda_machine, measure_gpu, warnings_of
from hardware_models.microbench_gpu_light import gpu_cases
from hardware_models.microbench_host import host_timings
from hardware_models.microbench_light import light_cases
from hardware_models.microbench_plan import mirrored
from hardware_models.microbench_samples import Measured, load_previous, noise, previous_yardstick, sample, store
from hardware_models.microbench_timing import Stopwatch
from hardware_models.microbench_yardstick import Yardstick

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done, 0 to 1."""

RAW_FILE = "raw.json"
_POOL_BYTES = 2**28
_TIME_LIMIT_S = {True: 40.0, False: 450.0}
_HOST_SHARE = 0.12
"""Part of the time limit kept for dispatch and sustained load."""
_ROUNDS = {True: 8, False: 25}
_YARDSTICK_EVERY = 25
"""Kernels from one look at the machine's speed to the next."""


def measure(
    path: Path, *, device: str = "cpu", quick: bool = False, progress: Progress | None = None, cases: Sequence[Case] | None = None,
    time_limit_s: float | None = None, pool_bytes: int | None = None, num_rounds: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The raw timings, also written to ``path`` as they come; what makes them doubtful is printed and kept as ``warnings``.

    Args:
        path: the JSON file; samples already in it are kept.
        device: ``cpu`` or ``cuda`` (the first visible GPU; `microbench_gpu` says what of it).
        quick: a coarser grid within 45 s instead of 8 minutes.
        progress: told what is done and the fraction.
        cases: the grid; by default the whole one of the device.
        time_limit_s: stops (with what there is) after so long.
        pool_bytes: size of the buffer that operands come from (CPU).
        num_rounds: samples of each kernel, time permitting (CPU).
    """
    tell = progress or (lambda _what, _fraction: None)
    if device == "cuda":
        tell("starting", 0.0)
        raw = measure_gpu(
            path, cuda_machine(quick=quick), quick=quick, progress=tell, time_limit_s=time_limit_s,
            grid=gpu_cases if cases is None else lambda _size: list(cases),
        )  # fmt: skip
    else:
        raw = _measure_cpu(path, cases, tell, quick, time_limit_s, pool_bytes, num_rounds)
    for message in raw["warnings"]:
        print(f"warning: {message}", file=sys.stderr)
    return raw


def _measure_cpu(
    path: Path, cases: Sequence[Case] | None, tell: Progress, quick: bool, time_limit_s: float | None, pool_bytes: int | None, num_rounds: int | None
) -> dict[str, Any]:  # fmt: skip
    begin = time.perf_counter()
    limit_s = _TIME_LIMIT_S[quick] if time_limit_s is None else time_limit_s
    keep_freed_pages()
    tell("allocating operands", 0.0)
    pool = Pool(num_elements=(pool_bytes or _POOL_BYTES) // torch.float32.itemsize, device="cpu", dtype=torch.float32)
    stopwatch = Stopwatch("cpu")
    if cases is None:
        cases = mirrored([*heavy_cases("float32", full=not quick), *light_cases("float32", full=not quick)])
    measured = load_previous(path, cases)
    raw: dict[str, Any] = {
        "format": RAW_FORMAT,
        "complete": False,
        "quick": quick,
        "environment": environment("cpu"),
        "failed": {},
    }
    raw["environment"]["allocation"] = "kept pages"
    tell("dispatch and sustained load", 0.01)
    raw["host"] = host_timings("cpu", time_limit_s=_HOST_SHARE * limit_s) | {"copies": cpu_copy_timings(quick=quick)}
    rounds = num_rounds or _ROUNDS[quick]
    raw["yardstick_s"] = previous_yardstick(path, len(measured[::_YARDSTICK_EVERY]))
    with torch.no_grad():
        _rounds(measured, pool, stopwatch, lambda: time.perf_counter() - begin, limit_s, rounds, tell, path, raw)
    time_missing_yardstick(raw["yardstick_s"], rounds)
    raw["complete"], raw["noise"] = True, noise(measured)
    raw["warnings"] = warnings_of(raw)
    store(path, raw, measured)
    return raw


def time_missing_yardstick(samples_s: list[list[float]], num_rounds: int) -> None:
    """Times the yardstick where no kernel was left to be timed beside it: the run that timed them wrote none, or was stopped before its first.

    Args:
        samples_s: by place in the grid; left as they are where there are some.
        num_rounds: samples to take otherwise.
    """
    if samples_s and not any(samples_s):
        yardstick = Yardstick()
        samples_s[0] += [yardstick.seconds() for _ in range(num_rounds)]


def _rounds(
    measured: Sequence[Measured], pool: Pool, stopwatch: Stopwatch, elapsed: Callable[[], float], limit_s: float, num_rounds: int,
    tell: Progress, path: Path, raw: dict[str, Any],
) -> None:  # fmt: skip
    yardstick = Yardstick()
    for number in range(num_rounds):
        for position, one in enumerate(measured):
            if elapsed() > limit_s:
                return
            if len(one.samples_s) > number:
                continue
            if position % _YARDSTICK_EVERY == 0:
                raw["yardstick_s"][position // _YARDSTICK_EVERY].append(yardstick.seconds())
            try:
                sample(one, pool, stopwatch)
            except RuntimeError as problem:  # an operator that this device or build lacks: its curve is then missing
                raw["failed"][one.case.key] = str(problem).splitlines()[0]
                one.samples_s = [float("nan")] * num_rounds
            done = max((number + position / len(measured)) / num_rounds, elapsed() / limit_s)
            tell(f"{one.case.kernel_class} {one.case.op}", min(1.0, done))
        store(path, raw, measured)


NO_GPU_REMEDY = "install a build of torch for CUDA and check the driver, or measure the CPU with --device cpu"


def problem_of(device: str) -> str:
    """Why a device cannot be measured here; empty where it can."""
    return f"torch {torch.__version__} finds no GPU" if device == "cuda" and not torch.cuda.is_available() else ""


def raw_file(out: Path) -> Path:
    """The file in the folder ``out``; ``out`` itself where it is named as one."""
    return out if out.suffix == ".json" else out / RAW_FILE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hardware_models.microbench", description="Raw timings of this machine's kernels, copies and host."
    )
    parser.add_argument(
        "--out", required=True, type=Path, help=f"folder of {RAW_FILE}, or a .json file, to write or to go on with"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a coarser grid in less than a minute")
    options = parser.parse_args(arguments)
    if problem := problem_of(options.device):
        parser.error(f"--device {options.device}: {problem}; {NO_GPU_REMEDY}")
    shown = [-1]

    def progress(what: str, fraction: float) -> None:
        if int(fraction * 20) > shown[0]:
            shown[0] = int(fraction * 20)
            print(f"{fraction:4.0%} {what}", file=sys.stderr)

    path = raw_file(options.out)
    raw = measure(path, device=options.device, quick=options.quick, progress=progress)
    print(f"{len(raw['results'])} kernels, noise {raw['noise']:.1%}: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
