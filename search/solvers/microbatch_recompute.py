"""Which passes of which micro-batches recompute under a fixed pipeline order: the least makespan within each rank's memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hardware_models.errors import InfeasibleError
from search.solvers.integer_program import TOLERANCE, Floats, IntegerProgram, ProgramAnswer
from search.solvers.microbatch_greedy import fastest_choice, greedy_choice
from search.solvers.microbatch_problem import Choice, MicrobatchProblem, makespan_s, pass_bytes, pass_s, peak_bytes
from search.solvers.proof import Proof
from simulator.pipeline.action import Action

TIME_LIMIT_S = 60.0
"""Of the integer program."""
_SLACK = 10 * TOLERANCE
"""Part of each budget that a second try leaves free, where the solver's tolerance overstepped it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchSolution:
    """Options of every micro-batch on every stage, with their makespan."""

    proof: Proof
    choice: Choice
    """Per stage and micro-batch, the number of its option."""
    peak_bytes: tuple[int, ...]
    """Per rank."""

    @property
    def makespan_s(self) -> float:
        """Of the step."""
        return self.proof.objective_s


def solve_microbatch_recompute(problem: MicrobatchProblem, *, time_limit_s: float = TIME_LIMIT_S) -> MicrobatchSolution:
    """The options of least makespan that fit every rank; at the time limit the best known and a bound.

    Args:
        problem: order, options and memory.
        time_limit_s: of the integer program; 0 answers with `greedy_choice` where that finds one.

    Raises:
        InfeasibleError: a rank does not fit; names its least budget.

    Model:
        x[s, j, o] in {0, 1}, one o each; begin of every pass; T >= end of every pass; a pass begins after the rank's one before
        and after its inputs; per pass, memory before it + what it adds <= budget. Added, as it tightens the bound: T >= begin of
        each rank's first pass + all its passes.

    Source:
        StageRemat (ELF), HAL-05151601, 2025, see `MicrobatchProblem`.
    """
    fastest_s, greedy = makespan_s(problem, fastest_choice(problem)), greedy_choice(problem)
    if greedy is not None:
        known_s = makespan_s(problem, greedy)
        proof = Proof.of(known_s, fastest_s)
        if proof.is_exact or time_limit_s == 0:
            return MicrobatchSolution(proof=proof, choice=greedy, peak_bytes=peak_bytes(problem, greedy))
    else:
        for rank in range(problem.order.num_ranks):
            _refuse_infeasible(problem, rank)
    found, answer = _by_program(problem, fastest_s or 1.0, time_limit_s)
    candidates = [choice for choice in (found, greedy) if choice is not None]
    if not candidates:
        raise InfeasibleError(
            limit=f"no options were found within time_limit_s = {time_limit_s}",
            smallest_change="a longer time limit would do: each rank alone fits",
        )
    best = min(candidates, key=lambda choice: makespan_s(problem, choice))
    best_s = makespan_s(problem, best)
    proof = Proof.of(best_s, max(fastest_s, answer.bound_for(best_s)))
    return MicrobatchSolution(proof=proof, choice=best, peak_bytes=peak_bytes(problem, best))


def _by_program(problem: MicrobatchProblem, unit_s: float, time_limit_s: float) -> tuple[Choice | None, ProgramAnswer]:
    """A choice that fits, if one was found in time, and the answer that bounds it."""
    program = _Program(problem, unit_s, slack=0.0)
    answer = program.rows.solve(time_limit_s=time_limit_s).times(unit_s)
    found = None if answer.values is None else program.chosen(answer.values)
    if found is not None and not _fits(problem, found):
        program = _Program(problem, unit_s, slack=_SLACK)
        again = program.rows.solve(time_limit_s=time_limit_s)
        found = None if again.values is None else program.chosen(again.values)
    return (found if found is not None and _fits(problem, found) else None), answer


def least_budget_bytes(problem: MicrobatchProblem, rank: int) -> int:
    """The least memory that the rank's passes fit, whatever time they take; exact."""
    rows = IntegerProgram()
    peak = rows.variable(cost=1.0)
    columns = {}
    unit = max(1, *(option.saved_bytes + option.forward_peak_bytes for row in problem.options for option in row))
    for action in problem.passes(rank):
        key = (action.stage, action.micro_batch)
        if key not in columns:
            columns[key] = [rows.choice() for _ in problem.options[action.stage]]
            rows.exactly_one(columns[key])
    _add_memory(rows, problem, rank, columns, unit=unit, peak=peak)
    answer = rows.solve()
    assert answer.values is not None, "there is no limit"
    return peak_bytes(problem, _chosen(problem, columns, answer.values))[rank]


def _refuse_infeasible(problem: MicrobatchProblem, rank: int) -> None:
    least = least_budget_bytes(problem, rank)
    if least > problem.budget_bytes[rank]:
        raise InfeasibleError(
            limit=f"rank {rank} does not fit into budget_bytes = {problem.budget_bytes[rank]} under order {problem.order.name}",
            smallest_change=f"the least that fits is {least} bytes",
            needed_bytes=least,
        )


