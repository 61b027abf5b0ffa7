"""From raw timings to a profile on disk: fit, residuals, provenance.

``python -m hardware_models.calibration --raw RAW.json --out DIR`` fits a file that `hardware_models.microbench` wrote, here or on a bare machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hardware_models.calibration_device import PEAK_CLASSES, device_table, load_ratios, measured_bandwidth, measured_peaks
from hardware_models.curves import Curve, Floats
from hardware_models.errors import InputError
from hardware_models.files import writable_folder
from hardware_models.fit import fit_curve
from hardware_models.kernel import Kernel
from hardware_models.profile import DeviceProfile
from hardware_models.profile_file import (
    DEVICE_FILE,
    FORMAT,
    KERNELS_FILE,
    PROVENANCE_FILE,
    curve_table,
    load_profile,
)
from hardware_models.toml_file import write_toml

Progress = Callable[[str, float], None]

RAW_FILE = "raw.json"
_QUIET_NOISE = 0.1
"""Below this the median of a kernel's samples is its time; above, the mean of the fastest two: disturbances only add."""
_NUM_FASTEST = 2
_LEAST_POINTS = 3
_MOST_POINTS = 400
"""Of one curve: fitting takes the cube of their number. The first ones are kept: a prefix of the grid is spread over all of it."""
_MEASURING_SHARE = 0.97
_BULKY = frozenset({"allocator", "sustained_kernels"})
"""Sections of the raw timings that the provenance only sums up."""
_UNREADABLE = "restore it or measure again with 'python -m hardware_models.microbench --out DIR'"


def calibrate(out_dir: Path, *, quick: bool = False, device: str = "cpu", progress: Progress | None = None) -> DeviceProfile:
    """Measures this machine, fits, writes a profile folder, and returns the profile.

    Args:
        out_dir: folder to write; raw timings of an unfinished run in it are gone on with.
        quick: within 45 s instead of 8 minutes.
        device: ``cpu`` or ``cuda``.
        progress: told what is being done and the fraction done.

    Raises:
        InputError: there is no such device, or too little could be measured.
    """
    from hardware_models.microbench import NO_GPU_REMEDY, measure, problem_of  # noqa: PLC0415 - torch only where hardware is timed

    if problem := problem_of(device):
        raise InputError(source="--device", key="device", value=device, rule=problem, remedy=NO_GPU_REMEDY)
    tell = progress or (lambda _what, _fraction: None)
    writable_folder(out_dir)
    raw_path = out_dir / RAW_FILE
    if raw_path.exists() and json.loads(raw_path.read_text()).get("complete"):
        raw_path.unlink()
    raw = measure(raw_path, device=device, quick=quick, progress=lambda what, done: tell(what, _MEASURING_SHARE * done))
    tell("fitting", _MEASURING_SHARE)
    profile = fit_profile(raw, out_dir, source=str(raw_path))
    tell("done", 1.0)
    return profile


def read_raw(path: Path) -> dict[str, Any]:
    """The raw timings in a file.

    Raises:
        InputError: there is no such file, or it is not one that `microbench` wrote.
    """
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise InputError(source=str(path), key="", value=None, rule="no such file", remedy=_UNREADABLE) from problem
    except ValueError as problem:
        raise InputError(
            source=str(path), key="", value=None, rule=f"not whole or not JSON: {problem}", remedy=_UNREADABLE
        ) from problem
    for key in ("environment", "host", "results"):
        if not isinstance(raw, dict) or key not in raw:
            raise InputError(source=str(path), key=key, value=None, rule="raw timings hold this key", remedy=_UNREADABLE)
    if "dispatch" not in raw["host"]:
        raise InputError(
            source=str(path),
            key="host.dispatch",
            value=None,
            rule="was not measured before the run was stopped",
            remedy="let it go on",
        )
    return raw


def fit_profile(raw: Mapping[str, Any], out_dir: Path, *, source: str = RAW_FILE) -> DeviceProfile:
    """Fits raw timings and writes ``device.toml``, ``kernels.toml`` and ``provenance.toml``; the profile as read back.

    Timings of an unfinished run are fitted as far as they go; variants (another layout or back end) are compared, not fitted.

    Raises:
        InputError: the raw timings hold too little.
    """
    rows = [row for row in raw["results"] if not row.get("variant")]
    kernels = [_kernel(row) for row in rows]
    quiet = raw.get("noise", 1.0) < _QUIET_NOISE
    seconds = np.array([_time(row, quiet=quiet) for row in rows])
    fastest_s = np.array([min(row["samples_s"]) for row in rows])
    curves = _curves(kernels, list(seconds), int(raw["environment"].get("cache_bytes", 0)))
    if not any(curve.kernel_class in PEAK_CLASSES for curve in curves):
        raise InputError(
            source=source, key="results", value=len(kernels), rule="no product was timed often enough for a fit",
            remedy="repeat 'schedlab calibrate' on a quieter machine",
        )  # fmt: skip
    if not any(kernel.kernel_class in {"pointwise", "copy"} for kernel in kernels):
        raise InputError(
            source=source, key="results", value=len(kernels), rule="no pointwise kernel or copy was timed", remedy="let the measurement go on for longer",
        )  # fmt: skip
    write_toml(out_dir / KERNELS_FILE, {"format": FORMAT, "curve": [curve_table(curve) for curve in curves]})
    write_toml(out_dir / PROVENANCE_FILE, _provenance(raw, curves, kernels, seconds, fastest_s, quiet=quiet))
    write_toml(out_dir / DEVICE_FILE, device_table(raw, kernels, seconds, fastest_s, yardstick_s=_yardstick(raw, quiet=quiet)))
    return load_profile(out_dir)


