"""The roofline of products and attention over arrays of shapes, with tiles and waves: what a gridded curve is relative to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Sizes = Literal["product", "attention", "attention-backward", "decode"]
"""What the three axes are: ``product`` (m, n, k); ``attention`` (batch * heads, root of query length * key length, heads / key-value heads), forward or
backward; ``decode``, one query token, (batch * key-value heads, key length, heads / key-value heads)."""

SHARPNESS = 4.0
"""Exponent of the smooth maximum of compute and memory time: 19% above the greater where they are equal."""
BACKWARD_PRODUCTS = 2.5
"""Products of an attention's backward pass over those of its forward pass: five for two (Dao et al. 2022, FlashAttention, algorithm 4)."""
BACKWARD_TRAFFIC = 2.0
"""Operands of the backward pass over those of the forward pass: q, k, v, out and its gradient in, three gradients out, for q, k, v in and out."""
TILES = (
    ((256, 128), 1.0),
    ((128, 256), 1.0),
    ((128, 128), 0.92),
    ((64, 256), 0.85),
    ((128, 64), 0.75),
    ((64, 128), 0.75),
    ((64, 64), 0.55),
)
"""Output tiles that product libraries choose among, with the part of the greatest tile's rate that each reaches: it reads ``1/rows + 1/columns`` operands per
multiplication. Shapes: NVIDIA, Matrix multiplication background user's guide, table of tile sizes; rates: its figure of tile efficiency, rounded."""
LEAST_SPLIT = 512
"""Shortest part of the summed axis that is worth a block of its own; an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalLaw:
    """Rates of one device in one dtype."""

    flops_per_s: float
    bandwidth_bytes_per_s: float
    launch_s: float
    num_multiprocessors: int
    operand_bytes: float
    """Bytes of an element that is read."""
    result_bytes: float
    """Bytes of an element that is written."""

    def parts(self, sizes: Sizes, shapes: Integers) -> tuple[Floats, Floats]:
        """Seconds of arithmetic and of traffic, each alone; shapes ``(num,)``."""
        flops, read, written = work(sizes, shapes)
        moved = read * self.operand_bytes + written * self.result_bytes
        return np.asarray(flops / self.flops_per_s), np.asarray(moved / self.bandwidth_bytes_per_s)


def work(sizes: Sizes, shapes: Integers) -> tuple[Floats, Floats, Floats]:
    """FLOPs that are executed (the unmasked part of attention), elements read and elements written; shapes ``(num,)`` each."""
    columns = shapes.astype(np.float64).T
    if sizes == "product":
        m, n, k = columns
        return 2.0 * m * n * k, k * (m + n), m * n
    batch, heads, kv_heads, query_len, kv_len, head_dim, causal = columns
    unmasked = np.where(causal > 0, (kv_len + 1.0) / (2.0 * kv_len), 1.0)
    flops = 4.0 * batch * heads * query_len * kv_len * head_dim * unmasked
    read = batch * head_dim * (heads * query_len + 2.0 * kv_heads * kv_len)
    written = batch * head_dim * heads * query_len
    if sizes == "attention-backward":
        return BACKWARD_PRODUCTS * flops, BACKWARD_TRAFFIC * read, BACKWARD_TRAFFIC * written
    return flops, read, written


def coordinates(sizes: Sizes, shapes: Integers) -> Floats:
    """Binary logarithms of the three sizes that are the axes; shape ``(num, 3)``."""
    logs = np.log2(np.maximum(shapes, 1)).T
    if sizes == "product":
        return np.ascontiguousarray(logs[:3].T)
    batch, heads, kv_heads, query_len, kv_len = logs[:5]
    ratio = heads - kv_heads
    if sizes == "decode":
        return np.stack([batch + kv_heads, kv_len, ratio], axis=1)
    return np.stack([batch + heads, (query_len + kv_len) / 2.0, ratio], axis=1)


def law_seconds(sizes: Sizes, shapes: Integers, law: PhysicalLaw, *, at_edge: Floats | None = None) -> Floats:
    """Seconds by the roofline; shape ``(num,)``.

    **Model**: ``launch + (compute^s + memory^s)^(1/s)`` with s = `SHARPNESS`. For products beyond a grid, ``compute`` is multiplied by `quantization` over that of
    the nearest shape of the grid, which the grid's own timings already hold, but never divided: between nodes the grid does not hold the nearest shape's own
    waves, and a rate above that of the edge would pass the device's peak.

    **Source**: Williams, Waterman and Patterson 2009 (roofline).

    Args:
        sizes: which axes the shapes have.
        shapes: as in `Kernel`, shape ``(num, dims)``.
        law: rates.
        at_edge: coordinates of the nearest point of the grid, shape ``(num, 3)``; None to leave quantization out.
    """
    compute_s, memory_s = law.parts(sizes, shapes)
    if sizes == "product" and at_edge is not None and law.num_multiprocessors:
        beyond = np.flatnonzero((np.abs(at_edge - coordinates(sizes, shapes)) > 0.0).any(axis=1))
        nearest = np.rint(np.exp2(at_edge[beyond])).astype(np.int64)
        over_edge = quantization(shapes[beyond], law.num_multiprocessors) / quantization(nearest, law.num_multiprocessors)
        compute_s[beyond] *= np.maximum(1.0, over_edge)
    return np.asarray(law.launch_s + (compute_s**SHARPNESS + memory_s**SHARPNESS) ** (1.0 / SHARPNESS), dtype=np.float64)


def quantization(shapes: Integers, num_multiprocessors: int, count: Floats | float = 1.0) -> Floats:
    """Time of products in whole tiles and whole waves over that of their FLOPs alone at the greatest tile's rate; at least 1; shape ``(num,)``.

    **Model**: the best of `TILES`: ``ceil(m/rows) ceil(n/columns)`` tiles of each of ``count`` products in one launch, ``num_multiprocessors`` of them in a wave that takes as long as one tile; fewer tiles
    than multiprocessors split the summed axis, in parts of at least `LEAST_SPLIT`.

    **Source**: NVIDIA, Matrix multiplication background user's guide, sections on tile and wave quantization.

    **Not modelled**: stream-k; pairs of multiprocessors that share a tile.
    """
    m, n, k = np.ascontiguousarray(
        shapes.T, dtype=np.float64
    )  # whole numbers below 2^53: exact, and faster to divide than integers
    parts = np.floor(k / LEAST_SPLIT)
    best = np.full(len(shapes), np.inf)
    for (rows, columns), rate in TILES:
        tiles = count * np.ceil(m / rows) * np.ceil(n / columns)
        waves = np.ceil(tiles / num_multiprocessors)
        splits = np.maximum(1.0, np.minimum(np.floor(num_multiprocessors / tiles), parts))
        np.minimum(best, waves * (num_multiprocessors * rows * columns / rate) / splits, out=best)
    return np.asarray(np.maximum(best / (count * m * n), 1.0), dtype=np.float64)
