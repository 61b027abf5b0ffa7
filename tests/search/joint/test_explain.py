"""Explanations: one decision at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.errors import InputError
from search.joint.explain import Forecast, contributions
from simulator.plan import Batch, Memory, Parallel, Plan

BEST = Plan(parallel=Parallel(dp=8), batch=Batch(global_batch=8, micro_batch=1), memory=Memory(zero_stage=3))
EXPERT = replace(BEST, parallel=Parallel(tp=8), memory=Memory(zero_stage=0, recompute="full"))


def forecast(plan: Plan) -> Forecast:
    if plan.parallel.tp > 1 and plan.memory.zero_stage:
        raise InputError(source="plan", key="memory.zero_stage", value=3, rule="no replicas")
    return Forecast(step_time_s=3.0 if plan.memory.recompute == "full" else 2.0, fits=plan.memory.zero_stage == 3)


def test_each_decision_that_differs_is_exchanged_alone() -> None:
    found = {one.decision: one for one in contributions(BEST, EXPERT, forecast)}
    assert set(found) == {"degrees", "ZeRO stage", "recompute"}
    assert found["recompute"].brings(2.0) == pytest.approx(0.5)
    assert found["ZeRO stage"].reason == "does not fit"
    assert "no replicas" in found["degrees"].reason
    assert found["degrees"].brings(2.0) is None
