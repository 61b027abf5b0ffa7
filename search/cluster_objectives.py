"""Other objectives than time over several devices: least memory near the best time, and time against memory, by joint searches under budgets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hardware_models.errors import InfeasibleError
from search.joint.joint_search import JointResult
from search.joint.space import JointRequest
from search.traced.request import TracedRequest
from simulator.plan_file import plan_to_dict

Request = TypeVar("Request", JointRequest, TracedRequest)
Search = Callable[[Request, float], JointResult]
"""A joint search of a request within seconds."""
FIRST_SHARE = 0.5
"""Of the time limit, for the search without a budget of its own."""
NUM_BUDGETS = 6
"""Searches under budgets, which share the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetedResult:
    """The chosen plan, and all that searches under budgets found."""

    best: JointResult
    lower_bound_bytes: int
    """No plan within the time takes less on its fullest rank: the largest budget under which that was proven."""
    front: tuple[JointResult, ...]
    """From the fastest to the smallest, none dominated."""

    @property
    def peak_bytes(self) -> int:
        """Of the chosen plan's fullest rank."""
        return max(self.best.simulation.peak_memory_bytes)

    def front_json(self) -> list[dict[str, Any]]:
        """The frontier as ``pareto`` in JSON."""
        return [
            {
                "step_time_s": one.simulation.step_time_s, "peak_memory_bytes": max(one.simulation.peak_memory_bytes), "lower_bound_s": one.lower_bound_s,
                "plan": plan_to_dict(one.plan),
            }
            for one in self.front
        ]  # fmt: skip


def least_memory(request: Request, search: Search[Request], *, within: float, time_limit_s: float) -> BudgetedResult:
    """The plan of least memory that takes at most ``within`` more than the best time found.

    **Model**: budgets are halved between one that no fast enough plan was found for and the peak of the best one so far; each is a search of its own.

    Args:
        request: its budget is the largest that is tried.
        search: answers a request within seconds.
        within: fraction of the best time.
        time_limit_s: of all searches together.

    Raises:
        InfeasibleError: nothing fits the request's budget.
    """
    end = time.monotonic() + time_limit_s
    fastest = search(request, FIRST_SHARE * time_limit_s)
    limit_s = (1 + within) * fastest.simulation.step_time_s
    best, low, proven, found = fastest, 0, 0, [fastest]
    for step in range(NUM_BUDGETS):
        budget = (low + max(best.simulation.peak_memory_bytes)) // 2
        left_s = (end - time.monotonic()) / (NUM_BUDGETS - step)
        if left_s <= 0 or budget <= low:
            break
        try:
            one = search(replace(request, budget_bytes=budget), left_s)
        except InfeasibleError:
            low = budget
            continue
        found.append(one)
        if one.simulation.step_time_s <= limit_s:
            best = one
        else:
            low = budget
            proven = max(proven, budget) if one.lower_bound_s > limit_s else proven
    return BudgetedResult(best=best, lower_bound_bytes=proven, front=_front(found))


def time_against_memory(request: Request, search: Search[Request], *, time_limit_s: float) -> BudgetedResult:
    """The fastest plan, and the fastest ones under budgets that fall from its peak by equal factors until nothing is found.

    Args:
        request: its budget is the largest that is tried.
        search: answers a request within seconds.
        time_limit_s: of all searches together.

    Raises:
        InfeasibleError: nothing fits the request's budget.
    """
    end = time.monotonic() + time_limit_s
    found = [search(request, FIRST_SHARE * time_limit_s)]
    for step in range(NUM_BUDGETS):
        left_s = (end - time.monotonic()) / (NUM_BUDGETS - step)
        budget = int(max(found[-1].simulation.peak_memory_bytes) / math.sqrt(2.0))
        if left_s <= 0:
            break
        try:
            found.append(search(replace(request, budget_bytes=budget), left_s))
        except InfeasibleError:
            break
    return BudgetedResult(best=found[0], lower_bound_bytes=0, front=_front(found))


def _front(found: list[JointResult]) -> tuple[JointResult, ...]:
    kept: list[JointResult] = []
    for one in sorted(found, key=lambda one: (one.simulation.step_time_s, max(one.simulation.peak_memory_bytes))):
        if not kept or max(one.simulation.peak_memory_bytes) < max(kept[-1].simulation.peak_memory_bytes):
            kept.append(one)
    return tuple(kept)
