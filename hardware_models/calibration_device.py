"""From raw timings to the values of ``device.toml``: peaks, bandwidth, efficiencies, copies, host dispatch, load. Pure but for the catalogue."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hardware_models.aliases import device_named
from hardware_models.catalogue import list_hardware
from hardware_models.curves import Floats, physical_terms
from hardware_models.errors import UnknownNameError
from hardware_models.fit import nonnegative_least_squares
from hardware_models.kernel import Kernel
from hardware_models.profile import PEAK_NAME, Sourced
from hardware_models.profile_file import DEVICE_FILE, FORMAT, sourced

_LARGE_QUARTER, _FAST_TENTH = 0.75, 0.9
"""Quantiles: of traffic, above which a kernel is large; of the rates of large kernels, the bandwidth."""
_CPU_TILE = (1, 1)
_CUDA_TILE = (128, 256)
PEAK_CLASSES = frozenset({"gemm", "batched_gemm"})
_LOADED_CLASSES = frozenset({"gemm", "batched_gemm", "attention", "convolution"})
"""Bound by arithmetic, so slower at lower clocks."""
_RAMP_FROM_BYTES = 2**20
"""Copies from this size on tell the rate; smaller ones the latency."""

_SAME_MEMORY = 0.1
"""Relative difference of the memory up to which a device is the catalogue's of its name and no other board."""
_CARRIED = ("architecture", "memory_kind", "host_link", "peer_link", "peer_bytes_per_s", "boost_clock_hz", "tdp_w")
"""What the catalogue says and no timing tells."""

Table = dict[str, Any]


def catalogue_entry(device_name: str, memory_bytes: int) -> Table | None:
    """``device.toml`` of the catalogue's device of this name and memory; None where it has none, and all is then measured."""
    try:
        name = device_named(device_name)
    except UnknownNameError:
        return None
    folder = next(entry.path for entry in list_hardware() if entry.name == name)
    table = tomllib.loads((folder / DEVICE_FILE).read_text(encoding="utf-8"))
    return table if abs(table["memory_bytes"]["value"] / memory_bytes - 1) <= _SAME_MEMORY else None


def measured_peaks(kernels: Sequence[Kernel], seconds: Floats) -> dict[str, float]:
    """FLOP/s of the fastest product of each dtype, by the name of its peak."""
    best: dict[str, float] = {}
    for kernel, duration_s in zip(kernels, seconds, strict=True):
        if kernel.kernel_class in PEAK_CLASSES and kernel.flops:
            name = PEAK_NAME.get(kernel.dtype, kernel.dtype)
            best[name] = max(best.get(name, 0.0), kernel.flops / float(duration_s))
    return best


def measured_bandwidth(kernels: Sequence[Kernel], fastest_s: Floats) -> float:
    """Bytes/s of the fast tenth of large pointwise kernels and copies, at the least time of each."""
    moved = np.array([kernel.moved_bytes for kernel in kernels], dtype=np.float64)
    streams = np.array([kernel.kernel_class in {"pointwise", "copy"} for kernel in kernels])
    large = streams & (moved >= np.quantile(moved[streams], _LARGE_QUARTER))
    return float(np.quantile((moved / fastest_s)[large], _FAST_TENTH))


