"""A first look at a large space of which no good plan is known: a few plans simulated before most ways to split the model are priced, so that most of them need not be."""

from __future__ import annotations

import time
from functools import reduce
from itertools import chain

import numpy as np

from search.joint.batch_study import NOTHING, BatchOutcome
from search.joint.best_first import BestFirst
from search.joint.bounded_space import FirstBounds, Ints
from search.joint.evaluate import Evaluator
from search.joint.points import groups_of
from search.joint.processes import num_processes, shared_out

SPLITS = 256
"""Ways to split the model that are priced for it, the least bound first; twice as many each time that nothing is found."""
MANY_SPLITS = 1024
"""That there must be for it to pay."""
FAR = 1.75
"""Times the least bound from which on a plan is far above it."""
POINTS = 256
"""Whose plans are bounded; others each time."""
PLANS = 16
"""That are simulated."""
PARTS = 4
"""Into which the points are dealt, however many processors there are: workers of several machines begin with the same plan."""
GUESS = 1.5
"""Steps in which the time below which a first plan is looked for grows: the shorter a step, the less the host link carries, so that bounds are closer."""
_ALIKE = ("tp", "cp", "pp", "ep", "zero_stage")
"""Of points that agree in these, only the one with the least bound is looked at."""


def scouted(first: FirstBounds, evaluator: Evaluator, known_s: float, end: float) -> BatchOutcome | None:
    """What the most promising plans of the most promising splits came to; None: there are so few that all of them are priced at once, or a plan is known that is not far above all bounds.

    Args:
        first: bounds of the space, which are raised.
        evaluator: bounds and simulates plans.
        known_s: of a plan that is known; infinite: none is.
        end: moment (`time.monotonic`) at which no other plan is begun.
    """
    least_s = float(first.bound_s.min())
    if known_s < FAR * least_s or first.num_open_splits(known_s) < MANY_SPLITS:
        return None
    guess_s, splits, seen = min(known_s, GUESS * least_s), SPLITS, np.zeros(len(first.space), np.bool_)
    found: BatchOutcome | None = None
    while True:
        first.price(guess_s, end=end, most_splits=splits)
        rows = np.flatnonzero(first.priced & ~seen & (first.bound_s < guess_s))
        rows = rows[np.argsort(first.bound_s[rows], kind="stable")]
        if len(rows):
            chosen = rows[np.sort(groups_of(first.space.points.take(rows), _ALIKE)[0])[:POINTS]]
            seen[chosen] = True
            outcome = _simulated(evaluator, chosen, known_s, end)
            found = outcome if found is None else found.joined(outcome)
        if (found is not None and found.value is not None) or guess_s >= known_s or seen.all() or time.monotonic() > end:
            return found
        guess_s, splits = min(known_s, GUESS * guess_s), 2 * splits


def _simulated(evaluator: Evaluator, rows: Ints, known_s: float, end: float) -> BatchOutcome:
    """Some of the plans of points, shared out over all processors."""

    def part(number: int) -> BatchOutcome:
        queue = BestFirst(evaluator, known_s)
        for row in rows[number::PARTS].tolist():
            if time.monotonic() > end:
                break
            queue.add(row)
        while queue.num_simulated < PLANS // PARTS and queue.least_s < queue.incumbent and time.monotonic() <= end:
            queue.step()
        queue.settle(end)
        return queue.outcome(NOTHING)

    count = num_processes()
    parts = shared_out(lambda first: [part(number) for number in range(first, PARTS, count)], range(min(count, PARTS)))
    return reduce(lambda one, other: one.joined(other), chain.from_iterable(parts))
