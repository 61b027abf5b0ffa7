"""Weight offload: the integer program, the rule for given residencies and all residencies agree."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InfeasibleError, InputError
from search.solvers.offload_problem import HostLink
from search.solvers.weight_offload import _Program, solve_weight_offload
from search.solvers.weight_phases import weight_bound_s, weight_step_s
from search.solvers.weight_problem import Residency, WeightProblem

RESIDENT, TWICE, OVER_TURN, OVER_STEP = Residency


@st.composite
def problems(draw: st.DrawFn) -> WeightProblem:
    blocks = draw(st.integers(1, 4))

    def several(low: int, high: int, count: int = blocks) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))

    return WeightProblem(
        forward_s=tuple(map(float, several(0, 4))), backward_s=tuple(map(float, several(0, 6))), weight_bytes=several(0, 6),
        gradient_bytes=several(0, 3), room_bytes=several(2, 24, 2 * blocks),
        link=HostLink(out_bytes_per_s=float(draw(st.integers(1, 3))), in_bytes_per_s=float(draw(st.integers(1, 3)))),
    )  # fmt: skip


@settings(max_examples=25)
@given(problems())
def test_equals_all_residencies_and_the_integer_program(problem: WeightProblem) -> None:
    times = {ways: weight_step_s(problem, ways) for ways in product(Residency, repeat=problem.num_blocks)}
    best = min(times.values())
    built = _Program(problem)
    program = built.rows.solve().times(built.unit_s)
    assert (program.values is None) == math.isinf(best)
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            solve_weight_offload(problem)
        return
    assert program.objective == pytest.approx(best, abs=1e-6)
    solution = solve_weight_offload(problem)
    assert solution.proof.objective_s == pytest.approx(best, abs=1e-9)
    assert solution.proof.gap == pytest.approx(0.0, abs=1e-6)
    assert weight_bound_s(problem) <= best + 1e-9
    assert weight_step_s(problem, solution.residencies) == solution.proof.objective_s


def equal_blocks(blocks: int, room: int, *, rate: float = 1.0, gradient: int = 0) -> WeightProblem:
    """1 s forward, 2 s backward, 3 bytes each."""
    return WeightProblem(
        forward_s=(1.0,) * blocks, backward_s=(2.0,) * blocks, weight_bytes=(3,) * blocks, gradient_bytes=(gradient,) * blocks,
        room_bytes=(room,) * (2 * blocks), link=HostLink(out_bytes_per_s=rate, in_bytes_per_s=rate),
    )  # fmt: skip


def test_two_blocks_by_hand() -> None:
    """Passes F0 F1 B1 B0 of 1, 1, 2, 2 s; block 1 comes in (3 bytes, 1 byte/s) beside F0 and the B0 before it: no wait."""
    problem = equal_blocks(2, 6)
    assert weight_step_s(problem, (RESIDENT, RESIDENT)) == 6.0
    assert weight_step_s(problem, (RESIDENT, OVER_TURN)) == 6.0
    assert weight_step_s(problem, (RESIDENT, TWICE)) == 6.0 + 3.0
    # block 0 twice, block 1 over the turn: F1's weights come beside F0 (1 of 3 bytes, as B0 holds only 3 of 6 bytes: 2 more before),
    # B0's beside B1 (2 of 3 bytes) and F1 (1 byte), F0's and F1's beside B0 (2 bytes): 9 bytes in a step take 9 s
    assert weight_step_s(problem, (TWICE, OVER_TURN)) == 9.0
    assert weight_step_s(problem, (TWICE, TWICE)) == 12.0
    assert weight_step_s(equal_blocks(2, 2), (TWICE, TWICE)) == math.inf
    assert solve_weight_offload(problem).residencies == (RESIDENT, RESIDENT)


def test_gradients_go_out_beside_the_next_pass() -> None:
    problem = equal_blocks(2, 11, gradient=4)
    assert weight_step_s(problem, (OVER_STEP, RESIDENT)) == 6.0 + 3.0
    assert weight_step_s(equal_blocks(2, 11, gradient=1), (OVER_STEP, RESIDENT)) == 6.0


def test_room_for_all_costs_nothing_and_a_fast_link_neither() -> None:
    assert solve_weight_offload(equal_blocks(8, 24)).proof.objective_s == 24.0
    fast = solve_weight_offload(equal_blocks(8, 9, rate=100.0))
    assert fast.proof.objective_s == 24.0
    assert fast.proof.is_exact


def test_more_room_never_costs_time_and_no_step_is_below_the_bound() -> None:
    solutions = [solve_weight_offload(equal_blocks(6, room)) for room in (6, 9, 12, 15, 18)]
    times = [solution.proof.objective_s for solution in solutions]
    assert times == sorted(times, reverse=True)
    assert times[-1] == 18.0
    assert all(solution.proof.status == "exact" for solution in solutions)


def test_the_quick_answer_is_bounded() -> None:
    quick = solve_weight_offload(equal_blocks(20, 21), time_limit_s=0)
    assert quick.proof.lower_bound_s == max(60.0, 2 * 60 - 2 * 21) <= quick.proof.objective_s
    assert quick.proof.gap < 0.1


def test_what_does_not_fit_names_the_least_that_does() -> None:
    with pytest.raises(
        InfeasibleError, match=r"weights of 3 blocks do not fit room_bytes of 2 to 2; 1 bytes more at every pass would do"
    ):
        solve_weight_offload(equal_blocks(3, 2))


def test_messages_of_wrong_arguments() -> None:
    link = HostLink(out_bytes_per_s=1.0, in_bytes_per_s=1.0)
    with pytest.raises(InputError, match="room_bytes: 2 entries must be given, but got 1"):
        WeightProblem(forward_s=(1.0,), backward_s=(1.0,), weight_bytes=(1,), gradient_bytes=(0,), room_bytes=(1,), link=link)
    with pytest.raises(InputError, match="weight_bytes: 0 <= value < inf must hold"):
        WeightProblem(
            forward_s=(1.0,), backward_s=(1.0,), weight_bytes=(-1,), gradient_bytes=(0,), room_bytes=(1, 1), link=link
        )
