"""What ``torch.compile`` makes of generated blocks: chains of memory-bound kernels become one, and what is cheap is made again for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hardware_models.kernel import Kernel
from simulator.workload import Block, BlockOption, MemoryEvent, Pass, Workload

_FUSES = frozenset({"pointwise", "normalization", "softmax", "reduction", "copy"})
"""Classes that inductor generates code for; products, attention and embeddings are calls of libraries."""
LIBRARY_OPS = frozenset({"sort", "topk", "histc"})
"""Memory-bound operators that stay calls of their own: inductor falls back to torch's for sorting, selecting and counting."""
_EAGER_BLOCKS = frozenset({"embedding", "head"})
"""Blocks outside the layers."""
_MADE = frozenset({"gradient", "shared_gradient"})
FUSED_OP = "fused"
"""Operator's name of a kernel that stands for several."""


def compiled_workload(workload: Workload) -> Workload:
    """The workload with each block compiled on its own, as trainers compile transformer layers; embedding, head and loss stay eager.

    **Model**: a maximal run of memory-bound kernels is one kernel (`compiled_pass`). The graph keeps what the option ``selective`` keeps, the results of products and
    the block's input: all else follows from these without a product, so that the partition with the least saved bytes makes it again.

    **Source**: pytorch torch/_functorch/partitioners.py (``min_cut_rematerialization_partition``) and torch/_inductor/scheduler.py (fusion); the rules, not a trace. torchtitan compiles each ``TransformerBlock`` (``apply_compile``), and not the loss (train.py, 2024-12: "compiling loss function
    causes CUDA errors, turning off for now").

    **Not modelled**: products with fused epilogues (``max-autotune``), bounds on the size of a fused kernel, other attention kernels.
    """
    made: dict[int, Block] = {}
    for block in workload.blocks:
        if id(block) not in made:
            made[id(block)] = block if block.name in _EAGER_BLOCKS else _compiled_block(block)
    return replace(workload, blocks=tuple(made[id(block)] for block in workload.blocks))


def compiled_pass(run: Pass, *, library: frozenset[str] = LIBRARY_OPS) -> Pass:
    """The pass with each maximal run of memory-bound kernels as one.

    **Model**: a run ends behind a reduction, at a library's kernel, and on both sides of a kernel that makes a parameter's gradient (it reduces over the other axis).
    What a kernel makes for the rest of its run stays in registers: those bytes are not read again, and neither written nor allocated where they are freed inside the run.

    Args:
        run: kernels and memory events of an eager pass.
        library: memory-bound operators that stay calls of their own.
    """
    groups = _groups(run, library)
    fused = [_registers(run, first, end) for first, end in groups]
    gone = {place for kept in fused for place in kept.events}
    memory = [
        replace(event, kernel=_moved(event, groups)) for place, event in enumerate(run.memory) if place not in gone
    ]  # fmt: skip
    kernels = tuple(_fused(run.kernels[first:end], kept) for (first, end), kept in zip(groups, fused, strict=True))
    return Pass(kernels=kernels, memory=tuple(sorted(memory, key=lambda event: event.kernel)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Registers:
    """What a run of kernels hands on without memory."""

    unread_bytes: int
    unwritten_bytes: int
    events: tuple[int, ...]
    """Places in the pass's memory events that do not occur."""


def _compiled_block(block: Block) -> Block:
    option = min(block.options, key=lambda one: one.saved_internal_bytes)
    return replace(block, discard=compiled_pass(block.discard), options=(_compiled_option(option),))


def _compiled_option(option: BlockOption) -> BlockOption:
    return replace(
        option, forward=compiled_pass(option.forward), backward=compiled_pass(option.backward),
        backward_accumulate=compiled_pass(option.backward_accumulate),
    )  # fmt: skip


def _groups(run: Pass, library: frozenset[str]) -> list[tuple[int, int]]:
    """First and last + 1 kernel of each kernel of the compiled pass."""
    alone = {event.kernel for event in run.memory if event.buffer in _MADE and event.delta_bytes > 0}
    groups: list[tuple[int, int]] = []
    opened = False
    for n, kernel in enumerate(run.kernels):
        fuses = n not in alone and kernel.kernel_class in _FUSES and kernel.op not in library
        if fuses and opened:
            groups[-1] = (groups[-1][0], n + 1)
        else:
            groups.append((n, n + 1))
        opened = fuses and kernel.kernel_class != "reduction"
    return groups


def _registers(run: Pass, first: int, end: int) -> _Registers:
    """Bytes that a run of kernels makes before its last one, and of these the ones that are freed before it is over."""
    made: list[tuple[int, MemoryEvent]] = []
    gone: list[int] = []
    unread = unwritten = 0
    for place, event in enumerate(run.memory):
        if event.delta_bytes > 0 and first <= event.kernel < end - 1:
            made.append((place, event))
            unread += event.delta_bytes
        elif event.delta_bytes < 0 and first < event.kernel <= end:
            own = next(
                (one for one in made if one[1].delta_bytes == -event.delta_bytes and one[1].buffer == event.buffer), None
            )
            if own is not None:
                made.remove(own)
                gone += [own[0], place]
                unwritten += own[1].delta_bytes
    return _Registers(unread_bytes=unread, unwritten_bytes=unwritten, events=tuple(gone))


def _moved(event: MemoryEvent, groups: Sequence[tuple[int, int]]) -> int:
    """Kernels of the compiled pass that have run when an event occurs: bytes come before the kernel that makes them and go after the one that frees them."""
    for place, (first, end) in enumerate(groups):
        if event.kernel <= first:
            return place
        if event.kernel < end:
            return place + (event.delta_bytes < 0)
    return len(groups)


def _fused(kernels: Sequence[Kernel], kept: _Registers) -> Kernel:
    """One kernel that does what several do; a single one is itself."""
    if len(kernels) == 1:
        return kernels[0]
    read, written = sum(kernel.read_bytes for kernel in kernels), sum(kernel.written_bytes for kernel in kernels)
    least = kernels[-1].written_bytes
    return Kernel(
        kernel_class="pointwise", op=FUSED_OP, shape=(max(kernel.shape[0] for kernel in kernels),), dtype=kernels[-1].dtype, flops=0,
        read_bytes=max(0, read - kept.unread_bytes), written_bytes=max(least, written - kept.unwritten_bytes),
    )  # fmt: skip
