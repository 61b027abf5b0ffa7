"""The joint search: equal to brute force where that is possible, never worse than a baseline, the same answer however it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_models.errors import InfeasibleError, InputError
from search.joint.joint_search import JointResult, joint_search
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
    assert "the least that was seen is" in raised.value.smallest_change
