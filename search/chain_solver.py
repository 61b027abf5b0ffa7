"""Optimal rematerialization of a chain under a memory limit: one table of least times answers many limits.

Memory-persistent schedules are searched: what an F_ck or F_all keeps stays until its backward pass, and forward runs start at the
topmost boundary that is held. Times are the least up to the size of a memory slot; memory is never understated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hardware_models.errors import InfeasibleError, InputError
from search.chain_kernels import ChainArrays, Floats, Ints, best_choice, least_memory, least_times
from search.chain_problem import ChainProblem
from search.chain_schedules import (
    checkpoint_every_stage,
    checkpoint_segments,
    evaluate,
    fastest_options,
    leanest_options,
    store_all,
)
from simulator.sequence import Operation, format_sequence, parse_sequence

__all__ = [
    "ChainSolution",
    "ChainTable",
    "chain_arrays",
    "checkpoint_every_stage",
    "checkpoint_segments",
    "evaluate",
    "format_sequence",
    "minimum_limit_bytes",
    "parse_sequence",
    "solve_chain",
    "store_all",
]

_MOST_REFINEMENTS = 3
"""How many times a table doubles its slots for limits that only the exact sizes meet."""
_MOST_REFINED_ENTRIES = 1 << 25
"""Largest refined table: 256 MiB of seconds."""
_SIZES_TO_ALIGN = 4
"""How many of the most frequent sizes may set the slot size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSolution:
    """A sequence that fits a limit, with its exact time and peak (`evaluate`)."""

    time_s: float
    peak_bytes: int
    operations: tuple[Operation, ...]


def chain_arrays(problem: ChainProblem) -> ChainArrays:
    """The problem as the kernels take it, options padded to the widest stage."""
    stages, widest = problem.num_stages, max(len(names) for names in problem.option_names)

    def seconds(rows: Sequence[Sequence[float]]) -> Floats:
        return np.array([[*row, *[0.0] * (widest - len(row))] for row in rows], np.float64)

    def sizes(rows: Sequence[Sequence[int]]) -> Ints:
        return np.array([[*row, *[0] * (widest - len(row))] for row in rows], np.int64)

    resident = np.array(problem.resident_bytes, np.int64)
    return ChainArrays(
        boundary_bytes=np.array(problem.boundary_bytes, np.int64),
        held_bytes=np.array([problem.held_bytes(last) for last in range(stages)], np.int64),
        discard_s=np.array(problem.discard_s, np.float64),
        discard_peak_bytes=np.array(problem.discard_peak_bytes, np.int64),
        num_options=np.array([len(names) for names in problem.option_names], np.int64),
        fastest=np.array(fastest_options(problem), np.int64),
        option_s=seconds(problem.forward_s) + seconds(problem.backward_s),
        saved_bytes=sizes(problem.saved_bytes),
        forward_peak_bytes=sizes(problem.forward_peak_bytes),
        backward_need_bytes=sizes(problem.backward_peak_bytes) + resident[:, None],
    )


def stacked_bytes_of(chain: ChainArrays) -> Ints:
    """Sizes [stages, options + 1] of which at most one per row is held beneath a sub-chain: boundary i + 1, or what i saves."""
    return np.concatenate((chain.boundary_bytes[1:, None], chain.saved_bytes), axis=1)


def rounding_bytes(stacked_bytes: Ints, slot_bytes: int) -> int:
    """Most bytes by which a schedule's memory can be overstated, the limit's own rounding among them."""
    return int((-stacked_bytes % slot_bytes).max(axis=1).sum()) + slot_bytes


