"""The chain solver against the published table, brute force and the usual baselines."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InfeasibleError, InputError
from search.chain_kernels import least_memory, least_times
from search.chain_problem import ChainProblem
from search.chain_solver import (
    ChainTable,
    chain_arrays,
    checkpoint_every_stage,
    checkpoint_segments,
    choose_slot_bytes,
    evaluate,
    format_sequence,
    minimum_limit_bytes,
    parse_sequence,
    solve_chain,
    store_all,
)
from simulator.sequence import Operation
from tests.chain_cases import SCHROEDER, all_persistent_sequences, chains, long_chain

# 8 stages f=1, b=2, a=1, abar=4 and a loss stage f=b=0, a=1, abar=1; memory without boundary 0
PUBLISHED_TIMES = {7: 53, 10: 34, 13: 31, 16: 30, 19: 29, 22: 28, 25: 27, 28: 26, 31: 26, 34: 25, 37: 24}
PUBLISHED = ChainProblem.classic([1.0] * 8 + [0.0], [2.0] * 8 + [0.0], [1] * 10, [4] * 8 + [1])


def limits_between(problem: ChainProblem, count: int) -> list[int]:
    """Limits from the least to that of storing everything, both ends among them."""
    least, most = minimum_limit_bytes(problem), evaluate(problem, store_all(problem))[1]
    return [least + (most - least) * step // (count - 1) for step in range(count)]


def test_published_table() -> None:
    assert minimum_limit_bytes(PUBLISHED) > 4 + 1
    table = ChainTable(PUBLISHED, 37 + 1)
    for available, time_s in PUBLISHED_TIMES.items():
        assert table.solve(available + 1).time_s == time_s
        assert solve_chain(PUBLISHED, available + 1).time_s == time_s
    with pytest.raises(InfeasibleError):
        table.solve(4 + 1)


@settings(max_examples=60, deadline=None)
@given(chains())
def test_equals_brute_force_at_every_limit(problem: ChainProblem) -> None:
    listed = [evaluate(problem, operations) for operations in all_persistent_sequences(problem)]
    least, most = min(peak for _, peak in listed), max(peak for _, peak in listed)
    assert minimum_limit_bytes(problem) == least
    table = ChainTable(problem, most, num_slots=most + 1)
    assert table.slot_bytes == 1
    for limit in sorted({peak + more for _, peak in listed for more in (-1, 0)}):
        if limit < least:
            with pytest.raises(InfeasibleError):
                table.solve(limit)
            continue
        solution = table.solve(limit)
        assert solution.time_s == min(time for time, peak in listed if peak <= limit)
        assert evaluate(problem, solution.operations) == (solution.time_s, solution.peak_bytes)
        assert solution.peak_bytes <= limit


@settings(max_examples=40, deadline=None)
@given(chains())
def test_compiled_table_equals_brute_force_without_any_fallback(problem: ChainProblem) -> None:
    listed = [evaluate(problem, operations) for operations in all_persistent_sequences(problem)]
    available = max(peak for _, peak in listed) - problem.boundary_bytes[0]
    chain = chain_arrays(problem)
    need, _ = least_memory(chain, 1)
    whole = least_times(chain, 1, available, need)[problem.num_stages - 1]
    for slots, time_s in enumerate(whole):
        limit = slots + problem.boundary_bytes[0]
        assert time_s == min((time for time, peak in listed if peak <= limit), default=math.inf)


def test_brute_force_lists_as_many_sequences_as_there_are() -> None:
    for stages in range(1, 6):
        chain = ChainProblem.classic([1] * stages, [1] * stages, [1] * (stages + 1), [1] * stages)
        listed = list(all_persistent_sequences(chain))
        assert len(set(listed)) == len(listed) == SCHROEDER[stages]


@settings(max_examples=40, deadline=None)
@given(chains(size=1000), st.integers(1, 60))
def test_coarse_slots_never_understate_memory_nor_time(problem: ChainProblem, num_slots: int) -> None:
    listed = [evaluate(problem, operations) for operations in all_persistent_sequences(problem)]
    table = ChainTable(problem, max(peak for _, peak in listed), num_slots)
    times = []
    for limit in sorted({peak for _, peak in listed})[:40]:
        solution = table.solve(limit)
        assert evaluate(problem, solution.operations) == (solution.time_s, solution.peak_bytes)
        assert solution.peak_bytes <= limit
        assert solution.time_s >= min(time for time, peak in listed if peak <= limit)
        times.append(solution.time_s)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("stages", "options", "seed"), [(30, 1, 0), (40, 2, 1), (25, 3, 2)])
def test_long_chains_fit_never_lose_to_baselines_and_gain_from_memory(stages: int, options: int, seed: int) -> None:
    problem = long_chain(stages, options, seed)
    baselines = [store_all(problem), checkpoint_every_stage(problem)]
    baselines += [checkpoint_segments(problem, segments) for segments in range(1, stages + 1)]
    known = [evaluate(problem, operations) for operations in baselines]
    limits = sorted({*limits_between(problem, 25), *(peak for _, peak in known)})
    table = ChainTable(problem, limits[-1], num_slots=200)
    times = []
    for limit in limits:
        solution = table.solve(limit)
        assert evaluate(problem, solution.operations) == (solution.time_s, solution.peak_bytes)
        assert solution.peak_bytes <= limit
        assert all(solution.time_s <= time for time, peak in known if peak <= limit)
        times.append(solution.time_s)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(times))
    assert times[-1] == evaluate(problem, store_all(problem))[0]


def test_the_least_limit_is_met_exactly_and_refused_one_byte_below() -> None:
    problem = long_chain(30, 2, 3)
    least = minimum_limit_bytes(problem)
    for num_slots in (1, 7, 100):
        assert solve_chain(problem, least, num_slots).peak_bytes <= least
    with pytest.raises(InfeasibleError) as caught:
        solve_chain(problem, least - 1)
    assert str(caught.value) == (
        f"infeasible: a chain of 30 stages does not fit into limit_bytes = {least - 1} by recomputing; the least that fits is {least} bytes"
    )


@pytest.mark.parametrize("above_least", [1.02, 1.05, 1.2, 2.0])
def test_usual_slots_lose_little_against_many(above_least: float) -> None:
    problem = long_chain(30, 2, 4)
    limit = int(minimum_limit_bytes(problem) * above_least)
    usual, many = solve_chain(problem, limit), solve_chain(problem, limit, 8000)
    once_s = evaluate(problem, store_all(problem))[0]
    assert usual.time_s == pytest.approx(many.time_s, abs=0.02 * once_s)


def test_slots_follow_repeated_sizes() -> None:
    stages = 20
    problem = ChainProblem.classic([1.0] * stages, [2.0] * stages, [7_000_001] * (stages + 1), [35_000_005] * stages)
    limit = evaluate(problem, store_all(problem))[1] - 1
    slot = ChainTable(problem, limit, num_slots=300).slot_bytes
    assert -7_000_001 % slot <= 1
    assert -35_000_005 % slot <= 5


def test_a_single_stage_needs_its_own_peaks_only() -> None:
    problem = ChainProblem.classic([1.0], [2.0], [5, 3], [4], [1], [2])
    assert minimum_limit_bytes(problem) == 5 + max(3 + 4 + 1, 5 + 3 + 4 + 2)
    solution = solve_chain(problem, 19)
    assert (solution.time_s, solution.operations) == (3.0, (Operation("F_all", 0, "all"), Operation("B", 0)))


def test_lasting_gradients_force_recompute() -> None:
    chain = {
        "discard_s": (1.0, 1.0), "discard_peak_bytes": (1, 1), "boundary_bytes": (0, 1, 1), "boundary_gradient_bytes": (0, 1, 0),
        "option_names": (("all",), ("all",)), "forward_s": ((1.0,), (1.0,)), "backward_s": ((2.0,), (2.0,)),
        "saved_bytes": ((10,), (10,)), "forward_peak_bytes": ((10,), (10,)), "backward_peak_bytes": ((11,), (15,)),
    }  # fmt: skip
    assert solve_chain(ChainProblem(**chain, resident_bytes=(0, 0)), 25).time_s == 6.0
    assert solve_chain(ChainProblem(**chain, resident_bytes=(4, 0)), 25).time_s == 6.0
    assert solve_chain(ChainProblem(**chain, resident_bytes=(4, 4)), 25).time_s == 7.0


def test_text_round_trip() -> None:
    for limit in (8, 11, 20, 38):
        operations = solve_chain(PUBLISHED, limit).operations
        assert parse_sequence(format_sequence(operations)) == operations


def test_text_that_is_no_operation_names_line_and_rule() -> None:
    with pytest.raises(InputError, match=r"plan\.seq: line 2 = 'F_x 1': an operation is F_ck i, F_e i, F_all i:option or B i"):
        parse_sequence("F_ck 0\nF_x 1\n", source="plan.seq")


def test_messages_of_wrong_arguments() -> None:
    with pytest.raises(InputError, match=r"num_slots = 0: num_slots >= 1 must hold"):
        ChainTable(PUBLISHED, 38, 0)
    with pytest.raises(InputError, match=r"limit_bytes <= max_limit_bytes must hold, but got 39 > 38"):
        ChainTable(PUBLISHED, 38).solve(39)


def test_sizes_beyond_the_memory_do_not_set_its_slots() -> None:
    """Cutting them into slots would look at as many slot sizes as they have bytes."""
    assert choose_slot_bytes(np.array([[10**15, 7]]), 1, 400) == 1
    assert choose_slot_bytes(np.array([[10**15, 300]]), 4000, 400) == 10
