"""The value of a point of a traced model: its fastest plan that fits, over cuts into stages and recompute, found by simulation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hardware_models.errors import InfeasibleError, InputError
from search.joint.batch_study import NOTHING, BatchOutcome
from search.joint.explain import Forecast
from search.joint.refusals import reason_of, together
from search.traced.cuts import Cut, cuts_of
from search.traced.plans import TracedPlans, budget_bytes
from search.traced.space import TracedSpace
from search.traced.step_bounds import StepBound, step_bound
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.plan import Plan
from simulator.plan_file import plan_to_dict
from simulator.tracing.simulate_stages import StagesCase


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedValue:
    """What a point came to."""

    plan: Plan | None
    """The fastest plan that fits and beats the incumbent; None: there is none."""
    step_time_s: float
    """Its time; infinite where there is none."""
    num_simulated: int
    least_bytes: int
    """Least memory of a simulated plan that did not fit; 0 where there is none."""
    complete: bool
    """Whether time was enough to look at all of its plans."""
    refused: Mapping[str, int]
    """Plans that the simulator refuses, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinedPoint:
    """A point with its plans that recompute nothing, one for each cut, and their bounds, least first."""

    index: int
    cases: tuple[tuple[StepBound, StagesCase], ...]
    refused: Mapping[str, int]

    @property
    def least_s(self) -> float:
        """Seconds that none of its plans is below."""
        return self.cases[0][0].seconds if self.cases else NOTHING


class _Judge:
    """The best plan of a point so far."""

    def __init__(self, incumbent: float) -> None:
        self.best, self.count, self.least = incumbent, 0, 0
        self.plan: Plan | None = None

    def take(self, plan: Plan, found: StagesOnCluster) -> bool:
        """Whether a simulated plan fits."""
        self.count += 1
        peak = max(found.peak_memory_bytes)
        if not found.fits:
            self.least = min(self.least or peak, peak)
        elif found.step_time_s < self.best:
            self.best, self.plan = found.step_time_s, plan
        return found.fits


class TracedEvaluator:
    """Simulates plans of a space.

    Args:
        space: whose points are asked for.
        plans: of its model on its cluster.
    """

    def __init__(self, space: TracedSpace, plans: TracedPlans) -> None:
        self.space, self.plans = space, plans

    def simulate(self, plan: Plan) -> StagesOnCluster:
        """A plan's prediction on the request's devices."""
        return self.plans.simulate(plan, gpus=self.space.request.cluster.num_gpus)

    def forecast(self, plan: Plan) -> Forecast:
        """A plan's time, and whether it fits."""
        found = self.simulate(plan)
        return Forecast(step_time_s=found.step_time_s, fits=found.fits)

    def refined(self, index: int) -> RefinedPoint:
        """A point's plans without recompute, with their bounds (`search.traced.step_bounds`); plans that recompute keep order and cut, so that their passes are only longer."""
        plain, refused = self.space.plan(index), Counter[str]()
        library = self.plans.simulator.stage_library(plain)
        found: list[tuple[StepBound, StagesCase]] = []
        try:
            first = self.plans.plain(plain)
            cases = [first, *(self.plans.plain(_with_cut(plain, cut)) for cut in cuts_of(first, library) if cut is not None)]
            found = [(step_bound(case, library), case) for case in cases]
        except InputError as error:
            refused[reason_of(error)] += 1  # a point that the simulator refuses by name
        return RefinedPoint(index=index, cases=tuple(sorted(found, key=lambda one: one[0].seconds)), refused=refused)

    def simulated(self, point: RefinedPoint, incumbent: float, *, end: float = NOTHING) -> TracedValue:
        """What a point comes to.

        Of each cut the plan without recompute is simulated where it may fit; where it does not, ``optimal`` is, whose sequences each stage's memory asks for, and where none of these is
        found to fit, the plan that runs each block again.

        Args:
            point: with its plans.
            incumbent: best value so far.
            end: moment (`time.monotonic`) at which no other plan is begun.
        """
        judge, refused, complete = _Judge(incumbent), Counter(point.refused), True
        for bound, case in point.cases:
            if bound.seconds >= judge.best:
                break
            if time.monotonic() > end:
                complete = False
                break
            if bound.needed_bytes <= budget_bytes(case) and judge.take(case.plan, case.simulate()):
                continue
            for recompute in ("optimal", "full"):  # all blocks again where no mixture was found
                try:
                    if self._again(case, recompute, judge):
                        break
                except InfeasibleError:
                    continue
                except InputError as error:
                    refused[reason_of(error)] += 1
        return TracedValue(
            plan=judge.plan, step_time_s=judge.best if judge.plan else NOTHING, num_simulated=judge.count, least_bytes=judge.least, complete=complete,
            refused=refused,
        )  # fmt: skip

    def _again(self, plain: StagesCase, recompute: str, judge: _Judge) -> bool:
        """Takes the plan that recomputes, unless its own bound is not below the best; whether it fits, or need not be looked at.

        Raises:
            InfeasibleError: no sequences fit.
        """
        plan = replace(plain.plan, memory=replace(plain.plan.memory, recompute=recompute))
        simulator = self.plans.simulator
        case = self.plans.solved(plan, self.plans.sequence(plain)) if recompute == "optimal" else simulator.case(plan)
        if step_bound(case, simulator.stage_library(plan)).seconds >= judge.best:
            return True
        return judge.take(plan, self.simulate(plan))

    def batch(self, indices: Sequence[int], bounds: Sequence[float], incumbent: float, *, end: float = NOTHING) -> BatchOutcome:
        """The outcome of points in order of their bounds.

        Args:
            indices: of the points.
            bounds: of each; ascending.
            incumbent: best value so far.
            end: moment (`time.monotonic`) at which no other plan is begun.
        """
        best, winner, plan, count, least, open_bound = incumbent, None, None, 0, 0, NOTHING
        refused, points = Counter[str](), list[RefinedPoint]()
        for index, bound in zip(indices, bounds, strict=True):
            if bound >= best:
                break
            if time.monotonic() > end:
                open_bound = bound
                break
            points.append(self.refined(index))
        for point in sorted(points, key=lambda one: one.least_s):
            value = self.simulated(point, best, end=end)
            count += value.num_simulated
            least = min(least or value.least_bytes, value.least_bytes or least)
            refused.update(value.refused)
            if value.plan is not None:
                best, winner, plan = value.step_time_s, point.index, value.plan
            if not value.complete:
                open_bound = min(open_bound, point.least_s)
        attributes: dict[str, Any] = {} if plan is None else {"plan": plan_to_dict(plan)}
        return BatchOutcome(
            value=None if winner is None else best, point=winner, open_bound=open_bound, num_simulated=count, least_bytes=least, attributes=attributes,
            refused=together([refused]),
        )  # fmt: skip


def _with_cut(plan: Plan, cut: Cut) -> Plan:
    return replace(plan, pipeline=replace(plan.pipeline, partition=cut))
