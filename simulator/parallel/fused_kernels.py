"""What Megatron's fused kernels spare, and what adding to float32 gradients inside a product costs, on the passes of generated blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from hardware_models.kernel import Kernel
from simulator.presets.tape import FLOAT, pointwise
from simulator.workload import Block, BlockOption, Pass

_SCALE_AND_MASK = frozenset({"mul", "add"})
_FUSED_TRAFFIC = 3
"""Accesses of a sum on its own, two reads and a write: behind dropout in one kernel only the read of the residual stream is left, a third of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccumulationShares:
    """Parts of the added traffic that lengthen products which add to a float32 matrix."""

    plain: float
    grouped: float
    """Of experts' products, one after the other."""


_USUAL_SHARES = AccumulationShares(plain=0.5, grouped=0.5)
_SHARES: Mapping[str, AccumulationShares] = MappingProxyType({"blackwell": AccumulationShares(plain=0.75, grouped=1.0)})
"""By architecture. Plain products: 0.52 median (quartiles 0.29 and 0.63) over 55 shapes on A100 PCIe, 0.75 (0.20 and 1.46) over 129 on B200, each against its shape without, at 85% of the memory's bandwidth. Grouped ones, against
this project's price of the product alone: nothing is hidden on B200 (1.16; 0.97 and 1.27 over 20 shapes), at most half on A100 (4 shapes). Others are taken as A100. MooreThreads/SimuMax configs/system @4dcaae513b,
rows with ``accumulate=True`` and float32 results."""
_PRODUCT_BYTES = 2
"""Per element, written by a product that adds to nothing."""


def fuse_kernels(block: Block) -> Block:
    """The block with scale, mask and softmax in one kernel, and dropout and residual sum in one.

    **Source**: Narayanan et al. 2021 (arXiv 2104.04473), section 4.2.

    **Not modelled**: softmax in float32 with casts around it keeps its kernels.
    """
    options = tuple(
        replace(
            option, forward=fused_pass(option.forward), backward=fused_pass(option.backward),
            backward_accumulate=fused_pass(option.backward_accumulate),
        )
        for option in block.options
    )  # fmt: skip
    return replace(block, discard=fused_pass(block.discard), options=options)


def fused_pass(run: Pass) -> Pass:
    """The pass without scaling and masking beside its softmax, and with what is left of sums behind dropout."""
    kernels = list(run.kernels)
    dropped: set[int] = set()
    for n, kernel in enumerate(kernels):
        if kernel.op == "_softmax":
            before = n - 1
            while before >= 0 and kernels[before].op in _SCALE_AND_MASK:
                dropped.add(before)
                before -= 1
        elif kernel.op == "mul" and n and kernels[n - 1].op == "_softmax_backward_data":
            dropped.add(n)
        elif kernel.op == "add" and n and kernels[n - 1].op == "native_dropout" and kernels[n - 1].shape == kernel.shape:
            kernels[n] = pointwise("add", max(1, kernel.shape[0] // _FUSED_TRAFFIC), kernel.dtype, num_read=2)
    return without(replace(run, kernels=tuple(kernels)), dropped)


def without(run: Pass, dropped: Collection[int]) -> Pass:
    """The pass without some of its kernels; memory comes and goes where it did."""
    left = [n for n in range(len(run.kernels)) if n not in dropped]
    before = (
        [sum(n < end for n in left) for end in range(len(run.kernels) + 1)] if dropped else list(range(len(run.kernels) + 1))
    )
    memory = tuple(replace(event, kernel=before[event.kernel]) for event in run.memory)
    return Pass(kernels=tuple(run.kernels[n] for n in left), memory=memory)


def accumulating(
    option: BlockOption, elements: int, *, width: int = 4, architecture: str = "", grouped: bool = False
) -> BlockOption:
    """The option whose products add to gradients of so many elements.

    **Model**: no kernel of its own; the product takes longer by a share of what moving the added bytes takes: a gradient read and written instead of two bytes written.

    Args:
        option: one way to run a block.
        elements: of its parameters.
        width: bytes of a gradient.
        architecture: of the device, which decides the share.
        grouped: most of the parameters are experts'.
    """
    if not elements:
        return replace(option, backward_accumulate=option.backward)
    shares = _SHARES.get(architecture, _USUAL_SHARES)
    share = shares.grouped if grouped else shares.plain
    added: Kernel = pointwise("add_", max(1, round(elements * share * (2 * width - _PRODUCT_BYTES) / 2 / 4)), FLOAT)
    return replace(option, backward_accumulate=replace(option.backward, kernels=(*option.backward.kernels, added)))


def column_products(block: Block, hidden: int, tokens: int) -> tuple[Kernel, ...]:
    """The weight gradient of a block's first product (queries, keys and values; up), which is made while the input's gradient is summed over tp."""
    if block.name not in {"attention", "network"}:
        return ()
    kernels = block.options[0].backward.kernels
    made = [
        kernel for kernel in kernels if kernel.kernel_class == "gemm" and (kernel.shape[0], kernel.shape[2]) == (hidden, tokens)
    ]
    return tuple(made[-1:])
