"""Samplers that know no bounds, under the same study: TPE, NSGA-II and random choice over the same space, judged by the same simulation. What the best-bound-first order is measured against.

**Space.** One parameter for each decision of a point (degrees and counts as whole numbers on a logarithmic scale, names as categories) and for each inner decision. Few combinations are legal, so a proposal
is taken for the legal plan nearest to it: decision by decision in the order of `DECISIONS`, the nearest value that the earlier ones leave (for numbers by ratio). No simulation is lost on
plans that divisibility or the trainer refuses. A plan that does not fit keeps its time, and what it lacks as a constraint, which TPE and NSGA-II both use.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, log
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from hardware_models.errors import InfeasibleError, InputError
from search.joint.batch_study import JointStudyResult, Progress
from search.joint.evaluate import Evaluator
from search.joint.memory_variants import memory_variants
from search.joint.refusals import reason_of, together
from search.joint.space import JointSpace
from search.storage import close, storage_of
from search.trainers import violations
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Memory, Plan
from simulator.plan_file import plan_to_dict

SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
"""By the names that ``--sampler`` takes; everything but the seed is Optuna's default."""
DECISIONS = (
    "pp",
    "tp",
    "cp",
    "ep",
    "schedule",
    "virtual_stages",
    "micro_batch",
    "zero_stage",
    "placement",
    "cp_method",
    "compute",
)
"""Columns of a point that are chosen, in the order in which a proposal is taken to the nearest legal one; data parallelism and the number of micro-batches follow."""
NAMED = ("schedule", "placement", "cp_method", "compute")
"""Those that are indices of names: no value is nearer than another."""
INNER = ("recompute", "optimizer_offload", "activation_offload", "weight_offload")
"""Keys of ``[memory]`` that are chosen."""
MEMORY = "memory"
"""Name of the constraint: what is lacking over what there is; at most 0 where the plan fits."""
LEAST_LACK = 1e-6
"""Lack of a plan that does not fit for another reason than the device's memory."""
TRIALS_PER_SIMULATION = 4
"""A sampler that proposes known plans again is stopped after so many trials for each simulation it may make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRun:
    """How long a sampler goes on, and where from."""

    sampler: str
    """Of `SAMPLERS`."""
    seed: int = 0
    max_simulations: int | None = None
    """Different plans; None: no limit."""

    def over(self, num_simulated: int, trials: int) -> bool:
        """Whether the simulations are used up, or the sampler proposes little that is new."""
        most = self.max_simulations
        return most is not None and (num_simulated >= most or trials >= TRIALS_PER_SIMULATION * most)


class LegalPlans:
    """Parameters of a study over the plans of a space, and the legal plan nearest to a proposal.

    Args:
        space: whose plans are chosen from.
    """

    def __init__(self, space: JointSpace) -> None:
        self.space = space
        self._names = {
            "schedule": space.schedules, "placement": space.placements, "cp_method": space.cp_methods, "compute": space.computes
        }  # fmt: skip
        variants = tuple(memory_variants(space.request.trainer, space.plan(0)))
        inner = {key: CategoricalDistribution(list(dict.fromkeys(getattr(one, key) for one in variants))) for key in INNER}
        self.distributions: dict[str, BaseDistribution] = {name: self._distribution(name) for name in DECISIONS} | inner

    def nearest(self, proposed: Mapping[str, Any]) -> Plan | None:
        """The legal plan nearest to a proposal; None where the trainer can save no memory in any way at its point."""
        plain = self.space.plan(self._point(proposed))
        return self._with_memory(plain, proposed)

    def _distribution(self, name: str) -> BaseDistribution:
        values = getattr(self.space.points, name)
        if name in NAMED:
            return CategoricalDistribution([self._names[name][place] for place in np.unique(values)])
        low, high = int(values.min()), int(values.max())
        return IntDistribution(low, high, log=low > 0)

    def _point(self, proposed: Mapping[str, Any]) -> int:
        rows = np.arange(len(self.space))
        for name in DECISIONS:
            column = getattr(self.space.points, name)[rows]
            present = [int(value) for value in np.unique(column)]
            rows = rows[column == self._taken(name, present, proposed[name])]
        return int(rows[0])

    def _taken(self, name: str, present: list[int], wanted: Any) -> int:
        if name in NAMED:
            place = self._names[name].index(wanted)
            return place if place in present else present[0]
        if min(present) > 0:
            return min(present, key=lambda value: (abs(log(value / wanted)), value))
        return min(present, key=lambda value: (abs(value - wanted), value))

    def _with_memory(self, plain: Plan, proposed: Mapping[str, Any]) -> Plan | None:
        request = self.space.request
        plans = [replace(plain, memory=memory) for memory in memory_variants(request.trainer, plain)]
        legal = [plan for plan in plans if not violations(plan, request.trainer, layers=request.config.layers)]
        return max(legal, key=lambda plan: _agreement(plan.memory, proposed), default=None)


def _agreement(memory: Memory, proposed: Mapping[str, Any]) -> int:
    """In how many inner decisions a plan is as proposed."""
    return sum(getattr(memory, key) == proposed[key] for key in INNER)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What a plan came to."""

    step_time_s: float
    lack: float
    """See `MEMORY`."""
    needed_bytes: int
    """0 where the plan fits."""


