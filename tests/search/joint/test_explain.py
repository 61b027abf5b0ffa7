"""Explanations: one decision at a time."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from math import prod

import pytest

from hardware_models.errors import InputError
from search.joint.explain import DECISIONS, GIVEN, Forecast, changes, contributions
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan

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


def test_every_key_of_a_plan_is_decided_or_given() -> None:
    keys = [f"{section.name}.{key.name}" for section in fields(Plan) for key in fields(getattr(Plan(), section.name))]
    decided = [key for own in DECISIONS.values() for key in own]
    assert sorted([*decided, *GIVEN]) == sorted(keys)


def test_the_way_multiplies_to_the_whole_and_begins_with_what_saves_most() -> None:
    theirs = replace(EXPERT, memory=Memory(zero_stage=1, recompute="full"), pipeline=Pipeline(schedule="zb-h1"))
    seen = []

    def seconds(plan: Plan) -> Forecast:
        seen.append(plan)
        factors = {
            "degrees": plan.parallel.tp > 1,
            "recompute": plan.memory.recompute == "full",
            "stage": plan.memory.zero_stage == 1,
            "order": plan.pipeline.schedule == "zb-h1",
        }
        slower = {"degrees": 1.5, "recompute": 2.0, "stage": 1.1, "order": 1.01}
        return Forecast(
            step_time_s=prod(slower[name] for name, theirs in factors.items() if theirs),
            fits=plan.memory.recompute == "full" or plan.parallel.tp == 1,
        )

    way = changes(BEST, theirs, seconds)
    # recompute would save most, but does not fit before the degrees are ours
    assert [one.decisions for one in way] == [("degrees",), ("recompute",), ("ZeRO stage",), ("pipeline order",)]
    assert way[0].before_s == pytest.approx(2.0 * 1.5 * 1.1 * 1.01)
    assert way[-1].after_s == 1.0
    assert prod(1.0 + one.brings for one in way) == pytest.approx(way[0].before_s / way[-1].after_s)
    assert all(one.after_s == after.before_s for one, after in pairwise(way))


def test_what_only_goes_together_is_one_step() -> None:
    def seconds(plan: Plan) -> Forecast:
        if (plan.parallel.tp > 1) != (plan.memory.recompute == "full"):
            raise InputError(source="plan", key="parallel.tp", value=8, rule="only with recompute")
        return Forecast(step_time_s=3.0 if plan.parallel.tp > 1 else 2.0, fits=True)

    (step,) = changes(BEST, replace(EXPERT, memory=Memory(zero_stage=3, recompute="full")), seconds)
    assert step.decisions == ("degrees", "recompute")
    assert (step.before_s, step.after_s) == (3.0, 2.0)