def choose_slot_bytes(stacked_bytes: Ints, available_bytes: int, num_slots: int) -> int:
    """Slot size between available / num_slots and twice that which overstates memory least.

    Chains repeat few sizes; a slot that divides those hardly rounds. Sizes that do not fit at all do not count: they would be cut into as many parts as they have bytes.
    """
    least = max(1, -(-available_bytes // num_slots))
    fitting = (stacked_bytes > 0) & (stacked_bytes <= available_bytes)
    sizes, counts = np.unique(stacked_bytes[fitting], return_counts=True)
    candidates = [
        -(-size // np.arange(max(1, size // (2 * least)), size // least + 1))
        for size in sizes[np.argsort(-counts, kind="stable")][:_SIZES_TO_ALIGN].tolist()
    ]
    ordered = np.unique(np.concatenate([[least], *candidates]).astype(np.int64))
    ordered = ordered[(ordered >= least) & (ordered <= 2 * least)]
    losses = (-stacked_bytes[None] % ordered[:, None, None]).max(axis=2).sum(axis=1) + ordered
    return int(ordered[np.argmin(losses)])


def operations_behind(
    problem: ChainProblem, chain: ChainArrays, slot_bytes: int, need: Ints, times: Floats, entry: tuple[int, int, int]
) -> tuple[Operation, ...]:
    """The sequence behind an entry of a table of `search.chain_kernels.least_times`.

    Args:
        problem: the chain.
        chain: its arrays.
        slot_bytes: size of a slot.
        need: slots that each state needs.
        times: seconds of each state and number of slots.
        entry: first stage, last stage, slots.
    """
    operations: list[Operation] = []
    pending: list[Operation | tuple[int, int, int]] = [entry]
    while pending:
        item = pending.pop()
        if isinstance(item, Operation):
            operations.append(item)
            continue
        first, last, left = item
        choice = int(best_choice(chain, slot_bytes, need, times, first, last, left))
        if choice < 0:
            kept = int(-(-chain.boundary_bytes[-choice] // slot_bytes))
            operations.append(Operation("F_ck", first))
            operations += [Operation("F_e", stage) for stage in range(first + 1, -choice)]
            pending += [(first, -choice - 1, left), (-choice, last, left - kept)]
        else:
            operations.append(Operation("F_all", first, problem.option_names[first][choice]))
            pending.append(Operation("B", first))
            if last > first:
                pending.append((first + 1, last, left - int(-(-chain.saved_bytes[first, choice] // slot_bytes))))
    return tuple(operations)


class _Grid:
    """Least times over equal memory slots, and a finer grid for limits that the rounding of sizes leaves out."""

    def __init__(
        self, problem: ChainProblem, chain: ChainArrays, max_limit_bytes: int, num_slots: int, refinements: int
    ) -> None:
        self.problem, self.chain, self.max_limit_bytes = problem, chain, max_limit_bytes
        self._num_slots, self._refinements = num_slots, refinements
        stacked, available = stacked_bytes_of(chain), max_limit_bytes - problem.boundary_bytes[0]
        self.slot_bytes = choose_slot_bytes(stacked, available, num_slots)
        self._rounding_bytes = rounding_bytes(stacked, self.slot_bytes)
        self._slots = available // self.slot_bytes
        self._need, _ = least_memory(chain, self.slot_bytes)
        self.least_limit_bytes = problem.boundary_bytes[0] + int(self._need[problem.num_stages - 1]) * self.slot_bytes

    @cached_property
    def _times(self) -> Floats:
        times: Floats = least_times(self.chain, self.slot_bytes, self._slots, self._need)
        return times

    @cached_property
    def _finer(self) -> _Grid | None:
        entries = self._need.shape[0] * 2 * self._num_slots
        if self._refinements == 0 or self.slot_bytes == 1 or entries > _MOST_REFINED_ENTRIES:
            return None
        cap = min(self.least_limit_bytes, self.max_limit_bytes)
        return _Grid(self.problem, self.chain, cap, 2 * self._num_slots, self._refinements - 1)

    def bounds_s(self, limits_bytes: Ints) -> Floats:
        """As `ChainTable.bounds_s`."""
        raised = limits_bytes + self._rounding_bytes - self.problem.boundary_bytes[0]
        slots = np.clip(raised // self.slot_bytes, -1, self._slots)
        whole = float(self.chain.option_s[np.arange(self.problem.num_stages), self.chain.fastest].sum())
        times = np.append(self._times[self.problem.num_stages - 1], np.inf)[slots]
        return np.where(slots == self._slots, whole, np.maximum(times, whole))

    def answers(self, limit_bytes: int) -> Iterator[tuple[Operation, ...]]:
        """Sequences that fit the limit, the least of which is never slower than that of a smaller limit.

        A limit that exceeds ``least_limit_bytes`` by more than the rounding has on this grid no answer worse than any below it; others
        ask the finer grid too.
        """
        if limit_bytes >= self.least_limit_bytes:
            slots = (min(limit_bytes, self.max_limit_bytes) - self.problem.boundary_bytes[0]) // self.slot_bytes
            entry = (0, self.problem.num_stages - 1, slots)
            yield operations_behind(self.problem, self.chain, self.slot_bytes, self._need, self._times, entry)
        if limit_bytes <= self.least_limit_bytes + self._rounding_bytes and self._finer is not None:
            yield from self._finer.answers(min(limit_bytes, self._finer.max_limit_bytes))


class ChainTable:
    """Answers for every memory limit up to a largest one.

    Args:
        problem: the chain.
        max_limit_bytes: the largest limit that will be asked, boundary 0 included; slots cover at most what `store_all` needs.
        num_slots: memory slots of the table; time grows in proportion, rounding shrinks.

    Raises:
        InputError: num_slots < 1.
        InfeasibleError: no schedule fits even the largest limit.

    Model:
        The recurrence of `ChainProblem` with m in slots: kept sizes rounded up one by one, step peaks as one sum, the limit rounded
        down. Limits between the exact least one and the least that the slots can express go to a finer table, at last to the
        schedule of least memory, so that every limit from `minimum_limit_bytes` on has an answer. The usual baselines are
        compared too, as rounding could make one of them win; the answer never gets slower as the limit grows.

    Source:
        rotor and rk-rotor, see `ChainProblem`.
    """

    def __init__(self, problem: ChainProblem, max_limit_bytes: int, num_slots: int = 500) -> None:
        if num_slots < 1:
            raise InputError(source="ChainTable", key="num_slots", value=num_slots, rule="num_slots >= 1 must hold")
        self.problem, self.max_limit_bytes = problem, max_limit_bytes
        self._chain = chain_arrays(problem)
        self._exact_need, self._exact_s = least_memory(self._chain, 1)
        self.minimum_limit_bytes = problem.boundary_bytes[0] + int(self._exact_need[problem.num_stages - 1])
        self._refuse_infeasible(max_limit_bytes)
        _, enough_bytes = evaluate(problem, store_all(problem))
        self._grid = _Grid(problem, self._chain, min(max_limit_bytes, enough_bytes), num_slots, _MOST_REFINEMENTS)

    @property
    def slot_bytes(self) -> int:
        """Size of a memory slot."""
        return self._grid.slot_bytes

    def solve(self, limit_bytes: int) -> ChainSolution:
        """The fastest known sequence whose peak is at most ``limit_bytes``.

        Raises:
            InputError: the limit exceeds the table's largest one.
            InfeasibleError: the limit is below ``minimum_limit_bytes``.
        """
        if limit_bytes > self.max_limit_bytes:
            rule = f"limit_bytes <= max_limit_bytes must hold, but got {limit_bytes} > {self.max_limit_bytes}"
            raise InputError(
                source="ChainTable", key="limit_bytes", value=limit_bytes, rule=rule, remedy="make the table for more"
            )
        self._refuse_infeasible(limit_bytes)
        best = self._least_memory_solution
        for operations in self._grid.answers(limit_bytes):
            best = self._better(best, operations, limit_bytes)
        for time_s, least_bytes, options, num_segments in self._baselines:
            if time_s < best.time_s and least_bytes <= limit_bytes:
                best = self._better(best, checkpoint_segments(self.problem, num_segments, options), limit_bytes)
        return best

    def bounds_s(self, limits_bytes: Sequence[int] | Ints) -> Floats:
        """Seconds that no memory-persistent sequence within each limit is below; infinite where none fits.

        **Model**: a sequence that fits a limit fits the slots of that limit raised by all that rounding adds, so the table's time there is no more than its own.
        """
        return self._grid.bounds_s(np.asarray(limits_bytes, np.int64))

    def _better(self, best: ChainSolution, operations: tuple[Operation, ...], limit_bytes: int) -> ChainSolution:
        time_s, peak_bytes = evaluate(self.problem, operations)
        if peak_bytes > limit_bytes or time_s >= best.time_s:
            return best
        return ChainSolution(time_s=time_s, peak_bytes=peak_bytes, operations=operations)

    def _refuse_infeasible(self, limit_bytes: int) -> None:
        if limit_bytes < self.minimum_limit_bytes:
            raise InfeasibleError(
                limit=f"a chain of {self.problem.num_stages} stages does not fit into limit_bytes = {limit_bytes} by recomputing",
                smallest_change=f"the least that fits is {self.minimum_limit_bytes} bytes",
            )

    @cached_property
    def _least_memory_solution(self) -> ChainSolution:
        available = self.minimum_limit_bytes - self.problem.boundary_bytes[0]
        entry = (0, self.problem.num_stages - 1, available)
        operations = operations_behind(self.problem, self._chain, 1, self._exact_need, self._exact_s[:, None], entry)
        time_s, peak_bytes = evaluate(self.problem, operations)
        return ChainSolution(time_s=time_s, peak_bytes=peak_bytes, operations=operations)

    @cached_property
    def _baselines(self) -> tuple[tuple[float, int, tuple[int, ...], int], ...]:
        """Time, least bytes, options and number of segments of each equal-segment schedule; one segment keeps everything."""
        stages, run_until_s = self.problem.num_stages, np.concatenate(([0.0], np.cumsum(self._chain.discard_s)))
        found: list[tuple[float, int, tuple[int, ...], int]] = []
        for options in dict.fromkeys((fastest_options(self.problem), leanest_options(self.problem))):
            every = np.arange(stages)
            once_s = float(self._chain.option_s[every, options].sum())
            saved_until = np.concatenate(([0], np.cumsum(self._chain.saved_bytes[every, options])))
            for segments in range(1, stages + 1):
                starts = np.arange(segments) * (stages // segments)
                graphs = saved_until[np.append(starts[1:], stages)] - saved_until[starts]
                least_bytes = int((np.cumsum(self._chain.boundary_bytes[starts]) + graphs).max())
                found.append((once_s + float(run_until_s[starts[-1]]), least_bytes, options, segments))
        return tuple(found)


def solve_chain(problem: ChainProblem, limit_bytes: int, num_slots: int = 500) -> ChainSolution:
    """The fastest known memory-persistent sequence whose peak is at most ``limit_bytes``, boundary 0 included.

    Raises:
        InfeasibleError: the limit is below `minimum_limit_bytes`.
    """
    return ChainTable(problem, limit_bytes, num_slots).solve(limit_bytes)


def minimum_limit_bytes(problem: ChainProblem) -> int:
    """The least limit, boundary 0 included, that a memory-persistent schedule of the chain fits; exact, without slots."""
    need, _ = least_memory(chain_arrays(problem), 1)
    return problem.boundary_bytes[0] + int(need[problem.num_stages - 1])
