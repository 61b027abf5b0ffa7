"""The outer space of a search on one device: micro-batch sizes, precisions and cells of fractions on the host, each with its inner solver."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from hardware_models.errors import InfeasibleError
from search.device.device_solver import DeviceSolver, memory_keys
from search.device.host_cells import FINER_STEPS, Technique, host_cells, neighbours
from search.found_plan import Found, Point, rank, summary
from search.recompute import RecomputeSolver
from search.search_request import SearchRequest
from search.step_evaluator import Candidate
from search.study import BoundedPoint, Outcome
from simulator.plan import Batch, Memory, Plan, Precision
from simulator.plan_sections import ComputePrecision
from simulator.simulate import Simulation, StepSetting, simulate, step_setting

PARETO_BUDGETS = 9
"""Budgets, evenly spread from the least to the plain schedule's, whose best plans make the frontier."""
BUDGET_STEPS = 6
"""Halvings of the stretch of budgets in which the least memory for a time lies."""
RESERVED_TRIES = 4
"""How often a budget is lowered because the caching allocator would hold more than the device has."""


class PlanSearch:
    """The outer space of one request: micro-batch sizes, precisions and cells of fractions, each with its inner solver, kept between questions."""

    def __init__(self, request: SearchRequest, *, like: PlanSearch | None = None) -> None:
        self.request, self._like = request, like
        self._solvers: dict[tuple[int, str], DeviceSolver] = {}

    def with_techniques(self, techniques: tuple[Technique, ...]) -> PlanSearch:
        """The same search with fewer or other techniques; what was evaluated is shared."""
        return PlanSearch(replace(self.request, techniques=techniques), like=self)

    def solver(self, micro_batch: int, precision: ComputePrecision | None = None) -> DeviceSolver:
        """The solver at a micro-batch and a precision (default: the model's)."""
        one = precision or self.request.precisions[0]
        key = (micro_batch, one)
        if key not in self._solvers:
            if self._like is not None:
                recompute = self._like.solver(micro_batch, one).recompute
            else:
                workload = self.request.source_in(one).workload(micro_batch)
                recompute = RecomputeSolver(workload, self.request.device, self.setting(micro_batch, one))
            self._solvers[key] = DeviceSolver(recompute, self.request.used_techniques)
        return self._solvers[key]

    def setting(self, micro_batch: int, precision: ComputePrecision) -> StepSetting:
        """The step at a micro-batch and a precision."""
        plan = Plan(precision=Precision(compute=precision, optimizer=self.request.optimizer))  # type: ignore[arg-type]
        return replace(
            step_setting(plan, 0),
            num_microbatches=self.request.global_batch // micro_batch,
            budget_bytes=self.request.budget_bytes,
        )

    def micro_batches(self) -> tuple[int, ...]:
        """Sizes that are tried, largest first."""
        return tuple(self.request.micro_batches())

    def space(self) -> tuple[Point, ...]:
        """All points, the plain ones first."""
        cells = host_cells(self.request.used_techniques)
        return tuple(
            Point(micro_batch=size, precision=precision, cell=cell)
            for size in self.micro_batches()
            for precision in self.request.precisions
            for cell in cells
        )

    def least(self) -> Candidate:
        """The least memory that any point needs."""
        return min((self._least_at(point) for point in self.space()), key=lambda candidate: candidate.peak_bytes)

    def plain(self) -> Candidate:
        """The whole batch at once, nothing recomputed, nothing on the host, in the model's own precision."""
        return self.solver(self.request.global_batch).plain()

    def unlimited_s(self) -> float:
        """Time of the fastest step if memory had no end."""
        return min(
            self.solver(size, precision).recompute.fastest_s
            for size in self.micro_batches()
            for precision in self.request.precisions
        )

    def best_within(self, budget_bytes: int, *, incumbent: Found | None = None) -> Found:
        """The fastest plan within a budget, points in order of their bounds until none can be better.

        Args:
            budget_bytes: most bytes allocated on the device.
            incumbent: a plan of the space that fits, if one is known.

        Raises:
            InfeasibleError: none fits; says the least budget that does.
        """
        best = incumbent
        refused: list[InfeasibleError] = []
        for bound, _, point in sorted((self.bound_s(one, budget_bytes), place, one) for place, one in enumerate(self.space())):
            if best is not None and bound >= best.candidate.step_time_s:
                break
            try:
                below_s = math.inf if best is None else best.candidate.step_time_s
                found = self.best_at(point, budget_bytes, below_s=below_s)
            except InfeasibleError as error:
                refused.append(error)
                continue
            if best is None or rank(found) < rank(best):
                best = found
        if best is None:
            raise min(refused, key=lambda error: error.needed_bytes)
        return best

    def bound_s(self, point: Point, budget_bytes: int) -> float:
        """Seconds that no plan of a point within a budget is below."""
        return self.solver(point.micro_batch, point.precision).bound.lower_bound_s(budget_bytes, point.cell)

    def best_at(self, point: Point, budget_bytes: int, *, below_s: float = math.inf) -> Found:
        """The fastest plan of a point that fits the budget and, with what the allocator reserves, the device.

        Args:
            point: of the space.
            budget_bytes: most bytes of live tensors.
            below_s: plans that compute for longer are not looked at.

        Raises:
            InfeasibleError: none fits, or none that does computes for less; says the least budget that fits.
        """
        solver, device = self.solver(point.micro_batch, point.precision), self.request.device
        budget = budget_bytes
        for _ in range(RESERVED_TRIES):
            candidate = solver.best(budget, point.cell, below_s=below_s)
            found = Found(micro_batch=point.micro_batch, precision=point.precision, candidate=candidate)
            if device.kind == "cpu" or candidate.step_time_s >= below_s:
                return found
            excess = self._excess_bytes(found)
            if excess <= 0:
                return found
            budget = candidate.peak_bytes - excess
        needed = candidate.peak_bytes + excess
        raise InfeasibleError(
            limit=f"at {point.text} the caching allocator holds more than the device has for every plan that was found",
            smallest_change=f"{needed} bytes would do", needed_bytes=needed,
        )  # fmt: skip

    def points(self) -> tuple[BoundedPoint, ...]:
        """The outer space with a value that no plan of a point is below."""
        budget = self.request.budget_bytes
        return tuple(BoundedPoint(text=point.text, bound=self.bound_s(point, budget)) for point in self.space())

    def outcome(self, text: str) -> Outcome:
        """The fastest plan at a point.

        Raises:
            InfeasibleError: none fits the budget.
        """
        point = self._named(text)
        found = self.best_at(point, self.request.budget_bytes)
        value = found.candidate.step_time_s
        bound = min(value, self.bound_s(point, self.request.budget_bytes))
        return Outcome(value=value, bound=bound, attributes=found.to_attributes())

    def least_bytes_points(self, within_s: float) -> tuple[BoundedPoint, ...]:
        """The outer space with bytes that no plan of a point within a time is below."""
        return tuple(BoundedPoint(text=point.text, bound=float(self._bytes_bound(point, within_s))) for point in self.space())

    def least_bytes_outcome(self, text: str, within_s: float) -> Outcome:
        """The plan of least memory at a point that takes no longer than a time.

        Raises:
            InfeasibleError: none is that fast within the budget.
        """
        point, budget = self._named(text), self.request.budget_bytes
        best = self.best_at(point, budget)
        if best.candidate.step_time_s > within_s:
            rule = f"at {text} no plan within the budget takes at most {within_s} s"
            raise InfeasibleError(limit=rule, smallest_change="allow more time", needed_bytes=best.candidate.peak_bytes)
        low = self._least_at(point).peak_bytes
        tried = [low, *(0,) * BUDGET_STEPS]
        for budget in tried:
            if not low <= (limit := budget or (low + best.candidate.peak_bytes) // 2) < best.candidate.peak_bytes:
                break
            try:
                found = self.best_at(point, limit)
            except InfeasibleError:
                low = limit
                continue
            if found.candidate.step_time_s <= within_s:
                best = found
            else:
                low = limit
        value = float(best.candidate.peak_bytes)
        bound = min(value, float(self._bytes_bound(point, within_s)))
        return Outcome(value=value, bound=bound, attributes=best.to_attributes())

    def _bytes_bound(self, point: Point, within_s: float) -> int:
        """Bytes below which a point's time bound exceeds a time; to a thousandth."""
        low, high = 0, self.request.budget_bytes

        def too_little(budget_bytes: int) -> bool:
            bound = self.bound_s(point, budget_bytes)
            return bound > within_s or math.isinf(bound)

        if too_little(high):
            return high
        while high - low > high // 1000 + 1:
            middle = (low + high) // 2
            low, high = (middle, high) if too_little(middle) else (low, middle)
        return low

    def _least_at(self, point: Point) -> Candidate:
        return self.solver(point.micro_batch, point.precision).least(point.cell)

    def _named(self, text: str) -> Point:
        return next(point for point in self.space() if point.text == text)

    def refined(self, found: Found, budget_bytes: int, *, until: float = math.inf) -> Found:
        """The same with fractions between the ends of cells, and with whole blocks' parameters in place of a fraction of each, where that is faster.

        No other is begun after the moment ``until`` (`time.monotonic`).
        """
        best = found
        for step in FINER_STEPS:
            shares = best.candidate.shares
            weights, optimizer = (shares.weights[0], shares.optimizer) if shares else (0.0, 0.0)
            for cell in neighbours(weights, optimizer, step, self.request.used_techniques):
                if time.monotonic() > until:
                    return best
                with suppress(InfeasibleError):
                    point = Point(micro_batch=found.micro_batch, precision=found.precision, cell=cell)
                    best = min(best, self.best_at(point, budget_bytes, below_s=best.candidate.step_time_s), key=rank)
        return self._placed(best, budget_bytes, until)

    def _placed(self, found: Found, budget_bytes: int, until: float) -> Found:
        """The same with whole blocks' parameters on the host, where that is faster and fits the budget and, with what the allocator reserves, the device."""
        solver, budget = self.solver(found.micro_batch, found.precision), budget_bytes
        for _ in range(RESERVED_TRIES):
            other = replace(found, candidate=solver.placed(found.candidate, budget, until=until))
            if rank(other) >= rank(found):
                return found
            excess = self._excess_bytes(other)
            if excess <= 0:
                return other
            budget = other.candidate.peak_bytes - excess
        return found

    def _excess_bytes(self, found: Found) -> int:
        """By how much what the allocator reserves for a plan is more than the device has; 0 or less: it fits."""
        device = self.request.device
        return max(self.simulate(found).peak_reserved_bytes) + device.context_bytes - device.memory_bytes

    def plan_of(self, found: Found) -> Plan:
        """The plan of what was found."""
        request, keys = self.request, memory_keys(found.candidate.shares)
        return Plan(
            batch=Batch(global_batch=request.global_batch, micro_batch=found.micro_batch, seq_len=request.model.seq_len),
            memory=Memory(recompute=found.recompute, budget_bytes=request.budget_bytes, **keys),  # type: ignore[arg-type]
            precision=Precision(compute=found.precision, optimizer=request.optimizer),  # type: ignore[arg-type]
        )

    def simulate(self, found: Found) -> Simulation:
        """A plan on the engine, the allocator included."""
        solver = self.solver(found.micro_batch, found.precision)
        setting = replace(self.setting(found.micro_batch, found.precision), host=found.candidate.shares)
        return simulate(solver.workload, found.candidate.operations, self.request.device, setting)

    def experts(self) -> Iterator[tuple[str, Found]]:
        """Named expert plans."""
        several = len(self.request.precisions) > 1
        for size in self.micro_batches():
            for precision in self.request.precisions:
                for one in self.solver(size, precision).experts():
                    name = f"{one.name}, micro_batch {size}" + (f", {precision}" if several else "")
                    yield name, Found(micro_batch=size, precision=precision, candidate=one)

    def fits(self, found: Found, budget_bytes: int) -> bool:
        """Whether a plan fits the budget and, with what the allocator reserves, the device."""
        return found.candidate.peak_bytes <= budget_bytes and self.simulate(found).fits

    def pareto(self) -> tuple[dict[str, Any], ...]:
        """Time against memory: the best plan at budgets from the least to the plain schedule's, none dominated."""
        least, plain = self.least().peak_bytes, self.plain().peak_bytes
        points: list[Found] = []
        for step in range(PARETO_BUDGETS):
            budget = least + (max(plain, least) - least) * step // (PARETO_BUDGETS - 1)
            found = self.best_within(budget)
            if not points or found.candidate.step_time_s < points[-1].candidate.step_time_s:
                points.append(found)
        return tuple(summary(found) for found in points)

    def evaluated_front(self, best: Found) -> tuple[dict[str, Any], ...]:
        """Time against memory of the experts' plans and the best one, without those that another beats in both."""
        kept: list[Found] = []
        for found in sorted((best, *(one for _, one in self.experts())), key=rank):
            if not kept or found.candidate.peak_bytes < kept[-1].candidate.peak_bytes:
                kept.append(found)
        return tuple(summary(found) for found in reversed(kept))
