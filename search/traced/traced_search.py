"""The joint search for a model that is traced: module, cluster and batch -> the best plan, a proven bound, and what experts would have set. Imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.units import format_bytes
from search.joint.batch_study import NOTHING, BatchOutcome, JointStudyResult, Progress, run_batches
from search.joint.experts import Expert
from search.joint.explain import contributions
from search.joint.joint_search import Baseline, JointResult
from search.joint.workers import run_together
from search.traced.chain_bounds import UNBOUNDED_S, ChainBounds
from search.traced.evaluate import TracedEvaluator
from search.traced.experts import experts
from search.traced.plans import TracedPlans, budget_bytes
from search.traced.request import TracedRequest
from search.traced.space import TracedSpace, traced_space
from search.traced.step_bounds import least_bytes, step_bound
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.plan import Plan
from simulator.plan_file import plan_from_dict
from simulator.tracing.simulate_stages import StageSimulator

MOST_LEAST = 8
"""Plans that are simulated for the least memory that would do, where nothing fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What every worker of a search knows before it simulates."""

    evaluator: TracedEvaluator
    bound_s: NDArray[np.float64]
    """Shape (points,)."""
    known_s: float
    """Time of the best baseline that fits; infinite where none does."""

    def run(
        self, storage: str | None, time_limit_s: float | None, on_progress: Callable[[Progress], None] | None = None
    ) -> JointStudyResult:
        """Takes part in the study until it is over."""
        order = np.argsort(self.bound_s, kind="stable")
        bounds = self.bound_s[order]

        def evaluate(rows: range, incumbent: float, end: float) -> BatchOutcome:
            stretch = slice(rows.start, rows.stop)
            return self.evaluator.batch(order[stretch].tolist(), bounds[stretch].tolist(), incumbent, end=end)

        return run_batches(
            bounds, evaluate, request=self.evaluator.space.request.text, known=self.known_s, storage=storage, time_limit_s=time_limit_s,
            on_progress=on_progress,
        )  # fmt: skip


def traced_search(
    request: TracedRequest, *, storage: str | None = None, workers: int = 1, time_limit_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None, plans: TracedPlans | None = None,
) -> JointResult:  # fmt: skip
    """The best plan of a traced model on exactly the devices of a cluster; never slower than a baseline that fits.

    **Proof**: points are looked at in order of their bounds (`search.traced.chain_bounds`) until none is below the best plan; of a point, plans whose own bounds (`search.traced.step_bounds`) are
    not below it are not simulated. A plan that recomputes has the order and the cut of the plain one, whose passes are no longer, and is not looked at where that one fits.

    Args:
        request: model, batch, devices and what is allowed.
        storage: where workers meet (`search.storage.storage_of`); None: memory, or a file of this search where there are several workers.
        workers: processes of this machine that simulate.
        time_limit_s: stop then, with the gap that remains.
        on_progress: called before the first and after each batch of points of this process.
        plans: of the model on the cluster, where several searches share what they have traced; None: made here.

    Raises:
        InfeasibleError: nothing divides the devices, or nothing fits; says the least memory that was seen.
    """
    started = time.perf_counter()
    known_plans = plans or plans_of(request)
    space = space_of(request, known_plans)
    evaluator = TracedEvaluator(space, known_plans)
    baselines = _baselines(evaluator)
    known = min((one for one in baselines if one.fits), key=lambda one: one.step_time_s, default=None)
    known_s = known.step_time_s if known else NOTHING
    bounds = ChainBounds(space, known_plans.simulator).seconds(most_s=known.step_time_s if known else UNBOUNDED_S)
    prepared = _Prepared(evaluator=evaluator, bound_s=bounds, known_s=known_s)
    limit_s = None if time_limit_s is None else max(0.0, time_limit_s - (time.perf_counter() - started))
    study = run_together(prepared.run, workers, storage, limit_s, on_progress)
    plan = plan_from_dict(study.best.user_attrs["plan"]) if study.best is not None else known.plan if known else None
    if plan is None:
        raise _infeasible(evaluator, study)
    simulation = evaluator.simulate(plan)
    return JointResult(
        plan=plan, simulation=simulation, study=study, lower_bound_s=min(simulation.step_time_s, study.progress.lower_bound), space_size=len(space),
        elapsed_s=time.perf_counter() - started, num_probed=0, baselines=baselines, expert=known,
        differences=contributions(plan, known.plan, evaluator.forecast) if known else (),
    )  # fmt: skip


def plans_of(request: TracedRequest) -> TracedPlans:
    """Simulates plans of a request's model on its cluster."""
    return TracedPlans(simulator=StageSimulator(source=request.source, cluster=request.cluster, device=request.device))


