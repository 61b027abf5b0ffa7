"""Samplers beside the search: only legal plans, never better than a proven one, and they go on where they stopped."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InputError
from search.joint.batch_study import Progress
from search.joint.evaluate import Evaluator
from search.joint.joint_search import joint_search
from search.joint.sampled_study import SAMPLERS, Judge, LegalPlans, SampledRun, run_sampled
from search.joint.sampler_curves import OURS, CurvePoint, read_curves, write_curves
from search.joint.sampler_figures import sampler_figure
from search.joint.space import joint_space
from search.trainers import violations
from simulator.plan_file import plan_from_dict
from tests.search.joint.joint_cases import device_of, small_request, source_of

REQUEST = small_request(layers=2, gpus=4, batch=4, trainer="megatron")
SPACE = joint_space(REQUEST)
PLANS = LegalPlans(SPACE)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Evaluator(SPACE, source_of(REQUEST), device_of(REQUEST)))


@settings(max_examples=30)
@given(st.data())
def test_the_nearest_plan_is_legal(data: st.DataObject) -> None:
    proposed = {}
    for name, one in PLANS.distributions.items():
        choices = st.sampled_from(one.choices) if hasattr(one, "choices") else st.integers(one.low, one.high)  # type: ignore[attr-defined]
        proposed[name] = data.draw(choices, label=name)
    plan = PLANS.nearest(proposed)
    assert plan is not None
    assert plan.num_gpus == 4
    assert violations(plan, REQUEST.trainer, layers=2) == ()


@pytest.mark.parametrize("index", range(0, len(SPACE), 17))
def test_a_plan_that_is_proposed_exactly_is_taken(index: int) -> None:
    plan, row = SPACE.plan(index), SPACE.points.row(index)
    named = {
        "schedule": plan.pipeline.schedule,
        "placement": plan.parallel.order,
        "cp_method": plan.parallel.cp_method,
        "compute": plan.precision.compute,
    }
    inner = {"recompute": "full", "optimizer_offload": 0.0, "activation_offload": 0.0, "weight_offload": 0.0}
    taken = PLANS.nearest(row | named | inner)
    assert taken is not None
    assert (taken.parallel, taken.batch, taken.pipeline) == (plan.parallel, plan.batch, plan.pipeline)
    assert (taken.memory.zero_stage, taken.memory.recompute) == (plan.memory.zero_stage, "full")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_beats_the_proven_plan_and_each_is_the_same_again(sampler: str, judge: Judge) -> None:
    proven = joint_search(REQUEST, source_of(REQUEST), device_of(REQUEST))
    ways: list[list[Progress]] = [[], []]
    for passed in ways:
        run = SampledRun(sampler=sampler, seed=1, max_simulations=30)
        found = run_sampled(SPACE, judge, run, request="r", bound_s=proven.lower_bound_s, on_progress=passed.append)
        assert found.progress.num_simulated == 30
        assert found.best is not None
        assert found.best.values[0] >= proven.simulation.step_time_s
        plan = plan_from_dict(found.best.user_attrs["plan"])
        assert judge.verdict(plan, inf) is not None
    assert [(one.num_simulated, one.incumbent) for one in ways[0]] == [(one.num_simulated, one.incumbent) for one in ways[1]]
    assert all(later.incumbent <= one.incumbent for one, later in zip(ways[0], ways[0][1:], strict=False))


def test_a_sampled_study_goes_on_and_a_known_plan_stays_the_best(judge: Judge, tmp_path: Path) -> None:
    storage = f"journal:{tmp_path / 'study.log'}"

    def run(simulations: int, known_s: float = inf) -> int:
        wanted = SampledRun(sampler="random", max_simulations=simulations)
        found = run_sampled(SPACE, judge, wanted, request="r", bound_s=1e-6, known_s=known_s, storage=storage)
        assert (found.best is None) == (known_s < inf)
        return found.progress.num_simulated

    assert run(3) == 3
    assert run(6, known_s=1e-5) == 6


def test_curves_are_kept_and_drawn(tmp_path: Path) -> None:
    points = [
        CurvePoint(setting="one", method=OURS, seed=0, simulations=10, best_s=1.0, bound_s=0.5),
        CurvePoint(setting="one", method="tpe", seed=0, simulations=1, best_s=inf, bound_s=0.5),
        CurvePoint(setting="one", method="tpe", seed=0, simulations=100, best_s=1.25, bound_s=0.5),
    ]
    write_curves(points, tmp_path / "curves.csv")
    assert read_curves(tmp_path / "curves.csv") == tuple(points)
    (axes,) = sampler_figure(points).axes
    ours, bound, tpe = (list(line.get_ydata()) for line in axes.get_lines())
    assert (ours, bound) == ([1.0, 1.0], [0.5, 0.5])
    assert tpe[1:] == [1.25, 1.25]
    (tmp_path / "curves.csv").write_text("setting,method,seed,simulations,best_s,bound_s\none,tpe,0,1,fast,1\n")
    with pytest.raises(InputError, match="line 2, best_s = 'fast'"):
        read_curves(tmp_path / "curves.csv")
