"""From raw timings to a profile on disk: fit, residuals, provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hardware_models.curves import Curve, physical_terms
from hardware_models.errors import InputError
from hardware_models.fit import fit_curve
from hardware_models.kernel import Kernel
from hardware_models.profile import DeviceProfile, Sourced
from hardware_models.profile_file import (
    DEVICE_FILE,
    FORMAT,
    KERNELS_FILE,
    PROVENANCE_FILE,
    curve_table,
    load_profile,
    sourced,
    write_toml,
)

Progress = Callable[[str, float], None]

RAW_FILE = "raw.json"
_QUIET_NOISE = 0.1
"""Below this the median of a kernel's samples is its time; above, the mean of the fastest two: disturbances only add."""
_NUM_FASTEST = 2
_LARGE_QUARTER, _FAST_TENTH = 0.75, 0.9
"""Quantiles: of traffic, above which a kernel is large; of the rates of large kernels, the bandwidth."""
_LEAST_POINTS = 3
_MEASURING_SHARE = 0.97
_CPU_TILE = (1, 1)
_CUDA_TILE = (128, 256)
_PEAK_CLASSES = frozenset({"gemm", "batched_gemm"})


def calibrate(out_dir: Path, *, quick: bool = False, device: str = "cpu", progress: Progress | None = None) -> DeviceProfile:
    """Measures this machine, fits, writes a profile folder, and returns the profile.

    Args:
        out_dir: folder to write; raw timings of an unfinished run in it are gone on with.
        quick: within 45 s instead of 8 minutes.
        device: ``cpu`` or ``cuda``.
        progress: told what is being done and the fraction done.
    """
    from hardware_models.microbench import measure  # noqa: PLC0415 - torch only where hardware is timed, not where a profile is read

    tell = progress or (lambda _what, _fraction: None)
    out_dir.mkdir(parents=True, exist_ok=True)
    raw_path = out_dir / RAW_FILE
    if raw_path.exists() and json.loads(raw_path.read_text()).get("complete"):
        raw_path.unlink()
    raw = measure(raw_path, device=device, quick=quick, progress=lambda what, done: tell(what, _MEASURING_SHARE * done))
    tell("fitting", _MEASURING_SHARE)
    profile = fit_profile(raw, out_dir, source=str(raw_path))
    tell("done", 1.0)
    return profile


def fit_profile(raw: Mapping[str, Any], out_dir: Path, *, source: str = RAW_FILE) -> DeviceProfile:
    """Fits raw timings and writes ``device.toml``, ``kernels.toml`` and ``provenance.toml``; the profile as read back.

    Raises:
        InputError: the raw timings hold too little.
    """
    kernels, seconds = _times(raw)
    curves = _curves(kernels, seconds, int(raw["environment"].get("cache_bytes", 0)))
    if not any(curve.kernel_class in _PEAK_CLASSES for curve in curves):
        raise InputError(
            source=source, key="results", value=len(kernels), rule="no product was timed often enough for a fit",
            remedy="repeat 'schedlab calibrate' on a quieter machine",
        )  # fmt: skip
    write_toml(out_dir / KERNELS_FILE, {"format": FORMAT, "curve": [curve_table(curve) for curve in curves]})
    write_toml(out_dir / PROVENANCE_FILE, _provenance(raw, curves))
    write_toml(out_dir / DEVICE_FILE, _device(raw, kernels, seconds))
    return load_profile(out_dir)


def _times(raw: Mapping[str, Any]) -> tuple[list[Kernel], list[float]]:
    """Kernels with one time each."""
    kernels, seconds = [], []
    quiet = raw.get("noise", 0.0) < _QUIET_NOISE
    for row in raw["results"]:
        kernels.append(
            Kernel(
                kernel_class=row["kernel_class"], op=row["op"], shape=tuple(row["shape"]), dtype=row["dtype"], flops=row["flops"],
                read_bytes=row["read_bytes"], written_bytes=row["written_bytes"],
            )
        )  # fmt: skip
        seconds.append(float(np.median(row["samples_s"]) if quiet else np.mean(sorted(row["samples_s"])[:_NUM_FASTEST])))
    return kernels, seconds


def _curves(kernels: list[Kernel], seconds: list[float], cache_bytes: int) -> list[Curve]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for position, kernel in enumerate(kernels):
        groups.setdefault((kernel.kernel_class, kernel.op, kernel.dtype), []).append(position)
    return [
        fit_curve([kernels[i] for i in rows], [seconds[i] for i in rows], group=key[1], cache_bytes=cache_bytes)
        for key, rows in sorted(groups.items())
        if len(rows) >= _LEAST_POINTS
    ]