def device_table(
    raw: Mapping[str, Any], kernels: Sequence[Kernel], seconds: Floats, fastest_s: Floats, *, yardstick_s: float | None = None
) -> Table:
    """``device.toml``; efficiencies are relative to the data sheet's peaks where the catalogue has the device, else to the best rates seen.

    Args:
        raw: the raw timings.
        kernels: those that are no variants.
        seconds: of each.
        fastest_s: least sample of each.
    """
    environment, host = raw["environment"], raw["host"]
    cuda = environment["device"] == "cuda"
    entry = catalogue_entry(environment["device_name"], environment["memory_bytes"]) if cuda else None
    terms = physical_terms(kernels, 0)
    best, bandwidth = measured_peaks(kernels, seconds), measured_bandwidth(kernels, fastest_s)
    peaks = {name: _value(raw, rate, "fastest product") for name, rate in best.items()}
    bandwidth_table = _value(raw, bandwidth, "fast tenth of large pointwise kernels and copies")
    if entry is not None:
        peaks |= entry["peak_flops_per_s"]
        bandwidth_table = entry["memory_bandwidth_bytes_per_s"]
    peak_of = np.array([peaks.get(PEAK_NAME.get(k.dtype, k.dtype), {"value": np.inf})["value"] for k in kernels])
    moved = (terms[:, 2] + terms[:, 3]) / seconds / bandwidth_table["value"]
    table: Table = {
        "format": FORMAT, "name": environment["device_name"], "kind": environment["device"], "num_multiprocessors": environment["num_multiprocessors"],
        "tile": list(_CUDA_TILE if cuda else _CPU_TILE),
        "provenance": f"measured {environment['date']} on {environment['device_name']}, {environment['num_threads']} threads, torch {environment['torch']}"
        f", {'quick' if raw['quick'] else 'full'} grid, noise {raw.get('noise', 1.0):.1%}",
        "memory_bytes": _value(raw, environment["memory_bytes"], "as the system reports it"), "memory_bandwidth_bytes_per_s": bandwidth_table,
        "dispatch_s": _value(raw, (host["dispatch"]["forward_s"] + host["dispatch"]["backward_s"]) / 2, "mean of forward and backward over a chain of tiny operators"),
        "launch_s": _launch(raw, seconds), "context_bytes": _context(raw), "peak_flops_per_s": peaks,
        "efficiency": [
            {"kernel_class": name, "flops": flops, "bandwidth": share, "relative_standard_error": error, "evidence": "measured", "source": "median over the grid"}
            for name, flops, share, error in efficiencies(kernels, terms[:, 1] / seconds / peak_of, moved)
        ],
    }  # fmt: skip
    if entry is not None:
        table |= {key: entry[key] for key in _CARRIED if key in entry}
    if yardstick_s is not None:
        table["yardstick_s"] = _value(raw, yardstick_s, "products and sums of one size, between kernels")
    if "checkpoint_policy" in host:
        table["checkpoint_policy_s"] = _value(
            raw, host["checkpoint_policy"]["operator_s"], "a chain of tiny operators, checkpointed by a policy and plain"
        )
    copies = copy_engine(raw["host"].get("copies") or ())
    return table | (_cuda_sections(raw) if cuda else {}) | ({} if copies is None else {"copy_engine": copies})


def _value(raw: Mapping[str, Any], number: float, what: str) -> Table:
    return sourced(Sourced(value=number, evidence="measured", source=what, date=raw["environment"]["date"]))


def _launch(raw: Mapping[str, Any], seconds: Floats) -> Table:
    launch = raw["host"].get("launch")
    if launch is None:
        return _value(raw, float(seconds.min()), "fastest kernel")
    return _value(raw, launch["stream_kernel_s"], "tiny kernels back to back in one stream")


def _context(raw: Mapping[str, Any]) -> Table:
    child = raw["host"].get("allocator", {}).get("default", {})
    if "context_bytes" in child:
        return _value(
            raw,
            max(0, child["context_bytes"]),
            "a process of its own, beyond its allocator, after products, convolutions and a training step",
        )
    seen = max(raw["environment"].get("context_bytes", 0), raw["host"].get("launch", {}).get("context_bytes", 0))
    return _value(raw, seen, "used on the device beyond the allocator; none on a CPU")


def efficiencies(kernels: Sequence[Kernel], compute: Floats, moved: Floats) -> list[tuple[str, float, float, float]]:
    """Per class: median fraction of the peak among kernels bound by arithmetic, of the bandwidth among the others, and their scatter."""
    rows = []
    for name in ["default", *sorted({kernel.kernel_class for kernel in kernels})]:
        chosen = np.array([name in ("default", kernel.kernel_class) for kernel in kernels])
        by_compute = chosen & (compute > moved)
        flops = float(np.median(compute[by_compute])) if by_compute.any() else 1.0
        bandwidth = float(np.median(moved[chosen & ~by_compute])) if (chosen & ~by_compute).any() else 1.0
        bound = np.maximum(compute / flops, moved / bandwidth)[chosen]
        rows.append((name, min(1.0, flops), min(1.0, bandwidth), float(np.std(np.log(np.maximum(bound, 1e-12))))))
    return rows


