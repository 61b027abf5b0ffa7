"""Which weights to keep on the host and when to bring them in: integer program, heuristic, bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hardware_models.errors import InfeasibleError
from search.solvers.integer_program import IntegerProgram
from search.solvers.proof import Proof
from search.solvers.weight_phases import phase_room_bytes, phase_s, phase_tables, weight_bound_s, weight_step_s
from search.solvers.weight_problem import Residency, WeightProblem

TIME_LIMIT_S = 60.0
"""Of the integer program."""
_SWEEPS = 4
"""Most rounds in which every block's residency is tried anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSolution:
    """Where each block's weights are, and the time of a repeated step."""

    proof: Proof
    residencies: tuple[Residency, ...]
    """Per block."""


def solve_weight_offload(problem: WeightProblem, *, time_limit_s: float = TIME_LIMIT_S) -> WeightSolution:
    """The residencies of the fastest step; at the time limit the best known and a bound.

    Args:
        problem: blocks, memory and link.
        time_limit_s: of the integer program; 0 answers with `spread_residencies` where they fit.

    Raises:
        InfeasibleError: no residencies fit; names the least memory more that does.

    Model:
        x[block, residency] in {0, 1}, one each; G and t of every phase; rows as in `WeightProblem`.
    """
    known, known_s = _heuristic(problem)
    bound_s = weight_bound_s(problem)
    if known is not None and (known_s <= bound_s or time_limit_s == 0):
        return WeightSolution(proof=Proof.of(known_s, bound_s), residencies=known)
    program = _Program(problem)
    answer = program.rows.solve(time_limit_s=time_limit_s or TIME_LIMIT_S).times(program.unit_s)
    if answer.values is not None:
        found = program.residencies(answer.values)
        found_s = weight_step_s(problem, found)
        if found_s < known_s:
            known, known_s = found, found_s
    if known is None:
        raise _infeasible(problem)
    return WeightSolution(proof=Proof.of(known_s, max(bound_s, answer.bound_for(known_s))), residencies=known)


def spread_residencies(problem: WeightProblem) -> Iterator[tuple[Residency, ...]]:
    """Residencies to begin with: k blocks on the host, spread evenly, all first or all last; each also kept over turn or step.

    Blocks near the turn are kept over it, blocks near the ends over the end of the step, as far as asked.
    """
    blocks = problem.num_blocks
    yield (Residency.RESIDENT,) * blocks
    for count in range(1, blocks + 1):
        spread = {int((index + 0.5) * blocks / count) for index in range(count)}
        for away in (spread, set(range(count)), set(range(blocks - count, blocks))):
            for way in (Residency.TWICE, Residency.OVER_TURN, Residency.OVER_STEP):
                yield tuple(way if block in away else Residency.RESIDENT for block in range(blocks))


def _heuristic(problem: WeightProblem) -> tuple[tuple[Residency, ...] | None, float]:
    """The best of `spread_residencies`, improved block by block."""
    best, best_s = None, math.inf
    for tried in spread_residencies(problem):
        time_s = weight_step_s(problem, tried)
        if time_s < best_s:
            best, best_s = tried, time_s
    if best is None:
        return None, math.inf
    for _ in range(_SWEEPS):
        before_s = best_s
        for block in range(problem.num_blocks):
            for way in Residency:
                tried = (*best[:block], way, *best[block + 1 :])
                time_s = weight_step_s(problem, tried)
                if time_s < best_s:
                    best, best_s = tried, time_s
        if best_s == before_s:
            break
    return best, best_s