class Judge:
    """Simulates each plan once; what several runs over one space ask for is simulated for the first of them.

    Args:
        evaluator: simulates.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._known: dict[tuple[Plan, bool], _Verdict | None] = {}

    def verdict(self, plan: Plan, incumbent: float) -> _Verdict | None:
        """What a plan comes to; None: no cut or recompute of it fits. What the allocator reserves is asked for where the plan would be the best so far, as the search does.

        Raises:
            InputError: the simulator refuses the plan; with each call.
        """
        found = self._ask(plan, reserved=False)
        if found is None or found.needed_bytes or found.step_time_s >= incumbent:
            return found
        return self._ask(plan, reserved=True)

    def _ask(self, plan: Plan, *, reserved: bool) -> _Verdict | None:
        key = plan, reserved
        if key not in self._known:
            try:
                self._known[key] = _verdict(self._evaluator.simulate(plan, reserved=reserved))
            except InfeasibleError:
                self._known[key] = None
        return self._known[key]


def _verdict(found: ParallelSimulation) -> _Verdict:
    device, budget = found.device, found.plan.memory.budget_bytes
    room = device.memory_bytes - device.context_bytes
    reserved, live = max(found.peak_reserved_bytes), max(found.peak_memory_bytes)
    lack = reserved / room - 1.0 if budget is None else max(reserved / room, live / budget) - 1.0
    needed = live if budget is not None else reserved
    return _Verdict(
        step_time_s=found.step_time_s, lack=min(lack, 0.0) if found.fits else max(lack, LEAST_LACK), needed_bytes=0 if found.fits else needed
    )  # fmt: skip


def run_sampled(
    space: JointSpace,
    judge: Judge,
    run: SampledRun,
    *,
    request: str,
    bound_s: float,
    known_s: float = inf,
    storage: str | None = None,
    time_limit_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> JointStudyResult:
    """Simulates what a sampler proposes until its simulations or the time are used up.

    Args:
        space: of plans.
        judge: simulates them.
        run: which sampler, and how long.
        request: text of everything that decides the answer; a study of one request, sampler and seed in a storage is gone on with.
        bound_s: a time that no plan of the space is below; the sampler is not told.
        known_s: time of a plan that is known already; only faster ones count as found.
        storage: see `search.storage.storage_of`.
        time_limit_s: stop after the trial that runs over it; None: no limit.
        on_progress: called before the first trial and after each one.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plans, met = LegalPlans(space), set[Plan]()
    name = "schedlab-" + hashlib.sha256(repr((request, run.sampler, run.seed)).encode()).hexdigest()[:16]
    kept = storage_of(storage)
    study = optuna.create_study(study_name=name, storage=kept, load_if_exists=True)
    before = _finished(study)
    study.sampler = SAMPLERS[run.sampler](run.seed + len(before))  # one that goes on does not propose the same again
    study.set_user_attr("request", request)
    started, trials = time.monotonic(), len(before)
    count, incumbent = sum(_simulated(one) for one in before), min([known_s, *(_value(one) for one in before)])
    while True:
        elapsed_s = time.monotonic() - started
        progress = Progress(incumbent=incumbent, lower_bound=min(bound_s, incumbent), num_simulated=count, elapsed_s=elapsed_s)
        if on_progress is not None:
            on_progress(progress)
        if (time_limit_s is not None and elapsed_s > time_limit_s) or run.over(count, trials):
            break
        told = _try(study, study.ask(plans.distributions), plans, judge, met, incumbent)
        trials, count, incumbent = trials + 1, count + _simulated(told), min(incumbent, _value(told))
    finished = _finished(study)
    best = min(finished, key=lambda one: (_value(one), one.number), default=None)
    close(kept)
    needs = [int(one.user_attrs["needed_bytes"]) for one in finished if one.user_attrs.get("needed_bytes")]
    return JointStudyResult(
        best=best if best is not None and _value(best) < known_s else None, progress=progress, least_bytes=min(needs, default=0),
        refused=together(one.user_attrs.get("refused", {}) for one in finished),
    )  # fmt: skip


def _try(study: Study, trial: Trial, plans: LegalPlans, judge: Judge, met: set[Plan], incumbent: float) -> FrozenTrial:
    """One proposal, taken to a legal plan, judged and told."""
    plan = plans.nearest(trial.params)
    if plan is None:
        return study.tell(trial, state=TrialState.PRUNED)
    try:
        verdict = judge.verdict(plan, incumbent)
    except InputError as error:
        trial.set_user_attr("refused", {reason_of(error): 1})
        return study.tell(trial, state=TrialState.PRUNED)
    if verdict is None:
        return study.tell(trial, state=TrialState.PRUNED)
    trial.set_user_attr("num_simulated", int(plan not in met))
    met.add(plan)
    trial.set_user_attr("plan", plan_to_dict(plan))
    trial.set_user_attr("needed_bytes", verdict.needed_bytes)
    trial.set_constraint(MEMORY, verdict.lack)
    return study.tell(trial, verdict.step_time_s)


def _finished(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _simulated(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get("num_simulated", 0))


def _value(trial: FrozenTrial) -> float:
    """Time of a trial whose plan fits; infinite otherwise."""
    return float(trial.values[0]) if trial.state is TrialState.COMPLETE and trial.user_attrs["needed_bytes"] == 0 else inf
