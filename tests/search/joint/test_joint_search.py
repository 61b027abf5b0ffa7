"""The joint search: equal to brute force where that is possible, never worse than a baseline, the same answer however it is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hardware_models.errors import InfeasibleError, InputError
from search.joint.best_first import BestFirst
from search.joint.evaluate import Evaluator
from search.joint.joint_search import JointResult, joint_search
from search.joint.memory_variants import memory_variants
from search.joint.space import JointRequest, joint_space
from search.stage_recompute import simulate_on_cluster
from search.trainers import violations
from tests.search.joint.joint_cases import all_plans, device_of, small_request, source_of


def answer(request: JointRequest, *, storage: str | None = None, workers: int = 1) -> JointResult:
    return joint_search(request, source_of(request), device_of(request), storage=storage, workers=workers)


def brute_force(request: JointRequest, *, engine: str = "compiled") -> float:
    """Least time of all plans that fit."""
    source, device, times = source_of(request), device_of(request), [float("inf")]
    for plan in all_plans(joint_space(request)):
        try:
            found = simulate_on_cluster(source, plan, request.cluster, device=device, engine=engine)
        except (InputError, InfeasibleError):
            continue
        if found.fits:
            times.append(found.step_time_s)
    return min(times)


def test_a_tiny_search_is_certified_and_equals_brute_force() -> None:
    request = small_request(layers=2, gpus=2, batch=2, trainer="torchtitan")
    found = answer(request)
    assert found.certified
    assert found.simulation.step_time_s == pytest.approx(brute_force(request, engine="simpy"), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "gpus", "batch", "trainer", "budget_gb"),
    [(2, 2, 2, "any", None), (2, 2, 4, "any", 1.2), (3, 4, 4, "megatron", 1.0), (4, 4, 8, "deepspeed", None), (2, 2, 2, "pytorch", 1.3)],
)  # fmt: skip
def test_certified_searches_equal_brute_force(
    layers: int, gpus: int, batch: int, trainer: str, budget_gb: float | None
) -> None:
    budget = None if budget_gb is None else int(budget_gb * 1e9)
    request = small_request(layers=layers, gpus=gpus, batch=batch, trainer=trainer, budget_bytes=budget)
    least_s = brute_force(request)
    found = answer(request)
    assert found.certified
    assert found.simulation.step_time_s == pytest.approx(least_s, rel=1e-9)


def test_the_answer_is_legal_fits_and_is_never_worse_than_a_baseline() -> None:
    request = small_request(layers=4, gpus=4, batch=8, trainer="megatron")
    found = answer(request)
    assert found.plan.num_gpus == 4
    assert found.simulation.fits
    assert violations(found.plan, request.trainer, layers=4) == ()
    assert found.baselines
    assert all(found.simulation.step_time_s <= one.step_time_s for one in found.baselines if one.fits)
    assert found.lower_bound_s <= found.simulation.step_time_s
    times = [one["step_time_s"] for one in found.pareto()]
    assert times == sorted(times)


def test_workers_and_a_resumed_study_give_the_same_answer(tmp_path: Path) -> None:
    request = small_request(layers=2, gpus=2, batch=4, trainer="torchtitan")
    alone, storage = answer(request), f"journal:{tmp_path / 'study.log'}"
    several = answer(request, storage=storage, workers=2)
    again, later = answer(request, storage=storage), answer(request, storage=storage)
    assert alone.plan == several.plan == again.plan
    assert alone.certified
    assert several.certified
    assert again.study.progress.num_simulated == later.study.progress.num_simulated


def test_a_budget_that_nothing_fits_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="no plan over 2 devices fits 1000 bytes") as raised:
        answer(small_request(layers=2, gpus=2, batch=2, trainer="torchtitan", budget_bytes=1000))
    assert raised.value.needed_bytes > 1000
    assert "the least that fits is" in raised.value.smallest_change


def test_a_search_that_runs_out_of_time_says_so_and_goes_on_later(tmp_path: Path) -> None:
    request, storage = small_request(layers=3, gpus=4, batch=8, trainer="megatron"), f"journal:{tmp_path / 'study.log'}"
    source, device = source_of(request), device_of(request)
    short = joint_search(request, source, device, storage=storage, time_limit_s=1e-3)
    assert not short.certified
    assert 0.0 < short.gap < 1.0
    whole = joint_search(request, source, device, storage=storage)
    assert whole.certified
    assert whole.simulation.step_time_s <= short.simulation.step_time_s
    assert short.lower_bound_s <= whole.lower_bound_s


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_model_states_are_never_counted_above_what_is_simulated(zero_stage: int) -> None:
    request = small_request(layers=4, gpus=4, batch=4)
    space = joint_space(request)
    evaluator = Evaluator(space, source_of(request), device_of(request))
    seen = 0
    for index in range(0, len(space), max(1, len(space) // 40)):
        plan = space.plan(index)
        if plan.memory.zero_stage != zero_stage:
            continue
        found = evaluator.simulate(plan, reserved=False)
        assert evaluator.states_bytes(plan, plan) <= max(found.peak_memory_bytes)
        seen += 1
    assert seen > 3


def test_a_point_is_worth_its_fastest_plan_that_fits_optimal_recompute_included() -> None:
    request = small_request(layers=4, gpus=2, batch=16)
    space = joint_space(request)
    index = next(n for n in range(len(space)) if (plan := space.plan(n)).parallel.pp == 2 and plan.batch.micro_batch == 8)
    evaluator = Evaluator(space, source_of(request), device_of(request))
    plain = evaluator.simulate(space.plan(index), reserved=False)
    tight = joint_space(replace(request, budget_bytes=int(0.9 * max(plain.peak_memory_bytes))))
    evaluator = Evaluator(tight, source_of(request), device_of(request))
    times: dict[str, float] = {}
    for memory in memory_variants(request.trainer, tight.plan(index)):
        try:
            found = evaluator.simulate(replace(tight.plan(index), memory=memory))
        except (InputError, InfeasibleError):
            continue
        if found.fits:
            times[memory.recompute] = min(times.get(memory.recompute, found.step_time_s), found.step_time_s)
    assert "optimal" in times
    queue = BestFirst(evaluator, float("inf"))
    queue.add(index)
    assert queue.run(float("inf")) == float("inf")
    assert queue.incumbent == min(times.values())
    assert min(times.values()) > plain.step_time_s
