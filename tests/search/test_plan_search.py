"""The search over micro-batch and recompute: never slower than an expert, proven, resumed, and honest about what does not fit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, InputError
from search.device.host_cells import TECHNIQUES, Technique
from search.found_plan import Found
from search.plan_search import PlanSearch, SearchRequest, SearchResult, search
from search.plan_sequence import sequence_of
from search.plan_space import PARETO_BUDGETS
from search.search_request import usable_techniques
from search.step_evaluator import Candidate
from simulator.host_schedule import HostShares
from simulator.model_source import ModelSource, model_source
from simulator.plan_file import plan_to_dict
from simulator.sequence import format_sequence, keep_all
from simulator.simulate import StepSetting, simulate, step_setting

BATCH = 2
"""Samples of a step: few, since each size that divides them is traced."""

DEVICE = load_hardware("h100-sxm")
KEYS = set(
    "techniques unlimited_memory_s overhead best objective budget_bytes lower_bound_s gap certified space_size num_simulated elapsed_s baselines pareto".split()
)


@cache
def model(name: str = "residual_mlp") -> ModelSource:
    return model_source(f"tests.small_models:{name}")


def request(budget_bytes: int, **changes: Any) -> SearchRequest:
    """Of recompute alone, unless techniques are given."""
    given = {"model": model(), "techniques": ("recompute",)} | changes
    return SearchRequest(device=DEVICE, global_batch=BATCH, budget_bytes=budget_bytes, **given)


@cache
def space(name: str = "residual_mlp") -> PlanSearch:
    return PlanSearch(request(1 << 40, model=model(name)))


def middle_budget() -> int:
    return (space().least().peak_bytes + space().plain().peak_bytes) // 2


@cache
def middle() -> SearchResult:
    return search(request(middle_budget()))


def test_the_best_is_no_slower_than_any_expert_that_fits() -> None:
    found = middle()
    fitting = [one["step_time_s"] for one in found.baselines.values() if one["fits"]]
    assert fitting
    assert len(fitting) < len(found.baselines)
    assert found.simulation.step_time_s <= min(fitting)
    assert found.simulation.fits
    assert max(found.simulation.peak_memory_bytes) <= middle_budget()
    assert set(found.baselines) == {
        f"{name}, micro_batch {size}" for name in ("none", "selective", "full", "sqrt-segments") for size in (2, 1)
    }


def test_bound_and_gap() -> None:
    found = middle()
    best_s = found.simulation.step_time_s
    assert 0 < found.lower_bound <= best_s * (1 + 1e-12)
    assert found.gap == pytest.approx((best_s - found.lower_bound) / best_s, abs=1e-9)
    assert found.certified == (found.gap <= 1e-9)
    assert found.space_size == 2
    assert 1 <= found.study.num_simulated <= found.space_size


def test_the_plan_stands_for_the_sequence() -> None:
    found = middle()
    workload = model().workload(found.plan.batch.micro_batch or 0)
    operations = sequence_of(found.plan, workload, DEVICE)
    setting = StepSetting(num_microbatches=found.plan.num_microbatches, optimizer="adamw")
    assert simulate(workload, operations, DEVICE, setting).step_time_s == pytest.approx(found.simulation.step_time_s, rel=1e-12)
    assert found.plan.memory.budget_bytes == middle_budget()


def test_keys_of_the_command_line() -> None:
    found = middle().to_json()
    assert set(found) == KEYS
    assert found["best"]["plan"] == plan_to_dict(middle().plan)
    assert found["best"]["sequence"] == format_sequence(middle().operations).splitlines()
    assert json.loads(json.dumps(found))["certified"] is middle().certified


def test_with_room_enough_nothing_is_recomputed() -> None:
    found = search(request(1 << 40))
    assert found.plan.memory.recompute == "none"
    assert found.plan.batch.micro_batch == BATCH
    assert found.certified
    assert found.study.num_simulated == 1, "the bounds exclude smaller micro-batches"


def test_more_memory_is_never_slower_along_the_frontier() -> None:
    frontier = search(request(middle_budget(), objective="pareto")).pareto
    assert 1 <= len(frontier) <= PARETO_BUDGETS
    times, peaks = ([one[key] for one in frontier] for key in ("step_time_s", "peak_memory_bytes"))
    assert times == sorted(times, reverse=True)
    assert peaks == sorted(peaks)
    assert peaks[0] == space().least().peak_bytes


def test_below_the_least_budget_nothing_fits_and_the_least_does() -> None:
    least = space().least().peak_bytes
    with pytest.raises(InfeasibleError) as caught:
        search(request(least - 1))
    assert caught.value.needed_bytes == least
    assert f"the least budget that fits is {least} bytes" in str(caught.value)
    assert search(request(least)).simulation.peak_memory_bytes == (least,)
    with pytest.raises(InfeasibleError, match=f"the least budget that fits is {least} bytes"):
        space().best_within(least - 1)
    assert space().best_within(least).candidate.peak_bytes == least


def test_the_least_memory_as_an_objective() -> None:
    found = search(request(1 << 40, objective="memory", within=math.inf))
    least = space().least().peak_bytes
    assert found.simulation.peak_memory_bytes == (least,)
    assert found.study.best.values == [float(least)]
    assert 1 <= found.study.num_simulated <= found.space_size
    shown = found.to_json()
    assert 0.5 * least < shown["lower_bound_bytes"] <= least
    assert "lower_bound_s" not in shown
    operations = sequence_of(found.plan, model().workload(found.plan.batch.micro_batch or 0), DEVICE)
    assert format_sequence(operations) == format_sequence(found.operations), "the plan's budget leads back to the sequence"


def test_a_study_in_a_storage_is_gone_on_with(tmp_path: Path) -> None:
    storage = f"journal:{tmp_path / 'study.log'}"
    asked: list[int] = []
    wanted = request(middle_budget())
    first = search(wanted, storage=storage, on_trial=lambda _study, trial: asked.append(trial.number))
    again = search(wanted, storage=storage, on_trial=lambda _study, trial: asked.append(trial.number))
    assert len(asked) == first.study.num_simulated
    assert again.study.num_simulated == 0
    assert (again.plan, again.operations) == (first.plan, first.operations)
    other = search(replace(wanted, budget_bytes=wanted.budget_bytes + 1), storage=storage)
    assert other.study.num_simulated > 0, "another budget is another study"


def test_a_model_that_mixes_samples_keeps_its_batch_unless_allowed() -> None:
    assert space("convolution_net").micro_batches() == (BATCH,)
    allowed = PlanSearch(request(1 << 40, model=model("convolution_net"), allow=("split-batch",)))
    assert allowed.micro_batches() == (2, 1)
    assert allowed.least().peak_bytes <= space("convolution_net").least().peak_bytes


def test_the_same_request_has_the_same_text_and_others_another() -> None:
    one = request(100)
    assert one.text == request(100).text
    others = [
        request(101), request(100, objective="memory"), request(100, allow=("split-batch",)), request(100, optimizer="sgd"),
        replace(one, global_batch=1), replace(one, device=DEVICE.changed(name="other")), request(100, model=model("convolution_net")),
    ]  # fmt: skip
    assert len({one.text, *(other.text for other in others)}) == len(others) + 1


def test_refusals_of_a_request() -> None:
    with pytest.raises(InputError, match=r"--global-batch = 0: global_batch >= 1 must hold"):
        replace(request(1), global_batch=0)
    with pytest.raises(InputError, match=r"--allow = 'fp8': known are split-batch, tf32, bf16"):
        request(1, allow=("fp8",))
    with pytest.raises(InputError, match=r"micro_batch = 12: the example inputs hold 6 samples"):
        search(replace(request(1), global_batch=12))


ALL: tuple[Technique, ...] = TECHNIQUES


@cache
def joint() -> SearchResult:
    """Below what recompute alone can do."""
    return search(request(space().least().peak_bytes * 3 // 4, techniques=ALL))


@pytest.mark.slow
def test_together_fits_where_recompute_alone_does_not() -> None:
    found = joint()
    budget = space().least().peak_bytes * 3 // 4
    assert found.simulation.fits
    assert max(found.simulation.peak_memory_bytes) <= budget
    assert found.simulation.peak_host_bytes > 0
    assert 0 < found.lower_bound <= found.simulation.step_time_s
    fitting = [one["step_time_s"] for one in found.baselines.values() if one["fits"]]
    assert found.simulation.step_time_s <= min(fitting, default=math.inf) * (1 + 1e-12)
    assert found.to_json()["overhead"] == pytest.approx(found.simulation.step_time_s / found.unlimited_s - 1)


@pytest.mark.slow
def test_together_is_never_slower_than_recompute_alone() -> None:
    assert search(request(middle_budget(), techniques=ALL)).simulation.step_time_s <= middle().simulation.step_time_s


@pytest.mark.slow
def test_a_joint_plan_is_read_back_with_its_fractions() -> None:
    found = joint()
    setting = step_setting(found.plan, len(found.simulation.workload.blocks))
    again = simulate(found.simulation.workload, found.operations, DEVICE, setting)
    assert again.step_time_s == found.simulation.step_time_s
    assert again.peak_memory_bytes == found.simulation.peak_memory_bytes


def test_what_is_found_survives_a_storage() -> None:
    shares = HostShares(activations=(0.0, 0.5), weights=(0.25,) * 2, optimizer=1.0)
    candidate = Candidate(name="optimal", operations=keep_all(2), shares=shares, step_time_s=0.1, peak_bytes=7, host_bytes=8)
    found = Found(micro_batch=2, precision="bf16", candidate=candidate)
    assert Found.from_attributes(json.loads(json.dumps(found.to_attributes()))) == found


def test_an_incumbent_is_kept_where_nothing_is_better() -> None:
    tried = space()
    best = tried.best_within(middle_budget())
    impossible = replace(best, candidate=replace(best.candidate, step_time_s=0.0))
    assert tried.best_within(middle_budget(), incumbent=impossible) is impossible


def test_least_memory_near_the_best_time() -> None:
    fastest = middle().simulation.step_time_s
    found = search(request(middle_budget(), objective="memory", within=0.1))
    assert found.simulation.step_time_s <= 1.1 * fastest
    assert space().least().peak_bytes <= found.simulation.peak_memory_bytes[0] <= middle().simulation.peak_memory_bytes[0]
    assert 0 <= found.lower_bound <= found.simulation.peak_memory_bytes[0]


def test_a_precision_is_searched_where_it_is_allowed() -> None:
    found = PlanSearch(request(1 << 40, allow=("bf16",))).space()
    assert len(found) == 4
    assert {point.precision for point in found} == {"fp32", "bf16"}
    with pytest.raises(InputError, match="no peak for this dtype"):
        replace(request(1, allow=("bf16",)), device=load_hardware("v100-sxm2-16gb"))


def test_a_cpu_is_its_own_host() -> None:
    assert usable_techniques(DEVICE.changed(kind="cpu")) == (("recompute",), "a CPU is its own host")
    assert usable_techniques(DEVICE) == (ALL, "")
    techniques, reason = usable_techniques(replace(DEVICE, copy_engine=None))
    assert techniques == ("recompute",)
    assert "rate of copies" in reason
