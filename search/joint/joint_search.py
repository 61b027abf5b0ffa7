"""The joint search: model, cluster and batch -> the best plan, a proven bound, and what experts would have set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes
from search.gap import CERTIFIED_GAP, relative_gap
from search.joint.batch_study import NOTHING, BatchOutcome, JointStudyResult, Progress, run_batches, value_of
from search.joint.best_first import BestFirst
from search.joint.bounded_space import BoundedSpace, FirstBounds, Floats
from search.joint.evaluate import Evaluator
from search.joint.experts import Expert, experts
from search.joint.explain import Contribution, contributions
from search.joint.frontier import Frontier
from search.joint.least_memory import LeastMemory, least_memory
from search.joint.processes import num_processes, shared_out
from search.joint.sampled_study import Judge, SampledRun, run_sampled
from search.joint.scout import scouted
from search.joint.space import JointRequest, joint_space
from search.joint.workers import run_together
from search.study_key import fingerprint, study_text
from simulator.model_source import ModelSource
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from simulator.plan_file import plan_from_dict, plan_to_dict

FEW_PLANS = 32
"""Of experts' rules, up to which one process looks at them."""
PRICING = 0.5
"""Part of the time left that goes into prices: bounds by arithmetic hold for what is not priced then."""
LEAST_MEMORY_S = 20.0
"""That a search with a time limit looks for the least memory that would do, where nothing fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The fastest plan of an expert's rule that fits; if none does, its fastest plan."""

    name: str
    source: str
    plan: Plan
    step_time_s: float
    peak_memory_bytes: int
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return {
            "step_time_s": self.step_time_s, "peak_memory_bytes": self.peak_memory_bytes, "fits": self.fits, "plan": plan_to_dict(self.plan), "source": self.source
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class JointResult:
    """The answer of a joint search."""

    plan: Plan
    simulation: ParallelSimulation | StagesOnCluster
    study: JointStudyResult
    lower_bound_s: float
    space_size: int
    elapsed_s: float
    num_probed: int
    """Plans that were simulated before the study began, baselines aside."""
    baselines: tuple[Baseline, ...]
    expert: Baseline | None
    """The fastest baseline that fits."""
    differences: tuple[Contribution, ...]
    """What each decision brings against it, alone."""

    @property
    def gap(self) -> float:
        """(best - lower bound) / best."""
        return relative_gap(self.simulation.step_time_s, self.lower_bound_s)

    @property
    def certified(self) -> bool:
        """Whether the plan is proven optimal within the model."""
        return self.gap <= CERTIFIED_GAP

    def pareto(self) -> list[dict[str, Any]]:
        """Time against memory: the best plan and the baselines that fit, without those that another beats in both."""
        own = ("best", self.simulation.step_time_s, max(self.simulation.peak_memory_bytes))
        found = [own, *((one.name, one.step_time_s, one.peak_memory_bytes) for one in self.baselines if one.fits)]
        kept: list[tuple[str, float, int]] = []
        for one in sorted(found, key=lambda one: one[1:]):
            if not kept or one[2] < kept[-1][2]:
                kept.append(one)
        return [{"name": name, "step_time_s": seconds, "peak_memory_bytes": size} for name, seconds, size in kept]

    def explanation(self) -> dict[str, Any] | None:
        """Against which baseline each decision brings how much; None where no baseline fits."""
        if self.expert is None:
            return None
        best_s = self.simulation.step_time_s
        return {"baseline": self.expert.name, "decisions": [one.to_json(best_s) for one in self.differences]}

    def to_json(self) -> dict[str, Any]:
        """The keys of ``schedlab search --json``."""
        return {
            "best": {"plan": plan_to_dict(self.plan), "simulate": self.simulation.to_json()}, "objective": "time", "budget_bytes": self.plan.memory.budget_bytes, "lower_bound_s": self.lower_bound_s, "gap": self.gap,
            "certified": self.certified, "space_size": self.space_size, "num_simulated": self.study.progress.num_simulated + self.num_probed,
            "elapsed_s": self.elapsed_s, "baselines": {one.name: one.to_json() for one in self.baselines}, "pareto": self.pareto(),
            "explanation": self.explanation(), "refused": dict(self.study.refused),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What every worker of a search knows before it simulates."""

    evaluator: Evaluator
    bounded: BoundedSpace
    bound_s: Floats
    """Of all points, raised where that pays."""
    request: str
    known_s: float
    """Time of the best baseline that fits; infinite where none does."""
    sampled: SampledRun | None
    """A sampler to set beside the search; None: best bound first."""

    def run(
        self, storage: str | None, time_limit_s: float | None, on_progress: Callable[[Progress], None] | None = None
    ) -> JointStudyResult:
        """Takes part in the study until it is over."""
        if self.sampled is not None:
            return run_sampled(
                self.bounded.space, Judge(self.evaluator), self.sampled, request=self.request, bound_s=float(self.bounded.bound_s.min()), known_s=self.known_s,
                storage=storage, time_limit_s=time_limit_s, on_progress=on_progress,
            )  # fmt: skip
        order = self.bounded.in_order()
        bounds = self.bound_s[order]

        def evaluate(rows: range, incumbent: float, end: float) -> BatchOutcome:
            queue = BestFirst(self.evaluator, incumbent)
            for place in rows:
                if bounds[place] < incumbent:
                    queue.add(int(order[place]))
            return queue.outcome(queue.run(end))

        return run_batches(
            bounds, evaluate, request=self.request, known=self.known_s, storage=storage, time_limit_s=time_limit_s, on_progress=on_progress
        )  # fmt: skip


def joint_search(
    request: JointRequest,
    source: ModelSource,
    device: DeviceProfile,
    *,
    storage: str | None = None,
    workers: int = 1,
    time_limit_s: float | None = None,
    sampled: SampledRun | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> JointResult:
    """The best plan of a model on exactly the devices of a cluster; never slower than a baseline that fits.

    Args:
        request: model, batch, devices, trainer and what is allowed.
        source: of the model.
        device: profile of the cluster's devices.
        storage: where workers meet (`search.storage.storage_of`); None: memory, or a file of this search where there are several workers.
        workers: processes of this machine that simulate.
        time_limit_s: stop then, with the gap that remains.
        sampled: a sampler that knows no bounds in place of the search's own order, to compare; the bound is then that of all points before any simulation.
        on_progress: called before the first and after each batch of points of this process.

    Raises:
        InfeasibleError: nothing divides the devices, or nothing fits; says the least memory that was seen.
    """
    started = time.perf_counter()
    space = joint_space(request)
    evaluator = Evaluator(space, source, device)
    end = NOTHING if time_limit_s is None else time.monotonic() + max(0.0, time_limit_s - (time.perf_counter() - started))
    baselines = _baselines(evaluator, experts(request), end)
    known = min((one for one in baselines if one.fits), key=lambda one: one.step_time_s, default=None)
    first = FirstBounds(space, device, evaluator.tables)
    known_s = known.step_time_s if known else NOTHING
    seen = scouted(first, evaluator, known_s, _part_of_time(end, PRICING)) if sampled is None else None
    known_s = min(known_s, NOTHING if seen is None or seen.value is None else seen.value)
    bounded = first.price(known_s, end=_part_of_time(end, PRICING))
    frontier = Frontier(bounded, evaluator, known_s)
    probed = _joined(seen, frontier.dive(end)) if sampled is None else None
    prepared = _Prepared(
        evaluator=evaluator,
        bounded=bounded,
        bound_s=frontier.bound_s,
        request=f"{_text(request, device)} in order {bounded.digest()}",
        known_s=frontier.known_s,
        sampled=sampled,
    )
    limit_s = None if time_limit_s is None else max(0.0, time_limit_s - (time.perf_counter() - started))
    study = run_together(prepared.run, workers, storage, limit_s, on_progress)
    plan = _best_plan(study, probed, known)
    if plan is None:
        plan = _least_plan(evaluator, study, limited=time_limit_s is not None)
    simulation = evaluator.simulate(plan)
    return JointResult(
        plan=plan, simulation=simulation, study=study, lower_bound_s=min(simulation.step_time_s, study.progress.lower_bound), space_size=len(space),
        elapsed_s=time.perf_counter() - started, num_probed=probed.num_simulated if probed else 0, baselines=baselines, expert=known, differences=contributions(plan, known.plan, evaluator.forecast) if known else (),
    )  # fmt: skip


def _part_of_time(end: float, part: float) -> float:
    """The moment at which such a part of the time from now to the end is over."""
    now = time.monotonic()
    return now + part * (end - now) if end < NOTHING else NOTHING


def _joined(one: BatchOutcome | None, other: BatchOutcome | None) -> BatchOutcome | None:
    return one.joined(other) if one is not None and other is not None else one or other


def _best_plan(study: JointStudyResult, probed: BatchOutcome | None, known: Baseline | None) -> Plan | None:
    begun_s = NOTHING if probed is None or probed.value is None else probed.value
    if study.best is not None and value_of(study.best) <= begun_s:
        return plan_from_dict(study.best.user_attrs["plan"])
    if probed is not None and probed.value is not None:
        return plan_from_dict(probed.attributes["plan"])
    return known.plan if known else None


def _least_plan(evaluator: Evaluator, study: JointStudyResult, *, limited: bool) -> Plan:
    """The plan that needs the least memory, which may fit where the time did not suffice to find another; a search with a time limit looks for it for `LEAST_MEMORY_S`.

    Raises:
        InfeasibleError: it does not fit; names the least memory that would do.
    """
    least = least_memory(evaluator, end=time.monotonic() + LEAST_MEMORY_S if limited else NOTHING)
    if least.plan is not None:
        with suppress(InfeasibleError):
            if evaluator.simulate(least.plan).fits:
                return least.plan
    raise _infeasible(evaluator, study, least)


def _infeasible(evaluator: Evaluator, study: JointStudyResult, least: LeastMemory) -> InfeasibleError:
    """The error that names the least memory that would do."""
    request, device = evaluator.space.request, evaluator.device
    need, room = least.needed_bytes, request.budget_bytes or device.memory_bytes - device.context_bytes
    said = "the least that fits is" if least.exact else "the least that was seen is"
    proven = (
        "no plan" if not study.progress.lower_bound < NOTHING else f"none of {study.progress.num_simulated} simulated plans"
    )
    return InfeasibleError(
        limit=f"{proven} over {request.cluster.num_gpus} devices fits {room} bytes ({format_bytes(room)}) on each",
        smallest_change=f"{said} {need} bytes ({format_bytes(need)}); or take more devices, a smaller batch or a smaller model"
        if need
        else "take more devices, a smaller batch or a smaller model",
        needed_bytes=need,
    )


def _baselines(evaluator: Evaluator, rules: Sequence[Expert], end: float) -> tuple[Baseline, ...]:
    """Of all rules, in their order; after the end (`time.monotonic`) no other plan is simulated by a process that knows one that fits."""
    count = num_processes() if sum(len(one.plans) for one in rules) > FEW_PLANS else 1

    def part(number: int) -> list[Baseline | None]:
        found: list[Baseline | None] = []
        for rule in rules[number::count]:
            late = any(one is not None and one.fits for one in found) and time.monotonic() > end
            found.append(None if late else _baseline(evaluator, rule, end))
        return found

    found: list[Baseline | None] = [None] * len(rules)
    for number, own in enumerate(shared_out(part, range(count))):
        found[number::count] = own
    return tuple(one for one in found if one is not None)


def _baseline(evaluator: Evaluator, expert: Expert, end: float) -> Baseline | None:
    """The fastest plan of a rule that fits; None where the simulator refuses all of its plans."""
    found: Baseline | None = None
    for least_s, plan in sorted(((evaluator.bound_s(plan), plan) for plan in expert.plans), key=lambda one: one[0]):
        if found is not None and (least_s >= found.step_time_s or time.monotonic() > end):
            break
        with suppress(InputError, InfeasibleError):
            result = evaluator.below(plan, found.step_time_s if found else NOTHING)
            if result.fits and (found is None or result.step_time_s < found.step_time_s):
                found = _as_baseline(expert, plan, result, fits=True)
    return found or _beyond(evaluator, expert, end)


def _beyond(evaluator: Evaluator, expert: Expert, end: float) -> Baseline | None:
    """The fastest plan of a rule of which none fits, as far as there is time."""
    tried: list[tuple[Plan, ParallelSimulation]] = []
    for plan in expert.plans:
        if time.monotonic() > end:
            break
        with suppress(InputError, InfeasibleError):
            tried.append((plan, evaluator.simulate(plan, reserved=False)))
    tried.sort(key=lambda one: one[1].step_time_s)
    return _as_baseline(expert, *tried[0], fits=False) if tried else None


def _as_baseline(expert: Expert, plan: Plan, result: ParallelSimulation, *, fits: bool) -> Baseline:
    return Baseline(
        name=expert.name, source=expert.source, plan=plan, step_time_s=result.step_time_s,
        peak_memory_bytes=max(result.peak_memory_bytes), fits=fits,
    )  # fmt: skip


def _text(request: JointRequest, device: DeviceProfile) -> str:
    """All that decides the answer."""
    return study_text(
        request.config, request.seq_len, request.global_batch, request.cluster, fingerprint(device), fingerprint(request.trainer), request.computes,
        request.budget_bytes, request.extra_schedules,
    )  # fmt: skip
