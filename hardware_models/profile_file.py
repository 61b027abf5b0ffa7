"""Profiles on disk: a folder with ``device.toml`` and, once measured, ``kernels.toml`` and ``provenance.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hardware_models.curves import Curve
from hardware_models.errors import InputError
from hardware_models.files import whole_file
from hardware_models.kernel import KernelClass
from hardware_models.profile import CopyEngine, DeviceProfile, Efficiency, Evidence, Sourced

DEVICE_FILE, KERNELS_FILE, PROVENANCE_FILE = "device.toml", "kernels.toml", "provenance.toml"
FORMAT = 1

_LEAST_RATE = 1e9
"""No device computes or moves less than this in a second: a smaller value is in another unit (GB/s, TFLOP/s)."""
_MOST_SECONDS = 1.0
"""Launching one kernel takes less than this: a larger value is in another unit (us)."""
_LEAST_MEMORY_BYTES = 2**20

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_Rate = Annotated[float, Field(ge=_LEAST_RATE, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, lt=_MOST_SECONDS, allow_inf_nan=False)]


_Model = TypeVar("_Model", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class _SourcedSection(_Section):
    evidence: Evidence
    source: str = Field(min_length=1)
    date: str = Field(min_length=1)


class _RateSection(_SourcedSection):
    value: _Rate


class _SecondsSection(_SourcedSection):
    value: _Seconds


class _MemorySection(_SourcedSection):
    value: Annotated[int, Field(ge=_LEAST_MEMORY_BYTES)]


class _BytesSection(_SourcedSection):
    value: Annotated[int, Field(ge=0)]


class _EfficiencySection(_Section):
    kernel_class: KernelClass | Literal["default"]
    flops: _Fraction
    bandwidth: _Fraction
    relative_standard_error: _NonNegative
    evidence: Evidence
    source: str = Field(min_length=1)


class _CopySection(_Section):
    to_device_bytes_per_s: _Rate
    to_host_bytes_per_s: _Rate
    latency_s: _Seconds
    duplex_efficiency: _Fraction
    compute_slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    evidence: Evidence
    source: str = Field(min_length=1)


class _DeviceFile(_Section):
    format: Literal[1]
    name: str = Field(min_length=1)
    kind: Literal["cpu", "cuda"]
    provenance: str
    num_multiprocessors: Annotated[int, Field(ge=0)]
    tile: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
    memory_bytes: _MemorySection
    memory_bandwidth_bytes_per_s: _RateSection
    dispatch_s: _SecondsSection
    launch_s: _SecondsSection
    context_bytes: _BytesSection
    peak_flops_per_s: dict[str, _RateSection] = Field(min_length=1)
    efficiency: list[_EfficiencySection] = Field(min_length=1)
    copy_engine: _CopySection | None = None


class _CurveSection(_Section):
    kernel_class: KernelClass
    group: str = Field(min_length=1)
    dtype: str = Field(min_length=1)
    evidence: Evidence
    points: list[list[_Finite]] = Field(min_length=1)
    seconds: list[_Positive]
    physical_seconds: list[_Positive]
    cache_bytes: Annotated[int, Field(ge=0)]
    coefficients: tuple[_NonNegative, _NonNegative, _NonNegative, _NonNegative, _NonNegative, _NonNegative]
    length_scale: _Positive
    noise: _Positive
    relative_standard_error: _NonNegative
    median_error: _NonNegative


class _KernelsFile(_Section):
    format: Literal[1]
    curve: list[_CurveSection] = []


def load_profile(folder: Path) -> DeviceProfile:
    """The profile in a folder.

    Raises:
        InputError: a file is missing, truncated, or holds a value that breaks a rule; names file, key, value, rule and remedy.
    """
    device_path, kernels_path = folder / DEVICE_FILE, folder / KERNELS_FILE
    device = _validated(_DeviceFile, device_path)
    curves: tuple[Curve, ...] = ()
    if kernels_path.exists():
        kernels = _validated(_KernelsFile, kernels_path)
        curves = tuple(_curve(section, kernels_path, position) for position, section in enumerate(kernels.curve))
    efficiencies = tuple(Efficiency(**section.model_dump()) for section in device.efficiency)
    if "default" not in {one.kernel_class for one in efficiencies}:
        raise InputError(
            source=str(device_path), key="efficiency", value=None, rule="one [[efficiency]] has kernel_class = 'default'", remedy="add it",
        )  # fmt: skip
    copy = device.copy_engine
    return DeviceProfile(
        name=device.name, kind=device.kind, memory_bytes=device.memory_bytes.value,
        peak_flops_per_s=MappingProxyType({dtype: peak.value for dtype, peak in device.peak_flops_per_s.items()}),
        memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s.value, dispatch_s=device.dispatch_s.value,
        context_bytes=device.context_bytes.value, launch_s=device.launch_s.value, num_multiprocessors=device.num_multiprocessors,
        tile=device.tile, efficiencies=efficiencies, curves=curves,
        copy_engine=None if copy is None else CopyEngine(**copy.model_dump(exclude={"source"})),
        evidence=MappingProxyType(_evidence(device)), provenance=device.provenance,
    )  # fmt: skip


def _evidence(device: _DeviceFile) -> dict[str, Evidence]:
    kinds = {f"peak_flops_per_s.{dtype}": peak.evidence for dtype, peak in device.peak_flops_per_s.items()}
    for key in ("memory_bytes", "memory_bandwidth_bytes_per_s", "dispatch_s", "launch_s", "context_bytes"):
        kinds[key] = getattr(device, key).evidence
    return kinds


def _curve(section: _CurveSection, path: Path, position: int) -> Curve:
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


def _validated(model: type[_Model], path: Path) -> _Model:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise InputError(
            source=str(path),
            key="",
            value=None,
            rule="no such file",
            remedy="a profile is a folder with device.toml; 'schedlab calibrate' writes one",
        ) from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise InputError(
            source=str(path), key="", value=None, rule=f"not whole or not TOML: {problem}", remedy="restore the file or repeat 'schedlab calibrate'",
        ) from problem  # fmt: skip
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        raise _as_input_error(problem, path) from problem


def _as_input_error(problem: ValidationError, path: Path) -> InputError:
    """The first violation in our words."""
    first = problem.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    kind = first["type"]
    if kind == "missing":
        return InputError(
            source=str(path), key=key, value=None, rule="this key is required", remedy=_REMEDY_OF_MISSING[path.name]
        )
    if kind == "extra_forbidden":
        return InputError(
            source=str(path), key=key, value=first["input"], rule="unknown key", remedy="remove it or correct its spelling"
        )
    rule = first["msg"][0].lower() + first["msg"][1:]
    remedy = _REMEDIES.get(kind, "correct the value")
    if kind == "greater_than_equal" and first.get("ctx", {}).get("ge") == _LEAST_RATE:
        remedy = "give the rate in bytes/s or FLOP/s, not in GB/s or TFLOP/s"
    if kind == "less_than" and first.get("ctx", {}).get("lt") == _MOST_SECONDS:
        remedy = "give seconds, not microseconds"
    return InputError(source=str(path), key=key, value=first["input"], rule=rule, remedy=remedy)


_REMEDY_OF_MISSING = {DEVICE_FILE: "add it", KERNELS_FILE: "repeat 'schedlab calibrate': this version writes it"}
_REMEDIES = {"finite_number": "give a finite number", "literal_error": "choose one of these"}


def sourced(value: Sourced) -> dict[str, Any]:
    """The TOML table of a value with its source."""
    return {"value": value.value, "evidence": value.evidence, "source": value.source, "date": value.date}


def curve_table(curve: Curve) -> dict[str, Any]:
    """The TOML table of a curve."""
    table = {name: getattr(curve, name) for name in Curve.__slots__}
    return table | {"points": [list(row) for row in curve.points], "seconds": list(curve.seconds),
                    "physical_seconds": list(curve.physical_seconds), "coefficients": list(curve.coefficients)}  # fmt: skip


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a TOML file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(tomli_w.dumps(values), encoding="utf-8")
