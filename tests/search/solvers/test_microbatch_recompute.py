"""Recompute per stage and micro-batch against all choices, each played by a rule of the test's own."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InfeasibleError, InputError
from search.solvers.microbatch_greedy import greedy_choice
from search.solvers.microbatch_problem import Choice, MicrobatchProblem, PassOption, makespan_s, peak_bytes
from search.solvers.microbatch_recompute import least_budget_bytes, solve_microbatch_recompute
from simulator.pipeline.action import Action
from simulator.pipeline.catalogue import OrderRequest, make_order

ORDERS = ("gpipe", "1f1b", "zb-h1", "zb-v", "interleaved")


def played(problem: MicrobatchProblem, choice: Choice) -> tuple[float, list[int]]:
    """Makespan by recursion over what each pass waits for, and peaks by summing what is alive at each pass."""
    place = {cell: (rank, at) for rank, cells in enumerate(problem.order.ranks) for at, cell in enumerate(cells)}

    def option(action: Action) -> PassOption:
        return problem.options[action.stage][choice[action.stage][action.micro_batch]]

    @cache
    def end(action: Action) -> float:
        rank, at = place[action]
        stage, kind, batch = action
        chosen = option(action)
        duration = {"F": chosen.forward_s, "B": chosen.input_gradient_s, "W": chosen.weight_gradient_s}.get(
            kind, chosen.input_gradient_s + chosen.weight_gradient_s
        )
        inputs = {
            "F": [Action(stage - 1, "F", batch)],
            "W": [Action(stage, "B", batch)],
        }.get(kind, [Action(stage, "F", batch), Action(stage + 1, "B", batch), Action(stage + 1, "BW", batch)])
        ready = [end(other) + (problem.comm_s if place[other][0] != rank else 0.0) for other in inputs if other in place]
        return max([0.0, *ready, *([end(problem.order.ranks[rank][at - 1])] if at else [])]) + duration

    peaks = []
    for cells in problem.order.ranks:
        alive: dict[tuple[int, int], int] = {}
        peak = 0
        for cell in cells:
            key, chosen = (cell.stage, cell.micro_batch), option(cell)
            now = sum(alive.values())
            if cell.kind == "F":
                peak, alive[key] = max(peak, now + chosen.forward_peak_bytes), chosen.saved_bytes
            if cell.kind in {"B", "BW"}:
                peak, alive[key] = max(peak, now + chosen.input_gradient_peak_bytes), chosen.weight_saved_bytes
            if cell.kind in {"W", "BW"}:
                peak = max(
                    peak,
                    sum(alive.values()) + chosen.weight_gradient_peak_bytes,
                    sum(alive.values()) if cell.kind == "W" else 0,
                )
                del alive[key]
            peak = max(peak, sum(alive.values()))
        peaks.append(peak)
    return max(end(cells[-1]) for cells in problem.order.ranks), peaks


@st.composite
def problems(draw: st.DrawFn, most_choices: int = 300) -> MicrobatchProblem:
    name = draw(st.sampled_from(ORDERS))
    ranks, batches = draw(st.sampled_from([(1, 2), (2, 2), (1, 3), (2, 4), (3, 2)]))
    if name == "interleaved":
        ranks, batches = 2, 2
    request = OrderRequest(
        schedule=name, num_ranks=ranks, num_microbatches=batches, virtual_stages=2 if name == "interleaved" else None
    )
    order = make_order(request)
    seconds, sizes = st.integers(0, 5).map(float), st.integers(0, 6)
    rows, left = [], most_choices
    for _ in range(order.num_stages):
        count = 2 if 2**batches <= left else 1
        left //= count**batches
        rows.append(tuple(
            PassOption(
                name="abc"[number], forward_s=draw(seconds), input_gradient_s=draw(seconds), weight_gradient_s=draw(seconds),
                saved_bytes=draw(sizes), weight_saved_bytes=draw(sizes), forward_peak_bytes=draw(sizes),
                input_gradient_peak_bytes=draw(sizes), weight_gradient_peak_bytes=draw(sizes),
            )
            for number in range(count)
        ))  # fmt: skip
    budgets = tuple(draw(st.integers(0, 20)) for _ in range(order.num_ranks))
    return MicrobatchProblem(order=order, options=tuple(rows), budget_bytes=budgets, comm_s=draw(seconds))


@settings(max_examples=25)
@given(problems())
def test_equals_brute_force(problem: MicrobatchProblem) -> None:
    batches = problem.order.num_microbatches
    rows = [list(product(range(len(options)), repeat=batches)) for options in problem.options]
    best, least = float("inf"), [10**9] * problem.order.num_ranks
    for choice in product(*rows):
        time_s, peaks = played(problem, choice)
        assert time_s == makespan_s(problem, choice)
        assert tuple(peaks) == peak_bytes(problem, choice)
        least = [min(pair) for pair in zip(least, peaks, strict=True)]
        if all(peak <= budget for peak, budget in zip(peaks, problem.budget_bytes, strict=True)):
            best = min(best, time_s)
    assert [least_budget_bytes(problem, rank) for rank in range(problem.order.num_ranks)] == least
    if best == float("inf"):
        with pytest.raises(InfeasibleError):
            solve_microbatch_recompute(problem)
        return
    solution = solve_microbatch_recompute(problem)
    assert solution.makespan_s == pytest.approx(best, abs=1e-9)
    assert solution.proof.gap == pytest.approx(0.0, abs=1e-6)
    assert all(peak <= budget for peak, budget in zip(solution.peak_bytes, problem.budget_bytes, strict=True))


def pipeline(ranks: int, batches: int, budget: int) -> MicrobatchProblem:
    """1F1B; recompute saves 9 of 10 bytes for one more forward pass."""
    keep = PassOption(name="none", forward_s=1, input_gradient_s=1, weight_gradient_s=1, saved_bytes=10, forward_peak_bytes=10)
    again = PassOption(
        name="full",
        forward_s=1,
        input_gradient_s=2,
        weight_gradient_s=1,
        saved_bytes=1,
        forward_peak_bytes=10,
        input_gradient_peak_bytes=9,
    )
    order = make_order(OrderRequest(schedule="1f1b", num_ranks=ranks, num_microbatches=batches))
    return MicrobatchProblem(order=order, options=((keep, again),) * ranks, budget_bytes=(budget,) * ranks)


def test_memory_for_all_recomputes_nothing_and_the_least_recomputes_all_that_waits() -> None:
    assert solve_microbatch_recompute(pipeline(4, 8, 40)).makespan_s == (8 + 3) * 3
    assert solve_microbatch_recompute(pipeline(4, 8, 40)).proof.is_exact
    least = least_budget_bytes(pipeline(4, 8, 40), 0)
    assert least == 3 + 10
    tight = solve_microbatch_recompute(pipeline(4, 8, least))
    assert max(tight.peak_bytes) <= least
    with pytest.raises(
        InfeasibleError, match="rank 0 does not fit into budget_bytes = 12 under order 1f1b; the least that fits is 13 bytes"
    ):
        solve_microbatch_recompute(pipeline(4, 8, least - 1))


def test_more_memory_never_costs_time_and_some_micro_batches_cost_less_than_all() -> None:
    times = [solve_microbatch_recompute(pipeline(3, 6, budget)).makespan_s for budget in (12, 15, 21, 24, 30)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == (6 + 2) * 3
    assert times[0] > times[2] > times[-1]


def test_the_quick_choice_fits_and_is_bounded() -> None:
    problem = pipeline(4, 16, 22)
    choice = greedy_choice(problem)
    assert choice is not None
    quick = solve_microbatch_recompute(problem, time_limit_s=0)
    assert quick.choice == choice
    assert max(quick.peak_bytes) <= 22
    assert quick.proof.lower_bound_s == (16 + 3) * 3 <= quick.makespan_s


def test_messages_of_wrong_arguments() -> None:
    order = make_order(OrderRequest(schedule="dualpipe-v", num_ranks=2, num_microbatches=4))
    option = PassOption(name="none", forward_s=1, input_gradient_s=1, weight_gradient_s=1, saved_bytes=1)
    with pytest.raises(InputError, match="runs pairs of passes as one; give an order without overlap"):
        MicrobatchProblem(order=order, options=((option,),) * 4, budget_bytes=(1, 1))
    with pytest.raises(InputError, match="options: 4 entries must be given, but got 1"):
        MicrobatchProblem(order=order, options=((option,),), budget_bytes=(1, 1))
    with pytest.raises(InputError, match=r"option x: saved_bytes = -1: 0 <= value < inf must hold"):
        PassOption(name="x", forward_s=1, input_gradient_s=1, weight_gradient_s=1, saved_bytes=-1)
