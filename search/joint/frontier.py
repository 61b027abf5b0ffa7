"""The points that may still hold the best plan, under bounds that are raised where it pays: of the whole space at once, by playing an order, by plan."""

from __future__ import annotations

import multiprocessing
import time
from functools import reduce

import numpy as np

from search.joint.batch_study import NOTHING, BatchOutcome
from search.joint.best_first import BestFirst
from search.joint.bounded_space import BoundedSpace, Floats, Ints
from search.joint.evaluate import Evaluator
from search.joint.points import groups_of
from search.joint.processes import num_processes, shared_out

STEP = 256
"""Points whose bounds are raised together."""
DIVE = 64
"""Plans that are simulated before the study begins: those with the least bounds come near the best one, and all others are then held against that."""
FEW_POINTS = 1000
"""That could beat a known plan, up to which the study begins at once."""
_PLAYED_COLUMNS = (
    "tp",
    "cp",
    "pp",
    "dp",
    "ep",
    "micro_batch",
    "placement",
    "cp_method",
    "compute",
    "schedule",
    "virtual_stages",
    "zero_stage",
)
_ORDER_COLUMNS = ("schedule", "pp", "virtual_stages", "num_microbatches")
_PRICED, _PLAYED, _REFINED = range(3)
"""How far a point's bound has been raised."""


class Frontier:
    """Bounds of all points, the cheap ones first: a point's bound is raised by the next dearer method only while it is among the least.

    1. `bounded_space`: all points at once, for every cut and order of a kind.
    2. `StepBounds.alone`: passes of the point's own cuts in its own order; points that differ in ZeRO stage and placement share it.
    3. `StepBounds.bounds`: each of the point's plans with its traffic and memory.

    Args:
        bounded: the space with its first bounds.
        evaluator: plays and simulates.
        known_s: of a plan that is known; points that cannot beat it are not looked at.
    """

    def __init__(self, bounded: BoundedSpace, evaluator: Evaluator, known_s: float) -> None:
        self.space, self.evaluator, self.known_s = bounded.space, evaluator, known_s
        self.bound_s: Floats = bounded.bound_s.copy()
        self._raised = np.zeros(len(self.bound_s), np.int8)
        self._shared = multiprocessing.RawValue("d", known_s)
        """Time of the best plan that any process has found."""

    def dive(self, end: float) -> BatchOutcome | None:
        """Simulates plans, the least bound first, up to `DIVE` of them; then raises the bounds of all points that could beat the best of these. All processors take part.

        Args:
            end: moment (`time.monotonic`) at which no other bound is raised.

        Returns:
            What came of it; None where few points could beat the known plan: the study looks at them anyway.
        """
        if int((self.bound_s < self.known_s).sum()) < FEW_POINTS:
            return None
        count = num_processes()
        part_of = groups_of(self.space.points, _ORDER_COLUMNS)[1] % count  # who makes an order plays all that run in it
        whole, self._shared = self.bound_s, multiprocessing.RawValue("d", self.known_s)

        def part(number: int) -> tuple[Floats, float, BatchOutcome]:
            self.bound_s = np.where(part_of == number, whole, NOTHING)
            outcome = self._dive_alone(DIVE // count, end)
            return self.bound_s[part_of == number], self.known_s, outcome

        found = shared_out(part, range(count))
        self.bound_s = whole
        for number, (bound_s, _, _) in enumerate(found):
            self.bound_s[part_of == number] = bound_s
        self.known_s = min(known_s for _, known_s, _ in found)
        return reduce(lambda one, other: one.joined(other), (outcome for _, _, outcome in found))

    def _dive_alone(self, most: int, end: float) -> BatchOutcome:
        queue, rows = BestFirst(self.evaluator, self.known_s), np.arange(len(self.bound_s))
        while queue.num_simulated < most and queue.plan is None and time.monotonic() <= end:
            queue.incumbent = self.known_s = min(queue.incumbent, self._shared.value)
            first = int(np.argmin(self.bound_s))
            if min(queue.least_s, self.bound_s[first]) >= self.known_s:
                break
            if queue.least_s <= self.bound_s[first]:
                queue.step()
            elif self._raised[first] < _REFINED:
                least = rows[np.argpartition(self.bound_s, STEP)[:STEP]]
                least = least[(self.bound_s[least] < self.known_s) & (self._raised[least] == self._raised[first])]
                self._raise(least, end)
            else:
                queue.add(first)
                self.bound_s[first] = NOTHING  # as long as its plans are in the queue
        queue.settle(end)
        for point, seconds in queue.open_points().items():
            self.bound_s[point] = seconds
        self.known_s = queue.incumbent
        self._tell()
        self._raise_all(end)
        return queue.outcome(NOTHING)

    def _tell(self) -> None:
        """Two processes that tell at once may overwrite each other, which costs some bounds and is not wrong."""
        self._shared.value = self.known_s = min(self.known_s, self._shared.value)

    def _raise_all(self, end: float) -> None:
        """Raises the bounds of all points that could beat the best plan so far, as far as they can be."""
        for stage in (_PRICED, _PLAYED):
            rows = np.flatnonzero((self.bound_s < self.known_s) & (self._raised == stage))
            rows = rows[np.argsort(self.bound_s[rows], kind="stable")]
            for place in range(0, len(rows), STEP):
                self._tell()
                own = rows[place : place + STEP]
                self._raise(own[self.bound_s[own] < self.known_s], end)

    def _raise(self, rows: Ints, end: float) -> None:
        """Raises bounds of points that have been raised equally far."""
        if not len(rows):
            return
        if self._raised[rows[0]] == _PRICED:
            self._play(rows, end)
            return
        for point in rows.tolist():
            if time.monotonic() > end:
                return
            refined = self.evaluator.refined(point, self.known_s)
            self.bound_s[point] = max(self.bound_s[point], refined.least_s)
            self._raised[point] = _REFINED

    def _play(self, rows: Ints, end: float) -> None:
        """Points that differ in what does not change their passes are played once; bounds of those for which there is no time stay as they are."""
        first, group_of = groups_of(self.space.points.take(rows), _PLAYED_COLUMNS)
        seconds = np.zeros(len(first))
        for place, one in enumerate(first.tolist()):
            if time.monotonic() > end:
                break
            seconds[place] = self.evaluator.alone_s(int(rows[one]))
        self.bound_s[rows] = np.maximum(self.bound_s[rows], seconds[group_of])
        self._raised[rows] = _PLAYED