def _fits(problem: MicrobatchProblem, choice: Choice) -> bool:
    return all(peak <= budget for peak, budget in zip(peak_bytes(problem, choice), problem.budget_bytes, strict=True))


def _chosen(problem: MicrobatchProblem, columns: dict[tuple[int, int], list[int]], values: Floats) -> Choice:
    """Options that the program's values stand for; the first where it has no say."""
    return tuple(
        tuple(
            int(np.argmax(values[columns[stage, batch]])) if (stage, batch) in columns else 0
            for batch in range(problem.order.num_microbatches)
        )
        for stage in range(problem.order.num_stages)
    )


def _add_memory(
    rows: IntegerProgram,
    problem: MicrobatchProblem,
    rank: int,
    columns: dict[tuple[int, int], list[int]],
    *,
    unit: int,
    peak: int | None = None,
    slack: float = 0.0,
) -> None:
    """A row per pass: what is held and what the pass adds, in ``unit`` bytes, stays below the budget, or below variable ``peak``."""
    held: dict[int, float] = {}
    for action in problem.passes(rank):
        options, own = problem.options[action.stage], columns[action.stage, action.micro_batch]
        for added in (0, 1):
            terms = dict(held)
            for option, column in zip(options, own, strict=True):
                terms[column] = terms.get(column, 0.0) + pass_bytes(action, option)[added] / unit
            if peak is None:
                rows.at_most(terms, problem.budget_bytes[rank] * (1.0 - slack) / unit)
            else:
                rows.at_most(terms | {peak: -1.0}, 0.0)
            if added:
                held = terms


class _Program:
    """The integer program of a problem; times in multiples of ``unit_s``."""

    def __init__(self, problem: MicrobatchProblem, unit_s: float, *, slack: float) -> None:
        self.problem, self.rows, self.unit_s = problem, IntegerProgram(), unit_s
        self.end = self.rows.variable(cost=1.0)
        batches = range(problem.order.num_microbatches)
        self.columns: dict[tuple[int, int], list[int]] = {}
        for stage, options in enumerate(problem.options):
            for batch in batches:
                self.columns[stage, batch] = [self.rows.choice() for _ in options]
                self.rows.exactly_one(self.columns[stage, batch])
        self.begins = {
            action: self.rows.variable() for rank in range(problem.order.num_ranks) for action in problem.passes(rank)
        }
        self.rank_of = {action: rank for rank in range(problem.order.num_ranks) for action in problem.passes(rank)}
        for rank in range(problem.order.num_ranks):
            self._add_rank(rank)
            _add_memory(self.rows, problem, rank, self.columns, unit=max(1, problem.budget_bytes[rank]), slack=slack)
        for action in self.begins:
            self._add_inputs(action)

    def chosen(self, values: Floats) -> Choice:
        """Options of a solution."""
        return _chosen(self.problem, self.columns, values)

    def _duration(self, action: Action) -> dict[int, float]:
        options = self.problem.options[action.stage]
        columns = self.columns[action.stage, action.micro_batch]
        return {column: pass_s(action, option) / self.unit_s for column, option in zip(columns, options, strict=True)}

    def _add_rank(self, rank: int) -> None:
        """One pass after the other; the end after all of them."""
        passes = list(self.problem.passes(rank))
        if not passes:
            return
        for before, after in pairwise(passes):
            self.rows.at_most({self.begins[before]: 1.0, self.begins[after]: -1.0} | self._duration(before), 0.0)
        self.rows.at_most({self.begins[passes[-1]]: 1.0, self.end: -1.0} | self._duration(passes[-1]), 0.0)
        busy: dict[int, float] = {self.begins[passes[0]]: 1.0, self.end: -1.0}
        for action in passes:
            for column, value in self._duration(action).items():
                busy[column] = busy.get(column, 0.0) + value
        self.rows.at_most(busy, 0.0)

    def _add_inputs(self, action: Action) -> None:
        """A pass begins once its producer has ended and sent."""
        producer = self._producer(action)
        if producer is None:
            return
        apart_s = self.problem.comm_s if self.rank_of[producer] != self.rank_of[action] else 0.0
        row = {self.begins[producer]: 1.0, self.begins[action]: -1.0} | self._duration(producer)
        self.rows.at_most(row, -apart_s / self.unit_s)

    def _producer(self, action: Action) -> Action | None:
        """Whose output a pass waits for."""
        stage, kind, batch = action
        if kind == "F":
            return Action(stage - 1, "F", batch) if stage else None
        if kind == "W":
            return Action(stage, "B", batch)
        if stage == self.problem.order.num_stages - 1:
            return Action(stage, "F", batch)
        above = Action(stage + 1, "B", batch)
        return above if above in self.begins else Action(stage + 1, "BW", batch)
