"""Kernels that only move bytes: how often each operator passes over its operands, and what that takes on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hardware_models.bandwidth_ramp import BandwidthRamp, Floats, LaunchMode
from hardware_models.errors import UnknownNameError
from hardware_models.profile import DeviceProfile

Integers = NDArray[np.int64]
OptimizerForm = Literal["fused", "foreach", "per-tensor"]

LIGHT_CLASSES = frozenset("normalization softmax pointwise reduction embedding optimizer copy".split())
"""Classes whose kernels are bound by bytes or by their launch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One launch: how many times it passes over the operands that the operator reads and writes."""

    reads: float = 1.0
    writes: float = 1.0
    rereads: float = 0.0
    """Passes that find a row in the cache again, as long as the rows under way fit there."""


_ONE = (Sweep(),)
_ROW_TWICE = (Sweep(rereads=1.0),)
"""A block reads its row for the statistics and again to write the result."""
_STATISTICS_THEN_RESULT = (Sweep(writes=0.0), Sweep())
"""A first launch reads all for the statistics along an axis that no block holds alone, a second reads all again."""

SWEEPS: Mapping[str, tuple[Sweep, ...]] = MappingProxyType(
    {
        "native_layer_norm": _ROW_TWICE, "_fused_rms_norm": _ROW_TWICE,
        # the input's gradient by rows; those of scale and shift by columns, in a launch of their own that reads both operands again
        "native_layer_norm_backward": (Sweep(rereads=1.0), Sweep(writes=0.0)), "_fused_rms_norm_backward": (Sweep(rereads=1.0), Sweep(writes=0.0)),
        **dict.fromkeys("native_batch_norm _native_batch_norm_legit _batch_norm_with_update cudnn_batch_norm".split(), _STATISTICS_THEN_RESULT),
        **dict.fromkeys("native_batch_norm_backward batch_norm_backward cudnn_batch_norm_backward".split(), _STATISTICS_THEN_RESULT),
        "native_group_norm": _STATISTICS_THEN_RESULT, "native_group_norm_backward": _STATISTICS_THEN_RESULT,
    }
)  # fmt: skip
"""Launches of operators that pass over their operands more than once.

**Source**: structure of the kernels in pytorch/pytorch aten/src/ATen/native/cuda (layer_norm_kernel.cu, Normalization.cuh, group_norm_kernel.cu); not timed.
"""

WARP_SOFTMAX_COLUMNS = 1024
"""Rows up to this length stay in the registers of a warp (pytorch/pytorch aten/src/ATen/native/cuda/PersistentSoftmax.cuh)."""
BLOCK_SOFTMAX_BYTES = 48 * 1024
"""Rows of a forward softmax up to this size are kept in a block's shared memory (pytorch/pytorch SoftMax.cu: ``sharedMemPerBlock``)."""
BLOCKS_PER_MULTIPROCESSOR = 2
"""Rows of a long softmax under way on a multiprocessor: blocks of 1024 threads that fit its 2048 resident ones."""
ATOMIC_EMBEDDING_INDICES = 3072
"""Up to so many indices an embedding's gradient is one launch after the zeros (pytorch/pytorch aten/src/ATen/native/cuda/Embedding.cu)."""
SORT_LAUNCHES = 12
"""Launches that sort more indices and find their runs: eight 8-bit digits of 64-bit keys, a histogram, a scan, two for the runs. Counted, not timed."""
SORT_BYTES = 32
"""Bytes that one of them moves of an index: key and position, eight bytes each, read and written."""
SAVED_OPERAND = 1 / 3
"""Part of a backward kernel's traffic that is in memory in any case: of gradient in, gradient out and saved tensor the last was evicted since the forward pass."""
_COLD = MappingProxyType({"optimizer": 1.0, "embedding": 1.0})
"""Classes whose operands are in memory in any case: states and tables are touched once a step, gigabytes apart."""
FUSED_ELEMENTS, FUSED_TENSORS = 320 * 65536, 36
"""Most elements and tensors of one launch of a fused AdamW: 320 blocks of 65536, 36 tensors of four lists (pytorch/pytorch MultiTensorApply.cuh, 4 KiB arguments)."""
_FOREACH_TENSORS = 110
"""Most tensors of one launch over a single list (same file)."""
FOREACH_ADAMW = ((1, 1), (2, 1), (1, 1), (2, 1), (1, 1), (1, 1), (1, 1), (3, 1))
"""(reads, writes) of a parameter's size by each operation of an unfused AdamW step: decay, first moment, decay and update of the second, root, bias
correction, epsilon, update (torch/optim/adamw.py)."""
FUSED_ADAMW = ((4, 3),)
"""The same in one: parameter, gradient and two moments read, all but the gradient written."""


