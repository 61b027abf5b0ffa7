"""What is known about one device: the profile that prices kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from hardware_models.bandwidth_ramp import BandwidthRamp
from hardware_models.curves import Curve
from hardware_models.errors import InputError
from hardware_models.gridded import GriddedCurve
from hardware_models.physical_law import PhysicalLaw
from hardware_models.units import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

Evidence = Literal["measured", "published", "datasheet"]
EVIDENCE_KINDS: tuple[str, ...] = get_args(Evidence)

PEAK_NAME = MappingProxyType(
    {"float8_e4m3fn": "float8", "float8_e5m2": "float8", "complex64": "float32", "complex128": "float64", "uint8": "int8"}
)
"""The peak that holds for a dtype, where that is not the dtype's own name."""


LAW_FLOPS_SHARE, LAW_BANDWIDTH_SHARE, LAW_LAUNCH_S = 0.8, 0.85, 2e-6
"""Rates and launch of the law that gridded curves are relative to: round figures near what all timed GPUs reach; the grids hold the difference."""
NARROW_BYTES, WIDE_RESULT_BYTES = 0.5, 2.0
"""Bytes of a four-bit element; least bytes of an element of a product's result (eight-bit products return bfloat16)."""


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
    copy_slowdown: float = 1.0
    """Time of a copy while a kernel runs over its time alone, at least 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDispatch:
    """Seconds of the host for one kernel, by how the step is run."""

    eager_s: float
    """Forward, from Python, under autograd; with the driver's launch."""
    autograd_backward_s: float
    """Backward, from autograd's own thread; with the driver's launch."""
    compiled_s: float
    """A fused kernel of ``torch.compile``; with the driver's launch."""
    compiled_call_s: float
    """Once for each call of a compiled region: guards, wrapper."""
    cuda_graph_s: float
    """A kernel inside a CUDA graph that is launched as a whole."""
    evidence: Evidence
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sustained:
    """Rate of products inside a long step over that of a single short one timed alone.

    **Model**: a short product runs at the boost clock; inside a step the board reaches its power limit and lowers clock and voltage (power grows with
    clock times voltage squared). Time of a compute-bound kernel inside a step = its time alone / ``factor``; ``low`` to ``high`` holds four fifths of what shapes and sources say.

    **Not modelled**: the mix of kernels in the step (memory-bound ones let the board cool), the operands' values, the room's temperature.

    Applies to prices from curves of kernels timed alone. The roofline's efficiencies are those of repeated products and are not divided again.
    """

    factor: float
    low: float
    high: float
    evidence: Evidence
    source: str
    date: str


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
    architecture: str = ""
    """The vendor's name of the generation, lower case (``ampere``); empty where it has none (a CPU)."""
    compute_capability: str = ""
    """CUDA's, for example ``8.0``."""
    memory_kind: str = ""
    """Technology of the memory, lower case (``hbm2e``, ``gddr6``)."""
    l2_bytes: int = 0
    """Last-level cache; 0 where not known."""
    boost_clock_hz: float = 0.0
    """At which the peaks hold; 0 where not known."""
    tdp_w: float = 0.0
    """Power limit of the board; 0 where not known."""
    host_link: str = ""
    """Name of the link to the host, as in the table of links (``pcie-gen4-x16``)."""
    peer_link: str = ""
    """Name of the link to other devices, as there (``nvlink3``); empty where there is none but the host's, or one that the table does not hold."""
    peer_bytes_per_s: float = 0.0
    """Theoretical rate of all of the device's peer links together, one direction."""
    workspace_bytes: int = 0
    """What the product library takes of the allocator's memory at its first call, per stream."""
    checkpoint_policy_s: float = 0.0
    """Seconds of the host for each operator that selective checkpointing asks its policy about; 0 where that was not measured."""
    yardstick_s: float = 0.0
    """Seconds of `hardware_models.microbench_yardstick` while kernels were measured, by the same statistic as theirs; 0 where not known."""
    light: BandwidthRamp | None = None
    """Time of kernels that only move bytes; None where not known (a CPU)."""
    host_dispatch: HostDispatch | None = None
    sustained: Sustained | None = None
    product_library: str = ""
    """Version of the library whose products run, one of `alignment`'s; empty: the newest."""
    grids: tuple[GriddedCurve, ...] = ()
    """Curves of products and attention on grids; the first of a class, operator and dtype prices training, the others are other software."""

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
        """This device with other values, for what-if studies.

        Gridded curves take the new rates; those of a dtype that has no peak any more are left out. Another memory bandwidth scales the rate from memory of
        ``light``, unless that is given too.
        """
        changed: DeviceProfile = replace(self, **changes)  # type: ignore[arg-type]
        laws = changed.laws()
        light = changed.light
        if light is not None and "light" not in changes:
            faster = changed.memory_bandwidth_bytes_per_s / self.memory_bandwidth_bytes_per_s
            light = replace(light, dram_bytes_per_s=light.dram_bytes_per_s * faster)
        grids = tuple(replace(grid, law=laws[grid.dtype]) for grid in changed.grids if grid.dtype in laws)
        return replace(changed, grids=grids, light=light)

    def laws(self) -> Mapping[str, PhysicalLaw]:
        """The law that gridded curves are relative to, by dtype, from the data sheet's values."""
        return MappingProxyType(
            {
                dtype: self._law(dtype)
                for dtype in (*self.peak_flops_per_s, *PEAK_NAME)
                if PEAK_NAME.get(dtype, dtype) in self.peak_flops_per_s
            }
        )

    def _law(self, dtype: str) -> PhysicalLaw:
        operand = DTYPE_BYTES.get(dtype, NARROW_BYTES)
        return PhysicalLaw(
            flops_per_s=LAW_FLOPS_SHARE * self.peak(dtype), bandwidth_bytes_per_s=LAW_BANDWIDTH_SHARE * self.memory_bandwidth_bytes_per_s,
            launch_s=LAW_LAUNCH_S, num_multiprocessors=self.num_multiprocessors, operand_bytes=operand, result_bytes=max(operand, WIDE_RESULT_BYTES),
        )  # fmt: skip
