"""What the files of a profile must hold: their sections, and the bounds that tell a value in another unit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hardware_models.kernel import KernelClass
from hardware_models.profile import Evidence
from hardware_models.toml_file import (
    Finite,
    Fraction,
    MemoryBytes,
    Name,
    NonNegative,
    Positive,
    Seconds,
    Section,
    SourcedSection,
)

LEAST_RATE = 1e9
"""No device computes or moves less than this in a second: a smaller value is in another unit (GB/s, TFLOP/s)."""
MOST_RATE = 1e18
"""No device computes or moves more than this in a second."""
LEAST_CACHE_BYTES = 2**16
"""No last-level cache is smaller: a smaller value is in another unit (MB)."""
LEAST_CLOCK_HZ, MOST_CLOCK_HZ = 1e8, 1e10
"""Clocks of processors: a smaller value is in another unit (MHz, GHz)."""
MOST_WATTS = 1e4

_Rate = Annotated[float, Field(ge=LEAST_RATE, le=MOST_RATE, allow_inf_nan=False)]


class RateSection(SourcedSection):
    """Bytes or FLOPs in a second."""

    value: _Rate


class SecondsSection(SourcedSection):
    """A time on the host or of one kernel."""

    value: Seconds


class MemorySection(SourcedSection):
    """The size of a memory."""

    value: MemoryBytes


class BytesSection(SourcedSection):
    """A size that may be nothing."""

    value: Annotated[int, Field(ge=0)]


class CacheSection(SourcedSection):
    """The size of a cache."""

    value: Annotated[int, Field(ge=LEAST_CACHE_BYTES)]


class ClockSection(SourcedSection):
    """A clock."""

    value: Annotated[float, Field(ge=LEAST_CLOCK_HZ, le=MOST_CLOCK_HZ, allow_inf_nan=False)]


class PowerSection(SourcedSection):
    """A power."""

    value: Annotated[float, Field(gt=0, le=MOST_WATTS, allow_inf_nan=False)]


class EfficiencySection(Section):
    """Achievable fractions of the peaks (`Efficiency`)."""

    kernel_class: KernelClass | Literal["default"]
    flops: Fraction
    bandwidth: Fraction
    relative_standard_error: NonNegative
    evidence: Evidence
    source: Name


class CopySection(Section):
    """Copies to and from the host (`CopyEngine`)."""

    to_device_bytes_per_s: _Rate
    to_host_bytes_per_s: _Rate
    latency_s: Seconds
    duplex_efficiency: Fraction
    compute_slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    copy_slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    evidence: Evidence
    source: Name


class LightSection(Section):
    """Memory-bound kernels (`BandwidthRamp`)."""

    graph_launch_s: Seconds
    stream_gap_s: Seconds
    stream_floor_s: Seconds
    first_wave_bytes: Positive
    first_wave_bytes_per_s: _Rate
    second_wave_s: Seconds
    cache_bytes_per_s: _Rate
    cache_bytes: Annotated[float, Field(ge=LEAST_CACHE_BYTES, allow_inf_nan=False)]
    spill_width: Positive
    dram_latency_s: Seconds
    dram_bytes_per_s: _Rate
    mix: list[tuple[Annotated[float, Field(ge=0, le=1)], Positive]] = Field(min_length=1)
    wide_mix: list[tuple[Annotated[float, Field(ge=0, le=1)], Positive]] = Field(min_length=1)
    median_error: NonNegative
    p90_error: NonNegative
    evidence: Evidence
    source: Name


class HostDispatchSection(SourcedSection):
    """Host time for one kernel (`HostDispatch`)."""

    eager_s: Seconds
    autograd_backward_s: Seconds
    compiled_s: Seconds
    compiled_call_s: Seconds
    cuda_graph_s: Seconds


class SustainedSection(SourcedSection):
    """Clocks under load (`Sustained`)."""

    factor: Fraction
    low: Fraction
    high: Fraction


class DeviceFile(Section):
    """``device.toml``."""

    format: Literal[1]
    name: Name
    kind: Literal["cpu", "cuda"]
    provenance: str
    num_multiprocessors: Annotated[int, Field(ge=0)]
    tile: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
    memory_bytes: MemorySection
    memory_bandwidth_bytes_per_s: RateSection
    dispatch_s: SecondsSection
    launch_s: SecondsSection
    context_bytes: BytesSection
    peak_flops_per_s: dict[str, RateSection] = Field(min_length=1)
    efficiency: list[EfficiencySection] = Field(min_length=1)
    copy_engine: CopySection | None = None
    architecture: str = ""
    compute_capability: str = Field(default="", pattern=r"^(\d+\.\d+)?$")
    memory_kind: str = ""
    host_link: str = ""
    peer_link: str = ""
    l2_bytes: CacheSection | None = None
    boost_clock_hz: ClockSection | None = None
    tdp_w: PowerSection | None = None
    peer_bytes_per_s: RateSection | None = None
    workspace_bytes: BytesSection | None = None
    checkpoint_policy_s: SecondsSection | None = None
    yardstick_s: SecondsSection | None = None
    light: LightSection | None = None
    host_dispatch: HostDispatchSection | None = None
    sustained: SustainedSection | None = None


class CurveSection(Section):
    """One measured curve (`Curve`)."""

    kernel_class: KernelClass
    group: Name
    dtype: Name
    evidence: Evidence
    points: list[list[Finite]] = Field(min_length=1)
    seconds: list[Positive]
    physical_seconds: list[Positive]
    cache_bytes: Annotated[int, Field(ge=0)]
    coefficients: tuple[NonNegative, NonNegative, NonNegative, NonNegative, NonNegative, NonNegative]
    length_scale: Positive
    noise: Positive
    relative_standard_error: NonNegative
    median_error: NonNegative


class KernelsFile(Section):
    """``kernels.toml``."""

    format: Literal[1]
    curve: list[CurveSection] = Field(default_factory=list)
