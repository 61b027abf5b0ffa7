"""What is measured when: which shapes a device can take, in an order whose every prefix is a usable grid, in fair shares of the time.

Pure: measures nothing itself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hardware_models.microbench_cases import Case

LONGEST_KERNEL_S = 0.05
"""No kernel of the grid takes longer: a slower one tells nothing that a faster one does not."""
CLASS_SHARES: Mapping[str, float] = {
    "gemm": 5.0, "batched_gemm": 1.5, "attention": 3.0, "convolution": 3.0, "fft": 1.0, "normalization": 1.5, "softmax": 1.0, "pointwise": 2.0,
    "reduction": 1.0, "embedding": 0.5, "optimizer": 1.0, "copy": 1.0,
}  # fmt: skip
"""Shares of the time for kernels, by how much of a training step the class takes and how many dimensions its shapes have."""
_BASES = (2, 3, 5, 7)
"""Coprime bases of the low-discrepancy sequence, one a dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a device can take.

    ``memory_bytes`` is for the operands and results of one kernel; rates are rough and measured beforehand, by torch's name of the dtype.
    """

    memory_bytes: float
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    longest_s: float = LONGEST_KERNEL_S

    def admits(self, case: Case) -> bool:
        """Whether a case fits the memory and takes less than the longest time; False for a dtype without a rate that computes."""
        if case.work_bytes > self.memory_bytes or case.work_bytes / self.bytes_per_s > self.longest_s:
            return False
        if not case.flops:
            return True
        return case.flops <= self.longest_s * self.flops_per_s.get(case.dtype, 0.0)


def radical_inverse(number: int, base: int) -> float:
    """The digits of a number mirrored at the point: in [0, 1).

    **Source**: van der Corput 1935; Halton 1960.
    """
    value, scale = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        scale /= base
        value += digit * scale
    return value


def halton(num: int, low: Sequence[float], high: Sequence[float]) -> Iterator[tuple[float, ...]]:
    """``num`` points that fill a box evenly, and so does every prefix; at most four dimensions.

    Args:
        num: how many.
        low: corner of the box.
        high: opposite corner.
    """
    for number in range(1, num + 1):
        yield tuple(
            a + (b - a) * radical_inverse(number, base) for a, b, base in zip(low, high, _BASES[: len(low)], strict=True)
        )


def plan_sizes(low: float, high: float, num: int) -> Iterator[float]:
    """``num`` numbers from a range: both ends, then as `halton` goes on."""
    yield from (high, low)
    for (value,) in halton(num - 2, (low,), (high,)):
        yield value


def coarse_first(cases: Sequence[Case]) -> list[Case]:
    """Cases in the order of their tier; in a tier each operator's in turn, dealt like cards, in the order of the list."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    ranked = []
    for position, case in enumerate(cases):
        group = case.kernel_class, case.op, case.dtype, case.variant
        ranked.append(((case.tier, counts[group], position), case))
        counts[group] += 1
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def mirrored(cases: Sequence[Case]) -> list[Case]:
    """Cases of each operator in bit-reversed order, so that a prefix of a sorted list of sizes is spread over all of it."""
    counts: Counter[tuple[str, str, str]] = Counter()
    ranked = []
    for position, case in enumerate(cases):
        group = case.kernel_class, case.op, case.dtype
        ranked.append((radical_inverse(counts[group], 2), position))
        counts[group] += 1
    return [cases[position] for _, position in sorted(ranked)]


def plan(cases: Sequence[Case], limits: Limits) -> list[Case]:
    """The cases that a device can take, coarse first, none twice."""
    distinct = {case.key: case for case in reversed(cases) if limits.admits(case)}
    return coarse_first([case for case in cases if distinct.get(case.key) is case])


def in_turns(
    cases: Sequence[Case], visit: Callable[[Case], None], *, clock: Callable[[], float], end_s: float, shares: Mapping[str, float] = CLASS_SHARES,
    after: Callable[[Case], None] = lambda _case: None,
) -> int:  # fmt: skip
    """Visits cases until the time is over: next is the class that has used least of its share. The number visited.

    Args:
        cases: in the order in which those of a class are visited.
        visit: measures one.
        clock: seconds, as ``end_s``.
        end_s: no visit starts at or after this.
        shares: of the time, by class; what a class does not need goes to the others.
        after: told each case once it was visited.
    """
    waiting: dict[str, deque[Case]] = {}
    for case in cases:
        waiting.setdefault(case.kernel_class, deque()).append(case)
    spent_s = dict.fromkeys(waiting, 0.0)
    visited = 0
    while waiting and clock() < end_s:
        name = min(waiting, key=lambda one: spent_s[one] / shares[one])
        case = waiting[name].popleft()
        if not waiting[name]:
            del waiting[name]
        begin_s = clock()
        visit(case)
        spent_s[name] += clock() - begin_s
        visited += 1
        after(case)
    return visited
