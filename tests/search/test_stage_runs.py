"""Runs and single blocks against all sequences and against the table of `StageTable`; what they say of themselves against `evaluate`."""

from __future__ import annotations

from collections import Counter
from math import inf

import pytest

from search.chain_schedules import evaluate
from search.stage_chain import StageTable, kept_bytes
from search.stage_runs import StageRuns, StageSequence
from simulator.sequence import check_sequence
from tests.chain_cases import layered_chain
from tests.search.test_stage_chain import all_parts

SEEDS = range(12)
TWICE = 2
"""Forward runs of a block."""


def needed(found: StageSequence, others: float) -> float:
    return others * found.kept_bytes + found.peak_bytes


def limits_between(runs: StageRuns, others: float) -> list[int]:
    whole = runs.fastest(inf, others)
    assert whole is not None
    least, most = needed(runs.leanest(others), others), needed(whole, others)
    return [int(least + part * (most - least)) for part in (0.0, 0.1, 0.3, 0.6, 0.9, 1.0)]


@pytest.mark.parametrize("seed", SEEDS)
def test_sequences_are_what_they_say(seed: int) -> None:
    problem, starts = layered_chain(seed)
    runs = StageRuns(problem, starts)
    for others in (0.0, 3.0):
        for limit in limits_between(runs, others):
            found = runs.fastest(limit, others)
            assert found is not None
            check_sequence(found.operations, problem.num_stages)
            seconds, peak = evaluate(problem, found.operations)
            assert seconds == pytest.approx(found.seconds, rel=1e-12)
            assert peak <= found.peak_bytes
            assert kept_bytes(problem, found.operations) == found.kept_bytes
            assert needed(found, others) <= limit


@pytest.mark.parametrize("seed", SEEDS)
def test_hardly_slower_than_the_table_of_all_sequences(seed: int) -> None:
    """Beyond what little memory only nested recompute can use."""
    problem, starts = layered_chain(seed)
    runs = StageRuns(problem, starts)
    for others in (0.0, 1.0, 7.0):
        for limit in limits_between(runs, others)[2:]:
            found = runs.fastest(limit, others)
            table = StageTable(problem, limit).sequences(others + 1.0)
            best_s = min((evaluate(problem, one)[0] for one in table), default=inf)
            assert found is not None
            assert found.seconds <= best_s * 1.005


@pytest.mark.parametrize("seed", SEEDS)
def test_a_layer_or_two_against_all_sequences_that_run_blocks_twice(seed: int) -> None:
    problem, starts = layered_chain(seed, layers=1 + seed % 2, options=1)
    runs = StageRuns(problem, starts)
    everything = [(*forward, *backward) for forward, backward in all_parts(problem, 0)]
    everything = [one for one in everything if max(Counter(own.block for own in one if own.kind != "B").values()) <= TWICE]
    known = [(*evaluate(problem, one), kept_bytes(problem, one)) for one in everything]
    for others in (0.0, 1.0, 5.0):
        for limit in limits_between(runs, others)[1:]:
            found = runs.fastest(limit, others)
            best_s = min(seconds for seconds, peak, kept in known if others * kept + peak <= limit)
            assert found is not None
            assert found.seconds >= best_s * (1 - 1e-12)
            assert found.seconds <= best_s * (1 + 1e-12)


def test_more_memory_is_never_slower_and_more_in_flight_never_faster() -> None:
    problem, starts = layered_chain(3, layers=8)
    runs = StageRuns(problem, starts)
    limits = limits_between(runs, 4.0)
    times = [_seconds(runs, limit, 4.0) for limit in limits]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]
    by_flight = [_seconds(runs, limits[3], others) for others in (0.0, 1.0, 2.0, 4.0, 8.0)]
    assert by_flight == sorted(by_flight)


def _seconds(runs: StageRuns, limit: float, others: float) -> float:
    found = runs.fastest(limit, others)
    return inf if found is None else found.seconds


def test_what_one_keeps_can_be_limited_by_itself() -> None:
    problem, starts = layered_chain(5, layers=4)
    runs = StageRuns(problem, starts)
    whole = runs.fastest(inf, 0.0)
    assert whole is not None
    found = runs.fastest(inf, 0.0, most_kept=whole.kept_bytes // 2)
    assert found is not None
    assert found.kept_bytes <= whole.kept_bytes // 2
    assert found.seconds > whole.seconds


def test_nothing_fits_no_memory() -> None:
    problem, starts = layered_chain(1)
    runs = StageRuns(problem, starts)
    assert runs.fastest(0.0, 1.0) is None
    assert runs.fastest(needed(runs.leanest(1.0), 1.0) - 1, 1.0) is None
    assert runs.least_peak_bytes <= runs.leanest(0.0).peak_bytes
