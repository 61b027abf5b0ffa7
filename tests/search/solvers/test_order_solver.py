"""The order solver and its bound against all orders of small pipelines, and closed forms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InfeasibleError, InputError
from search.solvers.order_bound import order_bound_s
from search.solvers.order_solver import solve_order
from simulator.pipeline.action import Action, Order
from simulator.pipeline.play_order import RankTimes, play_order

EQUAL = RankTimes(forward_s=(1.0,), input_gradient_s=(1.0,), weight_gradient_s=(1.0,))


@cache
def rank_orders(batches: int) -> tuple[str, ...]:
    """Every order of F, B and W of one rank whose micro-batches go one after the other."""

    def grow(text: str, counts: tuple[int, int, int]) -> Iterator[str]:
        if counts == (batches,) * 3:
            yield text
        for index, letter in enumerate("FBW"):
            most = batches if index == 0 else counts[index - 1]
            if counts[index] < most:
                grown = tuple(count + (at == index) for at, count in enumerate(counts))
                yield from grow(text + letter, grown)  # type: ignore[arg-type]

    return tuple(grow("", (0, 0, 0)))


def every_order(ranks: int, batches: int) -> Iterator[Order]:
    for rows in product(rank_orders(batches), repeat=ranks):
        cells = []
        for rank, row in enumerate(rows):
            cells.append(tuple(Action(rank, letter, row[:at].count(letter)) for at, letter in enumerate(row)))  # type: ignore[arg-type]
        yield Order(name="all", num_stages=ranks, num_microbatches=batches, ranks=tuple(cells))


@st.composite
def rank_times(draw: st.DrawFn, ranks: int) -> RankTimes:
    def seconds() -> tuple[float, ...]:
        return tuple(float(draw(st.integers(0, 5))) for _ in range(ranks))

    return RankTimes(
        forward_s=seconds(), input_gradient_s=seconds(), weight_gradient_s=seconds(), comm_s=float(draw(st.integers(0, 2)))
    )


@settings(max_examples=12)
@given(
    st.sampled_from([(1, 3), (2, 2), (3, 2)]),
    st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.data(),
)
def test_never_below_the_best_of_all_orders_and_the_bound_never_above(
    sizes: tuple[int, int], limit: float, share: float, data: st.DataObject
) -> None:
    ranks, batches = sizes
    times = data.draw(rank_times(ranks))
    bound = order_bound_s(tuple(range(ranks)), batches, times=times, memory_limit=limit, weight_share=share)
    best = float("inf")
    for order in every_order(ranks, batches):
        try:
            played = play_order(order, times, weight_share=share)
        except InputError:
            continue
        if max(played.peak_activations) <= limit + 1e-9:
            best = min(best, played.makespan_s)
    assert bound <= best + 1e-9
    solution = solve_order(ranks, batches, times=times, memory_limit=limit, weight_share=share, folded=False)
    assert solution.proof.objective_s >= best - 1e-9
    assert max(solution.peak_activations) <= limit + 1e-9


def test_bound_of_the_first_rank_is_the_published_one() -> None:
    """P = 4, F = B = W = 1, comm = 0.5: bubble >= 3 (1 + 1) + (4 - k)."""
    times = RankTimes(forward_s=(1.0,), input_gradient_s=(1.0,), weight_gradient_s=(1.0,), comm_s=0.5)
    for limit in (1, 2, 4, 6):
        bound = order_bound_s((0, 1, 2, 3), 20, times=times, memory_limit=limit, weight_share=0.5)
        assert bound >= 60 + 3 * 2 + (4 - limit)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_memory_buys_time_and_zero_bubble_meets_its_bound(ranks: int) -> None:
    batches = 4 * ranks
    solutions = [solve_order(ranks, batches, times=EQUAL, memory_limit=limit) for limit in (1, ranks / 2 + 1, ranks, 2 * ranks)]
    times = [solution.proof.objective_s for solution in solutions]
    assert times == sorted(times, reverse=True)
    assert solutions[2].proof.objective_s < (batches + ranks - 1) * 3
    alone = solve_order(ranks, batches, times=EQUAL, memory_limit=ranks, folded=False)
    assert alone.proof.objective_s >= solutions[2].proof.objective_s
    assert alone.proof.gap < 0.15


def test_one_rank_is_exact() -> None:
    solution = solve_order(1, 5, times=EQUAL, memory_limit=1.0)
    assert (solution.proof.objective_s, solution.proof.status) == (15.0, "exact")


def test_no_room_for_one_micro_batch() -> None:
    with pytest.raises(InfeasibleError, match=r"memory_limit 0.2 M_B holds no order of 2 ranks; memory_limit >= 1 would do"):
        solve_order(2, 4, times=EQUAL, memory_limit=0.2)
    with pytest.raises(InputError, match="num_ranks >= 1 must hold, but got 0"):
        solve_order(0, 4, times=EQUAL, memory_limit=1)
