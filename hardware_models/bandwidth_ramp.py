"""Seconds of kernels that only move bytes on a GPU: launch, then the cache, then its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
LaunchMode = Literal["stream", "graph"]
"""How a kernel gets onto the device: one launch after the other from the host, or as a node of a CUDA graph."""

WAVE_WIDTH = 0.08
"""Width, in natural logarithms of bytes, over which the second wave of thread blocks sets in (all but a step in every measured device)."""
FLOOR_SHARPNESS = 8.0
"""Exponent of the smooth maximum of the host's launch interval and the device's time: 9% above either where they are equal."""
_MOST_EXPONENT = 50.0
"""Beyond this a logistic step is 0 or 1 to double precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BandwidthRamp:
    """Time of a memory-bound kernel over the bytes that it moves.

    **Model**: with b bytes moved, ``miss`` the part of them that leaves the last-level cache and W the bytes of one wave of thread blocks::

        cache = min(b, W) / first_wave_rate + max(0, b - W) / cache_rate + second_wave_s * step(b / W)
        dram  = dram_latency_s + b / (dram_rate * mix(read fraction))    or wide_mix
        graph = graph_launch_s + (1 - miss) * cache + miss * dram
        stream = smooth maximum of (stream_gap_s + graph, stream_floor_s)

    ``miss`` is a logistic step of ``log b`` at ``cache_bytes``, or more for operands that cannot be in the cache (``cold``).

    **Source**: the form is ours; per device, `source`. The wave: resident threads of all multiprocessors, 8 bytes read and written by each.

    **Not modelled**: reuse between kernels beyond ``cold``; the part of a cache that another kernel's operands hold.
    """

    graph_launch_s: float
    """Of an empty kernel inside a CUDA graph."""
    stream_gap_s: float
    """What a launch from a stream adds on the device."""
    stream_floor_s: float
    """Least interval of launches from a stream: the host's time for one."""
    first_wave_bytes: float
    first_wave_bytes_per_s: float
    second_wave_s: float
    cache_bytes_per_s: float
    cache_bytes: float
    """Working set of which half leaves the cache."""
    spill_width: float
    """Of the logistic step, in natural logarithms of bytes."""
    dram_latency_s: float
    dram_bytes_per_s: float
    """Of a kernel that writes a byte for every one it reads."""
    mix: tuple[tuple[float, float], ...]
    """(read fraction of the traffic, rate relative to ``dram_bytes_per_s``), increasing in the first, straight lines between: of the timed kernels, whose
    threads hold one load of 8 bytes in flight for each operand."""
    wide_mix: tuple[tuple[float, float], ...]
    """The same of kernels whose threads hold several 16-byte loads in flight, as the framework's do: faster where bandwidth times latency exceeds what the
    resident threads of the timed kernels ask for."""
    median_error: float
    p90_error: float
    """Of unseen sizes (5-fold); of this device predicted from the others where it was not measured."""
    evidence: Literal["measured", "published", "datasheet"]
    source: str

    def dram_rate(self, read_fraction: ArrayLike, *, wide: bool = False) -> Floats:
        """Bytes per second from memory, by the part of the traffic that is read; the shape of the argument."""
        fractions, rates = zip(*(self.wide_mix if wide else self.mix), strict=True)
        return np.asarray(
            self.dram_bytes_per_s * np.interp(np.asarray(read_fraction, dtype=np.float64), fractions, rates),
            dtype=np.float64,
        )

    def seconds(
        self,
        moved_bytes: ArrayLike,
        *,
        read_fraction: ArrayLike = 0.5,
        cold: ArrayLike = 0.0,
        launch: LaunchMode = "stream",
        wide: bool = False,
    ) -> Floats:
        """Seconds of kernels; shape of the arguments broadcast together.

        Args:
            moved_bytes: read and written.
            read_fraction: of them, in [0, 1].
            cold: the part of the bytes that is in memory whatever the kernel's size, in [0, 1].
            launch: from a stream or inside a CUDA graph.
            wide: threads hold several 16-byte loads in flight, as the framework's kernels do.
        """
        moved = np.asarray(moved_bytes, dtype=np.float64)
        cold_part = np.asarray(cold, dtype=np.float64)
        missed = cold_part + (1.0 - cold_part) * _step(moved, self.cache_bytes, self.spill_width)
        dram_s = self.dram_latency_s + moved / self.dram_rate(read_fraction, wide=wide)
        alone_s = self.graph_launch_s + (1.0 - missed) * self.cache_seconds(moved) + missed * dram_s
        if launch == "graph":
            return np.asarray(alone_s, dtype=np.float64)
        longer, shorter = (
            np.maximum(self.stream_gap_s + alone_s, self.stream_floor_s),
            np.minimum(self.stream_gap_s + alone_s, self.stream_floor_s),
        )
        return np.asarray(longer * (1.0 + (shorter / longer) ** FLOOR_SHARPNESS) ** (1.0 / FLOOR_SHARPNESS), dtype=np.float64)

    def cache_seconds(self, moved_bytes: ArrayLike) -> Floats:
        """Seconds, beyond the launch, of traffic that stays in the last-level cache; the shape of the argument."""
        moved = np.asarray(moved_bytes, dtype=np.float64)
        first = np.minimum(moved, self.first_wave_bytes)
        second_s = self.second_wave_s * _step(moved, self.first_wave_bytes, WAVE_WIDTH)
        return np.asarray(
            first / self.first_wave_bytes_per_s + (moved - first) / self.cache_bytes_per_s + second_s, dtype=np.float64
        )


def _step(moved: Floats, middle: float, width: float) -> Floats:
    """Logistic step from 0 to 1 in the logarithm of the bytes."""
    exponent = (np.log(middle) - np.log(np.maximum(moved, 1.0))) / width
    return np.asarray(1.0 / (1.0 + np.exp(np.clip(exponent, -_MOST_EXPONENT, _MOST_EXPONENT))), dtype=np.float64)
