"""Least memory near the best time, and time against memory, from searches under budgets whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hardware_models.errors import InfeasibleError
from search.cluster_objectives import Search, least_memory, time_against_memory
from search.joint.space import JointRequest

WHOLE = 1 << 20


@dataclass(frozen=True)
class Request:
    """As much of a request as budgets need."""

    budget_bytes: int | None = WHOLE


def hyperbola(least_bytes: int, *, proven: bool) -> tuple[Search, list[int]]:
    """A model whose best time is WHOLE / memory seconds, and the budgets that it was asked for."""
    asked: list[int] = []

    def search(request: Any, _limit_s: float) -> Any:
        budget = request.budget_bytes
        asked.append(budget)
        if budget < least_bytes:
            raise InfeasibleError(limit="too little", smallest_change="more", needed_bytes=least_bytes)
        seconds = WHOLE / budget
        simulation = SimpleNamespace(step_time_s=seconds, peak_memory_bytes=(budget // 2, budget))
        return SimpleNamespace(simulation=simulation, lower_bound_s=seconds if proven else 0.0, plan=None)

    return cast("Search", search), asked


@pytest.mark.parametrize("proven", [True, False])
def test_the_least_memory_within_a_quarter_more_time_is_four_fifths(proven: bool) -> None:
    search, asked = hyperbola(WHOLE // 4, proven=proven)
    found = least_memory(cast("JointRequest", Request()), search, within=0.25, time_limit_s=60.0)
    assert 0.8 <= found.peak_bytes / WHOLE <= 0.8 + 2**-4
    assert found.best.simulation.step_time_s <= 1.25
    assert found.lower_bound_bytes == (max(budget for budget in asked if budget < 0.8 * WHOLE) if proven else 0)
    times = [one.simulation.step_time_s for one in found.front]
    assert times == sorted(times)


def test_any_time_leads_to_the_least_that_fits() -> None:
    search, _ = hyperbola(WHOLE // 4, proven=True)
    found = least_memory(cast("JointRequest", Request()), search, within=float("inf"), time_limit_s=60.0)
    assert WHOLE // 4 <= found.peak_bytes <= WHOLE // 4 + WHOLE // 16


def test_the_frontier_ends_where_nothing_fits() -> None:
    search, asked = hyperbola(WHOLE // 4, proven=True)
    found = time_against_memory(cast("JointRequest", Request()), search, time_limit_s=60.0)
    peaks = [max(one.simulation.peak_memory_bytes) for one in found.front]
    assert peaks == sorted(peaks, reverse=True)
    assert len(peaks) == len(asked) - 1
    assert asked[-1] < WHOLE // 4


def test_what_does_not_fit_at_all_is_refused() -> None:
    search, _ = hyperbola(2 * WHOLE, proven=True)
    with pytest.raises(InfeasibleError, match="too little"):
        least_memory(cast("JointRequest", Request()), search, within=0.1, time_limit_s=60.0)
