"""Writes ``[light]`` of every catalogued GPU from published timings: ``python -m hardware_models.bandwidth_catalogue --measurements DIR``."""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import floor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hardware_models.aliases import device_named
from hardware_models.bandwidth_fit import MemorySystem, carry_ramp, fit_ramp, ramp_errors, read_ramp_timings
from hardware_models.bandwidth_ramp import BandwidthRamp
from hardware_models.catalogue import CATALOGUE_FOLDER, catalogue_names
from hardware_models.kernel_tables import read_kernels, read_streams
from hardware_models.profile_file import DEVICE_FILE
from hardware_models.profile_sections import DeviceFile
from hardware_models.toml_file import read_section, write_toml
from hardware_models.units import GB

SMALL_KERNELS_TABLE = "small_kernel_launch_overhead.csv"
"""Timings of a kernel that reads and writes one number a thread, over its size."""
STREAM_TABLE = "hbm_stream_bandwidth.csv"
"""Rates from memory by the mix of reads and writes."""
PRODUCTS_TABLE = "gemm_latency_aiconfigurator.csv"
"""Products of few rows read their weights as fast as a framework's kernels read anything."""
FEW_ROWS = 16
"""Of a product whose time is that of reading its weights."""
TURNAROUND = 0.94
"""Rate of mixed reads and writes over that of reads alone, of kernels with enough loads in flight: a bus idles when it turns around.

**Source**: one write a read over reads alone, mean of V100, A100 40 GB and A100 80 GB (0.945), te42kyfo/gpu-benches gpu-stream @1c36d509ee; on newer
stacked memories that benchmark's reads are bound by the bytes under way and say nothing of the bus.
"""
THREADS_OF_CAPABILITY = MappingProxyType({"7.5": 1024, "8.6": 1536, "8.9": 1536})
"""Resident threads of a multiprocessor where they are not `THREADS` (CUDA C++ Programming Guide, technical specifications per compute capability)."""
THREADS = 2048
MEMORY_OF = MappingProxyType({"v100-sxm2-16gb": "v100-sxm2-32gb", "v100-pcie-32gb": "v100-sxm2-32gb"})
"""Boards with the same memory at the same rate as one whose rates are in the table."""
READS_LIKE = MappingProxyType({"gh200": "h100-sxm", "b300": "b200", "gb300": "gb200"})
"""Boards that read by products of few rows like another, in proportion to their bandwidths."""
_GPU_BENCHES = "te42kyfo/gpu-benches {} @1c36d509ee"
_STREAM_SOURCES = MappingProxyType({"gh200": "RRZE-HPC/gpu-benches gpu-stream/gh200.txt @1038c5d0d0"})
"""Where a device's memory rates are from, if not from the repository of all others."""
_DIGITS, _ERROR_DIGITS, _RATIO_STEPS = 5, 3, 10_000
"""Significant digits of coefficients and of errors; relative rates are rounded down to this part of 1, so that none exceeds the data sheet's bandwidth."""
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRates:
    """Bytes per second of one device's memory by pattern."""

    table_name: str
    write: float
    scale: float
    triad: float
    read: float

    @property
    def source(self) -> str:
        """Repository, file and commit."""
        return _STREAM_SOURCES.get(self.table_name, _GPU_BENCHES.format(f"gpu-stream/{self.table_name}.txt"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What is published of the memories of catalogued devices, by device."""

    devices: Mapping[str, DeviceFile]
    fitted: Mapping[str, BandwidthRamp]
    """Where small kernels were timed."""
    carried_errors: Mapping[str, tuple[float, float]]
    """Median and 90th percentile of each of these predicted from the others."""
    rates: Mapping[str, MemoryRates]
    reads: Mapping[str, float]
    """Bytes per second of products of few rows."""

    def dram_rates(self) -> dict[str, float]:
        """Rate of one byte written for each one read, of devices where it is known."""
        return {
            name: self.fitted[name].dram_bytes_per_s if name in self.fitted else one.scale for name, one in self.rates.items()
        }


def memory_of(device: DeviceFile) -> MemorySystem:
    """A data sheet's memory; the device has a cache and a clock (every catalogued GPU does)."""
    assert device.l2_bytes is not None
    assert device.boost_clock_hz is not None
    return MemorySystem(
        kind="gddr" if device.memory_kind.startswith("gddr") else "hbm", num_multiprocessors=device.num_multiprocessors,
        threads_per_multiprocessor=THREADS_OF_CAPABILITY.get(device.compute_capability, THREADS), clock_hz=device.boost_clock_hz.value,
        l2_bytes=float(device.l2_bytes.value), bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s.value,
    )  # fmt: skip


def read_published(measurements: Path, folder: Path = CATALOGUE_FOLDER) -> Published:
    """Reads the three tables and fits a ramp to each device that was timed.

    Args:
        measurements: folder of the tables.
        folder: of the devices' folders, whose data sheets are read.

    Raises:
        InputError: a table or data sheet is missing or breaks a rule.
    """
    devices = {name: read_section(DeviceFile, folder / name / DEVICE_FILE) for name in catalogue_names()}
    found = read_ramp_timings(measurements / SMALL_KERNELS_TABLE)
    timings = {device_named(name): found[name] for name in found}
    fitted = {
        device_named(name): fit_ramp(
            one, memory_of(devices[device_named(name)]), source=_GPU_BENCHES.format(f"gpu-small-kernels/{name}.txt and {name}_graph.txt")
        )
        for name, one in found.items()
    }  # fmt: skip
    published = Published(
        devices=devices, fitted=fitted, carried_errors={}, rates=_memory_rates(measurements), reads=_read_rates(measurements)
    )
    errors = {name: ramp_errors(_carried(name, published, without=name), timings[name]) for name in fitted}
    return replace(
        published,
        carried_errors={name: (float(np.median(one)), float(np.quantile(one, 0.9))) for name, one in errors.items()},
    )


def _memory_rates(measurements: Path) -> dict[str, MemoryRates]:
    by_name: dict[str, dict[str, float]] = {}
    for row in read_streams(measurements / STREAM_TABLE):
        by_name.setdefault(row.device, {})[row.op.removeprefix("memory_")] = row.moved_bytes / row.seconds
    return {
        device_named(name): MemoryRates(table_name=name, write=rates["init_write"], scale=rates["scale"], triad=rates["triad"], read=rates["read"])
        for name, rates in by_name.items()
    }  # fmt: skip


def _read_rates(measurements: Path) -> dict[str, float]:
    """Greatest traffic over time of bfloat16 products of few rows, in whole GB/s."""
    found: dict[str, float] = {}
    for row in read_kernels(measurements / PRODUCTS_TABLE):
        if row.kernel.shape[0] <= FEW_ROWS and row.kernel.dtype == "bfloat16":
            name = device_named(row.device)
            rate = (row.kernel.read_bytes + row.kernel.written_bytes) / row.seconds
            found[name] = max(found.get(name, 0.0), round(rate / GB) * float(GB))
    return found


def _carried(name: str, published: Published, *, without: str = "") -> BandwidthRamp:
    """The ramp of a device by the ratios of data sheets; ``without`` one of the timed devices."""
    known = [(memory_of(published.devices[one]), ramp) for one, ramp in published.fitted.items() if one != without]
    rates = [(memory_of(published.devices[one]), rate) for one, rate in published.dram_rates().items() if one != without]
    return carry_ramp(known, memory_of(published.devices[name]), rates=rates, source=name)


def light_section(name: str, published: Published) -> dict[str, Any]:
    """``[light]`` of one device.

    **Model**: the fitted ramp where the device was timed, else `carry_ramp`. Relative rates by the mix are those of the device's own memory benchmark, else
    means of like devices. Kernels with wide loads reach the greatest of: the timed kernel's rate, `TURNAROUND` of the read rate, `TURNAROUND` of what
    products of few rows read; nothing exceeds the data sheet's bandwidth.
    """
    bandwidth = published.devices[name].memory_bandwidth_bytes_per_s.value
    rates, reads = published.rates.get(MEMORY_OF.get(name, name)), _reads_of(name, published)
    ramp, sources = _ramp_of(name, published, rates)
    dram = ramp.dram_bytes_per_s
    narrow, mix_source = _narrow_mix(name, published, rates)
    candidates = [
        dram,
        *((rates.scale, TURNAROUND * rates.read) if rates else ()),
        *((TURNAROUND * reads[0],) if reads else ()),
    ]
    wide = min(max(candidates), bandwidth) / dram
    fastest_read = [wide, narrow[3], *([reads[0] / dram] if reads else []), *([] if rates else [wide / TURNAROUND])]
    mixes = {
        "mix": ((0.0, narrow[0]), (0.5, narrow[1]), (0.6667, narrow[2]), (1.0, narrow[3])),
        "wide_mix": ((0.0, max(wide, narrow[0])), (0.5, wide), (1.0, max(fastest_read))),
    }
    rounded_dram = _rounded(dram, _DIGITS)
    least = min(bandwidth / dram, bandwidth / rounded_dram)
    texts = ([mix_source] if rates else []) + ([reads[1]] if reads else []) + ([] if rates else [mix_source])
    section = {field.name: getattr(ramp, field.name) for field in fields(ramp)}
    section |= {key: _rounded(value, _DIGITS) for key, value in section.items() if isinstance(value, float)}
    section |= {key: [[part, _rounded_down(min(rate, least))] for part, rate in mix] for key, mix in mixes.items()}
    section |= {key: _rounded(getattr(ramp, key), _ERROR_DIGITS) for key in ("median_error", "p90_error")}
    return section | {"source": "; ".join([*sources, *texts])}


def _ramp_of(name: str, published: Published, rates: MemoryRates | None) -> tuple[BandwidthRamp, list[str]]:
    """The fitted or carried ramp with its own device's rate from memory where that was measured, and where it is from."""
    if name in published.fitted:
        return published.fitted[name], [published.fitted[name].source]
    kind = memory_of(published.devices[name]).kind
    near = [one for one in published.fitted if memory_of(published.devices[one]).kind == kind]
    errors = [published.carried_errors[one] for one in near]
    ramp = replace(
        _carried(name, published),
        median_error=max(median for median, _p90 in errors),
        p90_error=max(p90 for _median, p90 in errors),
    )
    sources = [
        f"carried by data-sheet ratios from {' and '.join(near)}, {_GPU_BENCHES.format('gpu-small-kernels')}",
        f"rate from memory by saturation and bytes in flight over {_GPU_BENCHES.format('gpu-stream')} ({len(published.rates)} devices)",
        "errors: the timed devices predicted from each other",
    ]
    if rates is None:
        return ramp, sources
    return replace(ramp, dram_bytes_per_s=rates.scale), [*sources, f"memory rate (scale): {rates.source}"]


def _reads_of(name: str, published: Published) -> tuple[float, str] | None:
    """Bytes per second that products of few rows read, and where that is from."""
    lender = READS_LIKE.get(name, name)
    if lender not in published.reads:
        return None
    ratio = (
        published.devices[name].memory_bandwidth_bytes_per_s.value
        / published.devices[lender].memory_bandwidth_bytes_per_s.value
    )
    rate = published.reads[lender] * ratio
    like = "" if lender == name else f" (as {lender}, by bandwidth)"
    text = f"wide loads: products of few rows read {rate / GB:.0f} GB/s{like}, ai-dynamo/aiconfigurator gemm tables @095f58a51c"
    return rate, f"{text}, times {TURNAROUND} for the turnaround of reads and writes"


def _narrow_mix(name: str, published: Published, rates: MemoryRates | None) -> tuple[tuple[float, float, float, float], str]:
    """Rates of writing, one read a write, two reads a write and reading, over the second of them; and where they are from."""
    alike = [rates] if rates else [published.rates[one] for one in _alike(name, published)]
    ratios = np.array([(one.write / one.scale, 1.0, one.triad / one.scale, one.read / one.scale) for one in alike])
    write, both, triad, read = (float(value) for value in np.exp(np.mean(np.log(ratios), axis=0)))
    if rates:
        return (write, both, triad, read), f"mix: {rates.source}"
    return (
        write,
        both,
        triad,
        read,
    ), f"mix: mean of {', '.join(one.table_name for one in alike)}, {_GPU_BENCHES.format('gpu-stream')}"


def _alike(name: str, published: Published) -> Sequence[str]:
    """Devices in the table of memory rates that have the same kind of memory, of the newer or older generations if it is stacked."""

    def family(one: str) -> tuple[str, bool]:
        device = published.devices[one]
        kind = memory_of(device).kind
        return kind, kind == "hbm" and device.architecture in {"hopper", "blackwell"}

    return [one for one in published.rates if family(one) == family(name)]


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _rounded_down(value: float) -> float:
    return floor(value * _RATIO_STEPS * (1 + _ROUNDING)) / _RATIO_STEPS


def update_catalogue(measurements: Path, folder: Path = CATALOGUE_FOLDER) -> dict[str, dict[str, Any]]:
    """Replaces ``[light]`` of every ``device.toml`` in ``folder``, and nothing else; returns the sections by device."""
    published = read_published(measurements, folder)
    sections = {name: light_section(name, published) for name in published.devices}
    for name, section in sections.items():
        path = folder / name / DEVICE_FILE
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        write_toml(path, values | {"light": section})
    return sections


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `update_catalogue`; prints a line for each device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, required=True, help="folder of the published tables")
    parser.add_argument("--out", type=Path, default=CATALOGUE_FOLDER, help="folder of the devices' folders")
    options = parser.parse_args(arguments)
    lines = ["| device | evidence | GB/s | median | p90 |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {one['evidence']} | {one['dram_bytes_per_s'] / GB:.0f} | {one['median_error']:.1%} | {one['p90_error']:.1%} |"
        for name, one in update_catalogue(options.measurements, options.out).items()
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
