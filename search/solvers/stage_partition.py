"""Which blocks each pipeline stage runs, and what it recomputes, under the memory that the order leaves it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from hardware_models.errors import InfeasibleError, InputError
from search.solvers.partition_kernels import best_split, least_bottleneck, stage_times
from search.solvers.proof import Proof
from search.solvers.stage_knapsack import (
    MOST_POINTS,
    StageOption,
    StageSolution,
    block_arrays,
    distinct_transients,
    least_stage_bytes,
    solve_stage_recompute,
)
from simulator.pipeline.action import Order, actions_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionProblem:
    """A chain of blocks to be cut into stages.

    Model:
        Stage s with the blocks i..j-1 takes t(s, i, j), the least time of `solve_stage_recompute` with
        in_flight[s] micro-batches and budget_bytes[s] - stage_static_bytes[s] - sum(static_bytes[i:j]). Minimised is
        sum of t + (m - 1) max of t + 2 (p - 1) comm: the way of the first micro-batch down and up, then one micro-batch a period.

    Source:
        AdaPipe (ASPLOS 2024): partition with recompute chosen per stage inside, for 1F1B; MadPipe (IEEE 9835381): partition under
        the memory of the micro-batches in flight; the objective is Mist's (EuroSys 2025) without its first and last micro-batch's extra.

    Not modelled:
        Several chunks that share a rank's memory; the order's own waiting where stage times differ (the simulator has it); different
        communication between stages.
    """

    blocks: tuple[tuple[StageOption, ...], ...]
    """Per block, its options."""
    static_bytes: tuple[int, ...]
    """Per block: parameters, gradients, optimizer states."""
    in_flight: tuple[int, ...]
    """Per stage, micro-batches whose saved bytes are held at once (`in_flight_of`)."""
    budget_bytes: tuple[int, ...]
    """Per stage."""
    num_microbatches: int
    stage_static_bytes: tuple[int, ...] = ()
    """Per stage: buffers and all else that does not depend on its blocks; empty: none."""
    comm_s: float = 0.0
    """From a stage to the next."""
    least_blocks: int = 1
    """Of a stage; 0 lets stages be empty."""

    def __post_init__(self) -> None:
        stages = len(self.in_flight)
        lengths = (
            ("static_bytes", len(self.static_bytes), len(self.blocks)),
            ("budget_bytes", len(self.budget_bytes), stages),
            ("stage_static_bytes", len(self.stage_static_bytes) or stages, stages),
        )
        for key, length, wanted in lengths:
            if length != wanted:
                raise InputError(
                    source="partition problem", key=key, value=None, rule=f"{wanted} entries must be given, but got {length}"
                )
        if not all(self.blocks) or not self.blocks:
            raise InputError(
                source="partition problem", key="blocks", value=None, rule="there are blocks, and each has an option"
            )
        if not stages or min(self.in_flight) < 1 or self.num_microbatches < 1 or self.least_blocks < 0 or self.comm_s < 0:
            rule = "in_flight >= 1 for one or more stages, num_microbatches >= 1, least_blocks >= 0 and comm_s >= 0 must hold"
            raise InputError(source="partition problem", key="", value=None, rule=rule)

    @property
    def num_stages(self) -> int:
        """P."""
        return len(self.in_flight)

    def room_bytes(self, stage: int, first: int, stop: int) -> int:
        """Memory of a stage for saved and transient bytes of the blocks first..stop-1."""
        own = self.stage_static_bytes[stage] if self.stage_static_bytes else 0
        return self.budget_bytes[stage] - own - sum(self.static_bytes[first:stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSolution:
    """Stages and what they recompute."""

    proof: Proof
    """Of the step's time."""
    partition: tuple[int, ...]
    """Blocks per stage."""
    stages: tuple[StageSolution | None, ...]
    """Per stage; None where it is empty."""

    @property
    def largest_s(self) -> float:
        """Time of the slowest stage and micro-batch."""
        return max(stage.time_s for stage in self.stages if stage is not None)


