"""What a search beside samplers is charged for: the experts' plans that it simulated, no more and no fewer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from search.joint import sampler_comparison
from search.joint.experts import Expert
from search.joint.sampler_comparison import SETTINGS, _experts_simulated
from simulator.plan import Batch, Plan

PLANS = tuple(Plan(batch=Batch(global_batch=count)) for count in range(1, 5))
BOUNDS = dict(zip(PLANS, (1.0, 2.0, 3.0, 4.0), strict=True))


def baseline(name: str, seconds: float, *, fits: bool) -> Any:
    return SimpleNamespace(name=name, step_time_s=seconds, fits=fits)


@pytest.mark.parametrize(
    ("baselines", "count"),
    [
        ([baseline("rule", 2.5, fits=True)], 2),
        ([baseline("rule", 1.0, fits=True)], 1),
        ([baseline("rule", 9.0, fits=False)], 4),
        ([baseline("rule", 3.5, fits=True), baseline("other", 2.5, fits=True)], 3 + 2),
        ([], 0),
    ],
)
def test_plans_of_a_rule_are_simulated_up_to_its_answer(
    monkeypatch: pytest.MonkeyPatch, baselines: list[Any], count: int
) -> None:
    """In the order of their bounds until one is not below the answer; all of a rule that nothing fits; none of a rule without an answer."""
    rules = tuple(Expert(name=name, source="a test", plans=PLANS) for name in ("rule", "other"))
    monkeypatch.setattr(sampler_comparison, "experts", lambda _request: rules)
    evaluator: Any = SimpleNamespace(space=SimpleNamespace(request=None), bound_s=BOUNDS.__getitem__)
    assert _experts_simulated(evaluator, baselines) == count


def test_a_hard_setting_is_among_those_compared() -> None:
    assert len(SETTINGS) == 3
    assert any(setting.model == "gpt3-175b" and setting.trainer == "any" for setting in SETTINGS)