def _kernel(row: Mapping[str, Any]) -> Kernel:
    return Kernel(
        kernel_class=row["kernel_class"], op=row["op"], shape=tuple(row["shape"]), dtype=row["dtype"], flops=row["flops"], read_bytes=row["read_bytes"],
        written_bytes=row["written_bytes"],
    )  # fmt: skip


def _time(row: Mapping[str, Any], *, quiet: bool) -> float:
    """One time of a kernel from its samples."""
    return float(np.median(row["samples_s"]) if quiet else np.mean(sorted(row["samples_s"])[:_NUM_FASTEST]))


def _yardstick(raw: Mapping[str, Any], *, quiet: bool) -> float | None:
    """Median over the places in the grid at which the yardstick was timed, each by the statistic of a kernel; None where it was not."""
    found = [_time({"samples_s": samples}, quiet=quiet) for samples in raw.get("yardstick_s", ()) if samples]
    return float(np.median(found)) if found else None


def _curves(kernels: list[Kernel], seconds: list[float], cache_bytes: int) -> list[Curve]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for position, kernel in enumerate(kernels):
        groups.setdefault((kernel.kernel_class, kernel.op, kernel.dtype), []).append(position)
    return [
        fit_curve(
            [kernels[i] for i in rows[:_MOST_POINTS]],
            [seconds[i] for i in rows[:_MOST_POINTS]],
            group=key[1],
            cache_bytes=cache_bytes,
        )
        for key, rows in sorted(groups.items())
        if len(rows) >= _LEAST_POINTS
    ]


def _provenance(
    raw: Mapping[str, Any], curves: Sequence[Curve], kernels: Sequence[Kernel], seconds: Floats, fastest_s: Floats, *, quiet: bool
) -> dict[str, Any]:  # fmt: skip
    residuals = [
        {
            "kernel_class": curve.kernel_class, "op": curve.group, "dtype": curve.dtype, "num": len(curve.points), "median_error": curve.median_error,
            "rms_error": curve.relative_standard_error,
        }
        for curve in curves
    ]  # fmt: skip
    host = raw["host"]
    allocator = {
        name: {key: value for key, value in one.items() if key != "trace"} for name, one in host.get("allocator", {}).items()
    }
    table = {
        "format": FORMAT, "quick": raw["quick"], "complete": raw.get("complete", False), "noise": raw.get("noise", 1.0),
        "statistic": "median of the samples of each kernel" if quiet else f"mean of the {_NUM_FASTEST} fastest samples of each kernel",
        "residual": "leave-one-out over the grid, logarithmic", "warnings": list(raw.get("warnings", ())), "environment": raw["environment"],
        "measured": {
            "peak_flops_per_s": measured_peaks(kernels, seconds), "memory_bandwidth_bytes_per_s": measured_bandwidth(kernels, fastest_s),
        },
        "host": {name: value for name, value in host.items() if name not in _BULKY}, "allocator": allocator,
        "load": load_ratios(host.get("sustained_kernels", ())), "load_state": list(host.get("sustained_kernels", ())),
        "variants": variant_ratios(raw["results"], quiet=quiet), "failed": dict(raw.get("failed", {})), "residuals": residuals,
    }  # fmt: skip
    return dict(_without_none(table))


def variant_ratios(rows: Sequence[Mapping[str, Any]], *, quiet: bool) -> list[dict[str, Any]]:
    """Median time of each variant over that of the kernel of the same shape as it is by default, where both were timed."""
    default = {(row["op"], row["dtype"], *row["shape"]): _time(row, quiet=quiet) for row in rows if not row.get("variant")}
    ratios: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        base = default.get((row["op"], row["dtype"], *row["shape"]))
        if row.get("variant") and base is not None:
            key = row["kernel_class"], row["op"], row["dtype"], row["variant"]
            ratios.setdefault(key, []).append(_time(row, quiet=quiet) / base)
    return [
        {"kernel_class": key[0], "op": key[1], "dtype": key[2], "variant": key[3], "num": len(found), "over_default": float(np.median(found))}
        for key, found in sorted(ratios.items())
    ]  # fmt: skip


def _without_none(value: Any) -> Any:
    """The same without what is None, which TOML cannot say."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value if inner is not None]
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: fits raw timings that were taken elsewhere."""
    parser = argparse.ArgumentParser(
        prog="python -m hardware_models.calibration", description="Fits raw timings and writes a hardware profile."
    )
    parser.add_argument("--raw", required=True, type=Path, help="the file that hardware_models.microbench wrote")
    parser.add_argument("--out", required=True, type=Path, help="folder of the profile")
    options = parser.parse_args(arguments)
    try:
        profile = fit_profile(read_raw(options.raw), options.out, source=str(options.raw))
    except InputError as problem:
        print(problem, file=sys.stderr)  # noqa: T201 - the command's answer
        return 2
    print(f"{profile.name}: {len(profile.curves)} curves in {options.out}", file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
