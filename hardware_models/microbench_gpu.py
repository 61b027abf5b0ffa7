"""All timings of a GPU, in sections that are kept as they end: host, copies, kernels, lasting load, allocator, compiled chains (bare machine).

The order of the work does not depend on a GPU: it runs on any `Machine`, and `cuda_machine` is the real one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hardware_models.microbench_allocator import SETTINGS, allocator_timings
from hardware_models.microbench_cases import Case, Pool
from hardware_models.microbench_copies import cuda_copy_timings
from hardware_models.microbench_environment import THROTTLED, GpuMonitor, context_bytes, environment
from hardware_models.microbench_gpu_heavy import FLOAT8, GridSize, gemm_cases
from hardware_models.microbench_gpu_light import gpu_cases
from hardware_models.microbench_host import dispatch, host_memory
from hardware_models.microbench_modes import (
    chain_timings,
    compiled_dispatch,
    dispatch_by_operator,
    launches,
    library_workspaces,
)
from hardware_models.microbench_plan import Limits, in_turns, plan
from hardware_models.microbench_samples import Measured, load_previous, noise, precision_of, sample, store, write_raw
from hardware_models.microbench_sustained import Monitor, loads, sustained_timings
from hardware_models.microbench_timing import Stopwatch

Progress = Callable[[str, float], None]
RAW_FORMAT = 2
TIME_LIMIT_S = {True: 38.0, False: 420.0}
"""Of a quick and of a full run, from the first tensor on: importing torch and fitting come on top."""
_GRID_END = {True: 0.82, False: 0.66}
_LOAD_END = {True: 1.0, False: 0.8}
"""Parts of the time limit at which the kernels, and then the lasting load, end."""
_LOAD_S = {True: 0.4, False: 1.0}
"""Lasting load on one kernel: power controllers settle within some 0.1 s."""
_SAMPLES_A_VISIT = 3
_MOST_VISITS = {True: 3, False: 8}
_SLOW_S = 0.02
"""Of a slower kernel one sample a visit is enough."""
_MEMORY_SHARE = 0.35
"""Of the free memory for one kernel: gradients and workspaces need as much again."""
_POOL_SHARE, _MOST_POOL_BYTES = 0.06, 2**31
_STORE_EVERY_S = 5.0
_COPY_PROBE_BYTES = 2**28
NOISY_SPREAD = 0.15
_OCCUPIED_BYTES = 3 * 2**30
"""A context with all libraries loaded takes less: more belongs to other processes."""
_AMPERE, _ADA = (8, 0), (8, 9)
_POOL_DTYPE = {"tf32": "float32", "complex64": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A device and what can be measured on it."""

    device: str
    main: str
    others: tuple[str, ...]
    stopwatch: Stopwatch
    environment: Callable[[], dict[str, Any]]
    free_bytes: Callable[[], int]
    recover: Callable[[], None]
    """After a kernel that failed; raises where the device takes no more work."""
    monitor: Callable[[], AbstractContextManager[Monitor]]
    sections: Mapping[str, Callable[[Callable[[float], None], float], Any]]
    """Other measurements by name, each told a progress callback and the end of its time: ``launch``, ``copies``, ``allocator``, ``compiled``, ``chains``."""


