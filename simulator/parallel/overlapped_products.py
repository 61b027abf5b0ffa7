"""Tensor-parallel collectives in pieces beside the products that they feed, or that feed them (``overlap_tp``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hardware_models.kernel import Kernel
from hardware_models.network.overlap import OverlapFactors
from hardware_models.units import DTYPE_BYTES
from simulator.lower import Price
from simulator.workload import Block

HALVES = frozenset({"attention", "network"})
"""Blocks whose collectives are overlapped; grouped products of experts are not."""
CHUNKS = 4
"""Pieces of a product whose result is scattered: Transformer Engine's ``num_splits`` of the method ``pipeline``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfProducts:
    """Products at both ends of a half of a layer."""

    columns: tuple[Kernel, ...]
    """What the gathered stream enters (queries, keys and values; gate and up)."""
    row: Kernel
    """What makes partial sums of the stream (projection; down)."""
    row_gradient: Kernel
    """The input's gradient of that product, which the gathered gradient enters."""
    column_gradients: tuple[Kernel, ...]
    """Input gradients of the first ones, partial sums too."""


def half_products(block: Block, *, hidden: int, tokens: int) -> HalfProducts | None:
    """The products of a block by their place; None where it is no half of a layer, or its first products do not take the stream (latent attention).

    Args:
        block: of the model.
        hidden: width of the stream.
        tokens: of a micro-batch on a context-parallel rank.
    """
    if block.name not in HALVES:
        return None
    option = block.options[0]
    *columns, row = [kernel for kernel in option.forward.kernels if kernel.kernel_class == "gemm"]
    if not columns or any(kernel.shape[2] != hidden for kernel in columns):
        return None
    back = [kernel for kernel in option.backward.kernels if kernel.kernel_class == "gemm"]
    by_input = [kernel for kernel in back if kernel.shape[0] == tokens and kernel.shape[2] != tokens]
    if len(by_input) != len(columns) + 1:  # a square matrix of tokens: either of the two gradients has the same shape
        by_input = back[::2]
    first, *others = by_input
    return HalfProducts(columns=tuple(columns), row=row, row_gradient=first, column_gradients=tuple(others))


def together_seconds(product_s: float, collective_s: float, factors: OverlapFactors) -> float:
    """Seconds of a product and a collective that begin together: both are slower until one has ended.

    **Model**: for ``t`` seconds both run, the product at ``1 / compute_under_collectives`` of its rate and the collective at ``1 / collectives_under_compute``; what is left
    of one then runs alone.
    """
    slow_product, slow_collective = factors.compute_under_collectives, factors.collectives_under_compute
    both_s = min(collective_s * slow_collective, product_s * slow_product)
    return both_s + max(0.0, collective_s - both_s / slow_collective) + max(0.0, product_s - both_s / slow_product)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOverlap:
    """How a framework overlaps collectives and products.

    **Model**: by ring, a gathered operand comes in as many pieces as ranks, and each piece is multiplied while the next one is under way; the own piece is there from the start, and
    nothing follows the last one. A scattered result goes likewise. By chunks, a product is cut into `CHUNKS`: the first one waits for nothing, the last
    one's scatter is behind everything. A product in pieces is priced by its pieces.

    **Source**: NVIDIA Transformer Engine, ``initialize_ub`` (transformer_engine/pytorch/module/base.py, v2): ring exchange for the gathers of the forward pass and of
    gradients, pipelined chunks for the scatters of the forward pass, bulk overlap with the weights' gradient for those of the backward pass. torch's
    asynchronous tensor parallelism (torch/distributed/_symmetric_memory): rings for all. The idea: Wang et al., ASPLOS 2023, section 5.

    **Not modelled**: multiprocessors that user buffers hold beyond the overlap factors; grouped products.
    """

    price: Price
    factors: OverlapFactors
    ranks: int
    chunked_scatter: bool
    """Whether results are scattered by chunks; else by ring."""

    def gathered_s(self, products: Sequence[Kernel], collective_s: float) -> float:
        """Seconds that a gather (or, by ring, a scatter) adds to products."""
        return self._added(products, collective_s / max(1, self.ranks - 1), self.ranks, behind=0)

    def scattered_s(self, products: Sequence[Kernel], collective_s: float) -> float:
        """Seconds that the scatter of a result adds to the product that makes it."""
        if not self.chunked_scatter:
            return self.gathered_s(products, collective_s)
        return self._added(products, collective_s / CHUNKS, CHUNKS, behind=1)

    def _added(self, products: Sequence[Kernel], piece_s: float, pieces: int, *, behind: int) -> float:
        whole_s = float(self.price(list(products)).sum())
        part_s = float(self.price([piece_of(kernel, pieces) for kernel in products]).sum())
        total_s = part_s + (pieces - 1) * together_seconds(part_s, piece_s, self.factors) + behind * piece_s
        return max(0.0, total_s - whole_s)


def piece_of(product: Kernel, pieces: int) -> Kernel:
    """One of so many pieces of a product, cut along its rows."""
    m, n, k = product.shape
    rows = max(1, m // pieces)
    left_bytes = m * k * DTYPE_BYTES[product.dtype]
    return replace(
        product, shape=(rows, n, k), flops=product.flops * rows // m, read_bytes=max(0, product.read_bytes - left_bytes * (m - rows) // m),
        written_bytes=product.written_bytes * rows // m,
    )  # fmt: skip