class _Program:
    """The integer program; bytes in multiples of the largest weight, times in those of the compute or of moving that weight. ``spare`` adds a variable: memory more, which is then minimised."""

    def __init__(self, problem: WeightProblem, *, spare: bool = False) -> None:
        self.problem, self.rows = problem, IntegerProgram()
        self.unit = max(1, *problem.weight_bytes)
        self.unit_s = max(math.fsum(problem.pass_s), self.unit / problem.link.in_bytes_per_s)
        self.spare = self.rows.variable(cost=1.0) if spare else None
        self.columns = [[self.rows.choice() for _ in Residency] for _ in range(problem.num_blocks)]
        for columns in self.columns:
            self.rows.exactly_one(columns)
        phases = 2 * problem.num_passes
        self.came = [self.rows.variable() for _ in range(phases + 1)]
        """G before phase 0, and by the end of each phase."""
        seconds = [self.rows.variable(cost=0.0 if spare else 1.0) for _ in range(phases)]
        tables, base, room = phase_tables(problem.num_blocks), phase_s(problem), phase_room_bytes(problem)
        demand: dict[int, float] = {}
        self._add({self.came[0]: -1.0}, self._terms(tables.fetches[0], problem.weight_bytes), 0.0)
        for phase in range(phases):
            own = self._terms(tables.fetches[phase], problem.weight_bytes)
            demand = _sum(demand, own)
            ahead = _sum(demand, self._terms(tables.fetches[(phase + 1) % phases], problem.weight_bytes))
            self._add({self.came[phase + 1]: -1.0}, ahead, 0.0)
            self.rows.at_most({self.came[phase]: 1.0, self.came[phase + 1]: -1.0}, 0.0)
            rate = problem.link.in_bytes_per_s * self.unit_s / self.unit
            self.rows.at_most({self.came[phase + 1]: 1.0, self.came[phase]: -1.0, seconds[phase]: -rate}, 0.0)
            self.rows.at_least({seconds[phase]: 1.0}, float(base[phase]) / self.unit_s)
            sent = self._terms(tables.sends[phase], problem.gradient_bytes)
            self._add({seconds[phase]: -problem.link.out_bytes_per_s * self.unit_s / self.unit}, sent, 0.0)
            held = _sum(
                self._terms(tables.holds[phase], problem.weight_bytes),
                self._terms(tables.leaves[phase], problem.gradient_bytes),
            )
            early = _sum(held, {column: -value for column, value in demand.items()})
            spared = {} if self.spare is None else {self.spare: -1.0}
            self._add({self.came[phase + 1]: 1.0} | spared, early, float(room[phase]) / self.unit)
        for sign in (1.0, -1.0):
            ends = {self.came[-1]: sign, self.came[0]: -sign}
            self._add(ends, {column: -sign * value for column, value in demand.items()}, 0.0)

    def residencies(self, values: np.ndarray) -> tuple[Residency, ...]:
        """Of a solution."""
        return tuple(Residency(int(np.argmax(values[columns]))) for columns in self.columns)

    def _terms(self, table: np.ndarray, sizes: tuple[int, ...]) -> dict[int, float]:
        return {
            self.columns[block][way]: sizes[block] / self.unit
            for way in Residency
            for block in range(self.problem.num_blocks)
            if table[way, block]
        }

    def _add(self, terms: dict[int, float], more: dict[int, float], bound: float) -> None:
        self.rows.at_most(_sum(terms, more), bound)


def _sum(terms: dict[int, float], more: dict[int, float]) -> dict[int, float]:
    total = dict(terms)
    for column, value in more.items():
        total[column] = total.get(column, 0.0) + value
    return total


def _infeasible(problem: WeightProblem) -> InfeasibleError:
    program = _Program(problem, spare=True)
    answer = program.rows.solve()
    assert answer.values is not None, "with enough memory all weights are resident"
    more = math.ceil(answer.objective * program.unit - 1e-6 * program.unit)
    return InfeasibleError(
        limit=f"weights of {problem.num_blocks} blocks do not fit room_bytes of {min(problem.room_bytes)} to {max(problem.room_bytes)}",
        smallest_change=f"{more} bytes more at every pass would do",
        needed_bytes=max(problem.room_bytes) + more,
    )