def solve_partition(problem: PartitionProblem) -> PartitionSolution:
    """The best cut of the chain, with each stage's recompute.

    Raises:
        InfeasibleError: no cut fits; names the least budget that does if all stages have the same more.

    Model:
        All t(s, i, j) from fronts that grow block by block, then for each possible largest time the least sum by a table over (stage,
        block); p L^2 / 2 steps each. Exact unless a front had more than `MOST_POINTS` points; then the bound ignores memory.
    """
    times, thinned = _stage_times(problem)
    bottleneck_s = float(least_bottleneck(times, problem.least_blocks))
    if not math.isfinite(bottleneck_s):
        raise _infeasible(problem)
    levels = np.unique(times[np.isfinite(times)])
    levels = levels[levels >= bottleneck_s]
    total_s, ends = best_split(times, levels, float(problem.num_microbatches - 1), problem.least_blocks)
    found_s = float(total_s) + 2 * (problem.num_stages - 1) * problem.comm_s
    starts = [0, *ends.tolist()]
    stages = tuple(
        solve_stage_recompute(problem.blocks[a:b], in_flight=problem.in_flight[s], budget_bytes=problem.room_bytes(s, a, b))
        if b > a
        else None
        for s, (a, b) in enumerate(pairwise(starts))
    )
    bound_s = _bound_without_memory_s(problem) if thinned else found_s
    return PartitionSolution(
        proof=Proof.of(found_s, bound_s), partition=tuple(b - a for a, b in pairwise(starts)), stages=stages
    )


def in_flight_of(order: Order) -> tuple[int, ...]:
    """Per stage, the most micro-batches between their forward pass and the end of their backward pass (W where it is apart)."""
    most, alive = Counter[int](), Counter[int]()
    for cells in order.ranks:
        split = {(action.stage, action.micro_batch) for action in actions_of(cells) if action.kind == "W"}
        for action in actions_of(cells):
            if action.kind == "F":
                alive[action.stage] += 1
                most[action.stage] = max(most[action.stage], alive[action.stage])
            elif action.kind != "B" or (action.stage, action.micro_batch) not in split:
                alive[action.stage] -= 1
    return tuple(most[stage] for stage in range(order.num_stages))


def _stage_times(problem: PartitionProblem) -> tuple[np.ndarray, bool]:
    room = [problem.room_bytes(stage, 0, 0) for stage in range(problem.num_stages)]
    times, thinned = stage_times(
        block_arrays(problem.blocks),
        distinct_transients(problem.blocks),
        np.array([0, *accumulate(problem.static_bytes)], np.int64),
        np.array(room, np.int64),
        np.array(problem.in_flight, np.int64),
        MOST_POINTS,
    )
    return times, bool(thinned)


def _bound_without_memory_s(problem: PartitionProblem) -> float:
    fastest = [min(option.time_s for option in row) for row in problem.blocks]
    slowest = max(*fastest, math.fsum(fastest) / problem.num_stages)
    return math.fsum(fastest) + (problem.num_microbatches - 1) * slowest + 2 * (problem.num_stages - 1) * problem.comm_s


def _infeasible(problem: PartitionProblem) -> InfeasibleError:
    if problem.least_blocks * problem.num_stages > len(problem.blocks):
        limit = f"{len(problem.blocks)} blocks do not fill {problem.num_stages} stages of least_blocks = {problem.least_blocks}"
        return InfeasibleError(
            limit=limit, smallest_change=f"{len(problem.blocks) // max(1, problem.least_blocks)} stages or fewer would do"
        )
    more = _least_more_bytes(problem)
    needed = max(problem.budget_bytes) + more
    return InfeasibleError(
        limit=f"no cut of {len(problem.blocks)} blocks into {problem.num_stages} stages fits budgets of {_span(problem.budget_bytes)} bytes",
        smallest_change=f"{more} bytes more on every stage would do",
        needed_bytes=needed,
    )


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _least_more_bytes(problem: PartitionProblem) -> int:
    """Bytes by which every stage's budget must grow: the least possible largest lack."""
    length = len(problem.blocks)
    lack = np.full((problem.num_stages, length + 1, length + 1), np.inf)
    for stage, in_flight in enumerate(problem.in_flight):
        for first in range(length + 1):
            for stop in range(first, length + 1):
                need = least_stage_bytes(problem.blocks[first:stop], in_flight=in_flight) if stop > first else 0
                lack[stage, first, stop] = max(0, need - problem.room_bytes(stage, first, stop))
    return int(least_bottleneck(lack, problem.least_blocks))
