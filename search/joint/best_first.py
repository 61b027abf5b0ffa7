"""Plans of many points, the one with the least bound first: bounded, then simulated, then asked what the allocator reserves."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from hardware_models.errors import InfeasibleError, InputError
from search.joint.batch_study import NOTHING, BatchOutcome
from search.joint.evaluate import Evaluator, RefinedPoint
from search.joint.refusals import reason_of, together
from simulator.parallel.simulation import ParallelSimulation
from simulator.pipeline.action import Order
from simulator.plan import Memory, Plan
from simulator.plan_file import plan_to_dict
from simulator.program import Kind

BOUNDED, TIMED, FITS = range(3)
"""What is known of a plan: a time that it is not below; its time, if it fits by more than live bytes; its time."""


class Candidate(NamedTuple):
    """A plan in the queue; least seconds first, ties in the order in which they came."""

    seconds: float
    number: int
    known: int
    """One of `BOUNDED`, `TIMED`, `FITS`."""
    point: int
    memory: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain:
    """The plan of a point that saves no memory: what all others of the same order and cut are measured against."""

    order: Order
    cut: tuple[int, ...]
    step_time_s: float
    update_s: float
    """Most that a rank spends in its optimizer."""

    def least_s(self, plan: Plan, order: Order, cut: tuple[int, ...]) -> float:
        """Seconds that another plan of the point is not below.

        **Model**: order and cut are the same, so that each of its passes follows the same ones; recompute and offload add to passes and to what they wait for, and a fixed
        order of longer passes does not end sooner. The host's optimizer step takes the place of the device's, which is left out for it.
        """
        if order is not self.order or cut != self.cut:
            return 0.0
        return self.step_time_s - (self.update_s if plan.memory.optimizer_offload else 0.0)


class BestFirst:
    """A queue of plans. The first one that comes out simulated and asked about its memory is the best of all that were added.

    Args:
        evaluator: bounds and simulates.
        incumbent: best value so far; what is not below it is left out.
    """

    def __init__(self, evaluator: Evaluator, incumbent: float) -> None:
        self.evaluator, self.incumbent = evaluator, incumbent
        self.plan: Plan | None = None
        """The best one, if it is below the first incumbent."""
        self.value: float | None = None
        self.point: int | None = None
        self.num_simulated, self.least_bytes = 0, 0
        self.refused: Counter[str] = Counter()
        self._queue: list[Candidate] = []
        self._numbers = count()
        self._points: dict[int, RefinedPoint] = {}
        self._plain: dict[int, _Plain] = {}

    @property
    def least_s(self) -> float:
        """Seconds that no plan in the queue is below."""
        return self._queue[0].seconds if self._queue else NOTHING

    def open_points(self) -> dict[int, float]:
        """Points with plans in the queue, and seconds that these are not below."""
        found: dict[int, float] = {}
        for one in self._queue:
            found[one.point] = min(found.get(one.point, NOTHING), one.seconds)
        return found

    def add(self, index: int) -> None:
        """The plans of a point."""
        refined = self.evaluator.refined(index, self.incumbent)
        self.refused.update(refined.refused)
        self._points[index] = refined
        for bound, memory in refined.ways:
            if bound.seconds < self.incumbent:
                self._push(bound.seconds, BOUNDED, index, memory)
            else:
                self._needs(bound.needed_bytes)

    def run(self, end: float) -> float:
        """Takes plans from the queue until none could be better than the best, or the time is over.

        Args:
            end: moment (`time.monotonic`) at which no other plan is begun.

        Returns:
            The least bound of what is left for lack of time; infinite: nothing is.
        """
        while self.least_s < self.incumbent:
            if time.monotonic() > end:
                return self.least_s
            self.step()
        return NOTHING

    def step(self) -> None:
        """Takes the first plan and finds out the next thing about it."""
        one = heapq.heappop(self._queue)
        if one.known == BOUNDED:
            self._simulate(one)
        elif one.known == TIMED:
            self._ask_allocator(one)
        else:
            self._take(one)

    def settle(self, end: float) -> None:
        """Asks the allocator about simulated plans, the fastest first, until one fits: the best so far, though others in the queue may be better. Time is not looked at before one is known."""
        timed = sorted(one for one in self._queue if one.known != BOUNDED)
        self._queue = [one for one in self._queue if one.known == BOUNDED]
        heapq.heapify(self._queue)
        while timed and timed[0].seconds < self.incumbent and (time.monotonic() <= end or self.plan is None):
            one = heapq.heappop(timed)
            if one.known == FITS:
                self._take(one)
                continue
            before = set(self._queue)
            self._ask_allocator(one)
            for found in set(self._queue) - before:
                self._queue.remove(found)
                heapq.heappush(timed, found)
            heapq.heapify(self._queue)
        for one in timed:
            heapq.heappush(self._queue, one)

    def outcome(self, open_bound: float) -> BatchOutcome:
        """What came of it; ``open_bound`` as `run` gave it."""
        attributes: dict[str, Any] = {} if self.plan is None else {"plan": plan_to_dict(self.plan)}
        return BatchOutcome(
            value=self.value, point=self.point, open_bound=open_bound, num_simulated=self.num_simulated,
            least_bytes=self.least_bytes, attributes=attributes, refused=together([self.refused]),
        )  # fmt: skip

    def _simulate(self, one: Candidate) -> None:
        point, plan = self._points[one.point], self._plan(one)
        order = point.orders[one.memory]
        cut, plain = self.evaluator.bounds.cut(plan, order), self._plain.get(one.point)
        least_s = plain.least_s(plan, order, cut) if plain is not None else 0.0
        if least_s >= self.incumbent:
            return
        if least_s > one.seconds:
            self._push(least_s, BOUNDED, one.point, one.memory)
            return
        result = self._asked(plan, reserved=False)
        if result is None:
            return
        self.num_simulated += 1
        if one.memory == point.plain.memory:
            self._plain[one.point] = _Plain(
                order=order, cut=cut, step_time_s=result.step_time_s, update_s=_update_seconds(result)
            )
        if not result.fits:
            self._needs(self._used(result))
        elif result.step_time_s < self.incumbent:
            self._push(result.step_time_s, TIMED, one.point, one.memory)

    def _ask_allocator(self, one: Candidate) -> None:
        """That may ask ``optimal`` for other, slower sequences."""
        result = self._asked(self._plan(one), reserved=True)
        if result is None:
            return
        if not result.fits:
            self._needs(self._used(result))
        elif result.step_time_s < self.incumbent:
            self._push(result.step_time_s, FITS, one.point, one.memory)

    def _take(self, one: Candidate) -> None:
        self.incumbent = self.value = one.seconds
        self.point, self.plan = one.point, self._plan(one)

    def _asked(self, plan: Plan, *, reserved: bool) -> ParallelSimulation | None:
        try:
            return self.evaluator.simulate(plan, reserved=reserved)
        except InfeasibleError as error:
            self._needs(error.needed_bytes)
        except InputError as error:
            self.refused[reason_of(error)] += 1  # a combination that the simulator refuses by name
        return None

    def _used(self, result: ParallelSimulation) -> int:
        return max(result.peak_memory_bytes if self.evaluator.space.request.budget_bytes else result.peak_reserved_bytes)

    def _plan(self, one: Candidate) -> Plan:
        return replace(self._points[one.point].plain, memory=one.memory)

    def _push(self, seconds: float, known: int, point: int, memory: Memory) -> None:
        heapq.heappush(self._queue, Candidate(seconds, next(self._numbers), known, point, memory))

    def _needs(self, size_bytes: int) -> None:
        """A plan that does not fit; 0: it is not known what would do."""
        self.least_bytes = min(self.least_bytes or size_bytes, size_bytes or self.least_bytes)


def _update_seconds(result: ParallelSimulation) -> float:
    """Most that a rank spends in its optimizer."""
    program = result.program
    updates = np.where(program.kind == Kind.OPTIMIZER, program.duration_s, 0.0)
    return float(np.bincount(program.device, weights=updates).max())
