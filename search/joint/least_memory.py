"""The least memory that a request can do with: what an infeasible search names as the budget that fits."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hardware_models.errors import InfeasibleError, InputError
from search.joint.batch_study import NOTHING
from search.joint.bounds import TWO_WAYS
from search.joint.evaluate import Evaluator
from search.joint.memory_variants import memory_variants
from search.trainers import violations
from simulator.plan import Plan

_MOST_RAISES = 16
"""Times that the budget of an ``optimal`` plan is raised to what its next rank asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastMemory:
    """Bytes of a device that a plan fits, and whether fewer were ruled out."""

    needed_bytes: int
    """Allocated where the request has a budget, else reserved; 0: nothing that was simulated fits any budget."""
    plan: Plan | None
    exact: bool
    """Whether all plans that might need less were simulated."""


def least_memory(evaluator: Evaluator, *, end: float = NOTHING) -> LeastMemory:
    """The plan of a space that needs the least memory, whatever its time.

    Points come in the order of what their model states alone need (`Evaluator.states_bytes`), until that is no less than the least so far.

    Args:
        evaluator: of the space; its budget is not looked at.
        end: moment (`time.monotonic`) at which no other plan is begun.
    """
    space, best, found = evaluator.space, 2**62, None
    trainer, layers = space.request.trainer, space.request.config.layers
    states = _states_of_points(evaluator)
    for index in np.argsort(states, kind="stable").tolist():
        if states[index] >= best:
            break
        open_plan = space.plan(index)
        for memory in memory_variants(trainer, open_plan):
            plan = replace(open_plan, memory=memory)
            if violations(plan, trainer, layers=layers) or evaluator.states_bytes(plan, open_plan) >= best:
                continue
            if time.monotonic() > end:
                return LeastMemory(needed_bytes=best if found else 0, plan=found, exact=False)
            needed = _needed(evaluator, plan)
            if needed is not None and needed < best:
                best, found = needed, plan
    return LeastMemory(needed_bytes=best if found else 0, plan=found, exact=True)


def _states_of_points(evaluator: Evaluator) -> NDArray[np.int64]:
    """What the model states of each point need at least; points of one split, ZeRO stage and kind of schedule share it."""
    space, points = evaluator.space, evaluator.space.points
    two_ways = np.array([name in TWO_WAYS for name in space.schedules])[points.schedule]
    columns = [points.tp, points.cp, points.pp, points.dp, points.ep, points.zero_stage, points.compute, two_ways]
    _, first, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_index=True, return_inverse=True)
    shared = np.array([_states(evaluator, space.plan(int(index))) for index in first], dtype=np.int64)
    found: NDArray[np.int64] = shared[inverse.ravel()]
    return found


def _states(evaluator: Evaluator, plan: Plan) -> int:
    """What the model states of a plan's point need at least, over all ways to keep them elsewhere."""
    trainer = evaluator.space.request.trainer
    ways = (replace(plan, memory=memory) for memory in memory_variants(trainer, plan))
    return min((evaluator.states_bytes(way, plan) for way in ways), default=0)


def _needed(evaluator: Evaluator, plan: Plan) -> int | None:
    """The least budget of a plan; None: the simulator refuses it, or it exceeds the device or the host at any budget."""
    budgeted = evaluator.space.request.budget_bytes is not None
    budget = None if plan.memory.recompute != "optimal" else 1
    for _ in range(_MOST_RAISES):
        try:
            result = evaluator.simulate(replace(plan, memory=replace(plan.memory, budget_bytes=budget)))
        except InfeasibleError as error:
            if not budget or error.needed_bytes <= budget:
                return None
            budget = error.needed_bytes
            continue
        except InputError:
            return None
        if not budgeted:
            return max(result.peak_reserved_bytes)
        roomy = replace(result, plan=replace(plan, memory=replace(plan.memory, budget_bytes=None)))
        return max(result.peak_memory_bytes) if roomy.fits else None
    return None
