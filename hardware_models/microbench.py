"""Raw timings of this machine: ``python -m hardware_models.microbench --out FILE.json [--device cpu|cuda] [--quick]``.

Needs the standard library, numpy and torch only. Cases are timed in rounds, one sample of each a round, so that a disturbance
spoils one sample of many cases rather than all of one. The file is rewritten after each round; a second run on the same file goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from hardware_models.files import whole_file
from hardware_models.host_memory import keep_freed_pages
from hardware_models.microbench_cases import Call, Case, Pool, heavy_cases
from hardware_models.microbench_host import host_timings
from hardware_models.microbench_light import light_cases
from hardware_models.microbench_timing import Stopwatch

RAW_FORMAT = 1
Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done, 0 to 1."""

_POOL_BYTES = {"cpu": 2**28, "cuda": 2**31}
_TIME_LIMIT_S = {True: 40.0, False: 450.0}
_HOST_SHARE = 0.12
"""Part of the time limit kept for dispatch, copies and sustained load."""
_ROUNDS = {True: 8, False: 25}
_SLOW_ENOUGH_S = 2e-4
"""A sample of a faster kernel repeats it until it lasts as long as this."""
_MAX_REPEATS = 64
_NEEDS_NO_WARM_UP_S = 2e-2
"""The first call of a kernel slower than this is a sample already: what it initialises is small beside it."""
_NOISY_SPREAD = 0.15
_CACHE_UNITS = {"K": 2**10, "M": 2**20}
_LEAST_SAMPLES = 3
"""A quartile needs so many."""
_ALLOCATION = {"cpu": "kept pages", "cuda": "caching allocator"}


@dataclass(slots=True)
class Measured:
    """Samples of one case."""

    case: Case
    read_bytes: int = 0
    written_bytes: int = 0
    repeats: int = 1
    warm: bool = False
    samples_s: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What the raw file holds of it."""
        case = self.case
        return {
            "kernel_class": case.kernel_class, "op": case.op, "shape": list(case.shape), "dtype": case.dtype, "flops": case.flops,
            "read_bytes": self.read_bytes, "written_bytes": self.written_bytes, "samples_s": self.samples_s,
        }  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """Where and with what: versions, processor or GPU, threads, clocks where the system shows them, load."""
    info: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}", "device": device, "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count() or 1, "load_average": list(os.getloadavg()), "host_processor": _processor_name(),
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "device_name": properties.name, "memory_bytes": properties.total_memory, "num_multiprocessors": properties.multi_processor_count,
            "cuda": str(torch.version.cuda), "clock_mhz": _gpu_clock_mhz(), "context_bytes": _context_bytes(),
            "cache_bytes": int(properties.L2_cache_size),
        }  # fmt: skip
    else:
        info |= {
            "device_name": _processor_name(), "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "num_multiprocessors": 0, "capability": torch.backends.cpu.get_cpu_capability(),
            "cache_bytes": _cpu_cache_bytes(), "clock_mhz": _cpu_clock_mhz(),
        }  # fmt: skip
    return info


def _context_bytes() -> int:
    """What the device holds beyond this process's allocator (other processes included: measure on an idle GPU)."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def _processor_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_clock_mhz() -> float | None:
    clocks = [float(line.split(":", 1)[1]) for line in _cpuinfo() if line.startswith("cpu MHz")]
    return max(clocks, default=None)


def _cpu_cache_bytes() -> int:
    """Of the last level; 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * _CACHE_UNITS[size[-1]] for size in sizes if size[-1:] in _CACHE_UNITS), default=0)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _gpu_clock_mhz() -> float | None:
    try:
        return float(torch.cuda.clock_rate())
    except (ModuleNotFoundError, RuntimeError, ImportError):  # no NVML bindings
        return None


def sample(measured: Measured, pool: Pool, stopwatch: Stopwatch) -> None:
    """Adds one sample of the case, its operands as cold as in a real step; the first call of a case warms it up and records its traffic."""
    call = measured.case.build(pool)
    _prepare(call, stopwatch)
    if not measured.warm:
        warm_up_s = _first_call(measured, call, stopwatch)
        if warm_up_s > _NEEDS_NO_WARM_UP_S:
            measured.samples_s.append(warm_up_s / call.repeats)
            return
        _prepare(call, stopwatch)
    duration_s = stopwatch.time(call.run, measured.repeats)
    measured.samples_s.append(duration_s / (measured.repeats * call.repeats))


def _prepare(call: Call, stopwatch: Stopwatch) -> None:
    stopwatch.flush()
    call.touch()
    stopwatch.synchronize()


def _first_call(measured: Measured, call: Call, stopwatch: Stopwatch) -> float:
    results: list[Any] = []
    warm_up_s = stopwatch.time(lambda: results.append(call.run()), 1)
    written = call.writes if call.writes is not None else [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
    measured.read_bytes = sum(x.numel() * x.element_size() for x in call.reads)
    measured.written_bytes = max(1, sum(x.numel() * x.element_size() for x in written))
    results.clear()
    if warm_up_s < _NEEDS_NO_WARM_UP_S:
        measured.repeats = max(1, min(_MAX_REPEATS, int(_SLOW_ENOUGH_S / max(stopwatch.time(call.run, 1), 1e-9))))
    measured.warm = True
    return warm_up_s


def load_previous(path: Path, cases: Sequence[Case]) -> list[Measured]:
    """Cases with the samples that an earlier, unfinished run on the same file left."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for row in json.loads(path.read_text())["results"]:
            key = f"{row['kernel_class']}/{row['op']}/{row['dtype']}/{'x'.join(map(str, row['shape']))}"
            found[key] = row
    nothing: dict[str, Any] = {"samples_s": [], "read_bytes": 0, "written_bytes": 0}
    kept = ((case, found.get(case.key, nothing)) for case in cases)
    return [
        Measured(case=case, samples_s=list(row["samples_s"]), read_bytes=row["read_bytes"], written_bytes=row["written_bytes"])
        for case, row in kept
    ]


