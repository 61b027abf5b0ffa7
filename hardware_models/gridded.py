"""A curve on a grid: seconds of products or attention over three sizes, interpolated between measured nodes, physical beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hardware_models.kernel import Kernel
from hardware_models.physical_law import Floats, Integers, PhysicalLaw, Sizes, coordinates, law_seconds

Evidence = Literal["measured", "published", "datasheet"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GriddedCurve:
    """Seconds of one operator in one dtype and software stack.

    **Model**: ``t(x) = law(x) * exp(r(u))``. ``law`` is the roofline of `physical_law`, ``u`` its three coordinates (binary logarithms of sizes), clamped to
    the grid, ``r`` the multilinear interpolation of ``log_ratios``. Beyond the grid ``r`` stays what it is at the nearest edge, and the tiles and waves of
    products count relative to that edge.

    **Source**: `gridded_fit` says how the nodes come from timings; ``source`` names these.
    """

    kernel_class: str
    group: str
    """Operator whose timings these are."""
    dtype: str
    stack: str
    """Software whose kernels were timed."""
    evidence: Evidence
    source: str
    sizes: Sizes
    """Which three sizes of a kernel the axes are."""
    axes: tuple[tuple[float, ...], ...]
    """Sizes at the nodes, increasing."""
    log_ratios: NDArray[np.float64]
    """Logarithm of measured over law at the nodes; shape: the axes' lengths."""
    law: PhysicalLaw
    relative_standard_error: float
    """Of a price on the grid: root mean square of cross-validated relative errors, the greatest hundredth left out."""
    median_error: float
    p90_error: float
    p99_error: float
    num_points: int
    """Timings behind the nodes; 0 where the curve is transferred from another device."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GriddedCurve):
            return NotImplemented
        names = [name for name in self.__slots__ if name != "log_ratios"]
        alike = all(getattr(self, name) == getattr(other, name) for name in names)
        return alike and np.array_equal(self.log_ratios, other.log_ratios)

    def __hash__(self) -> int:
        return hash((self.kernel_class, self.group, self.dtype, self.stack, self.axes, self.law))

    def seconds_of(self, kernels: Sequence[Kernel]) -> Floats:
        """Seconds of kernels that this curve covers; shape ``(len(kernels),)``."""
        return self.seconds(np.array([kernel.shape for kernel in kernels], dtype=np.int64))

    def seconds(self, shapes: Integers) -> Floats:
        """Seconds of kernels by their shapes, as in `Kernel`: shape ``(num, dims of the class)`` -> ``(num,)``."""
        nodes = [np.log2(np.array(axis)) for axis in self.axes]
        at = coordinates(self.sizes, shapes)
        inside = np.stack([np.clip(at[:, axis], node[0], node[-1]) for axis, node in enumerate(nodes)], axis=1)
        return law_seconds(self.sizes, shapes, self.law, at_edge=inside) * np.exp(self._interpolated(inside, nodes))

    def compute_share(self, shapes: Integers) -> Floats:
        """How far kernels are bound by arithmetic, 0 to 1: the law's compute time to the fourth power over the sum of both; shape ``(num,)``."""
        compute_s, memory_s = self.law.parts(self.sizes, shapes)
        return np.asarray(compute_s**4 / (compute_s**4 + memory_s**4), dtype=np.float64)

    def borrowed(
        self, law: PhysicalLaw, *, dtype: str, factor: float, source: str, relative_standard_error: float, median_error: float, p90_error: float,
        p99_error: float,
    ) -> GriddedCurve:  # fmt: skip
        """This curve for another device: that device's law, this one's ratios times ``factor``."""
        return replace(
            self, law=law, dtype=dtype, log_ratios=self.log_ratios + np.log(factor), evidence="datasheet", source=source, num_points=0,
            relative_standard_error=relative_standard_error, median_error=median_error, p90_error=p90_error, p99_error=p99_error,
        )  # fmt: skip

    def _interpolated(self, at: Floats, nodes: list[Floats]) -> Floats:
        """Multilinear interpolation of ``log_ratios``; ``at`` lies inside."""
        total = np.zeros(len(at))
        below, weight = [], []
        for axis, node in enumerate(nodes):
            lower = np.clip(np.searchsorted(node, at[:, axis], side="right") - 1, 0, max(0, len(node) - 2))
            upper = np.minimum(lower + 1, len(node) - 1)
            gap = np.where(upper > lower, node[upper] - node[lower], 1.0)
            below.append((lower, upper))
            weight.append(np.where(upper > lower, (at[:, axis] - node[lower]) / gap, 0.0))
        for corner in range(1 << len(nodes)):
            bits = [corner >> axis & 1 for axis in range(len(nodes))]
            share = np.ones(len(at))
            for axis, bit in enumerate(bits):
                share *= weight[axis] if bit else 1.0 - weight[axis]
            total += share * self.log_ratios[tuple(below[axis][bit] for axis, bit in enumerate(bits))]
        return total
