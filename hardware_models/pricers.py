"""What prices a kernel: a measured curve, a gridded curve, products that a kernel amounts to, or the roofline. One choice, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import hypot, inf
from types import MappingProxyType
from typing import Protocol

import numpy as np

from hardware_models.alignment import Alignment, alignment_of, misaligned
from hardware_models.bandwidth_ramp import LaunchMode
from hardware_models.curves import Curve, Floats
from hardware_models.gridded import GriddedCurve
from hardware_models.kernel import Kernel
from hardware_models.op_groups import group_of
from hardware_models.physical_law import Integers, quantization
from hardware_models.profile import DeviceProfile, Evidence
from hardware_models.roofline import roofline_evidence, roofline_seconds
from hardware_models.units import DTYPE_BYTES

_BY_TRAFFIC = frozenset({"pointwise", "copy", "optimizer"})
"""Classes priced by bytes: a curve of one dtype holds for all."""
_SAME_TENSOR_CORE = MappingProxyType({"float8_e5m2": "float8_e4m3fn"})
_PRODUCT_CLASSES = frozenset({"batched_gemm", "convolution"})
BATCH_FORM_ERROR = 0.1
"""Relative error of pricing a batched product as the plain products that it amounts to: root mean square over nine published batches on A100 (`ProductPricer`)."""
CONVOLUTION_FORM_ERROR = 0.2
"""The same of a convolution: an estimate, not measured on a GPU."""
_INTERVAL_Z = 1.2816
"""Half-width, in standard deviations of a normal distribution, of the interval that a sustained rate's low and high ends are: four fifths."""
_QUERY_LEN, _HEAD_DIM = 3, 5
"""Places in the shape of attention."""
_HEAD_STEP, _WIDEST_HEAD = 32, 256
"""Fused attention is compiled for heads of such multiples, up to the widest (``HEADDIM_SWITCH``, pytorch aten/src/ATen/native/transformers/cuda/flash_attn/static_switch.h)."""
_BLOCK = 128
"""Rows and columns of the tile that a product is cut into when it is asked how many multiprocessors one of a batch leaves idle."""


