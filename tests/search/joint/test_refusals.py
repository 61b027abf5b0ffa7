"""Refused plans: counted by rule, whatever values break it, and shown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.errors import InputError
from search.joint.best_first import BestFirst
from search.joint.evaluate import Evaluator
from search.joint.refusals import reason_of, refusal_line, together
from search.joint.space import joint_space
from search.joint.step_bounds import Bound
from tests.search.joint.joint_cases import device_of, small_request, source_of


def refusal(rule: str, *, key: str = "memory.grad_offload") -> InputError:
    return InputError(source="plan", key=key, value=1.0, rule=rule)


def test_values_of_a_rule_are_left_out_of_its_reason() -> None:
    first = refusal(
        "grad_offload <= optimizer_offload must hold, but got 1.0 > 0.5 under 1f1b in bf16", key="memory.block[0].x"
    )
    other = refusal(
        "grad_offload <= optimizer_offload must hold, but got 0.25 > 0 under 1f1b in bf16", key="memory.block[12].x"
    )
    expected = "memory.block[#].x: grad_offload <= optimizer_offload must hold, but got # > # under 1f1b in bf16"
    assert reason_of(first) == reason_of(other) == expected
    assert reason_of(refusal("2*4*2 != 8", key="")) == "#*#*# != #"


def test_parts_are_counted_together_most_first() -> None:
    found = together([{"b": 1, "a": 1}, {"c": 3}, {"b": 1, "d": 1}])
    assert list(found.items()) == [("c", 3), ("b", 2), ("a", 1), ("d", 1)]
    assert refusal_line(found) == "7 plans were not looked at, for the simulator refuses them: 3 x c; 2 x b; 1 x a; 1 x d"
    assert refusal_line({}) == ""


def test_a_point_counts_the_plans_that_the_simulator_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's offload takes parameters, gradients and optimizer states to the host together, which whole replicas cannot."""
    request = small_request(layers=2, gpus=2, batch=2, trainer="pytorch")
    space = joint_space(request)
    plans = [space.plan(index) for index in range(len(space))]
    index = next(n for n, plan in enumerate(plans) if plan.parallel.dp == 2 and plan.memory.zero_stage == 0)
    evaluator = Evaluator(space, source_of(request), device_of(request))
    point = evaluator.refined(index, float("inf"))
    unbounded = replace(point, ways=tuple((Bound(0.0, 0), memory) for _, memory in point.ways))
    monkeypatch.setattr(evaluator, "refined", lambda index, incumbent: unbounded)  # noqa: ARG005 - as the method is called
    found = BestFirst(evaluator, float("inf"))
    found.add(index)
    found.run(float("inf"))
    # all on the host, with recompute none and full
    reason = "memory.grad_offload: gradients that replicas reduce once a step stay on the device until then"
    assert found.refused == {reason: 2}
    assert found.num_simulated >= 1
