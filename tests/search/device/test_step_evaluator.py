"""Evaluating many shares of one sequence: the same step time and peak, to the byte, as lowering and playing the whole step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from search.step_evaluator import StepEvaluator
from simulator.host_schedule import HostShares
from simulator.sequence import Operation, checkpoint_blocks, keep_all
from simulator.simulate import StepSetting, simulate
from tests.small_models import traced

DEVICE = load_hardware("h100-sxm")
FRACTIONS = st.sampled_from([0.0, 0.3, 0.5, 1.0])


@cache
def evaluator(name: str, num_microbatches: int) -> StepEvaluator:
    return StepEvaluator(traced(name, num_microbatches).workload, DEVICE, StepSetting(num_microbatches=num_microbatches))


def sequences(found: StepEvaluator) -> list[tuple[Operation, ...]]:
    count = len(found.workload.blocks)
    return [keep_all(count), checkpoint_blocks(count, range(count - 1), ["all"] * count)]


@pytest.mark.parametrize("num_microbatches", [1, 2])
@given(activations=st.lists(FRACTIONS, min_size=16, max_size=16), weights=FRACTIONS, optimizer=FRACTIONS)
@settings(max_examples=5)
def test_time_and_peak_are_those_of_the_whole_simulation(
    num_microbatches: int, activations: list[float], weights: float, optimizer: float
) -> None:
    found = evaluator("residual-mlp", num_microbatches)
    count = len(found.workload.blocks)
    shares = HostShares(activations=tuple(activations[:count]), weights=(weights,) * count, optimizer=optimizer)
    for operations in sequences(found):
        candidate = found.evaluate("tried", operations, shares)
        whole = simulate(found.workload, operations, DEVICE, replace(found.setting, host=shares if shares.any else None))
        assert candidate.peak_bytes == whole.peak_memory_bytes[0]
        assert candidate.step_time_s == pytest.approx(whole.step_time_s, rel=1e-12)
        assert candidate.host_bytes == whole.peak_host_bytes


@pytest.mark.parametrize("name", [pytest.param("transformer", marks=pytest.mark.slow), "convolution-net"])
def test_many_micro_batches_are_exact_once_all_are_lowered(name: str) -> None:
    found = evaluator(name, 6)
    count = len(found.workload.blocks)
    shares = HostShares(activations=(0.5,) * count, weights=(0.5,) * count, optimizer=0.5)
    candidate = found.exact(found.evaluate("tried", sequences(found)[1], shares))
    whole = simulate(found.workload, candidate.operations, DEVICE, replace(found.setting, host=shares))
    assert candidate.step_time_s == pytest.approx(whole.step_time_s, rel=1e-12)
    assert candidate.peak_bytes == whole.peak_memory_bytes[0]


def test_compute_is_what_remains_of_a_step_without_its_update() -> None:
    found = evaluator("residual-mlp", 3)
    for operations in sequences(found):
        whole = simulate(found.workload, operations, DEVICE, found.setting)
        update_s = float(whole.program.duration_s[-1])
        assert found.compute_s(operations) == pytest.approx(whole.step_time_s - update_s, rel=1e-12)


def test_a_candidate_has_the_name_that_it_is_asked_by() -> None:
    found = evaluator("residual-mlp", 1)
    operations = sequences(found)[0]
    assert [found.evaluate(name, operations).name for name in ("first", "second")] == ["first", "second"]