def space_of(request: TracedRequest, plans: TracedPlans) -> TracedSpace:
    """The space of a request, whose model is traced for it at one sample.

    Raises:
        InfeasibleError: no combination divides batch and devices.
    """
    workload = plans.simulator.source.workload(1)
    return traced_space(request, num_blocks=len(workload.blocks), mixes_samples=workload.mixes_samples)


def _infeasible(evaluator: TracedEvaluator, study: JointStudyResult) -> InfeasibleError:
    request = evaluator.space.request
    need, room = _least_seen(evaluator, study.least_bytes), request.room_bytes
    proven = (
        "no plan" if not study.progress.lower_bound < NOTHING else f"none of {study.progress.num_simulated} simulated plans"
    )
    return InfeasibleError(
        limit=f"{proven} over {request.cluster.num_gpus} devices fits {room} bytes ({format_bytes(room)}) on each",
        smallest_change=f"the least that was seen is {need} bytes ({format_bytes(need)}); or take more devices, a smaller batch or a smaller model",
        needed_bytes=need,
    )  # fmt: skip


def _least_seen(evaluator: TracedEvaluator, known: int) -> int:
    """Least peak of simulated plans: those that run each block again, of the points whose plans could need least.

    Args:
        evaluator: of the space.
        known: least peak of a plan that was simulated before; 0: none.
    """
    found: list[tuple[int, int]] = []
    for index in range(len(evaluator.space)):
        try:
            case = evaluator.plans.simulator.case(_all_again(evaluator, index))
        except InputError:
            continue
        library = evaluator.plans.simulator.stage_library(case.plan)
        found.append((least_bytes(case, library), index))
    least = known
    for _, index in sorted(found)[:MOST_LEAST]:
        peak = max(evaluator.simulate(_all_again(evaluator, index)).peak_memory_bytes)
        least = min(least or peak, peak)
    return least


def _all_again(evaluator: TracedEvaluator, index: int) -> Plan:
    plain = evaluator.space.plan(index)
    return replace(plain, memory=replace(plain.memory, recompute="full"))


def _baselines(evaluator: TracedEvaluator) -> tuple[Baseline, ...]:
    workload = evaluator.plans.simulator.source.workload(1)
    rules = experts(evaluator.space.request, num_blocks=len(workload.blocks), mixes_samples=workload.mixes_samples)
    found = (_baseline(evaluator, rule) for rule in rules)
    return tuple(one for one in found if one is not None)


def _baseline(evaluator: TracedEvaluator, rule: Expert) -> Baseline | None:
    """The fastest plan of a rule that fits; if none does, the one of the least bound; None where the simulator refuses all of its plans."""
    bounded = []
    for plan in rule.plans:
        try:
            case = evaluator.plans.simulator.case(plan, gpus=plan.num_gpus)
            bounded.append((step_bound(case, evaluator.plans.simulator.stage_library(plan)), plan, budget_bytes(case)))
        except InputError:
            continue
    best: tuple[Plan, StagesOnCluster] | None = None
    for bound, plan, room in sorted(bounded, key=lambda one: one[0].seconds):
        if bound.needed_bytes > room or (best is not None and bound.seconds >= best[1].step_time_s):
            continue
        found = evaluator.simulate(plan)
        if found.fits and (best is None or found.step_time_s < best[1].step_time_s):
            best = (plan, found)
    if best is None and bounded:
        fastest = min(bounded, key=lambda one: one[0].seconds)[1]
        best = (fastest, evaluator.simulate(fastest))
    if best is None:
        return None
    plan, found = best
    return Baseline(
        name=rule.name, source=rule.source, plan=plan, step_time_s=found.step_time_s, peak_memory_bytes=max(found.peak_memory_bytes), fits=found.fits
    )  # fmt: skip
