"""Search: the best plan of a model on a device under a memory budget, how far from a bound it is, and what experts would have set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.profile import DeviceProfile
from search.recompute import Candidate, RecomputeSolver
from search.study import BoundedPoint, Outcome, StudyResult, run_study
from simulator.model_source import ModelSource
from simulator.plan import Batch, Memory, Plan
from simulator.plan_file import plan_to_dict
from simulator.sequence import Operation, format_sequence, parse_sequence
from simulator.simulate import Simulation, StepSetting, simulate

Objective = Literal["time", "memory"]
OBJECTIVES: tuple[Objective, ...] = ("time", "memory")
ALLOWABLE = ("split-batch",)
"""What a user may allow: ``split-batch`` splits the batch of a model that mixes samples (BatchNorm then sees micro-batches)."""
PARETO_BUDGETS = 9
"""Budgets, evenly spread from the least to the plain schedule's, whose best plans make the frontier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What is asked for; everything else is found."""

    model: ModelSource
    device: DeviceProfile
    global_batch: int
    budget_bytes: int
    """Most bytes allocated on the device."""
    objective: Objective = "time"
    allow: tuple[str, ...] = ()
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise InputError(source="--global-batch", key="", value=self.global_batch, rule="global_batch >= 1 must hold")
        for name in self.allow:
            if name not in ALLOWABLE:
                raise InputError(source="--allow", key="", value=name, rule=f"known are {', '.join(ALLOWABLE)}")

    @property
    def text(self) -> str:
        """All that decides the answer; studies of the same text are one."""
        parts = (
            self.model.name, self.model.seq_len, self.device.name, self.device.provenance, self.global_batch, self.budget_bytes,
            self.objective, self.allow, self.optimizer,
        )  # fmt: skip
        return repr(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The answer: ``sequence`` is what the plan's ``recompute = "optimal"`` stands for."""

    request: SearchRequest
    plan: Plan
    operations: tuple[Operation, ...]
    simulation: Simulation
    study: StudyResult
    space_size: int
    elapsed_s: float
    baselines: dict[str, dict[str, Any]]
    pareto: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The keys of ``schedlab search --json``."""
        return {
            "best": {
                "plan": plan_to_dict(self.plan), "sequence": format_sequence(self.operations).splitlines(),
                "simulate": self.simulation.to_json(),
            },
            "objective": self.request.objective, "budget_bytes": self.request.budget_bytes,
            "lower_bound_s" if self.request.objective == "time" else "lower_bound_bytes": self.study.lower_bound,
            "gap": self.study.gap, "certified": self.study.certified, "space_size": self.space_size,
            "num_simulated": self.study.num_simulated, "elapsed_s": self.elapsed_s, "baselines": self.baselines,
            "pareto": list(self.pareto),
        }  # fmt: skip


class PlanSearch:
    """The outer space of one request: micro-batch sizes, each with its exact inner solver, kept between questions."""

    def __init__(self, request: SearchRequest) -> None:
        self.request = request
        self._solvers: dict[int, RecomputeSolver] = {}

    def solver(self, micro_batch: int) -> RecomputeSolver:
        """The recompute solver at a micro-batch."""
        if micro_batch not in self._solvers:
            workload = self.request.model.workload(micro_batch)
            self._solvers[micro_batch] = RecomputeSolver(workload, self.request.device, self.setting(micro_batch))
        return self._solvers[micro_batch]

    def setting(self, micro_batch: int) -> StepSetting:
        """The step at a micro-batch."""
        return StepSetting(
            num_microbatches=self.request.global_batch // micro_batch,
            optimizer=self.request.optimizer,
            budget_bytes=self.request.budget_bytes,
        )

    def micro_batches(self) -> tuple[int, ...]:
        """Divisors of the batch, largest first; the whole batch alone for a model that mixes samples, unless splitting is allowed."""
        whole = self.request.global_batch
        divisors = tuple(size for size in range(whole, 0, -1) if whole % size == 0)
        if self.request.model.workload(whole).mixes_samples and "split-batch" not in self.request.allow:
            return divisors[:1]
        return divisors

    def least(self) -> Candidate:
        """The least memory that any point needs."""
        return min((self.solver(size).least() for size in self.micro_batches()), key=lambda candidate: candidate.peak_bytes)

    def plain(self) -> Candidate:
        """The whole batch at once, nothing recomputed."""
        return self.solver(self.request.global_batch).experts()[0]

    def best_within(self, budget_bytes: int) -> tuple[int, Candidate]:
        """(micro-batch, sequence) of the fastest plan within a budget.

        Raises:
            InfeasibleError: none fits; says the least budget that does.
        """
        found: list[tuple[int, Candidate]] = []
        refused: list[InfeasibleError] = []
        for size in self.micro_batches():
            try:
                found.append((size, self.solver(size).best(budget_bytes)))
            except InfeasibleError as error:
                refused.append(error)
        if not found:
            raise min(refused, key=lambda error: error.needed_bytes)
        return min(found, key=lambda pair: (pair[1].step_time_s, pair[1].peak_bytes))

    def points(self) -> tuple[BoundedPoint, ...]:
        """The outer space; a point's first bound is its time without any recompute, or its memory with all of it."""
        by_memory = self.request.objective == "memory"
        return tuple(
            BoundedPoint(
                text=f"micro_batch={size}", bound=0.0 if by_memory else self.solver(size).fastest_s
            )
            for size in self.micro_batches()
        )  # fmt: skip

    def outcome(self, text: str) -> Outcome:
        """The best plan at a point.

        Raises:
            InfeasibleError: none fits the budget.
        """
        micro_batch = int(text.removeprefix("micro_batch="))
        solver = self.solver(micro_batch)
        candidate = solver.best(self.request.budget_bytes)
        if self.request.objective == "memory":
            candidate = solver.least()
            value, bound = float(candidate.peak_bytes), float(candidate.peak_bytes)
        else:
            value = candidate.step_time_s
            bound = min(value, solver.lower_bound_s(self.request.budget_bytes))
        attributes = {
            "micro_batch": micro_batch, "recompute": candidate.name, "sequence": format_sequence(candidate.operations),
            "step_time_s": candidate.step_time_s, "peak_memory_bytes": candidate.peak_bytes,
        }  # fmt: skip
        return Outcome(value=value, bound=bound, attributes=attributes)

    def plan_of(self, micro_batch: int, recompute: str) -> Plan:
        """The plan of an outcome."""
        named = recompute if recompute in {"none", "selective", "full"} else "optimal"
        return Plan(
            batch=Batch(global_batch=self.request.global_batch, micro_batch=micro_batch, seq_len=self.request.model.seq_len),
            memory=Memory(recompute=named, budget_bytes=self.request.budget_bytes),
        )

    def simulate(self, micro_batch: int, operations: Sequence[Operation]) -> Simulation:
        """A sequence at a micro-batch on the reference engine."""
        solver = self.solver(micro_batch)
        return simulate(solver.workload, operations, self.request.device, self.setting(micro_batch))

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Named expert plans with their predicted time and memory, and whether they fit the budget."""
        return {
            f"{candidate.name}, micro_batch {size}": _summary(candidate, size, self.request.budget_bytes)
            for size in self.micro_batches()
            for candidate in self.solver(size).experts()
        }

    def pareto(self) -> tuple[dict[str, Any], ...]:
        """Time against memory: the best plan at budgets from the least to the plain schedule's, none dominated."""
        least, plain = self.least().peak_bytes, self.plain().peak_bytes
        points: list[tuple[int, Candidate]] = []
        for step in range(PARETO_BUDGETS):
            budget = least + (max(plain, least) - least) * step // (PARETO_BUDGETS - 1)
            size, candidate = self.best_within(budget)
            if not points or candidate.step_time_s < points[-1][1].step_time_s:
                points.append((size, candidate))
        return tuple(_summary(candidate, size, self.request.budget_bytes) for size, candidate in points)


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
    started = time.perf_counter()
    space = PlanSearch(request)
    points = space.points()
    study = run_study(
        points, space.outcome, request=request.text, storage=storage, time_limit_s=time_limit_s, on_trial=on_trial
    )
    found = study.best.user_attrs
    micro_batch, operations = int(found["micro_batch"]), parse_sequence(str(found["sequence"]))
    plan = space.plan_of(micro_batch, str(found["recompute"]))
    if request.objective == "memory":
        plan = replace(plan, memory=replace(plan.memory, budget_bytes=int(found["peak_memory_bytes"])))
    return SearchResult(
        request=request, plan=plan, operations=operations, simulation=space.simulate(micro_batch, operations), study=study,
        space_size=len(points), elapsed_s=time.perf_counter() - started, baselines=space.baselines(), pareto=space.pareto(),
    )  # fmt: skip


def _summary(candidate: Candidate, micro_batch: int, budget_bytes: int) -> dict[str, Any]:
    return {
        "micro_batch": micro_batch, "recompute": candidate.name, "step_time_s": candidate.step_time_s,
        "peak_memory_bytes": candidate.peak_bytes, "fits": candidate.peak_bytes <= budget_bytes,
    }  # fmt: skip
