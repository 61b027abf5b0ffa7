"""Optimal recompute for one workload on one device: the exact chain solver, its answers checked against the program they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from math import isqrt

import numpy as np

from hardware_models.errors import InfeasibleError
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes
from search.chain_kernels import Floats, Ints
from search.chain_of_workload import chain_of_workload, overcount_bytes
from search.chain_problem import ChainProblem
from search.chain_solver import ChainTable, checkpoint_segments, evaluate, minimum_limit_bytes, store_all
from search.step_evaluator import Candidate, StepEvaluator
from simulator.lower import optimizer_pass, resident_bytes
from simulator.sequence import Operation, checkpoint_blocks, keep_all
from simulator.simulate import StepSetting
from simulator.workload import Workload

SLOTS_RANGE = (500, 20_000)
"""Least and most memory slots of the chain solver's table; more slots round less."""
MOST_TABLE_ENTRIES = 1 << 24
"""Entries of the table (blocks^2 / 2 * slots) that its slots may take up."""
NUM_LIMITS = 17
"""The table is asked at so many limits, as the chain problem may overstate a sequence's memory (`overcount_bytes`)."""


class RecomputeSolver:
    """Finds the fastest sequence of a workload that fits a budget.

    Args:
        workload: one micro-batch.
        device: prices its kernels.
        setting: number of micro-batches, optimizer.

    **Source**: `search.chain_solver` (rotor, rk-rotor) inside; what it says about memory is checked on the lowered program.
    """

    def __init__(self, workload: Workload, device: DeviceProfile, setting: StepSetting) -> None:
        self.workload, self.device, self.setting = workload, device, setting
        self.evaluator = StepEvaluator(workload, device, setting)
        self._resident_bytes = sum(
            resident_bytes(workload, num_microbatches=setting.num_microbatches, optimizer=setting.optimizer)
        )
        self._problem = chain_of_workload(
            workload, device, first_micro_batch=setting.num_microbatches == 1, pass_seconds=self.evaluator.prices.seconds
        )
        self._overcount_bytes = overcount_bytes(workload)
        self._tables: dict[int, ChainTable] = {}

    @property
    def problem(self) -> ChainProblem:
        """The chain's."""
        return self._problem

    def evaluate(self, name: str, operations: Sequence[Operation]) -> Candidate:
        """The exact step time and peak of a sequence."""
        return self.evaluator.evaluate(name, operations)

    @property
    def fastest_s(self) -> float:
        """No sequence is faster: nothing is recomputed."""
        return min(self.evaluate(name, operations).step_time_s for name, operations in self._expert_sequences())

    def experts(self) -> tuple[Candidate, ...]:
        """What is set by hand today: nothing recomputed, products kept, every block checkpointed, sqrt(L) segments."""
        return tuple(self.evaluate(name, operations) for name, operations in self._expert_sequences())

    def least(self) -> Candidate:
        """The sequence of least memory that is known."""
        candidates = [*self.experts(), self._least_of_chain]
        return min(candidates, key=lambda candidate: (candidate.peak_bytes, candidate.step_time_s))

    def best(self, budget_bytes: int) -> Candidate:
        """The fastest sequence whose peak is at most the budget.

        Raises:
            InfeasibleError: none fits; says the least budget that does.
        """
        candidates = [*self.experts(), self._least_of_chain, *self._answers(budget_bytes)]
        fitting = [candidate for candidate in candidates if candidate.peak_bytes <= budget_bytes]
        if not fitting:
            least = self.least().peak_bytes
            raise InfeasibleError(
                limit=f"a memory budget of {budget_bytes} bytes ({format_bytes(budget_bytes)}) holds no schedule of {self.workload.model} "
                f"at micro-batch {self.workload.micro_batch}",
                smallest_change=f"the least budget that fits is {least} bytes ({format_bytes(least)})",
                needed_bytes=least,
            )
        return min(fitting, key=lambda candidate: (candidate.step_time_s, candidate.peak_bytes))

    def lower_bound_s(self, budget_bytes: int) -> float:
        """No memory-persistent sequence within the budget is faster; infinite where none fits.

        The chain's least time under a limit raised by all that rounding and `overcount_bytes` can take away.
        """
        limit = budget_bytes - self._resident_bytes
        return self._step_bound_s(self._table(limit), limit)

    def passes_bounds_s(self, budgets_bytes: Ints) -> Floats:
        """Per budget, seconds of all passes of a step that no memory-persistent sequence within it is below, the optimizer left out."""
        chain_s = self._whole_table.bounds_s(budgets_bytes - self._resident_bytes + self._overcount_bytes)
        return self.least_passes_s + self.setting.num_microbatches * np.maximum(0.0, chain_s - self._chain_fastest_s)

    def ladder(self, budgets_bytes: Iterable[int]) -> Iterator[tuple[Operation, ...]]:
        """The chain's fastest sequence at each budget that one fits, distinct ones once."""
        table = self._whole_table
        seen: set[tuple[Operation, ...]] = set()
        for budget in budgets_bytes:
            limit = min(budget - self._resident_bytes, table.max_limit_bytes)
            if limit >= table.minimum_limit_bytes and (found := table.solve(limit).operations) not in seen:
                seen.add(found)
                yield found

    @property
    def least_passes_s(self) -> float:
        """Seconds of a step's passes if nothing is recomputed."""
        return self.fastest_s - self.evaluator.prices.seconds(optimizer_pass(self.workload, optimizer=self.setting.optimizer))

    @property
    def least_forward_s(self) -> float:
        """Seconds of one micro-batch's forward passes, each at its fastest."""
        return sum(min(once, *graphs) for once, graphs in zip(self._problem.discard_s, self._problem.forward_s, strict=True))

    def _step_bound_s(self, table: ChainTable, limit_bytes: int) -> float:
        chain_s = float(table.bounds_s([limit_bytes + self._overcount_bytes])[0])
        return self.fastest_s + self.setting.num_microbatches * max(0.0, chain_s - self._chain_fastest_s)

    @property
    def _chain_fastest_s(self) -> float:
        problem = self._problem
        return sum(
            min(f + b for f, b in zip(forward, backward, strict=True))
            for forward, backward in zip(problem.forward_s, problem.backward_s, strict=True)
        )

    @property
    def _num_slots(self) -> int:
        fewest, most = SLOTS_RANGE
        return max(fewest, min(most, 2 * MOST_TABLE_ENTRIES // self._problem.num_stages**2))

    def _table(self, limit_bytes: int) -> ChainTable:
        largest = 2 * max(limit_bytes, minimum_limit_bytes(self._problem)) + self._overcount_bytes
        if largest not in self._tables:
            self._tables = {largest: ChainTable(self._problem, largest, self._num_slots)}
        return self._tables[largest]

    @cached_property
    def _whole_table(self) -> ChainTable:
        """For every limit up to that at which nothing is recomputed."""
        _, enough = evaluate(self._problem, store_all(self._problem))
        return ChainTable(self._problem, enough, self._num_slots)

    def _answers(self, budget_bytes: int) -> Iterator[Candidate]:
        limit = budget_bytes - self._resident_bytes
        table = self._table(limit)
        for raised in np.linspace(limit, limit + self._overcount_bytes, NUM_LIMITS):
            if raised >= table.minimum_limit_bytes:
                yield self.evaluate("optimal", table.solve(int(raised)).operations)

    @cached_property
    def _least_of_chain(self) -> Candidate:
        least = minimum_limit_bytes(self._problem)
        return self.evaluate("optimal", ChainTable(self._problem, least, self._num_slots).solve(least).operations)

    def _expert_sequences(self) -> Iterator[tuple[str, tuple[Operation, ...]]]:
        count = len(self.workload.blocks)
        everything = [block.options[0].name for block in self.workload.blocks]
        yield "none", keep_all(count)
        yield "selective", checkpoint_blocks(count, (), [block.options[-1].name for block in self.workload.blocks])
        yield "full", checkpoint_blocks(count, range(count - 1), everything)
        yield "sqrt-segments", checkpoint_segments(self._problem, max(1, isqrt(count)))
