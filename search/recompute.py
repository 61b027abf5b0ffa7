"""Optimal recompute for one workload on one device: the exact chain solver, its answers checked against the program they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt

import numpy as np

from hardware_models.errors import InfeasibleError
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes
from search.chain_of_workload import chain_of_workload, overcount_bytes
from search.chain_solver import ChainTable, checkpoint_segments, minimum_limit_bytes
from simulator.host_schedule import host_shares
from simulator.lower import PassPrices, lower, resident_bytes
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal
from simulator.recompute import check_no_exceptions, operations_of
from simulator.sequence import Operation, checkpoint_blocks, keep_all
from simulator.simulate import StepSetting, static_peak_bytes
from simulator.workload import Workload

SLOTS_RANGE = (500, 20_000)
"""Least and most memory slots of the chain solver's table; more slots round less."""
MOST_TABLE_ENTRIES = 1 << 24
"""Entries of the table (blocks^2 / 2 * slots) that its slots may take up."""
NUM_LIMITS = 17
"""The table is asked at so many limits, as the chain problem may overstate a sequence's memory (`overcount_bytes`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A sequence with its exact time and memory."""

    name: str
    operations: tuple[Operation, ...]
    step_time_s: float
    peak_bytes: int


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
        self._prices = PassPrices(partial(price, profile=device))
        self._resident_bytes = sum(
            resident_bytes(workload, num_microbatches=setting.num_microbatches, optimizer=setting.optimizer)
        )
        self._problem = chain_of_workload(workload, device, first_micro_batch=setting.num_microbatches == 1)
        self._overcount_bytes = overcount_bytes(workload)
        self._known: dict[tuple[Operation, ...], Candidate] = {}

    def evaluate(self, name: str, operations: Sequence[Operation]) -> Candidate:
        """The exact step time and peak of a sequence."""
        key = tuple(operations)
        if key not in self._known:
            lowered = min(self.setting.num_microbatches, 2)  # every later micro-batch repeats the second
            program = lower(self.workload, key, self._prices, num_microbatches=lowered, optimizer=self.setting.optimizer)
            second_s = float(program.duration_s[program.micro_batch == 1].sum())
            step_s = float(program.duration_s.sum()) + (self.setting.num_microbatches - lowered) * second_s
            batches = (self.setting.num_microbatches - lowered) * self.workload.batch_bytes
            peak = static_peak_bytes(program) + batches
            self._known[key] = Candidate(name=name, operations=key, step_time_s=step_s, peak_bytes=peak)
        return self._known[key]

    @property
    def fastest_s(self) -> float:
        """No sequence is faster: nothing is recomputed."""
        return min(self.evaluate(name, operations).step_time_s for name, operations in self._expert_sequences())

    def experts(self) -> tuple[Candidate, ...]:
        """What is set by hand today: nothing recomputed, products kept, every block checkpointed, sqrt(L) segments."""
        return tuple(self.evaluate(name, operations) for name, operations in self._expert_sequences())

    def least(self) -> Candidate:
        """The sequence of least memory that is known."""
        candidates = [*self.experts(), self._least_of_chain()]
        return min(candidates, key=lambda candidate: (candidate.peak_bytes, candidate.step_time_s))

    def best(self, budget_bytes: int) -> Candidate:
        """The fastest sequence whose peak is at most the budget.

        Raises:
            InfeasibleError: none fits; says the least budget that does.
        """
        candidates = [*self.experts(), self._least_of_chain(), *self._answers(budget_bytes)]
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
        """No memory-persistent sequence within the budget is faster.

        The chain's least time under a limit raised by all that rounding and `overcount_bytes` can take away.
        """
        limit = budget_bytes - self._resident_bytes
        table = self._table(limit)
        rounding = 2 * self._problem.num_stages * table.slot_bytes
        raised = max(limit + self._overcount_bytes + rounding, table.minimum_limit_bytes)
        chain_s = table.solve(min(raised, table.max_limit_bytes)).time_s
        return max(self.fastest_s, self.fastest_s + self.setting.num_microbatches * (chain_s - self._chain_fastest_s))

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
        least = minimum_limit_bytes(self._problem)
        return ChainTable(self._problem, 2 * max(limit_bytes, least) + self._overcount_bytes, self._num_slots)

    def _answers(self, budget_bytes: int) -> Iterator[Candidate]:
        limit = budget_bytes - self._resident_bytes
        table = self._table(limit)
        for raised in np.linspace(limit, limit + self._overcount_bytes, NUM_LIMITS):
            if raised >= table.minimum_limit_bytes:
                yield self.evaluate("optimal", table.solve(int(raised)).operations)

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


def optimal_recompute(plan: Plan, workload: Workload, device: DeviceProfile) -> tuple[Operation, ...]:
    """The sequence that ``recompute = "optimal"`` stands for: the fastest within ``memory.budget_bytes``, else the device's memory.

    Raises:
        InfeasibleError: no sequence fits.
        InputError: the plan offloads too (the joint optimum is not solved here), or sets single blocks.
    """
    check_no_exceptions(plan)
    if host_shares(plan, len(workload.blocks)).any:
        rule = "with offload fractions on a single device the two are not solved together"
        raise plan_refusal("memory.recompute", "optimal", rule, "name a file with the sequence, or none, selective or full")
    setting = StepSetting(num_microbatches=plan.num_microbatches, optimizer=plan.precision.optimizer)
    budget = plan.memory.budget_bytes or device.memory_bytes - device.context_bytes
    return RecomputeSolver(workload, device, setting).best(budget).operations


def sequence_of(plan: Plan, workload: Workload, device: DeviceProfile, **options: object) -> tuple[Operation, ...]:
    """The sequence of any plan: the plan's own rule, or the solver's answer where it says ``optimal``."""
    if plan.memory.recompute == "optimal":
        return optimal_recompute(plan, workload, device)
    return operations_of(plan, workload, **options)  # type: ignore[arg-type]
