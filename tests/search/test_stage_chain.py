"""Sequences of one pipeline stage against all there are, and what more memory or more micro-batches in flight change."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.chain_problem import ChainProblem
from search.chain_schedules import evaluate
from search.stage_chain import StageTable
from simulator.sequence import Operation, check_sequence
from tests.chain_cases import chains, long_chain

Parts = tuple[tuple[Operation, ...], tuple[Operation, ...]]


def below(problem: ChainProblem, first: int, last: int) -> Iterator[tuple[Operation, ...]]:
    """All sequences of a sub-chain whose input is held."""
    for name in problem.option_names[first]:
        rest = below(problem, first + 1, last) if last > first else iter([()])
        for later in rest:
            yield (Operation("F_all", first, name), *later, Operation("B", first))
    for middle in range(first + 1, last + 1):
        run = (Operation("F_ck", first), *(Operation("F_e", stage) for stage in range(first + 1, middle)))
        for upper in below(problem, middle, last):
            for lower in below(problem, first, middle - 1):
                yield (*run, *upper, *lower)


def all_parts(problem: ChainProblem, first: int) -> Iterator[Parts]:
    """All (forward, backward) halves of the blocks from the first one on."""
    if first == problem.num_stages:
        yield (), ()
        return
    for name in problem.option_names[first]:
        for forward, backward in all_parts(problem, first + 1):
            yield (Operation("F_all", first, name), *forward), (*backward, Operation("B", first))
    for middle in range(first + 1, problem.num_stages + 1):
        run = (Operation("F_ck", first), *(Operation("F_e", stage) for stage in range(first + 1, middle)))
        for again in below(problem, first, middle - 1):
            for forward, backward in all_parts(problem, middle):
                yield (*run, *forward), (*backward, *again)


def kept_bytes(problem: ChainProblem, forward: tuple[Operation, ...]) -> int:
    """Between the passes: what graphs saved, and inputs of checkpoints and graphs that no graph below has saved already."""
    saved = {
        one.block: problem.saved_bytes[one.block][problem.option_names[one.block].index(one.option)]
        for one in forward
        if one.kind == "F_all"
    }
    pinned = {one.block for one in forward if one.kind != "F_e" and one.block - 1 not in saved} - {0}
    return problem.boundary_bytes[0] + sum(saved.values()) + sum(problem.boundary_bytes[block] for block in pinned)


def fits(problem: ChainProblem, parts: Parts, limit_bytes: int, in_flight: int) -> bool:
    _, peak_bytes = evaluate(problem, (*parts[0], *parts[1]))
    return (in_flight - 1) * kept_bytes(problem, parts[0]) + peak_bytes <= limit_bytes


def halves(operations: tuple[Operation, ...]) -> Parts:
    """Cut where the last block has run for the first time."""
    last = max(one.block for one in operations)
    turn = next(place for place, one in enumerate(operations) if one.block == last) + 1
    return operations[:turn], operations[turn:]


@given(problem=chains(most_stages=4, most_sequences=200), in_flight=st.integers(1, 4), limit_bytes=st.integers(5, 200))
@settings(max_examples=60, deadline=None)
def test_equals_all_sequences(problem: ChainProblem, in_flight: int, limit_bytes: int) -> None:
    everything = [parts for parts in all_parts(problem, 0) if fits(problem, parts, limit_bytes, in_flight)]
    best = min((evaluate(problem, (*f, *b))[0] for f, b in everything), default=inf)
    table = StageTable(problem, limit_bytes, num_slots=limit_bytes)
    found = [
        one for one in table.sequences(in_flight, num_shares=limit_bytes) if fits(problem, halves(one), limit_bytes, in_flight)
    ]
    assert table.slot_bytes == 1
    assert min((evaluate(problem, one)[0] for one in found), default=inf) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("in_flight", [1, 2, 4, 8])
def test_sequences_are_legal_and_fit(in_flight: int) -> None:
    problem = long_chain(stages=12, options=2, seed=3)
    limit_bytes = 60_000
    for operations in StageTable(problem, limit_bytes).sequences(in_flight):
        check_sequence(operations, problem.num_stages)
        assert fits(problem, halves(operations), limit_bytes, in_flight)


def least_s(problem: ChainProblem, limit_bytes: int, in_flight: int) -> float:
    found = StageTable(problem, limit_bytes, num_slots=2000).sequences(in_flight, num_shares=200)
    return min((evaluate(problem, one)[0] for one in found), default=inf)


def test_more_micro_batches_in_flight_recompute_more() -> None:
    problem = long_chain(stages=12, options=2, seed=5)
    _, enough = evaluate(problem, next(StageTable(problem, 10**9).sequences(1)))
    times = [least_s(problem, 2 * enough, in_flight) for in_flight in (1, 2, 3, 4, 6)]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_nothing_fits_no_memory() -> None:
    assert list(StageTable(long_chain(stages=3, options=1, seed=1), 0).sequences(2)) == []
