"""Recompute and offload together on one device: never worse than either, below what either needs, and never below the bound."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, InputError
from search.device.device_solver import DeviceSolver, memory_keys
from search.device.host_cells import TECHNIQUES, HostBytes, HostCell, Technique, host_cells, neighbours, uniform_shares
from search.recompute import RecomputeSolver
from simulator.host_schedule import HostShares, host_shares
from simulator.plan import Memory, Plan
from simulator.sequence import checkpoint_blocks, keep_all
from simulator.simulate import StepSetting
from tests.simulator.test_host_planner import WEIGHT, chain
from tests.small_models import traced

DEVICE = load_hardware("h100-sxm")
FRACTIONS = st.floats(0.0, 1.0)
ALL_AWAY = HostCell(weights_low=0.5, weights_high=1.0, optimizer_low=0.5, optimizer_high=1.0)


@cache
def solver(techniques: tuple[Technique, ...] = TECHNIQUES, num_microbatches: int = 1) -> DeviceSolver:
    workload = traced("transformer", num_microbatches).workload
    recompute = RecomputeSolver(workload, DEVICE, StepSetting(num_microbatches=num_microbatches))
    return DeviceSolver(recompute, techniques)


def budget(part: float) -> int:
    """Between the least memory with all on the host and the plain step's."""
    least, plain = solver().least(ALL_AWAY).peak_bytes, solver().plain().peak_bytes
    return least + round(part * (plain - least))


@pytest.mark.parametrize("part", [pytest.param(0.2, marks=pytest.mark.slow), 0.6, pytest.param(0.9, marks=pytest.mark.slow)])
def test_together_is_never_slower_than_either_alone(part: float) -> None:
    limit = budget(part)
    together = solver(("recompute", "activations")).best(limit, HostCell()) if part > 0.5 else None
    for alone in (("recompute",), ("activations",)):
        try:
            found = solver(alone).best(limit, HostCell())
        except InfeasibleError:
            continue
        assert together is not None
        assert together.step_time_s <= found.step_time_s * (1 + 1e-12)
        assert together.peak_bytes <= limit


def test_less_memory_than_recompute_needs_is_enough_with_the_host() -> None:
    least_alone = solver(("recompute",)).least(HostCell()).peak_bytes
    limit = budget(0.1)
    assert limit < least_alone
    found = solver().best(limit, ALL_AWAY)
    assert found.peak_bytes <= limit
    assert found.host_bytes > 0


def test_what_does_not_fit_says_what_would() -> None:
    least = solver().least(ALL_AWAY).peak_bytes
    with pytest.raises(InfeasibleError, match=f"the least budget that fits is {least} bytes") as caught:
        solver().best(least - 1, ALL_AWAY)
    assert solver().best(caught.value.needed_bytes, ALL_AWAY).peak_bytes == least


@pytest.mark.parametrize("num_microbatches", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@given(activations=FRACTIONS, weights=FRACTIONS, optimizer=FRACTIONS, checkpointed=st.booleans())
@settings(max_examples=5)
def test_no_plan_is_below_its_cells_bound(
    num_microbatches: int, activations: float, weights: float, optimizer: float, *, checkpointed: bool
) -> None:
    found = solver(TECHNIQUES, num_microbatches)
    count = len(found.workload.blocks)
    operations = checkpoint_blocks(count, range(count - 1), ["all"] * count) if checkpointed else keep_all(count)
    shares = uniform_shares(count, activations=activations, weights=weights, optimizer=optimizer)
    plan = found.evaluator.exact(found.evaluator.evaluate("tried", operations, shares))
    cell = next(
        one for one in host_cells(TECHNIQUES)
        if one.weights_low <= weights <= one.weights_high and one.optimizer_low <= optimizer <= one.optimizer_high
    )  # fmt: skip
    assert found.bound.lower_bound_s(plan.peak_bytes, cell) <= plan.step_time_s * (1 + 1e-12)


def test_the_bound_of_recompute_alone_is_the_chains() -> None:
    alone = solver(("recompute",))
    limit = alone.least(HostCell()).peak_bytes
    assert alone.bound.lower_bound_s(limit, HostCell()) == alone.recompute.lower_bound_s(limit)


def test_bytes_of_cells_by_hand() -> None:
    """Five blocks of one parameter each: half of them is two, and what comes leaves out the blocks at both ends."""
    host = HostBytes(chain(5), num_microbatches=2, optimizer="adamw")
    half = HostCell(weights_low=0.5, weights_high=0.5, optimizer_low=0.0, optimizer_high=0.0)
    assert host.most_freed_bytes(half) == 5 * WEIGHT // 2
    traffic = host.least_traffic(half)
    away = 5 * WEIGHT // 2 - WEIGHT
    assert traffic.in_bytes == 2 * (2 * away - 2 * WEIGHT) + away
    assert (traffic.out_bytes, traffic.updated_bytes) == (away, 0)
    states = HostCell(optimizer_low=1.0, optimizer_high=1.0)
    assert host.most_freed_bytes(states) == 2 * 5 * WEIGHT + 4 * 5
    assert host.least_traffic(states).updated_bytes == 4 * WEIGHT * (2 + 2 + 1 + 2)
    assert host.most_gradients_freed_bytes(states) == 5 * WEIGHT


def test_cells_cover_all_fractions_once() -> None:
    assert host_cells(("recompute",)) == (HostCell(),)
    assert len(host_cells(TECHNIQUES)) == 9
    assert len({cell.text for cell in host_cells(TECHNIQUES)}) == 9
    with pytest.raises(InputError, match="0 <= low <= high <= 1 must hold"):
        HostCell(weights_low=0.5, weights_high=0.25)


def test_neighbours_stay_within_what_is_allowed() -> None:
    found = list(neighbours(0.0, 1.0, 0.25, TECHNIQUES))
    assert [(cell.weights_high, cell.optimizer_high) for cell in found] == [(0.25, 1.0), (0.0, 0.75)]
    assert [cell.optimizer_high for cell in neighbours(0.0, 0.5, 0.25, ("recompute", "optimizer"))] == [0.25, 0.75]


PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12)


@given(pairs=PAIRS, optimizer=FRACTIONS)
def test_a_plans_keys_are_read_back_as_the_same_fractions(pairs: list[tuple[float, float]], optimizer: float) -> None:
    activations, weights = zip(*pairs, strict=True)
    shares = HostShares(activations=activations, weights=weights, optimizer=optimizer)
    plan = Plan(memory=Memory(**memory_keys(shares)))  # type: ignore[arg-type]
    assert host_shares(plan, len(pairs)) == shares
    assert memory_keys(None) == {}


def test_whole_blocks_in_place_of_fractions_are_never_slower_and_above_the_bound() -> None:
    techniques: tuple[Technique, ...] = ("weights", "optimizer")
    found, half = solver(techniques), HostCell(weights_low=0.0, weights_high=0.5, optimizer_low=0.5, optimizer_high=1.0)
    limit = found.least(half).peak_bytes
    best = found.best(limit, half)
    placed = found.placed(best, limit)
    assert placed.peak_bytes <= limit
    assert placed.step_time_s <= best.step_time_s
    assert placed.shares is not None
    assert placed.step_time_s >= min(found.bound.lower_bound_s(limit, cell) for cell in host_cells(techniques))
    assert found.placed(best, limit, until=0.0) == best, "no time, no change"
    alone = found.recompute.best(found.plain().peak_bytes)
    assert found.placed(alone, limit) is alone, "nothing is on the host"
