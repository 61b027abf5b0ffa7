"""Optimal rematerialization of a chain together with offload of its activations to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hardware_models.errors import InfeasibleError, InputError
from search.chain_kernels import Floats, least_memory, least_times, row_of
from search.chain_problem import ChainProblem
from search.chain_schedules import evaluate, store_all
from search.chain_solver import (
    ChainSolution,
    chain_arrays,
    choose_slot_bytes,
    minimum_limit_bytes,
    operations_behind,
    rounding_bytes,
    solve_chain,
    stacked_bytes_of,
)
from search.solvers.offload_kernels import SEGMENT, Label, Labels, LinkArrays, SegmentTimes, Task, read_label, search_labels
from search.solvers.offload_problem import OffloadProblem, OffloadStep, evaluate_offload
from search.solvers.proof import Proof
from simulator.sequence import Operation

FEW_LABELS = 32
"""Of a first search, whose answer prunes the second."""
MOST_LABELS = 128
"""Partial schedules a stage that the search goes on with; more prove more and take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadSolution:
    """A schedule of recompute and offload with its proof."""

    proof: Proof
    steps: tuple[OffloadStep, ...]
    """From stage 0 up; empty where ``recompute_only`` is faster and nothing is offloaded."""
    recompute_only: ChainSolution | None
    """The schedule where offload gains nothing."""

    @property
    def time_s(self) -> float:
        """Of the schedule."""
        return self.proof.objective_s

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What the compute stream runs, in order."""
        if self.recompute_only is not None:
            return self.recompute_only.operations
        forward: list[Operation] = []
        backward: list[Operation] = []
        for step in self.steps:
            if step.option:
                forward.append(Operation("F_all", step.first, step.option))
                backward[:0] = [Operation("B", step.first)]
            else:
                forward.append(Operation("F_ck", step.first))
                forward += [Operation("F_e", stage) for stage in range(step.first + 1, step.stop)]
                backward[:0] = step.recompute
        return (*forward, *backward)

    @property
    def offloaded_stages(self) -> tuple[int, ...]:
        """Boundaries behind which an item goes to the host: that of the step that ends there."""
        return tuple(step.stop for step in self.steps if step.offloaded)


def solve_offload(
    problem: OffloadProblem, limit_bytes: int, *, num_slots: int = 500, most_labels: int = MOST_LABELS
) -> OffloadSolution:
    """The fastest known schedule of recompute and offload within a limit, and a bound below which none is.

    Args:
        problem: chain and link.
        limit_bytes: memory of the device, boundary 0 included.
        num_slots: memory slots of the table of segments; all else is counted in bytes.
        most_labels: partial schedules a stage that the search goes on with.

    Returns:
        Never slower than `solve_chain` with the same limit and slots. Exact where no label had to be dropped and slots round nothing.

    Raises:
        InfeasibleError: not even offloading all fits.

    Model:
        Labels (time, kept, forward backlog, backward backlog, pinned input) go from stage to stage; one that keeps no more
        than another, and after waiting for its transfers is no later, replaces it. Work is at most
        labels^2 * stages * (options + stages / 2).

    Source:
        POFO (NeurIPS 2021), see `OffloadProblem`; labels in place of a table over three kinds of memory are ours.
    """
    if most_labels < 1 or num_slots < 1:
        rule = f"num_slots >= 1 and most_labels >= 1 must hold, but got {num_slots} and {most_labels}"
        raise InputError(source="solve_offload", key="", value=None, rule=rule)
    known = solve_chain(problem.chain, limit_bytes, num_slots) if limit_bytes >= minimum_limit_bytes(problem.chain) else None
    least = minimum_offload_bytes(problem.chain)
    if known is None and limit_bytes < least:
        raise InfeasibleError(
            limit=f"a chain of {problem.chain.num_stages} stages does not fit into limit_bytes = {limit_bytes} by recompute and offload",
            smallest_change=f"the least that fits is {least} bytes",
            needed_bytes=least,
        )
    searched = _Search(problem, limit_bytes, num_slots, most_labels, known)
    return searched.solution()


def minimum_offload_bytes(chain: ChainProblem) -> int:
    """The least limit, boundary 0 included, that a schedule fits if all that can go to the host goes there; exact."""
    arrays = chain_arrays(chain)
    need, _ = least_memory(arrays, 1)
    stages, held = chain.num_stages, int(arrays.held_bytes[-1])
    best = [0] + [1 << 62] * stages
    for first in range(stages):
        pinned = chain.boundary_bytes[first] if first else 0
        for option in range(len(chain.option_names[first])):
            own = max(held + chain.forward_peak_bytes[first][option], int(arrays.backward_need_bytes[first, option]))
            best[first + 1] = min(best[first + 1], max(best[first], pinned + own))
        run = best[first]
        for last in range(first, stages - 1):
            beneath = chain.boundary_bytes[last] if last > first else pinned
            run = max(run, held + beneath + chain.discard_peak_bytes[last])
            own = pinned + int(need[row_of(first, last, stages)])
            best[last + 1] = min(best[last + 1], max(run, own))
    return chain.boundary_bytes[0] + best[stages]


class _Search:
    """One problem at one limit."""

    def __init__(
        self, problem: OffloadProblem, limit_bytes: int, num_slots: int, most_labels: int, known: ChainSolution | None
    ) -> None:
        self.problem, self.limit_bytes, self.most_labels, self.known = problem, limit_bytes, most_labels, known
        self.chain = chain_arrays(problem.chain)
        stacked = stacked_bytes_of(self.chain)
        _, enough_bytes = evaluate(problem.chain, store_all(problem.chain))
        available = enough_bytes - problem.chain.boundary_bytes[0]
        self.slot_bytes = choose_slot_bytes(stacked, available, num_slots)
        self.need, _ = least_memory(self.chain, self.slot_bytes)
        self.rounding_slots = 0 if self.slot_bytes == 1 else -(-rounding_bytes(stacked, self.slot_bytes) // self.slot_bytes)
        slots = -(-available // self.slot_bytes) + self.rounding_slots
        self.times_s = least_times(self.chain, self.slot_bytes, slots, self.need)

    def solution(self) -> OffloadSolution:
        """The best of labels and recompute alone."""
        found_s = np.inf if self.known is None else self.known.time_s
        steps: tuple[OffloadStep, ...] = ()
        bound_s = np.inf
        for most in (min(FEW_LABELS, self.most_labels), self.most_labels):
            labels, dropped_s = search_labels(self._task(0, found_s), most)
            best_s, number = self._best(labels)
            bound_s = min(best_s, dropped_s, found_s)
            if number >= 0 and best_s < found_s:
                steps = self._steps(labels, number)
                found_s = min(best_s, evaluate_offload(self.problem, steps, self.limit_bytes))
        if not np.isfinite(found_s):
            least = minimum_offload_bytes(self.problem.chain) + (self.rounding_slots + 1) * self.slot_bytes
            raise InfeasibleError(
                limit=f"no schedule within limit_bytes = {self.limit_bytes} was found on memory slots of {self.slot_bytes} bytes",
                smallest_change=f"more slots, or {least} bytes, would do", needed_bytes=least,
            )  # fmt: skip
        if self.rounding_slots and bound_s > self.rest_s:
            relaxed, dropped_s = search_labels(self._task(self.rounding_slots, found_s), self.most_labels)
            bound_s = min(bound_s, dropped_s, self._best(relaxed)[0])
        return OffloadSolution(proof=Proof.of(found_s, bound_s), steps=steps, recompute_only=None if steps else self.known)

    @property
    def rest_s(self) -> float:
        """Time if nothing is recomputed and nothing waited for."""
        return float(self.chain.option_s[np.arange(self.problem.chain.num_stages), self.chain.fastest].sum())

    def _task(self, credit_slots: int, known_s: float) -> Task:
        return Task(
            chain=self.chain, link=_link_arrays(self.problem),
            segments=SegmentTimes(self.slot_bytes, credit_slots, self.need, self.times_s),
            limit_bytes=self.limit_bytes, known_s=known_s, rounding_slots=self.rounding_slots,
            forward_rest_s=_rest_s([min(d, *f) for d, f in zip(self.problem.chain.discard_s, self.problem.chain.forward_s, strict=True)]),
            backward_rest_s=_rest_s([min(row) for row in self.problem.chain.backward_s]),
        )  # fmt: skip

    def _best(self, labels: Labels) -> tuple[float, int]:
        """Time and number of the best label that has decided upon every stage; inf where none has."""
        stages, link = self.problem.chain.num_stages, self.problem.link
        count = int(labels.num_labels[stages])
        if not count:
            return np.inf, -1
        turn_s = labels.out_bytes[stages, :count] / link.out_bytes_per_s + labels.in_bytes[stages, :count] / link.in_bytes_per_s
        time_s = labels.time_s[stages, :count] + turn_s
        return float(time_s.min()), int(time_s.argmin())

    def _steps(self, labels: Labels, number: int) -> tuple[OffloadStep, ...]:
        steps: list[OffloadStep] = []
        stop = self.problem.chain.num_stages
        while stop:
            label = read_label(labels, stop, number)
            steps.append(self._step(label, stop))
            stop, number = int(label.stage), int(label.parent)
        return tuple(reversed(steps))

    def _step(self, label: Label, stop: int) -> OffloadStep:
        first, names = int(label.stage), self.problem.chain.option_names
        if label.option != SEGMENT:
            return OffloadStep(first=first, stop=stop, option=names[first][label.option], offloaded=bool(label.offloaded))
        entry = (first, stop - 1, int(label.slots))
        sequence = operations_behind(self.problem.chain, self.chain, self.slot_bytes, self.need, self.times_s, entry)
        return OffloadStep(
            first=first, stop=stop, option="", offloaded=bool(label.offloaded), recompute=sequence,
            recompute_bytes=int(label.slots) * self.slot_bytes,
        )  # fmt: skip


def _rest_s(once_s: Sequence[float]) -> Floats:
    """[stages + 1], time of the stages from one on if each runs once."""
    rest: Floats = np.concatenate((np.cumsum(np.array(once_s)[::-1])[::-1], [0.0]))
    return rest


def _link_arrays(problem: OffloadProblem) -> LinkArrays:
    chain, link = problem.chain, problem.link
    out_busy, in_busy = (np.array(problem.busy_s(direction)) for direction in ("out", "in"))
    widest = max(len(names) for names in chain.option_names)
    forward, backward = (
        np.array([[*row, *[0.0] * (widest - len(row))] for row in rows]) for rows in (chain.forward_s, chain.backward_s)
    )
    return LinkArrays(
        out_bytes_per_s=link.out_bytes_per_s,
        in_bytes_per_s=link.in_bytes_per_s,
        discard_out_bytes=np.maximum(0.0, np.array(chain.discard_s) - out_busy) * link.out_bytes_per_s,
        option_out_bytes=np.maximum(0.0, forward - out_busy[:, None]) * link.out_bytes_per_s,
        option_in_bytes=np.maximum(0.0, backward - in_busy[:, None]) * link.in_bytes_per_s,
        in_busy_s=in_busy,
    )
