"""Kernels under lasting load against the same kernels alone: what the power limit takes (bare machine)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hardware_models.microbench_cases import Call, Case, Pool
from hardware_models.microbench_samples import precision_of
from hardware_models.microbench_timing import Stopwatch

_GAP_S = 0.02
"""Idle time before a kernel that is timed alone."""
_NUM_ALONE = 7
_BURST_S = 2e-3
"""Short enough that no power controller reacts, long enough that launches do not count."""
_BATCH_S = 0.05
"""A stretch under load is enqueued in pieces of this length, so that each can be timed."""
_MOST_CALLS, _MOST_OPERAND_BYTES = 8, 2**30
"""Sets of operands that take turns, so that none is in the caches when its turn comes."""
_MOST_IN_QUEUE = 500
_SETTLING = 0.5
"""The last part of a stretch, over which the rate is taken."""


class Monitor(Protocol):
    """What the driver says between two times."""

    def between(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """Clocks, power, temperature and reasons between two times of `time.perf_counter`."""


def sustained_timings(
    cases: Sequence[Case], pool_of: Callable[[Case], Pool], stopwatch: Stopwatch, monitor: Monitor, *, duration_s: float, end_s: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a case: seconds of a call alone (after an idle gap), in a burst, and at the end of ``duration_s`` back to back, with clocks and power.

    **Model**: burst over alone is what caches and overlapping launches change; sustained over burst is what clocks change.

    Args:
        cases: one or a few of each class.
        pool_of: operands of a case.
        stopwatch: of the device.
        monitor: asked for the stretch under load.
        duration_s: of each stretch.
        end_s: of `time.perf_counter`; no case starts after it.
    """
    rows = []
    for case in cases:
        if time.perf_counter() + duration_s > end_s:
            break
        try:
            with precision_of(case.dtype):
                row = _one(case, pool_of(case), stopwatch, monitor, duration_s)
        except RuntimeError as problem:  # an operator that this device or build lacks
            row = {"failed": str(problem).splitlines()[0]}
        rows.append({"kernel_class": case.kernel_class, "op": case.op, "shape": list(case.shape), "dtype": case.dtype, **row})
    return rows


def _one(case: Case, pool: Pool, stopwatch: Stopwatch, monitor: Monitor, duration_s: float) -> dict[str, Any]:
    calls = [case.build(pool) for _ in range(max(1, min(_MOST_CALLS, _MOST_OPERAND_BYTES // max(1, case.work_bytes))))]
    alone_s = _alone(calls, stopwatch)
    number = max(1, min(_MOST_IN_QUEUE, round(_BURST_S / alone_s)))
    time.sleep(_GAP_S)
    burst_s = _stretch(calls, stopwatch, number)
    number = max(1, min(_MOST_IN_QUEUE, round(_BATCH_S / burst_s)))
    begin_s = time.perf_counter()
    pieces: list[tuple[float, float]] = []
    while not pieces or pieces[-1][0] < begin_s + duration_s:
        piece_s = _stretch(calls, stopwatch, number)
        pieces.append((time.perf_counter(), piece_s))
    settled_s = begin_s + (1 - _SETTLING) * (pieces[-1][0] - begin_s)
    settled = sorted(seconds for at, seconds in pieces if at >= settled_s)
    return {
        "isolated_s": alone_s, "burst_s": burst_s, "sustained_s": settled[len(settled) // 2], "first_s": pieces[0][1],
        "duration_s": pieces[-1][0] - begin_s, "state": monitor.between(settled_s, pieces[-1][0]),
    }  # fmt: skip


def _alone(calls: Sequence[Call], stopwatch: Stopwatch) -> float:
    """Median seconds of one call, the device idle and its caches empty before it."""
    for call in calls:
        call.run()
    stopwatch.synchronize()
    samples = []
    for number in range(_NUM_ALONE):
        stopwatch.flush()
        time.sleep(_GAP_S)
        call = calls[number % len(calls)]
        samples.append(stopwatch.time(call.run, 1, host_s=stopwatch.host_s) / call.repeats)
    return sorted(samples)[_NUM_ALONE // 2]


def _stretch(calls: Sequence[Call], stopwatch: Stopwatch, number: int) -> float:
    """Seconds of a call in ``number`` rounds back to back over operands that take turns."""
    turn = [0]

    def run() -> None:
        calls[turn[0] % len(calls)].run()
        turn[0] += 1

    return stopwatch.time(run, number, host_s=min(stopwatch.host_s, 1e-4)) / (number * calls[0].repeats)


_LOADS: Mapping[tuple[str, str], int] = {
    ("gemm", "mm"): 3, ("attention", "attention"): 1, ("attention", "attention_backward"): 1, ("convolution", "convolution"): 1, ("batched_gemm", "bmm"): 1,
    ("fft", "_fft_c2c"): 1, ("normalization", "native_layer_norm"): 1, ("softmax", "_log_softmax"): 1, ("pointwise", "add"): 1, ("pointwise", "gelu"): 1,
    ("copy", "_to_copy"): 1, ("optimizer", "adamw"): 1, ("reduction", "sum"): 1, ("embedding", "embedding"): 1,
}  # fmt: skip
"""How many cases of an operator are put under lasting load."""
_QUICK_LOADS = frozenset({("gemm", "mm"), ("attention", "attention"), ("pointwise", "add")})
_LEAST_LOAD_BYTES = 2**24
"""Smaller kernels do not fill a GPU."""


def loads(cases: Sequence[Case], *, quick: bool) -> list[Case]:
    """The cases to put under lasting load: the first large ones of each class's main operator, in every dtype of a product."""
    counts: dict[tuple[str, str, str], int] = {}
    chosen = []
    for case in cases:
        key = case.kernel_class, case.op
        if case.variant or case.work_bytes < _LEAST_LOAD_BYTES or key not in _LOADS or (quick and key not in _QUICK_LOADS):
            continue
        most = 1 if quick or case.tier else _LOADS[key]
        counts[(*key, case.dtype)] = counts.get((*key, case.dtype), 0) + 1
        if counts[(*key, case.dtype)] <= most:
            chosen.append(case)
    return chosen