def write_raw(path: Path, raw: dict[str, Any]) -> None:
    """Writes the raw timings, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(raw))


def noise(measured: Sequence[Measured]) -> float:
    """How much the machine is disturbed: median over cases of (median sample - lower quartile) / lower quartile.

    1 where most cases have fewer than three samples: a machine that slow is disturbed, or the time limit was too short to tell.
    """
    ratios = []
    for one in measured:
        if len(one.samples_s) >= _LEAST_SAMPLES:
            low, middle = np.quantile(one.samples_s, (0.25, 0.5))
            ratios.append(middle / low - 1)
    return float(np.median(ratios)) if 2 * len(ratios) > len(measured) else 1.0


def measure(
    path: Path, *, device: str = "cpu", quick: bool = False, progress: Progress | None = None, cases: Sequence[Case] | None = None,
    time_limit_s: float | None = None, pool_bytes: int | None = None, num_rounds: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The raw timings, also written to ``path`` after each round.

    Args:
        path: the JSON file; samples already in it are kept.
        device: ``cpu`` or ``cuda``.
        quick: a coarser grid within 45 s instead of 8 minutes.
        progress: told what is done and the fraction.
        cases: the grid; by default the whole one of the device.
        time_limit_s: stops (with what there is) after so long.
        pool_bytes: size of the buffer that operands come from.
        num_rounds: samples of each kernel, time permitting.
    """
    begin = time.perf_counter()
    limit_s = _TIME_LIMIT_S[quick] if time_limit_s is None else time_limit_s
    tell = progress or (lambda _what, _fraction: None)
    if device == "cpu":
        keep_freed_pages()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tell("allocating operands", 0.0)
    pool = Pool(num_elements=(pool_bytes or _POOL_BYTES[device]) // dtype.itemsize, device=device, dtype=dtype)
    stopwatch = Stopwatch(device)
    if cases is None:
        cases = _grid(str(dtype).removeprefix("torch."), full=not quick)
    measured = load_previous(path, cases)
    raw: dict[str, Any] = {"format": RAW_FORMAT, "complete": False, "quick": quick, "environment": environment(device)}
    raw["environment"]["allocation"] = _ALLOCATION[device]
    tell("dispatch and copies", 0.01)
    raw["host"] = host_timings(device, time_limit_s=_HOST_SHARE * limit_s)
    with torch.no_grad():
        _rounds(
            measured,
            pool,
            stopwatch,
            lambda: time.perf_counter() - begin,
            limit_s,
            num_rounds or _ROUNDS[quick],
            tell,
            path,
            raw,
        )
    raw["complete"] = True
    raw["noise"] = noise(measured)
    _store(path, raw, measured)
    if raw["noise"] > _NOISY_SPREAD:
        print(
            f"warning: noisy machine, noise {raw['noise']:.0%} (spread of a kernel's samples; 100% if too few in the time limit); close other programs and repeat",
            file=sys.stderr,
        )
    return raw


def _grid(dtype: str, *, full: bool) -> list[Case]:
    """The grid coarse first: each operator's cases in bit-reversed order, dealt like cards, so that a stop spoils no class."""
    cases = [*heavy_cases(dtype, full=full), *light_cases(dtype, full=full)]
    counts: dict[tuple[str, str, str], int] = {}
    ranked: list[tuple[float, int]] = []
    sizes = Counter((case.kernel_class, case.op, case.dtype) for case in cases)
    for position, case in enumerate(cases):
        group = case.kernel_class, case.op, case.dtype
        number = counts[group] = counts.get(group, -1) + 1
        bits = max(1, (sizes[group] - 1).bit_length())
        ranked.append((int(f"{number:0{bits}b}"[::-1], 2) / 2**bits, position))
    return [cases[position] for _, position in sorted(ranked)]


def _rounds(
    measured: Sequence[Measured], pool: Pool, stopwatch: Stopwatch, elapsed: Callable[[], float], limit_s: float, num_rounds: int,
    tell: Progress, path: Path, raw: dict[str, Any],
) -> None:  # fmt: skip
    for number in range(num_rounds):
        for position, one in enumerate(measured):
            if elapsed() > limit_s:
                return
            if len(one.samples_s) > number:
                continue
            try:
                sample(one, pool, stopwatch)
            except RuntimeError as problem:  # an operator that this device or build lacks: its curve is then missing
                raw.setdefault("failed", {})[one.case.key] = str(problem).splitlines()[0]
                one.samples_s = [float("nan")] * num_rounds
            done = max((number + position / len(measured)) / num_rounds, elapsed() / limit_s)
            tell(f"{one.case.kernel_class} {one.case.op}", min(1.0, done))
        _store(path, raw, measured)


def _store(path: Path, raw: dict[str, Any], measured: Sequence[Measured]) -> None:
    raw["results"] = [one.as_json() for one in measured if one.samples_s and not np.isnan(one.samples_s[0])]
    write_raw(path, raw)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hardware_models.microbench", description="Raw timings of this machine's kernels."
    )
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write or to go on with")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a coarser grid in less than 45 s")
    options = parser.parse_args(arguments)
    shown = [-1]

    def progress(what: str, fraction: float) -> None:
        if int(fraction * 20) > shown[0]:
            shown[0] = int(fraction * 20)
            print(f"{fraction:4.0%} {what}", file=sys.stderr)

    raw = measure(options.out, device=options.device, quick=options.quick, progress=progress)
    print(f"{len(raw['results'])} kernels, noise {raw['noise']:.1%}: {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
