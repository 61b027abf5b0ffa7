"""Recompute per stage and micro-batch against an integer program of another shape, at sizes that no enumeration reaches.

The oracle has no times of passes: it minimises T over choices that fit, where T is at least the length of each path found so far; the choice is played, its longest path becomes a row, until
T is the time of the choice. Every row holds for all choices, so that the last T is the optimum.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from search.solvers.microbatch_problem import MicrobatchProblem, PassOption
from search.solvers.microbatch_recompute import least_budget_bytes, solve_microbatch_recompute
from simulator.pipeline.action import Action
from simulator.pipeline.catalogue import OrderRequest, make_order

MOST_ROUNDS = 200


def seconds(action: Action, option: PassOption) -> float:
    """Of a pass, by the words of `PassOption`."""
    parts = {"F": (option.forward_s,), "B": (option.input_gradient_s,), "W": (option.weight_gradient_s,)}
    return sum(parts.get(action.kind, (option.input_gradient_s, option.weight_gradient_s)))


def inputs(action: Action) -> list[Action]:
    """Passes whose output a pass may wait for."""
    stage, kind, batch = action
    if kind == "F":
        return [Action(stage - 1, "F", batch)]
    if kind == "W":
        return [Action(stage, "B", batch)]
    return [Action(stage, "F", batch), Action(stage + 1, "B", batch), Action(stage + 1, "BW", batch)]


class PathProgram:
    """The oracle of a problem; a variable for T and one for each option of each micro-batch on each stage."""

    def __init__(self, problem: MicrobatchProblem) -> None:
        self.problem = problem
        self.place = {cell: (rank, at) for rank, cells in enumerate(problem.order.ranks) for at, cell in enumerate(cells)}
        batches = range(problem.order.num_microbatches)
        names = [(stage, batch, n) for stage, own in enumerate(problem.options) for batch in batches for n in range(len(own))]
        self.column = {name: 1 + number for number, name in enumerate(names)}
        self.size = 1 + len(names)
        self.rows: list[np.ndarray] = []
        self.least: list[float] = []
        self.most: list[float] = []
        for stage, own in enumerate(problem.options):
            for batch in batches:
                self.add({self.column[stage, batch, n]: 1.0 for n in range(len(own))}, 1.0, 1.0)
        for rank, cells in enumerate(problem.order.ranks):
            for terms in self.needs(cells):
                self.add(terms, -np.inf, float(problem.budget_bytes[rank]))

    def add(self, terms: dict[int, float], least: float, most: float) -> None:
        """A row: the sum of the terms is between least and most."""
        row = np.zeros(self.size)
        for column, value in terms.items():
            row[column] += value
        self.rows.append(row)
        self.least.append(least)
        self.most.append(most)

    def needs(self, cells: tuple[Action, ...]) -> Iterator[dict[int, float]]:
        """Bytes at each moment of a rank, as terms: those that each micro-batch holds, with what the running pass adds."""
        alive: dict[tuple[int, int], str] = {}
        for cell in cells:
            own = (cell.stage, cell.micro_batch)
            for kind in ("F", "B", "W") if cell.kind != "BW" else ("B", "W"):
                if cell.kind not in {kind, "BW"}:
                    continue
                adds = {"F": "forward_peak_bytes", "B": "input_gradient_peak_bytes", "W": "weight_gradient_peak_bytes"}[kind]
                yield self.bytes_of([*alive.items(), (own, adds)])
                if kind == "F":
                    alive[own] = "saved_bytes"
                elif kind == "B":
                    alive[own] = "weight_saved_bytes"
                else:
                    del alive[own]
                yield self.bytes_of([*alive.items()])

    def bytes_of(self, held: list[tuple[tuple[int, int], str]]) -> dict[int, float]:
        """The sum of what is held, as terms."""
        terms: dict[int, float] = {}
        for (stage, batch), name in held:
            for n, option in enumerate(self.problem.options[stage]):
                column = self.column[stage, batch, n]
                terms[column] = terms.get(column, 0.0) + getattr(option, name)
        return terms

    def longest_path(self, chosen: dict[tuple[int, int], int]) -> tuple[float, list[Action], float]:
        """Time of a choice, the passes on its longest path, and seconds of the messages between them."""
        known: dict[Action, tuple[float, Action | None, float]] = {}

        def end(action: Action) -> float:
            if action not in known:
                rank, at = self.place[action]
                before = [
                    (other, self.problem.comm_s if self.place[other][0] != rank else 0.0)
                    for other in inputs(action)
                    if other in self.place
                ]
                before += [(self.problem.order.ranks[rank][at - 1], 0.0)] if at else []
                ready, last, sent = max(
                    ((end(other) + apart, other, apart) for other, apart in before),
                    key=lambda one: one[0],
                    default=(0.0, None, 0.0),
                )
                own = self.problem.options[action.stage][chosen[action.stage, action.micro_batch]]
                known[action] = (ready + seconds(action, own), last, sent)
            return known[action][0]

        last = max((cells[-1] for cells in self.problem.order.ranks), key=end)
        path, sent, at = [], 0.0, last
        while at is not None:
            path.append(at)
            sent, at = sent + known[at][2], known[at][1]
        return end(last), path, sent

    def optimum(self) -> float:
        """The least time of all choices that fit."""
        cost = np.zeros(self.size)
        cost[0] = 1.0
        kinds, bounds = np.ones(self.size), Bounds(0.0, np.array([np.inf, *[1.0] * (self.size - 1)]))
        kinds[0] = 0
        for _ in range(MOST_ROUNDS):
            answer = milp(
                cost, integrality=kinds, bounds=bounds, constraints=LinearConstraint(np.stack(self.rows), self.least, self.most)
            )
            chosen = {(stage, batch): n for (stage, batch, n), column in self.column.items() if answer.x[column] > 0.5}
            time_s, path, sent = self.longest_path(chosen)
            if time_s <= answer.x[0] + 1e-6 * time_s:
                return time_s
            terms = {0: 1.0}
            for action in path:
                for n, option in enumerate(self.problem.options[action.stage]):
                    column = self.column[action.stage, action.micro_batch, n]
                    terms[column] = terms.get(column, 0.0) - seconds(action, option)
            self.add(terms, sent, np.inf)
        raise AssertionError("the oracle found no end")


def random_problem(seed: int, schedule: str, ranks: int, batches: int) -> MicrobatchProblem:
    """Stages of different lengths with two options each, between the least memory and that of keeping everything."""
    rng = np.random.default_rng(seed)
    order = make_order(OrderRequest(schedule=schedule, num_ranks=ranks, num_microbatches=batches))
    rows = []
    for _ in range(order.num_stages):
        forward, gradient, weight = (float(rng.integers(2, 9)) for _ in range(3))
        saved, again, extra = int(rng.integers(8, 20)), int(rng.integers(1, 5)), float(rng.integers(1, 9))
        keep = PassOption(
            name="none", forward_s=forward, input_gradient_s=gradient, weight_gradient_s=weight, saved_bytes=saved, weight_saved_bytes=saved // 2, forward_peak_bytes=saved
        )  # fmt: skip
        full = PassOption(
            name="full", forward_s=forward, input_gradient_s=gradient + extra, weight_gradient_s=weight, saved_bytes=again, weight_saved_bytes=saved // 2,
            forward_peak_bytes=saved, input_gradient_peak_bytes=saved - again,
        )  # fmt: skip
        rows.append((keep, full))
    roomy = MicrobatchProblem(
        order=order, options=tuple(rows), budget_bytes=(10**6,) * order.num_ranks, comm_s=float(rng.integers(0, 3))
    )
    most = solve_microbatch_recompute(roomy).peak_bytes
    least = [least_budget_bytes(roomy, rank) for rank in range(order.num_ranks)]
    budgets = tuple(low + int((high - low) * rng.uniform(0.0, 0.7)) for low, high in zip(least, most, strict=True))
    return MicrobatchProblem(order=order, options=tuple(rows), budget_bytes=budgets, comm_s=roomy.comm_s)


def check(seed: int, schedule: str, ranks: int, batches: int) -> bool:
    """Whether memory decided the answer, which is the oracle's."""
    problem = random_problem(seed, schedule, ranks, batches)
    solution = solve_microbatch_recompute(problem)
    assert solution.proof.gap <= 1e-6
    assert solution.makespan_s == pytest.approx(PathProgram(problem).optimum(), rel=1e-6)
    return any(option for row in solution.choice for option in row)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_equals_an_integer_program_over_paths(schedule: str) -> None:
    assert check(1, schedule, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "ranks", "batches"), [("1f1b", 3, 6), ("1f1b", 4, 5), ("zb-h1", 3, 5), ("zb-v", 2, 4), ("gpipe", 3, 4)]
)
def test_equals_an_integer_program_over_paths_at_larger_sizes(schedule: str, ranks: int, batches: int) -> None:
    assert sum(check(seed, schedule, ranks, batches) for seed in range(3)) >= 1