def _device(raw: Mapping[str, Any], kernels: list[Kernel], seconds: list[float]) -> dict[str, Any]:
    """``device.toml``: peaks and bandwidth are the best rates seen, so efficiencies are relative to those."""
    environment = raw["environment"]
    device, date = environment["device"], environment["date"]
    times = np.array(seconds)
    terms = physical_terms(kernels, 0)
    rates = terms[:, 1] / times
    moved = terms[:, 2] + terms[:, 3]
    traffic = moved / times
    products = np.array([kernel.kernel_class in _PEAK_CLASSES for kernel in kernels])
    streams = np.array([kernel.kernel_class in {"pointwise", "copy"} for kernel in kernels])
    large = streams & (moved >= np.quantile(moved[streams], _LARGE_QUARTER))
    fastest = moved / np.array([min(row["samples_s"]) for row in raw["results"]])
    peak, bandwidth = float(rates[products].max()), float(np.quantile(fastest[large], _FAST_TENTH))

    def value(number: float, what: str) -> dict[str, Any]:
        return sourced(Sourced(value=number, evidence="measured", source=what, date=date))

    tile = _CUDA_TILE if device == "cuda" else _CPU_TILE
    dispatch = raw["host"]["dispatch"]
    dispatch_s = (dispatch["forward_s"] + dispatch["backward_s"]) / 2
    table: dict[str, Any] = {
        "format": FORMAT, "name": environment["device_name"], "kind": device, "num_multiprocessors": environment["num_multiprocessors"], "tile": list(tile),
        "provenance": f"measured {date} on {environment['device_name']}, {environment['num_threads']} threads, torch {environment['torch']}"
        f", {'quick' if raw['quick'] else 'full'} grid, noise {raw.get('noise', 0.0):.1%}",
        "memory_bytes": value(environment["memory_bytes"], "as the system reports it"),
        "memory_bandwidth_bytes_per_s": value(bandwidth, "fast tenth of large pointwise kernels and copies"),
        "dispatch_s": value(dispatch_s, "mean of forward and backward over a chain of tiny operators"),
        "launch_s": value(float(times.min()), "fastest kernel"),
        "context_bytes": value(environment.get("context_bytes", 0), "used on the device beyond the allocator; none on a CPU"),
        "peak_flops_per_s": {dtype: value(peak, "fastest product") for dtype in _peak_dtypes(device)},
        "efficiency": [
            {"kernel_class": name, "flops": flops, "bandwidth": moved, "relative_standard_error": error, "evidence": "measured", "source": "median over the grid"}
            for name, flops, moved, error in _efficiencies(kernels, rates / peak, traffic / bandwidth)
        ],
    }  # fmt: skip
    copy = _copy_engine(raw)
    return table if copy is None else table | {"copy_engine": copy}


def _peak_dtypes(device: str) -> tuple[str, ...]:
    return ("float32",) if device == "cpu" else ("bfloat16", "float16")


def _efficiencies(kernels: list[Kernel], compute: Any, moved: Any) -> list[tuple[str, float, float, float]]:
    """Per class: median fraction of the peak among kernels bound by arithmetic, of the bandwidth among the others."""
    rows = []
    classes = sorted({kernel.kernel_class for kernel in kernels})
    for name in ["default", *classes]:
        chosen = np.array([name in ("default", kernel.kernel_class) for kernel in kernels])
        by_compute = chosen & (compute > moved)
        flops = float(np.median(compute[by_compute])) if by_compute.any() else 1.0
        bandwidth = float(np.median(moved[chosen & ~by_compute])) if (chosen & ~by_compute).any() else 1.0
        bound = np.maximum(compute / flops, moved / bandwidth)[chosen]
        rows.append((name, min(1.0, flops), min(1.0, bandwidth), float(np.std(np.log(np.maximum(bound, 1e-12))))))
    return rows


def _copy_engine(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rates of the largest copy, latency of the smallest."""
    copies = raw["host"].get("copies")
    if not copies:
        return None
    first, last = copies[0], copies[-1]
    size = last["bytes"]
    return {
        "to_device_bytes_per_s": size / last["h2d_s"], "to_host_bytes_per_s": size / last["d2h_s"], "latency_s": max(first["h2d_s"], first["d2h_s"]),
        "duplex_efficiency": min(1.0, max(last["h2d_s"], last["d2h_s"]) / last["duplex_s"]),
        "compute_slowdown": max(1.0, _slowdown(last)), "evidence": "measured", "source": f"pinned copies of {size} bytes",
    }  # fmt: skip


def _slowdown(row: Mapping[str, float]) -> float:
    """Of a product while a copy runs: what the copy added, over the copy's time."""
    added_s = row["compute_with_copy_s"] - row["compute_alone_s"]
    together_s = min(row["copy_with_compute_s"], row["compute_with_copy_s"])
    return 1.0 / max(1e-2, 1.0 - added_s / together_s)


def _provenance(raw: Mapping[str, Any], curves: list[Curve]) -> dict[str, Any]:
    environment = {key: value for key, value in raw["environment"].items() if value is not None}
    residuals = [
        {
            "kernel_class": curve.kernel_class, "op": curve.group, "dtype": curve.dtype, "num": len(curve.points), "median_error": curve.median_error,
            "rms_error": curve.relative_standard_error,
        }
        for curve in curves
    ]  # fmt: skip
    return {
        "format": FORMAT, "quick": raw["quick"], "noise": raw.get("noise", 0.0), "statistic": f"median of the samples of each kernel; mean of the {_NUM_FASTEST} fastest where noise is {_QUIET_NOISE} or more",
        "residual": "leave-one-out over the grid, logarithmic", "environment": environment, "host": dict(raw["host"]), "failed": dict(raw.get("failed", {})),
        "residuals": residuals,
    }  # fmt: skip