def _cuda_sections(raw: Mapping[str, Any]) -> Table:
    """Sections that a CPU does not have; each only if it was measured."""
    environment = raw["environment"]
    found = {
        "compute_capability": environment.get("capability", ""),
        "host_dispatch": _host_dispatch(raw), "sustained": _sustained(raw), "workspace_bytes": _workspace(raw),
        "l2_bytes": _value(raw, environment["cache_bytes"], "as the driver reports it") if environment.get("cache_bytes") else None,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def copy_engine(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Rates and latency of pinned copies, and what directions and kernels do to each other; None without copies.

    **Model**: ``t = latency + bytes / rate`` for each direction, least squares of the relative error; with both busy each runs at a fraction e
    of its rate until the shorter is done, so a pair that takes T has ``e = shorter / (T - (longer - shorter))``; slow-downs are
    the means over kernels bound by arithmetic and by memory and over both directions.
    """
    if not rows:
        return None
    (up_s, up_rate), (down_s, down_rate) = (line_of(rows, f"{name}_s") for name in ("h2d", "d2h"))
    under = [one for row in rows for one in row.get("under", ())]
    slowed = {
        f"{what}_slowdown": max(1.0, float(np.mean([one[f"{what}_slowdown"] for one in under]))) if under else 1.0
        for what in ("compute", "copy")
    }
    last = rows[-1]
    return {
        "to_device_bytes_per_s": up_rate, "to_host_bytes_per_s": down_rate, "latency_s": max(up_s, down_s),
        "duplex_efficiency": min(1.0, duplex_efficiency(last["h2d_s"], last["d2h_s"], last["duplex_s"])),
        **slowed, "evidence": "measured",
        "source": f"pinned copies of {rows[0]['bytes']} to {last['bytes']} bytes" + ("" if under else "; beside kernels not measured, taken as no slow-down"),
    }  # fmt: skip


def line_of(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """Latency (s) and rate (bytes/s) of the line through times over sizes.

    The rate is that of sizes above 1 MiB (of all, where fewer than two are); the latency what small copies then leave.
    """
    chosen = [row for row in rows if row["bytes"] >= _RAMP_FROM_BYTES]
    chosen = chosen if len(chosen) > 1 else list(rows)
    sizes, times = (np.array([row[name] for row in chosen], dtype=np.float64) for name in ("bytes", key))
    matrix = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    _, slope = nonnegative_least_squares(matrix, np.ones(len(times)))
    rate = 1.0 / slope if slope > 0 else float(sizes[-1] / times[-1])
    small = min(rows, key=lambda row: row["bytes"])
    return max(0.0, float(small[key]) - small["bytes"] / rate), float(rate)


def duplex_efficiency(first_s: float, second_s: float, both_s: float) -> float:
    """Fraction of its own rate at which each of two copies runs while both do (see `copy_engine`)."""
    shorter, longer = sorted((first_s, second_s))
    return shorter / max(shorter, both_s - (longer - shorter))


def _host_dispatch(raw: Mapping[str, Any]) -> Table | None:
    host = raw["host"]
    launch, compiled = host.get("launch"), host.get("compiled")
    if launch is None or compiled is None:
        return None
    one_s = max(0.0, (compiled["long_s"] - compiled["short_s"]) / (compiled["num_kernels"] - 1))
    return {
        "eager_s": host["dispatch"]["forward_s"], "autograd_backward_s": host["dispatch"]["backward_s"], "compiled_s": one_s,
        "compiled_call_s": max(0.0, compiled["short_s"] - one_s), "cuda_graph_s": launch["graph_replay_s"] / launch["num_kernels"],
        "evidence": "measured", "source": "tiny kernels, lower quartiles", "date": raw["environment"]["date"],
    }  # fmt: skip


def _sustained(raw: Mapping[str, Any]) -> Table | None:
    """Rate under lasting load over that of a burst, of products; None where none was put under load."""
    rows = [row for row in raw["host"].get("sustained_kernels", ()) if row["kernel_class"] == "gemm" and "failed" not in row]
    factors = sorted(min(1.0, row["burst_s"] / row["sustained_s"]) for row in rows)
    if not factors:
        return None
    return {
        "factor": float(np.median(factors)), "low": factors[0], "high": factors[-1], "evidence": "measured",
        "source": f"{len(factors)} products back to back for {min(row['duration_s'] for row in rows):.1f} s over the same for 2 ms", "date": raw["environment"]["date"],
    }  # fmt: skip


def _workspace(raw: Mapping[str, Any]) -> Table | None:
    for row in raw["host"].get("allocator", {}).get("default", {}).get("context", ()):
        if row.get("workspace_bytes", -1) >= 0:
            return _value(raw, row["workspace_bytes"], "taken of the allocator by the first product")
    return None


def load_ratios(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """By class: median over its kernels of the time in a burst over alone (caches, overlapping launches) and under load over in a burst (clocks)."""
    whole = [row for row in rows if "failed" not in row]
    return [
        {
            "kernel_class": name, "bound_by_arithmetic": name in _LOADED_CLASSES, "num": len(chosen),
            "burst_over_isolated": float(np.median([row["burst_s"] / row["isolated_s"] for row in chosen])),
            "sustained_over_burst": float(np.median([row["sustained_s"] / row["burst_s"] for row in chosen])),
            "sustained_over_isolated": float(np.median([row["sustained_s"] / row["isolated_s"] for row in chosen])),
        }
        for name in sorted({row["kernel_class"] for row in whole})
        if (chosen := [row for row in whole if row["kernel_class"] == name])
    ]  # fmt: skip