def light_seconds(
    kernel_class: str,
    op: str,
    shapes: Integers,
    read_bytes: ArrayLike,
    written_bytes: ArrayLike,
    profile: DeviceProfile,
    *,
    launch: LaunchMode = "stream",
) -> Floats:
    """Seconds of kernels of one memory-bound operator on a GPU; shape ``(num,)``.

    **Model**: the sum over the operator's launches (`SWEEPS`, and by size for softmax and embeddings) of `BandwidthRamp.seconds` of its traffic, at least
    that of its traffic with rereads in the cache.

    Args:
        kernel_class: one of `LIGHT_CLASSES`.
        op: ATen operator.
        shapes: as in `Kernel`, shape ``(num, dims of the class)``.
        read_bytes: least traffic, shape ``(num,)``.
        written_bytes: the same.
        profile: with ``light``.
        launch: from a stream or inside a CUDA graph.

    **Not modelled**: strides, short rows that leave threads idle, what the kernel before left of the cache.
    """
    ramp = profile.light
    assert ramp is not None
    read, written = np.asarray(read_bytes, dtype=np.float64), np.asarray(written_bytes, dtype=np.float64)
    cold = _COLD.get(kernel_class, SAVED_OPERAND if "backward" in op else 0.0)
    if kernel_class == "softmax":
        return _softmax_seconds(op, shapes, read, written, profile, cold=cold, launch=launch)
    if op == "embedding_dense_backward":
        return _embedding_backward_seconds(shapes, read, written, ramp, launch=launch)
    total = np.zeros(len(read), dtype=np.float64)
    for sweep in SWEEPS.get(op, _ONE):
        total += _sweep_seconds(
            ramp, sweep.reads * read, sweep.writes * written, sweep.rereads * read, cold=cold, launch=launch
        )
    return total


def _sweep_seconds(
    ramp: BandwidthRamp, read: Floats, written: Floats, reread: Floats, *, cold: float, launch: LaunchMode
) -> Floats:
    """One launch: memory and cache work at the same time, the slower one decides."""
    moved = read + written
    fraction = np.divide(read, moved, out=np.full_like(moved, 0.5), where=moved > 0)
    once = ramp.seconds(moved, read_fraction=fraction, cold=cold, launch=launch, wide=True)
    if not reread.any():
        return once
    again = ramp.graph_launch_s + ramp.cache_seconds(moved + reread)
    return np.maximum(once, again)


def _softmax_seconds(
    op: str, shapes: Integers, read: Floats, written: Floats, profile: DeviceProfile, *, cold: float, launch: LaunchMode
) -> Floats:
    """Rows in a warp's registers or a block's shared memory are read once; longer ones thrice (maximum, sum, result), backward twice.

    The further passes find the row in the cache while the rows under way on all multiprocessors fit there, else in memory.
    """
    ramp = profile.light
    assert ramp is not None
    rows, columns = shapes[:, 0], shapes[:, 1]
    row_bytes = read / np.maximum(1, rows)
    backward = "backward" in op
    short = (columns <= WARP_SOFTMAX_COLUMNS) | (not backward) & (row_bytes <= BLOCK_SOFTMAX_BYTES)
    further = np.where(short, 0.0, 1.0 if backward else 2.0) * read
    under_way = np.minimum(rows, BLOCKS_PER_MULTIPROCESSOR * profile.num_multiprocessors) * row_bytes
    cached = under_way <= ramp.cache_bytes
    return _sweep_seconds(
        ramp, read + np.where(cached, 0.0, further), written, np.where(cached, further, 0.0), cold=cold, launch=launch
    )


def _embedding_backward_seconds(
    shapes: Integers, read: Floats, written: Floats, ramp: BandwidthRamp, *, launch: LaunchMode
) -> Floats:
    """Zeros over the whole table, then the touched rows read, added to and written; many indices are sorted first."""
    indices, vocabulary = shapes[:, 0], shapes[:, 2]
    touched = np.minimum(1.0, indices / np.maximum(1, vocabulary)) * written
    nothing = np.zeros_like(read)
    zeros_s = _sweep_seconds(ramp, nothing, written, nothing, cold=1.0, launch=launch)
    adding_s = _sweep_seconds(ramp, read + touched, touched, nothing, cold=1.0, launch=launch)
    sort_s = SORT_LAUNCHES * ramp.seconds(SORT_BYTES * indices, launch=launch)
    return np.asarray(zeros_s + adding_s + np.where(indices > ATOMIC_EMBEDDING_INDICES, sort_s, 0.0), dtype=np.float64)


def optimizer_seconds(
    elements: Sequence[int],
    profile: DeviceProfile,
    *,
    form: OptimizerForm = "fused",
    element_bytes: int = 4,
    launch: LaunchMode = "stream",
) -> tuple[float, int]:
    """Seconds on the device and launches of one AdamW step over parameters.

    **Model**: fused: one pass (`FUSED_ADAMW`), launches of at most `FUSED_TENSORS` tensors or `FUSED_ELEMENTS` elements; foreach: the passes of
    `FOREACH_ADAMW`, each over all tensors; per tensor: the same passes for each tensor alone. Launches times the time of their traffic from memory.

    Args:
        elements: of each parameter tensor.
        profile: of a GPU, with ``light``.
        form: which of torch's implementations.
        element_bytes: of parameter, gradient and moments.
        launch: from a stream or inside a CUDA graph.

    Raises:
        UnknownNameError: the form is not known.
    """
    ramp = profile.light
    assert ramp is not None
    passes: tuple[tuple[int, int], ...]
    if form == "per-tensor":
        passes, groups = FOREACH_ADAMW, np.array(elements, dtype=np.float64)
    elif form in {"fused", "foreach"}:
        passes, most = (FUSED_ADAMW, FUSED_TENSORS) if form == "fused" else (FOREACH_ADAMW, _FOREACH_TENSORS)
        total = float(sum(elements))
        num_groups = max(ceil(total / FUSED_ELEMENTS), ceil(len(elements) / most))
        groups = np.full(num_groups, total / max(1, num_groups))
    else:
        raise UnknownNameError(source="optimizer", key="form", value=form, known=("fused", "foreach", "per-tensor"))
    seconds = 0.0
    for reads, writes in passes:
        moved = (reads + writes) * element_bytes * groups
        seconds += float(ramp.seconds(moved, read_fraction=reads / (reads + writes), cold=1.0, launch=launch, wide=True).sum())
    return seconds, len(passes) * len(groups)
