"""Search: the best plan of a model on a device under a memory budget, how far from a bound it is, and what experts would have set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from search.found_plan import Found, rank, summary
from search.gap import CERTIFIED_GAP, relative_gap
from search.plan_space import PlanSearch
from search.search_request import ALLOWABLE, OBJECTIVES, Objective, SearchRequest
from search.study import StudyResult, run_study
from simulator.plan import Plan
from simulator.plan_file import plan_to_dict
from simulator.sequence import Operation, format_sequence
from simulator.simulate import Simulation

__all__ = ["ALLOWABLE", "OBJECTIVES", "Objective", "PlanSearch", "SearchRequest", "SearchResult", "search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The answer: ``operations`` is what the plan's ``recompute = "optimal"`` stands for."""

    request: SearchRequest
    plan: Plan
    operations: tuple[Operation, ...]
    simulation: Simulation
    study: StudyResult
    space_size: int
    elapsed_s: float
    baselines: dict[str, dict[str, Any]]
    pareto: tuple[dict[str, Any], ...]
    lower_bound: float
    """Seconds, or bytes where least memory is asked for, that no plan of the space is below."""
    unlimited_s: float
    """Time of the fastest step if memory had no end."""

    @property
    def value(self) -> float:
        """What is least: the step's seconds, or the peak's bytes."""
        return (
            float(self.simulation.peak_memory_bytes[0]) if self.request.objective == "memory" else self.simulation.step_time_s
        )

    @property
    def gap(self) -> float:
        """(best - lower bound) / best."""
        return relative_gap(self.value, self.lower_bound)

    @property
    def certified(self) -> bool:
        """Whether the plan is proven optimal within the model."""
        return self.gap <= CERTIFIED_GAP

    def to_json(self) -> dict[str, Any]:
        """The keys of ``schedlab search --json``."""
        return {
            "best": {
                "plan": plan_to_dict(self.plan), "sequence": format_sequence(self.operations).splitlines(),
                "simulate": self.simulation.to_json(),
            },
            "objective": self.request.objective, "budget_bytes": self.request.budget_bytes, "techniques": list(self.request.used_techniques),
            "lower_bound_bytes" if self.request.objective == "memory" else "lower_bound_s": self.lower_bound,
            "gap": self.gap, "certified": self.certified, "space_size": self.space_size,
            "num_simulated": self.study.num_simulated, "elapsed_s": self.elapsed_s, "unlimited_memory_s": self.unlimited_s,
            "overhead": self.simulation.step_time_s / self.unlimited_s - 1, "baselines": self.baselines, "pareto": list(self.pareto),
        }  # fmt: skip


def search(
    request: SearchRequest,
    *,
    storage: str | None = None,
    time_limit_s: float | None = None,
    on_trial: Callable[..., None] | None = None,
) -> SearchResult:
    """The best plan for a request, by an Optuna study over `PlanSearch`.

    Args:
        request: model, device, batch, budget and objective.
        storage: Optuna storage URL; a study of the same request there is gone on with.
        time_limit_s: stop then, with the gap that remains.
        on_trial: called with (study, trial) after each trial.

    Raises:
        InfeasibleError: nothing fits the budget; says the least one that does.
        InputError: the model cannot be traced.
    """
    started, space = time.perf_counter(), PlanSearch(request)
    end = math.inf if time_limit_s is None else time.monotonic() + time_limit_s
    run = _Run(space=space, storage=storage, end=end, on_trial=on_trial)
    if request.objective == "memory":
        found, study, bound = run.least_memory()
        plan = space.plan_of(found)
        plan = replace(plan, memory=replace(plan.memory, budget_bytes=found.candidate.peak_bytes))
    else:
        found, study, bound = run.least_time()
        plan = space.plan_of(found)
    simulation = space.simulate(found)
    experts = list(space.experts())
    baselines = {name: summary(one) | {"fits": space.fits(one, request.budget_bytes)} for name, one in experts}
    front = space.pareto() if request.objective == "pareto" else space.evaluated_front(found)
    return SearchResult(
        request=request, plan=plan, operations=found.candidate.operations, simulation=simulation, study=study, space_size=len(space.space()),
        elapsed_s=time.perf_counter() - started, baselines=baselines, pareto=front, lower_bound=bound, unlimited_s=space.unlimited_s(),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Studies of one request."""

    space: PlanSearch
    storage: str | None
    end: float
    """Moment (`time.monotonic`) at which no other plan is begun."""
    on_trial: Callable[..., None] | None

    def least_time(self) -> tuple[Found, StudyResult, float]:
        """The fastest plan, its study, and the seconds that none is below."""
        space, budget = self.space, self.space.request.budget_bytes
        study = run_study(
            space.points(), space.outcome, request=space.request.text, storage=self.storage, time_limit_s=self._left_s, on_trial=self.on_trial
        )  # fmt: skip
        found = Found.from_attributes(study.best.user_attrs)
        if not study.certified:
            found = space.refined(found, budget, until=self.end)
            fitting = (one for _, one in space.experts() if rank(one) < rank(found) and space.fits(one, budget))
            found = min((found, *fitting), key=rank)
        return found, study, min(study.lower_bound, found.candidate.step_time_s)

    def least_memory(self) -> tuple[Found, StudyResult, float]:
        """The plan of least memory among those that take little more than the fastest, its study, and the bytes that none is below."""
        space, within = self.space, self.space.request.within
        limit_s = math.inf if math.isinf(within) else (1 + within) * self.least_time()[0].candidate.step_time_s
        study = run_study(
            space.least_bytes_points(limit_s), lambda text: space.least_bytes_outcome(text, limit_s), request=f"{space.request.text} {limit_s}",
            storage=self.storage, time_limit_s=self._left_s, on_trial=self.on_trial,
        )  # fmt: skip
        return Found.from_attributes(study.best.user_attrs), study, study.lower_bound

    @property
    def _left_s(self) -> float | None:
        return None if math.isinf(self.end) else max(0.0, self.end - time.monotonic())
