"""Certified optima of tiny random requests are those of brute force: every point, every way to save memory, through the reference engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from hardware_models.errors import InfeasibleError
from search.joint.best_first import BestFirst
from search.joint.evaluate import Evaluator
from search.joint.space import joint_space
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from tests.search.joint.joint_cases import device_of, small_request, source_of
from tests.search.joint.tiny_instances import comparisons


@pytest.mark.parametrize("seed", [1, 2])
def test_a_certified_answer_is_the_one_of_brute_force(seed: int) -> None:
    for one in comparisons(seed, bases=1, budgets=3, most_plans=10):
        assert one.agrees, str(one)


@pytest.mark.slow
def test_two_hundred_certified_answers_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without experts' plans, which would be good answers to begin with: bounds and what a point rules out have to do it alone."""
    monkeypatch.setattr("search.joint.joint_search.experts", lambda _request: ())
    counts: Counter[str] = Counter()
    for one in comparisons(11, bases=20, budgets=10, most_plans=12):
        assert one.agrees, str(one)
        counts.update(("instances", *one.kinds()))
    assert counts["instances"] >= 200
    # the sample is worth something only if all of these decide some of it
    assert all(counts[kind] >= 5 for kind in ("infeasible", "pipeline", "recompute", "offload", "sharding")), counts


def test_a_plan_that_the_allocator_makes_infeasible_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best recompute may fit by live bytes and leave no room for what the allocator reserves: only then is it refused."""
    request = small_request(layers=4, gpus=2, batch=16)
    space = joint_space(request)
    plans = [space.plan(index) for index in range(len(space))]
    index = next(
        n
        for n, plan in enumerate(plans)
        if (plan.parallel.pp, plan.batch.micro_batch, plan.pipeline.schedule) == (2, 1, "gpipe")
    )
    source, device = source_of(request), device_of(request)
    plain = Evaluator(space, source, device).simulate(space.plan(index), reserved=False)
    tight = Evaluator(joint_space(replace(request, budget_bytes=int(0.9 * max(plain.peak_memory_bytes)))), source, device)
    simulate, refused = tight.simulate, []

    def full_device(plan: Plan, *, reserved: bool = True) -> ParallelSimulation:
        if reserved and plan.memory.recompute == "optimal":
            refused.append(plan)
            raise InfeasibleError(limit="reserved", smallest_change="more", needed_bytes=123)
        return simulate(plan, reserved=reserved)

    monkeypatch.setattr(tight, "simulate", full_device)
    found = BestFirst(tight, float("inf"))
    found.add(index)
    assert found.run(float("inf")) == float("inf")
    assert refused
    assert found.plan is None or found.plan.memory.recompute != "optimal"
    assert found.least_bytes == 123