class Pricer(Protocol):
    """Seconds of kernels of one class, operator and dtype."""

    @property
    def name(self) -> str:
        """Prices with one name have one error, those with different names independent ones."""

    @property
    def relative_standard_error(self) -> float:
        """Of a price."""

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Kinds that a price rests on."""

    def seconds_of(self, kernels: Sequence[Kernel]) -> Floats:
        """Shape ``(len(kernels),)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPricer:
    """A curve that was measured on this machine."""

    curve: Curve

    @property
    def name(self) -> str:
        """Class, group and dtype of the curve."""
        return f"{self.curve.kernel_class}/{self.curve.group}/{self.curve.dtype}"

    @property
    def relative_standard_error(self) -> float:
        """Of the curve."""
        return self.curve.relative_standard_error

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Of the curve."""
        return (self.curve.evidence,)

    def seconds_of(self, kernels: Sequence[Kernel]) -> Floats:
        """By the curve."""
        return self.curve.seconds_of(kernels)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPricer:
    """A gridded curve of kernels timed alone, at the rate that a board sustains.

    **Model**: ``t = alone * (1 + (1 / sustained - 1) * share)``, share = how far the kernel is bound by arithmetic (`GriddedCurve.compute_share`): clocks fall
    under the power limit, the memory's does not.
    """

    curve: GriddedCurve
    sustained: float
    """Rate in the run over that of a kernel alone, in (0, 1]."""
    sustained_error: float
    """Relative standard error of ``sustained``."""

    @property
    def name(self) -> str:
        """Class, group and dtype of the curve."""
        return f"{self.curve.kernel_class}/{self.curve.group}/{self.curve.dtype}"

    @property
    def relative_standard_error(self) -> float:
        """Of the curve and of the sustained rate, independent."""
        return hypot(self.curve.relative_standard_error, self.sustained_error)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Of the curve."""
        return (self.curve.evidence,)

    def seconds_of(self, kernels: Sequence[Kernel]) -> Floats:
        """By the grid, slowed by the power limit; heads as the kernels compute them."""
        shapes = np.array([kernel.shape for kernel in kernels], dtype=np.int64)
        if kernels[0].kernel_class == "attention":
            shapes[:, _HEAD_DIM] = computed_width(shapes[:, _QUERY_LEN], shapes[:, _HEAD_DIM])
        return self.seconds(shapes)

    def seconds(self, shapes: Integers) -> Floats:
        """The same from shapes, as in `Kernel`: ``(num, dims)`` -> ``(num,)``."""
        alone_s = self.curve.seconds(shapes)
        if self.sustained == 1.0:
            return alone_s
        return np.asarray(alone_s * (1.0 + (1.0 / self.sustained - 1.0) * self.curve.compute_share(shapes)), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductPricer:
    """Batched products and convolutions as the plain products that they amount to.

    **Model**: a kernel is ``count`` products (m, n, k) (`product_form`). One takes ``t1`` by the grid. A batched kernel's products share the multiprocessors
    that one leaves idle: ``t = launch + max(count * (t1 - launch) * share, bytes / bandwidth)`` with ``share = tiles / multiprocessors``, at least ``1 / count`` (a
    batch takes no less than one of it) and at least the batch's own roofline over ``count * t1`` (a split of the summed axis fills what few tiles leave idle), at most 1;
    grouped products of unequal sizes run one after the other. A convolution's ``t1`` leaves the unfolded matrix's traffic out. The roofline of a batch is
    ``hypot(compute, memory)`` with its tiles and waves (`quantization`): short rows of tiles hide arithmetic behind loads less well than whole products do.

    **Source**: Chetlur et al. 2014 (cuDNN: convolution as an implicit product); batches: EleutherAI/cookbook sizing/results/gemm_data/bmm and transformer_data/h_sweep.out @27dff48d59
    (A100, float16: 64 products of 2048 x 2048 x 128 reach 135 TFLOP/s, of 256 x 4096 x 256 143, of 512 x 4096 x 512 209, of 1024 x 4096 x 1024 232); grouped: MooreThreads/SimuMax @4dcaae513b, 108 groups on B200 within 11% (median)
    of one after the other.
    """

    grid: GridPricer
    form_error: float = BATCH_FORM_ERROR
    """Relative standard error of the form."""

    @property
    def name(self) -> str:
        """Of the grid: the error is that of its products."""
        return self.grid.name

    @property
    def relative_standard_error(self) -> float:
        """Of the grid and of the form."""
        return hypot(self.grid.relative_standard_error, self.form_error)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """The grid's, and an estimate."""
        return (*self.grid.evidence, "datasheet")

    def seconds_of(self, kernels: Sequence[Kernel]) -> Floats:
        """By the products."""
        forms = [product_form(kernel) for kernel in kernels]
        shapes = np.array([form[1:] for form in forms], dtype=np.int64)
        count = np.array([form[0] for form in forms], dtype=np.float64)
        law = self.grid.curve.law
        memory_s = np.array([kernel.moved_bytes for kernel in kernels]) / law.bandwidth_bytes_per_s
        unfolded = np.array([kernel.kernel_class == "convolution" for kernel in kernels])
        one_s = np.where(unfolded, self._without_traffic().seconds(shapes), self.grid.seconds(shapes)) - law.launch_s
        compute_s = law.parts("product", shapes)[0]
        tiles = -(-shapes[:, 0] // _BLOCK) * -(-shapes[:, 1] // _BLOCK)
        waves = quantization(shapes, law.num_multiprocessors, count) if law.num_multiprocessors else 1.0
        floor_s = np.hypot(count * compute_s * waves, np.where(unfolded, 0.0, memory_s))
        occupied = np.maximum(tiles / max(1, law.num_multiprocessors), floor_s / np.maximum(count * one_s, floor_s))
        alone = np.array([kernel.op == "_grouped_mm" for kernel in kernels])
        share = np.where(alone, 1.0, np.minimum(1.0, np.maximum(occupied, 1.0 / count)))
        return np.asarray(law.launch_s + np.maximum(count * one_s * share, memory_s), dtype=np.float64)

    def _without_traffic(self) -> GridPricer:
        """The grid's prices of arithmetic alone."""
        law = replace(self.grid.curve.law, bandwidth_bytes_per_s=inf)
        return replace(self.grid, curve=replace(self.grid.curve, law=law))


@dataclass(frozen=True, slots=True, kw_only=True)
class MisalignedPricer:
    """Products whose rows begin at odd addresses (`Alignment`)."""

    aligned: Pricer
    """Prices them as if they did not."""
    alignment: Alignment
    profile: DeviceProfile

    @property
    def name(self) -> str:
        """Of the library: how slowly it loads such rows is one error."""
        return f"{self.aligned.name}/misaligned"

    @property
    def relative_standard_error(self) -> float:
        """Of the aligned price and of the bound, independent."""
        return hypot(self.aligned.relative_standard_error, self.alignment.relative_standard_error)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """The aligned price's, and published timings of one device."""
        return (*self.aligned.evidence, "published")

    def seconds_of(self, kernels: Sequence[Kernel]) -> Floats:
        """The aligned price, bounded by the loads."""
        return self.alignment.slowed(self.aligned.seconds_of(kernels), kernels, self.profile)


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflinePricer:
    """First principles."""

    profile: DeviceProfile
    kernel_class: str
    launch: LaunchMode = "stream"

    @property
    def name(self) -> str:
        """The class."""
        return self.kernel_class

    @property
    def relative_standard_error(self) -> float:
        """Of the class's efficiencies."""
        return roofline_evidence(self.kernel_class, self.profile)[1]

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """The data sheet's peaks and the efficiencies' kind."""
        return ("datasheet", roofline_evidence(self.kernel_class, self.profile)[0])

    def seconds_of(self, kernels: Sequence[Kernel]) -> Floats:
        """By the roofline."""
        return roofline_seconds(kernels, self.profile, launch=self.launch)


def computed_width(query_len: Integers, head_dim: Integers) -> Integers:
    """Width of the heads that fused attention multiplies: the next of its kernels'; shapes ``(num,)``.

    One token only reads its keys, whose padding is not in memory; wider heads than the widest kernel's have another one and stay as they are. On an H100 heads of 132 reach 219 of the 370
    TFLOP/s of a step with heads of 128 (Dao-AILab/flash-attention#1141): more than the padding to 160 alone, which this is.
    """
    padded = -(-head_dim // _HEAD_STEP) * _HEAD_STEP
    return np.where((query_len > 1) & (head_dim <= _WIDEST_HEAD), padded, head_dim)


def product_form(kernel: Kernel) -> tuple[int, int, int, int]:
    """Count and (m, n, k) of the products that a batched product or a convolution amounts to."""
    if kernel.kernel_class == "batched_gemm":
        batch, m, n, k = kernel.shape
        return batch, m, n, k
    batch, in_channels, out_channels, groups, elements, positions, stride = kernel.shape
    inputs, outputs = max(1, in_channels // groups), max(1, out_channels // groups)
    if kernel.op == "convolution_backward_weight":
        return groups, outputs, inputs * elements, batch * positions
    if kernel.op == "convolution_backward_input":
        return groups, batch * positions * stride**2, inputs, max(1, outputs * elements // stride**2)
    return groups, batch * positions, outputs, inputs * elements


def grid_group(kernel: Kernel) -> str:
    """The group of gridded curves that a kernel belongs to."""
    if kernel.kernel_class == "attention":
        if "backward" in kernel.op:
            return "attention_backward"
        return "attention_decode" if kernel.shape[3] == 1 else "attention"
    return "mm"


def pricer_of(
    kernel: Kernel, profile: DeviceProfile, *, sustained: bool = True, stack: str = "", launch: LaunchMode = "stream"
) -> Pricer:
    """What prices a kernel on a device: its measured curve, else its grid, else products, else the roofline; slower where rows are misaligned.

    Args:
        kernel: to price.
        profile: of the device.
        sustained: as in a long step (`Sustained.factor`); False: timed alone.
        stack: software whose curve is preferred; empty: the one nearest to torch.
        launch: from a stream or inside a CUDA graph; curves and grids were timed from either and are left as they are.
    """
    curve = curve_of(kernel, profile)
    if curve is not None:
        return MeasuredPricer(curve=curve)
    aligned = _aligned_pricer(kernel, profile, sustained=sustained, stack=stack, launch=launch)
    if not (misaligned(kernel) and profile.kind == "cuda" and profile.num_multiprocessors and profile.boost_clock_hz):
        return aligned
    return MisalignedPricer(aligned=aligned, alignment=alignment_of(profile.product_library), profile=profile)


def _aligned_pricer(kernel: Kernel, profile: DeviceProfile, *, sustained: bool, stack: str, launch: LaunchMode) -> Pricer:
    """What prices a kernel that was not measured, its rows taken as aligned."""
    grid = _grid_of(kernel, profile, stack)
    if grid is None:
        return RooflinePricer(profile=profile, kernel_class=kernel.kernel_class, launch=launch)
    factor, error = 1.0, 0.0
    if sustained and profile.sustained is not None:
        factor = profile.sustained.factor
        error = (profile.sustained.high - profile.sustained.low) / (2.0 * _INTERVAL_Z * factor)
    pricer = GridPricer(curve=grid, sustained=factor, sustained_error=error)
    if kernel.kernel_class not in _PRODUCT_CLASSES:
        return pricer
    return ProductPricer(
        grid=pricer, form_error=BATCH_FORM_ERROR if kernel.kernel_class == "batched_gemm" else CONVOLUTION_FORM_ERROR
    )


def curve_of(kernel: Kernel, profile: DeviceProfile) -> Curve | None:
    """The measured curve that prices a kernel; None where there is none."""
    index = _index(profile.curves)
    for dtype in _dtypes(kernel, profile):
        measured = index.get((kernel.kernel_class, dtype), {})
        group = group_of(kernel.op, kernel.kernel_class, frozenset(measured))
        if group is not None:
            return measured[group]
    return None


def _grid_of(kernel: Kernel, profile: DeviceProfile, stack: str) -> GriddedCurve | None:
    if kernel.kernel_class not in {"gemm", "attention", *_PRODUCT_CLASSES} or _depthwise(kernel):
        return None
    dtype = _SAME_TENSOR_CORE.get(kernel.dtype, kernel.dtype)
    found = [grid for grid in profile.grids if grid.group == grid_group(kernel) and grid.dtype == dtype]
    return next((grid for grid in found if grid.stack == stack), found[0] if found else None)


def _depthwise(kernel: Kernel) -> bool:
    """Whether each channel of a convolution is convolved alone: frameworks have kernels of their own for it that take no product and only move bytes."""
    return kernel.kernel_class == "convolution" and kernel.shape[1] == kernel.shape[3] > 1


def _dtypes(kernel: Kernel, profile: DeviceProfile) -> tuple[str, ...]:
    """Dtypes whose curves hold for a kernel: its own, one of the same width and peak, any where bytes decide."""
    known = tuple(dict.fromkeys(curve.dtype for curve in profile.curves if curve.kernel_class == kernel.kernel_class))
    if kernel.kernel_class in _BY_TRAFFIC:
        return (kernel.dtype, *known)
    peaks = profile.peak_flops_per_s
    twins = tuple(
        other
        for other in known
        if DTYPE_BYTES.get(other) == DTYPE_BYTES.get(kernel.dtype)
        and other in peaks
        and peaks[other] == peaks.get(kernel.dtype)
    )
    return (kernel.dtype, *twins)


@lru_cache(maxsize=64)
def _index(curves: tuple[Curve, ...]) -> Mapping[tuple[str, str], Mapping[str, Curve]]:
    """Curves by class and dtype, then by operator."""
    index: dict[tuple[str, str], dict[str, Curve]] = {}
    for curve in curves:
        index.setdefault((curve.kernel_class, curve.dtype), {})[curve.group] = curve
    return index
