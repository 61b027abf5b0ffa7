"""Profiles on disk: a folder with ``device.toml`` and, once measured, ``kernels.toml`` and ``provenance.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hardware_models.bandwidth_ramp import BandwidthRamp
from hardware_models.curves import Curve
from hardware_models.errors import InputError
from hardware_models.gridded_file import load_grids
from hardware_models.profile import CopyEngine, DeviceProfile, Efficiency, Evidence, HostDispatch, Sourced, Sustained
from hardware_models.profile_sections import (
    LEAST_CACHE_BYTES,
    LEAST_CLOCK_HZ,
    LEAST_RATE,
    MOST_CLOCK_HZ,
    MOST_RATE,
    CurveSection,
    DeviceFile,
    KernelsFile,
    LightSection,
    SustainedSection,
)
from hardware_models.toml_file import LEAST_MEMORY_BYTES, MOST_SECONDS, Bound, Remedies, read_section

DEVICE_FILE, KERNELS_FILE, PROVENANCE_FILE = "device.toml", "kernels.toml", "provenance.toml"
FORMAT = 1

_MONOTONE_FROM_BYTES, _MONOTONE_TO_BYTES, _MONOTONE_POINTS = 1e3, 1e11, 400
"""Sizes between which the time of a memory-bound kernel is checked to grow."""
_ROUNDING = 1e-9


_BOUNDS: Mapping[Bound, str] = MappingProxyType(
    {
        ("greater_than_equal", LEAST_RATE): "give the rate in bytes/s or FLOP/s, not in GB/s or TFLOP/s",
        ("less_than_equal", MOST_RATE): "give the rate in bytes/s or FLOP/s: no device is that fast",
        ("less_than", MOST_SECONDS): "give seconds, not microseconds", ("greater_than_equal", LEAST_MEMORY_BYTES): "give bytes, not GB",
        ("greater_than_equal", LEAST_CACHE_BYTES): "give bytes, not MB", ("greater_than_equal", LEAST_CLOCK_HZ): "give hertz, not MHz or GHz",
        ("less_than_equal", MOST_CLOCK_HZ): "give hertz",
    }
)  # fmt: skip
_DEVICE_REMEDIES = Remedies(
    absent="a profile is a folder with device.toml; 'schedlab calibrate' writes one",
    broken="restore the file or repeat 'schedlab calibrate'", bounds=_BOUNDS,
)  # fmt: skip
_KERNELS_REMEDIES = replace(_DEVICE_REMEDIES, missing="repeat 'schedlab calibrate': this version writes it")


def load_profile(folder: Path) -> DeviceProfile:
    """The profile in a folder.

    Raises:
        InputError: a file is missing, truncated, or holds a value that breaks a rule; names file, key, value, rule and remedy.
    """
    device_path, kernels_path = folder / DEVICE_FILE, folder / KERNELS_FILE
    device = read_section(DeviceFile, device_path, remedies=_DEVICE_REMEDIES)
    curves: tuple[Curve, ...] = ()
    if kernels_path.exists():
        kernels = read_section(KernelsFile, kernels_path, remedies=_KERNELS_REMEDIES)
        curves = tuple(_curve(section, kernels_path, position) for position, section in enumerate(kernels.curve))
    efficiencies = tuple(Efficiency(**section.model_dump()) for section in device.efficiency)
    if "default" not in {one.kernel_class for one in efficiencies}:
        raise InputError(
            source=str(device_path), key="efficiency", value=None, rule="one [[efficiency]] has kernel_class = 'default'", remedy="add it",
        )  # fmt: skip
    copy = device.copy_engine
    profile = DeviceProfile(
        name=device.name, kind=device.kind, memory_bytes=device.memory_bytes.value,
        peak_flops_per_s=MappingProxyType({dtype: peak.value for dtype, peak in device.peak_flops_per_s.items()}),
        memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s.value, dispatch_s=device.dispatch_s.value,
        context_bytes=device.context_bytes.value, launch_s=device.launch_s.value, num_multiprocessors=device.num_multiprocessors,
        tile=device.tile, efficiencies=efficiencies, curves=curves,
        copy_engine=None if copy is None else CopyEngine(**copy.model_dump(exclude={"source"})),
        evidence=MappingProxyType(_evidence(device)), provenance=device.provenance, **_data_sheet(device),
        light=None if device.light is None else _light(device.light, device.memory_bandwidth_bytes_per_s.value, device_path),
        host_dispatch=None if device.host_dispatch is None else HostDispatch(**device.host_dispatch.model_dump()),
        sustained=None if device.sustained is None else _sustained(device.sustained, device_path),
    )  # fmt: skip
    return replace(profile, grids=load_grids(folder, profile.laws()))


_REQUIRED = ("memory_bytes", "memory_bandwidth_bytes_per_s", "dispatch_s", "launch_s", "context_bytes")
_OPTIONAL = ("l2_bytes", "boost_clock_hz", "tdp_w", "peer_bytes_per_s", "workspace_bytes", "yardstick_s", "checkpoint_policy_s")
_NAMES = ("architecture", "compute_capability", "memory_kind", "host_link", "peer_link")


def _evidence(device: DeviceFile) -> dict[str, Evidence]:
    kinds = {f"peak_flops_per_s.{dtype}": peak.evidence for dtype, peak in device.peak_flops_per_s.items()}
    for key in (*_REQUIRED, *_OPTIONAL, "light", "host_dispatch", "sustained"):
        section = getattr(device, key)
        if section is not None:
            kinds[key] = section.evidence
    return kinds


def _data_sheet(device: DeviceFile) -> dict[str, Any]:
    """Fields of the profile that a file may leave out."""
    given = {key: getattr(device, key) for key in _OPTIONAL}
    return {key: section.value for key, section in given.items() if section is not None} | {
        key: getattr(device, key) for key in _NAMES
    }


def _light(section: LightSection, bandwidth_bytes_per_s: float, path: Path) -> BandwidthRamp:
    ramp = BandwidthRamp(**(section.model_dump() | {"mix": tuple(section.mix), "wide_mix": tuple(section.wide_mix)}))
    for key, mix in (("mix", ramp.mix), ("wide_mix", ramp.wide_mix)):
        if any(before >= after for (before, _rate), (after, _other) in pairwise(mix)):
            raise InputError(
                source=str(path), key=f"light.{key}", value=[fraction for fraction, _rate in mix], rule="read fractions increase strictly",
                remedy="sort the pairs and merge equal ones",
            )  # fmt: skip
        fastest = section.dram_bytes_per_s * max(rate for _fraction, rate in mix)
        if fastest > bandwidth_bytes_per_s * (1 + _ROUNDING):
            raise InputError(
                source=str(path), key="light.dram_bytes_per_s", value=section.dram_bytes_per_s,
                rule=f"dram_bytes_per_s * {key} <= memory_bandwidth_bytes_per_s must hold, but got {fastest:.4g} > {bandwidth_bytes_per_s:.4g}",
                remedy="no kernel is faster than the theoretical bandwidth: correct one of them",
            )  # fmt: skip
    sizes = np.geomspace(_MONOTONE_FROM_BYTES, _MONOTONE_TO_BYTES, _MONOTONE_POINTS)
    falls = np.flatnonzero(np.diff(ramp.seconds(sizes)) < 0)
    if len(falls):
        raise InputError(
            source=str(path), key="light", value=None, rule=f"time grows with the bytes moved, but falls at {sizes[falls[0]]:.3g} bytes",
            remedy="rates fall from first_wave to cache to dram: correct the one that does not, or fit again",
        )  # fmt: skip
    return ramp


def _sustained(section: SustainedSection, path: Path) -> Sustained:
    if not section.low <= section.factor <= section.high:
        raise InputError(
            source=str(path), key="sustained.factor", value=section.factor,
            rule=f"low <= factor <= high must hold, but got low={section.low}, high={section.high}", remedy="correct the interval",
        )  # fmt: skip
    return Sustained(**section.model_dump())


def _curve(section: CurveSection, path: Path, position: int) -> Curve:
    where = f"curve[{position}] ({section.group})"
    lengths = len(section.points), len(section.seconds), len(section.physical_seconds)
    if len(set(lengths)) != 1:
        raise InputError(
            source=str(path), key=where, value=lengths, rule="points, seconds and physical_seconds have one length",
            remedy="repeat 'schedlab calibrate'",
        )  # fmt: skip
    points = tuple(tuple(row) for row in section.points)
    for before, after in pairwise(points):
        if not before < after or len(before) != len(after):
            raise InputError(
                source=str(path), key=f"{where}.points", value=list(after), rule=f"grid points increase strictly, but this one follows {list(before)}",
                remedy="sort the points and merge equal ones, or repeat 'schedlab calibrate'",
            )  # fmt: skip
    values = section.model_dump()
    values |= {"points": points, "seconds": tuple(section.seconds), "physical_seconds": tuple(section.physical_seconds)}
    return Curve(**values)


def sourced(value: Sourced) -> dict[str, Any]:
    """The TOML table of a value with its source."""
    return {"value": value.value, "evidence": value.evidence, "source": value.source, "date": value.date}


def curve_table(curve: Curve) -> dict[str, Any]:
    """The TOML table of a curve."""
    table = {name: getattr(curve, name) for name in Curve.__slots__}
    return table | {"points": [list(row) for row in curve.points], "seconds": list(curve.seconds),
                    "physical_seconds": list(curve.physical_seconds), "coefficients": list(curve.coefficients)}  # fmt: skip
