"""What Megatron's fused kernels spare, and what adding to float32 gradients inside a product costs, on the passes of generated blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from hardware_models.kernel import Kernel
from simulator.presets.tape import FLOAT, pointwise
from simulator.workload import Block, BlockOption, Pass

_SCALE_AND_MASK = frozenset({"mul", "add"})
_FUSED_TRAFFIC = 3
"""Accesses of a sum on its own, two reads and a write: behind dropout in one kernel only the read of the residual stream is left, a third of them."""
_ACCUMULATION_SHARE = 0.5
"""Part of the added traffic that lengthens a product which adds to a float32 matrix: 0.52 median (quartiles 0.29 and 0.63) over 55 shapes on A100 PCIe, each against its
shape without, at 85% of the memory's bandwidth; B200 scatters more: 0.75 (0.20 and 1.46) over 129. MooreThreads/SimuMax configs/system @4dcaae513b, rows with
``accumulate=True, out_dtype=fp32``."""
_PRODUCT_BYTES = 2
"""Per element, written by a product that adds to nothing."""
EAGER_SCRIPTS = ("megatron-core@2023",)
"""Frameworks whose scripted functions (GELU with its bias; bias, dropout and residual sum) run operator by operator in forward passes.

**Source**: Qi et al. 2024 (arXiv 2401.10241, table 6) time forward passes as long as the inputs' gradients, 18.5 and 18.1 ms, 11.3 and 11.2 ms a stage, though these have two products and a
pass over the scores more. With these functions in one kernel both forward passes come out 15% short; without, 10% long and right. Backward ones must be fused: else they would be half as
long again. Inferred from these times: which of torch's fusers ran is not stated."""
_GELU_READS = (1, 1, 1, 1, 2, 1, 2, 1, 1, 2)
"""Tensors that each operator of ``x = y + bias; x * 0.5 * (1 + tanh(0.79788456 * x * (1 + 0.044715 * x * x)))`` reads (Megatron-LM megatron/core/fusions/fused_bias_gelu.py)."""


def fuse_kernels(block: Block, *, scripted: bool = True) -> Block:
    """The block with scale, mask and softmax in one kernel, and dropout and residual sum in one.

    **Source**: Narayanan et al. 2021 (arXiv 2104.04473), section 4.2.

    **Not modelled**: softmax in float32 with casts around it keeps its kernels; memory of intermediate values where scripts are not fused.

    Args:
        block: operator by operator.
        scripted: whether forward passes run scripted functions in one kernel (`EAGER_SCRIPTS`).
    """
    forward = fused_pass if scripted else _unscripted_pass
    options = tuple(
        replace(
            option, forward=forward(option.forward), backward=fused_pass(option.backward),
            backward_accumulate=fused_pass(option.backward_accumulate),
        )
        for option in block.options
    )  # fmt: skip
    return replace(block, discard=forward(block.discard), options=options)


def _unscripted_pass(run: Pass) -> Pass:
    """The forward pass with its softmax in one kernel, but GELU, and the bias before dropout, operator by operator."""
    fused = fused_pass(run, sums=False)
    more: dict[int, tuple[Kernel, ...]] = {}
    for n, kernel in enumerate(fused.kernels):
        if kernel.op == "gelu":
            more[n] = tuple(pointwise("gelu", kernel.shape[0], kernel.dtype, num_read=reads) for reads in _GELU_READS)
        elif kernel.op == "native_dropout" and fused.kernels[n + 1 : n + 2] and fused.kernels[n + 1].op == "add":
            more[n] = (pointwise("add", kernel.shape[0], kernel.dtype), kernel)
    return _with_more(fused, more)


def _with_more(run: Pass, more: Mapping[int, tuple[Kernel, ...]]) -> Pass:
    """The pass with several kernels in place of some; memory comes and goes around all of them."""
    kernels: list[Kernel] = []
    before = [0]
    for n, kernel in enumerate(run.kernels):
        kernels += more.get(n, (kernel,))
        before.append(len(kernels))
    memory = tuple(replace(event, kernel=before[event.kernel]) for event in run.memory)
    return Pass(kernels=tuple(kernels), memory=memory)


def fused_pass(run: Pass, *, sums: bool = True) -> Pass:
    """The pass without scaling and masking beside its softmax, and, with ``sums``, what is left of sums behind dropout."""
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
        elif (
            sums and kernel.op == "add" and n and kernels[n - 1].op == "native_dropout" and kernels[n - 1].shape == kernel.shape
        ):
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


def accumulating(option: BlockOption, elements: int, *, width: int = 4) -> BlockOption:
    """The option whose products add to gradients of so many elements.

    **Model**: no kernel of its own; the product takes longer by half of what moving the added bytes takes: a gradient read and written instead of two bytes written.

    Args:
        option: one way to run a block.
        elements: of its parameters.
        width: bytes of a gradient.
    """
    if not elements:
        return replace(option, backward_accumulate=option.backward)
    share = round(elements * _ACCUMULATION_SHARE * (2 * width - _PRODUCT_BYTES) / 2 / 4)
    added: Kernel = pointwise("add_", max(1, share), FLOAT)
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
