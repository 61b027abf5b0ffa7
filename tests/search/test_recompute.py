"""Optimal recompute: exact candidates, bounds that hold against brute force, and budgets that say what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, InputError
from search.plan_sequence import optimal_recompute, sequence_of
from search.recompute import RecomputeSolver
from simulator.plan import Batch, Memory, MemoryBlock, Plan
from simulator.sequence import Operation, keep_all
from simulator.simulate import StepSetting, simulate
from simulator.workload import Workload
from tests.small_models import BATCH, SMALL_MODELS, traced
from tests.small_steps import nested, sequences

DEVICE = load_hardware("h100-sxm")
NUM_BUDGETS = 6
BRUTE_FORCED = ("no-grad-region", "cached-attribute", "class-token", "spectral")
"""Models of at most four blocks."""


@cache
def solver(name: str, num_microbatches: int = 1) -> RecomputeSolver:
    workload = traced(name, num_microbatches).workload
    return RecomputeSolver(workload, DEVICE, StepSetting(num_microbatches=num_microbatches))


def budgets(the_solver: RecomputeSolver) -> list[int]:
    """From the least to the plain schedule's."""
    least, plain = the_solver.least().peak_bytes, the_solver.experts()[0].peak_bytes
    return [least + (plain - least) * step // (NUM_BUDGETS - 1) for step in range(NUM_BUDGETS)]


def all_sequences(workload: Workload, first: int, last: int) -> Iterator[tuple[Operation, ...]]:
    """Every memory-persistent sequence of the blocks first ... last."""
    for option in workload.blocks[first].options:
        here = Operation("F_all", first, option.name)
        if first == last:
            yield here, Operation("B", first)
            continue
        for rest in all_sequences(workload, first + 1, last):
            yield here, *rest, Operation("B", first)
    for middle in range(first + 1, last + 1):
        forward = (Operation("F_ck", first), *(Operation("F_e", block) for block in range(first + 1, middle)))
        for upper in all_sequences(workload, middle, last):
            for lower in all_sequences(workload, first, middle - 1):
                yield *forward, *upper, *lower


@pytest.mark.parametrize("num_microbatches", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_bounds_experts_and_budgets(name: str, num_microbatches: int) -> None:
    found = solver(name, num_microbatches)
    previous_s = float("inf")
    for budget in budgets(found):
        best = found.best(budget)
        assert best.peak_bytes <= budget
        assert found.fastest_s <= found.lower_bound_s(budget) <= best.step_time_s * (1 + 1e-12)
        fitting = [expert.step_time_s for expert in found.experts() if expert.peak_bytes <= budget]
        assert best.step_time_s <= min(fitting, default=float("inf")), "no slower than what an expert would set"
        assert best.step_time_s <= previous_s * (1 + 1e-12), "more memory never takes longer"
        previous_s = best.step_time_s
    assert best.step_time_s == found.fastest_s
    assert found.lower_bound_s(budget) == pytest.approx(found.fastest_s, rel=1e-12)


@pytest.mark.parametrize("name", BRUTE_FORCED)
def test_against_every_sequence(name: str) -> None:
    found = solver(name)
    count = len(found.workload.blocks)
    every = [found.evaluate("brute force", operations) for operations in all_sequences(found.workload, 0, count - 1)]
    assert len(every) > 2**count
    assert found.least().peak_bytes <= min(one.peak_bytes for one in every)
    for budget in budgets(found):
        optimum = min(one.step_time_s for one in every if one.peak_bytes <= budget)
        assert found.lower_bound_s(budget) <= optimum * (1 + 1e-12)
        assert found.best(budget).step_time_s == pytest.approx(optimum, rel=1e-9), budget


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_a_candidate_is_what_the_engine_says(num_microbatches: int) -> None:
    found = solver("transformer", num_microbatches)
    for label, operations in sequences(traced("transformer", num_microbatches)).items():
        candidate = found.evaluate(label, operations)
        simulated = simulate(found.workload, operations, DEVICE, found.setting)
        assert candidate.step_time_s == pytest.approx(simulated.step_time_s, rel=1e-9)
        assert candidate.peak_bytes == simulated.peak_memory_bytes[0]
        assert found.evaluate(candidate.name, operations) is candidate


@pytest.mark.parametrize("name", ["residual-mlp", "transformer", "convolution-net", "skip-over-everything"])
def test_an_infeasible_budget_names_the_least_and_that_one_fits(name: str) -> None:
    found = solver(name)
    least = found.least().peak_bytes
    for budget in (1, least - 1):
        with pytest.raises(InfeasibleError) as caught:
            found.best(budget)
        assert caught.value.needed_bytes == least
        message = str(caught.value)
        assert message.startswith(f"infeasible: a memory budget of {budget} bytes")
        assert f"holds no schedule of {name} at micro-batch {BATCH}; the least budget that fits is {least} bytes (" in message
    assert found.best(least).peak_bytes == least


def test_experts_by_name() -> None:
    found = solver("transformer")
    none, selective, full, segments = found.experts()
    assert none.operations == keep_all(8)
    assert [one.name for one in (none, selective, full, segments)] == ["none", "selective", "full", "sqrt-segments"]
    assert none.step_time_s < selective.step_time_s < full.step_time_s
    assert none.peak_bytes > selective.peak_bytes
    assert none.peak_bytes > full.peak_bytes
    assert segments.step_time_s < full.step_time_s


def test_optimal_in_a_plan() -> None:
    found = solver("residual-mlp")
    budget = budgets(found)[2]
    plan = Plan(batch=Batch(global_batch=BATCH, micro_batch=BATCH), memory=Memory(recompute="optimal", budget_bytes=budget))
    operations = optimal_recompute(plan, found.workload, DEVICE)
    assert operations == found.best(budget).operations
    assert sequence_of(plan, found.workload, DEVICE) == operations
    roomy = Plan(batch=plan.batch, memory=Memory(recompute="optimal"))
    assert optimal_recompute(roomy, found.workload, DEVICE) == keep_all(5), "without a budget, the device's memory"
    named = Plan(batch=plan.batch, memory=Memory(recompute="none"))
    assert sequence_of(named, found.workload, DEVICE) == keep_all(5)


def test_single_blocks_beside_the_best_sequence_are_refused() -> None:
    plan = Plan(memory=Memory(recompute="optimal", block=(MemoryBlock(recompute="full"),)))
    with pytest.raises(
        InputError, match=r'memory.block\[0\].recompute = .full.: memory.recompute = "optimal" says of every block'
    ):
        optimal_recompute(plan, solver("residual-mlp").workload, DEVICE)


def test_a_small_device_limits_like_a_budget() -> None:
    found = solver("residual-mlp")
    least = found.least().peak_bytes
    plan = Plan(batch=Batch(global_batch=BATCH, micro_batch=BATCH), memory=Memory(recompute="optimal"))
    small = DEVICE.changed(memory_bytes=least + 7, context_bytes=7)
    peak = found.evaluate("small", optimal_recompute(plan, found.workload, small)).peak_bytes
    assert peak <= least
    with pytest.raises(InfeasibleError, match=f"the least budget that fits is {least} bytes"):
        optimal_recompute(plan, found.workload, DEVICE.changed(memory_bytes=least + 6, context_bytes=7))


def test_the_least_is_no_more_than_any_sequence_of_the_tests() -> None:
    for name in ("residual-mlp", "transformer"):
        found = solver(name)
        assert found.least().peak_bytes <= found.evaluate("nested", nested(len(found.workload.blocks))).peak_bytes
