"""What is known about one device: the profile that prices kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from hardware_models.curves import Curve
from hardware_models.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

Evidence = Literal["measured", "published", "datasheet"]
EVIDENCE_KINDS: tuple[str, ...] = get_args(Evidence)

PEAK_NAME = MappingProxyType(
    {"float8_e4m3fn": "float8", "float8_e5m2": "float8", "complex64": "float32", "complex128": "float64", "uint8": "int8"}
)
"""The peak that holds for a dtype, where that is not the dtype's own name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sourced:
    """One value of a data sheet or a publication."""

    value: float
    evidence: Evidence
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Achievable fractions of the peaks for a class of kernels; both in (0, 1]."""

    kernel_class: str
    flops: float
    bandwidth: float
    relative_standard_error: float
    evidence: Evidence
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyEngine:
    """Copies between this device and its host over their link."""

    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    latency_s: float
    duplex_efficiency: float
    """Rate with both directions busy over the sum of the rates alone, in (0, 1]."""
    compute_slowdown: float
    """Time of a kernel while a copy runs over its time alone, at least 1."""
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device: data-sheet values, efficiencies by class and fitted curves.

    ``peak_flops_per_s`` is dense and by torch's name of the dtype (``float8``, ``int8``, ``float4`` for the narrow ones).
    ``num_multiprocessors`` 0 means that work is not dealt out in tiles and waves (a CPU).
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    peak_flops_per_s: Mapping[str, float]
    memory_bandwidth_bytes_per_s: float
    dispatch_s: float
    """Host seconds to launch one kernel in eager mode, under autograd and a Python graph."""
    context_bytes: int
    """What the framework takes on the device before the first tensor."""
    launch_s: float
    """Least seconds of a kernel on the device."""
    num_multiprocessors: int
    tile: tuple[int, int]
    """Rows and columns of a product's output tile."""
    efficiencies: tuple[Efficiency, ...]
    curves: tuple[Curve, ...]
    copy_engine: CopyEngine | None
    evidence: Mapping[str, Evidence]
    """Kind of each data-sheet value, by its key."""
    provenance: str
    """One line: what these values rest on."""

    def peak(self, dtype: str) -> float:
        """FLOP/s of a dtype.

        Raises:
            InputError: the device has no unit for it.
        """
        name = PEAK_NAME.get(dtype, dtype)
        found = self.peak_flops_per_s.get(name)
        if found is None:
            raise InputError(
                source=self.name, key="peak_flops_per_s", value=dtype, rule=f"no peak for this dtype; known are {', '.join(self.peak_flops_per_s)}",
                remedy="choose another precision or add the peak to device.toml",
            )  # fmt: skip
        return found

    def efficiency(self, kernel_class: str) -> Efficiency:
        """The achievable fractions of a class; those of ``default`` where the class has none of its own."""
        by_class = {one.kernel_class: one for one in self.efficiencies}
        return by_class.get(kernel_class, by_class["default"])

    def changed(self, **changes: object) -> DeviceProfile:
        """This device with other values, for what-if studies."""
        return replace(self, **changes)  # type: ignore[arg-type]