class Pools:
    """One pool of operands a dtype, made when first needed."""

    def __init__(self, device: str, size_bytes: int, main: str) -> None:
        self._device, self._size_bytes, self._main = device, size_bytes, main
        self._pools: dict[str, Pool] = {}

    def of(self, case: Case) -> Pool:
        """The pool that a case draws from."""
        name = _POOL_DTYPE.get(case.dtype, self._main if case.dtype == FLOAT8 else case.dtype)
        if name not in self._pools:
            dtype = getattr(torch, name)
            self._pools[name] = Pool(num_elements=self._size_bytes // dtype.itemsize, device=self._device, dtype=dtype)
        return self._pools[name]


def measure_gpu(
    path: Path, machine: Machine, *, quick: bool, progress: Progress, time_limit_s: float | None = None,
    grid: Callable[[GridSize], list[Case]] = gpu_cases, clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:  # fmt: skip
    """The raw timings of a device, kept in ``path`` after each section and every few seconds; an unfinished run is gone on with.

    Args:
        path: the JSON file.
        machine: the device.
        quick: the coarse grid.
        progress: told what is done and the fraction.
        time_limit_s: for all sections together; by default that of the grid.
        grid: the cases, before the limits of the device.
        clock: seconds.
    """
    begin_s = clock()
    limit_s = TIME_LIMIT_S[quick] if time_limit_s is None else time_limit_s
    told = [0.0]

    def tell(what: str) -> None:
        told[0] = max(told[0], min(1.0, (clock() - begin_s) / limit_s))
        progress(what, told[0])

    raw = _begun(path, machine, quick=quick)
    grid_end_s = begin_s + _GRID_END[quick] * limit_s
    _section(raw, path, "dispatch", lambda: dict(dispatch(machine.device, machine.stopwatch)), tell)
    _section(raw, path, "operators", lambda: dispatch_by_operator(machine.device), tell)
    _section(raw, path, "host_memory", lambda: dict(host_memory()), tell)
    _run_sections(raw, path, machine, ("launch", "copies"), tell, grid_end_s)
    measured = _kernels_and_load(raw, path, machine, clock, begin_s, limit_s, tell, quick=quick, grid=grid)
    machine.recover()
    if not quick:
        _run_sections(raw, path, machine, ("allocator", "compiled", "chains"), tell, begin_s + limit_s)
    raw["noise"], raw["complete"] = noise(measured), True
    raw["warnings"] = warnings_of(raw)
    store(path, raw, measured)
    return raw


def _kernels_and_load(
    raw: dict[str, Any], path: Path, machine: Machine, clock: Callable[[], float], begin_s: float, limit_s: float,
    tell: Callable[[str], None], *, quick: bool, grid: Callable[[GridSize], list[Case]],
) -> list[Measured]:  # fmt: skip
    """The sections that need operands, which are freed at the end."""
    with torch.no_grad():
        pools = Pools(machine.device, min(_MOST_POOL_BYTES, int(_POOL_SHARE * machine.free_bytes())), machine.main)
        cases = _planned(raw, machine, pools, quick=quick, grid=grid)
        measured = _kernels(raw, path, machine, pools, cases, clock, begin_s + _GRID_END[quick] * limit_s, tell, quick=quick)
        left_s = max(0.0, begin_s + _LOAD_END[quick] * limit_s - clock())
        _section(raw, path, "sustained_kernels", lambda: _lasting(machine, pools, cases, left_s, quick=quick), tell)
    return measured


def _begun(path: Path, machine: Machine, *, quick: bool) -> dict[str, Any]:
    """What an unfinished run on the same device with the same torch left, or a new record."""
    here = machine.environment()
    if path.exists():
        raw: dict[str, Any] = json.loads(path.read_text())
        before = raw.get("environment", {})
        same = all(before.get(key) == here.get(key) for key in ("device", "device_name", "torch", "cuda"))
        if same and raw.get("quick") == quick and not raw.get("complete") and raw.get("format") == RAW_FORMAT:
            return raw
        print(f"{path}: finished, or of another device, version or grid; starting anew", file=sys.stderr)
        path.unlink()
    here["allocation"] = "caching allocator"
    return {
        "format": RAW_FORMAT,
        "complete": False,
        "quick": quick,
        "environment": here,
        "host": {},
        "failed": {},
        "results": [],
    }


def _section(raw: dict[str, Any], path: Path, name: str, run: Callable[[], Any], tell: Callable[[str], None]) -> None:
    """Measures one section unless an earlier run did, and keeps it; one that fails is named and leaves the others."""
    tell(name)
    if name in raw["host"]:
        return
    try:
        raw["host"][name] = run()
    except (RuntimeError, AttributeError, TypeError, OSError) as problem:
        raw["failed"][f"section/{name}"] = _first_line(problem)
    write_raw(path, raw)


def _run_sections(
    raw: dict[str, Any], path: Path, machine: Machine, names: tuple[str, ...], tell: Callable[[str], None], end_s: float
) -> None:
    for name in names:
        if name in machine.sections:
            run = machine.sections[name]
            _section(raw, path, name, lambda name=name, run=run: run(lambda _fraction: tell(name), end_s), tell)  # type: ignore[misc]


def _lasting(machine: Machine, pools: Pools, cases: list[Case], left_s: float, *, quick: bool) -> list[dict[str, Any]]:
    end_s = time.perf_counter() + left_s
    with machine.monitor() as monitor:
        return sustained_timings(
            loads(cases, quick=quick), pools.of, machine.stopwatch, monitor, duration_s=_LOAD_S[quick], end_s=end_s
        )


def _first_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _planned(
    raw: dict[str, Any], machine: Machine, pools: Pools, *, quick: bool, grid: Callable[[GridSize], list[Case]]
) -> list[Case]:
    """The cases that the device can take, by rates measured roughly now (or by the run before: then the plan is the same)."""
    size = GridSize(full=not quick, main=machine.main, others=machine.others)
    if "limits" not in raw:
        probes = {
            case.dtype: case for case in reversed(list(gemm_cases(size))) if case.shape == PROBE_SHAPE and not case.variant
        }
        rates = {dtype: rate for dtype, case in probes.items() if (rate := _probe(raw, machine, pools, case))}
        x = torch.ones(_COPY_PROBE_BYTES // 4, device=machine.device)
        x.clone()
        seconds = machine.stopwatch.time(x.clone, 1, host_s=1e-4)
        rates["complex64"] = rates.get("float32", 0.0)
        raw["limits"] = {
            "memory_bytes": _MEMORY_SHARE * machine.free_bytes(), "bytes_per_s": 2 * _COPY_PROBE_BYTES / seconds, "flops_per_s": rates,
        }  # fmt: skip
    return [case for case in plan(grid(size), Limits(**raw["limits"])) if case.key not in raw["failed"]]


PROBE_SHAPE = (4096, 4096, 4096)
"""The product whose rate tells how large the shapes of its dtype may be: the first of the grid."""


def _probe(raw: dict[str, Any], machine: Machine, pools: Pools, case: Case) -> float:
    """FLOP/s of one product; 0, with the reason kept, for a dtype that the device lacks."""
    try:
        with precision_of(case.dtype):
            call = case.build(pools.of(case))
            call.run()
            return case.flops / machine.stopwatch.time(call.run, 1, host_s=1e-4)
    except (RuntimeError, AttributeError, TypeError) as problem:
        raw["failed"][f"probe/{case.dtype}"] = _first_line(problem)
        machine.recover()
        return 0.0


def _kernels(
    raw: dict[str, Any], path: Path, machine: Machine, pools: Pools, cases: list[Case], clock: Callable[[], float], end_s: float,
    tell: Callable[[str], None], *, quick: bool,
) -> list[Measured]:  # fmt: skip
    """Samples of all cases: each visited once before any is visited again, classes taking turns."""
    measured = load_previous(path, cases, device=raw["environment"]["device"])
    by_key = {one.case.key: one for one in measured}
    stored = [clock()]

    def visit(case: Case) -> None:
        try:
            with precision_of(case.dtype):
                _visit(by_key[case.key], pools.of(case), machine.stopwatch)
        except (
            RuntimeError,
            AttributeError,
            TypeError,
        ) as problem:  # an operator that this device or build lacks, or no memory
            raw["failed"][case.key] = _first_line(problem)
            by_key[case.key].samples_s.clear()
            _recover(raw, path, machine, measured)

    def after(case: Case) -> None:
        tell(f"{case.kernel_class} {case.op}")
        if clock() > stored[0] + _STORE_EVERY_S:
            store(path, raw, measured)
            stored[0] = clock()

    for number in range(_MOST_VISITS[quick]):
        due = [
            case
            for case in cases
            if case.key not in raw["failed"] and len(by_key[case.key].samples_s) <= number * _SAMPLES_A_VISIT
        ]
        in_turns(due, visit, clock=clock, end_s=end_s, after=after)
    store(path, raw, measured)
    return measured


def _recover(raw: dict[str, Any], path: Path, machine: Machine, measured: list[Measured]) -> None:
    try:
        machine.recover()
    except RuntimeError as problem:  # the context is lost: keep what there is; the next run leaves out the kernel that did it
        store(path, raw, measured)
        message = (
            f"the device takes no more work ({_first_line(problem)}); run the same command again to go on without that kernel"
        )
        raise RuntimeError(message) from problem


def _visit(measured: Measured, pool: Pool, stopwatch: Stopwatch) -> None:
    for _ in range(_SAMPLES_A_VISIT):
        sample(measured, pool, stopwatch)
        if measured.samples_s[-1] > _SLOW_S:
            break


def warnings_of(raw: Mapping[str, Any]) -> list[str]:
    """What makes these timings doubtful: scatter, throttling, other users of the GPU, kernels that failed."""
    found = []
    if raw["noise"] > NOISY_SPREAD:
        found.append(
            f"noisy machine, noise {raw['noise']:.0%} (spread of a kernel's samples; 100% if too few in the time limit): close other programs and repeat"
        )
    reasons = {reason for row in raw["host"].get("sustained_kernels", ()) for reason in row.get("state", {}).get("reasons", ())}
    if throttled := sorted(reasons & THROTTLED):
        found.append(f"clocks were throttled under load ({', '.join(throttled)}): check cooling and power supply, then repeat")
    if raw["environment"].get("context_bytes", 0) > _OCCUPIED_BYTES:
        occupied = raw["environment"]["context_bytes"] / 2**30
        found.append(f"{occupied:.1f} GiB of the device were in use beside this process's tensors: repeat on an idle GPU")
    failed = {name: reason for name, reason in raw["failed"].items() if name.count("/") < _PARTS_OF_VARIANT}
    if failed:
        name, reason = next(iter(failed.items()))
        found.append(f"{len(failed)} measurements failed and are missing, the first: {name}: {reason}")
    return found


_PARTS_OF_VARIANT = 4
"""A variant's key has so many slashes (`Case.key`): a back end that does not take a shape is no reason to warn."""


def cuda_machine(*, quick: bool) -> Machine:
    """The first visible GPU of this machine; fewer sizes of copies where it has to be quick."""
    torch.cuda.init()
    capability = torch.cuda.get_device_capability()
    main = "bfloat16" if capability >= _AMPERE else "float16"
    others = ["float32", *(["tf32", "float16"] if capability >= _AMPERE else []), *([FLOAT8] if capability >= _ADA else [])]
    stopwatch = Stopwatch("cuda")
    dtype = getattr(torch, main)
    library_workspaces(dtype)
    return Machine(
        device="cuda", main=main, others=tuple(others), stopwatch=stopwatch, environment=lambda: environment("cuda"),
        free_bytes=lambda: int(torch.cuda.mem_get_info()[0]), recover=_recover_cuda, monitor=GpuMonitor,
        sections={
            "launch": lambda _tell, _end_s: {**launches(stopwatch), "context_bytes": context_bytes()},
            "copies": lambda tell, _end_s: cuda_copy_timings(dtype, quick=quick, tell=tell),
            "allocator": lambda tell, _end_s: allocator_timings(int(torch.cuda.mem_get_info()[0]), settings=SETTINGS, tell=tell),
            "compiled": lambda _tell, _end_s: compiled_dispatch("cuda"),
            "chains": lambda tell, end_s: chain_timings(stopwatch, device="cuda", dtype=dtype, end_s=end_s, tell=tell),
        },
    )  # fmt: skip


def _recover_cuda() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
