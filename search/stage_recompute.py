"""Optimal recompute over pipeline stages: what ``recompute = "optimal"`` stands for on a cluster, each stage under its own rank's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hardware_models.errors import InfeasibleError
from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes
from search.chain_problem import ChainProblem
from search.chain_schedules import evaluate
from search.rank_moments import moments_of
from search.spread_kernels import Ways, spread_ways
from search.stage_chain import StageTable, kept_bytes
from search.stage_choices import Choice, StageChoices
from search.stage_runs import StageSequence, undominated
from simulator.model_source import ModelSource
from simulator.parallel.open_step import OpenStep
from simulator.parallel.simulate_source import ParallelCase, parallel_case, simulate_source
from simulator.parallel.simulation import ParallelSimulation
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal
from simulator.sequence import Operation

MOST_ATTEMPTS = 4
"""Times that the budget is lowered by what the allocator reserves beyond it."""
MOST_CORRECTIONS = 3
"""Times that a rank is solved, its room corrected by what the chain problem over- or understates."""
NUM_STARTS = 24
"""From the fastest ways of stages that share a rank to their leanest."""
_LEAST_CORRECTION_BYTES = 1.0


class _Rank:
    """The stages of a pipeline rank, which share its memory."""

    def __init__(self, choices: StageChoices, order: Order, rank: int) -> None:
        self.choices, self.parts = choices, order.microbatch_parts
        self.stages = [choices.setting.stages[stage] for stage in order.stages_of_rank[rank]]
        self.moments = moments_of(order, rank, weight_share=choices.setting.weight_share)

    def fastest(self, room_bytes: float) -> tuple[list[Choice], float]:
        """The fastest way of each stage that was found, and its peak; beyond the room where nothing fits: then the leanest."""
        plain = [self.choices.plain(stage) for stage in self.stages]
        peak = self.peak_bytes(plain)
        if peak <= room_bytes:
            return plain, peak
        found = [self._solved(room_bytes)]
        if found[0] is None or any(self.choices.unlike(stage) for stage in self.stages):
            found.append(self._from_tables(room_bytes))
        lean = [self._lean(place) for place in range(len(self.stages))] if found == [None, None] else []
        best = min((own for own in found if own is not None), key=_seconds, default=lean)
        return best, self.peak_bytes(best)

    def peak_bytes(self, chosen: Sequence[Choice]) -> float:
        """Most bytes of activations, exactly."""
        kept = np.array([[one.cost.forward.net_bytes for one in chosen]], np.float64)
        forward = np.array([[one.cost.forward.rise_bytes for one in chosen]], np.float64)
        backward = np.array([[one.cost.backward.rise_bytes for one in chosen]], np.float64)
        return float(self.moments.peak_bytes(kept, forward / self.parts, backward / self.parts)[0])

    def _solved(self, room_bytes: float) -> list[Choice] | None:
        """The fastest sequences of `StageRuns` that fit exactly; what the solver takes them to need is corrected by what they do need."""
        best, limit, known = None, room_bytes, None
        for _ in range(MOST_CORRECTIONS):
            found = self._under(limit)
            if found is None or found == known:
                break
            known = found
            chosen, peak = self._exact(found)
            if peak <= room_bytes and (best is None or _seconds(chosen) < _seconds(best)):
                best = chosen
            corrected = room_bytes + self._said_bytes(found) - peak
            if abs(corrected - limit) < _LEAST_CORRECTION_BYTES:
                break
            limit = corrected
        return best

    def _exact(self, found: Sequence[StageSequence | None]) -> tuple[list[Choice], float]:
        chosen = [
            self.choices.choice(stage, own.operations if own else ()) for stage, own in zip(self.stages, found, strict=True)
        ]
        return chosen, self.peak_bytes(chosen)

    def _said_bytes(self, found: Sequence[StageSequence | None]) -> float:
        """The peak by the solver's account."""
        kept, forward, backward = np.array([self._sizes(place, own) for place, own in enumerate(found)], np.float64).T[:, None]
        return float(self.moments.peak_bytes(kept, forward / self.parts, backward / self.parts)[0])

    def _sizes(self, place: int, found: StageSequence | None) -> tuple[float, float, float]:
        """Bytes that a sequence keeps, and that its passes add."""
        if found is None:
            return 0.0, 0.0, 0.0
        kept = found.kept_bytes + self._lasting_bytes(place)
        return kept, found.peak_bytes, found.peak_bytes - kept

    def _lasting_bytes(self, place: int) -> int:
        """Held by each micro-batch from its first pass to its last, whatever runs again."""
        return self.choices.runs(self.stages[place]).problem.resident_bytes[0]

    def _others(self, places: Sequence[int]) -> float:
        """Micro-batches of some stages in flight beside the running one, which counts as one part of a micro-batch; in parts."""
        held = self.moments.held[:, list(places)].sum(axis=1)
        own = np.isin(self.moments.running, list(places)) & self.moments.backward
        return float(max(0.0, (held * self.parts - own).max()))

    def _filled(self) -> list[int]:
        """Places of stages that have blocks."""
        return [place for place, stage in enumerate(self.stages) if stage.blocks]

    def _lean(self, place: int) -> Choice:
        stage = self.stages[place]
        if not stage.blocks:
            return self.choices.plain(stage)
        return self.choices.choice(stage, self.choices.runs(stage).leanest(self._others([place])).operations)

    def _under(self, limit_bytes: float) -> list[StageSequence | None] | None:
        """The fastest sequences by the solver's account; None where nothing fits by it."""
        filled = self._filled()
        if len(filled) > 1:
            return self._spread({place: self.choices.runs(self.stages[place]).ways for place in filled}, limit_bytes)
        others, parts = self._others(filled), self.parts
        room = parts * limit_bytes - others * self._lasting_bytes(filled[0])
        found = self.choices.runs(self.stages[filled[0]]).fastest(room, others)
        return None if found is None else [found if place == filled[0] else None for place in range(len(self.stages))]

    def _kinds(self) -> dict[int, list[int]]:
        """Places of stages with blocks, like ones together."""
        kinds: dict[int, list[int]] = {}
        for place in self._filled():
            kinds.setdefault(self.choices.kind(self.stages[place]), []).append(place)
        return kinds

    def _spread(self, lists: dict[int, list[StageSequence]], limit_bytes: float) -> list[StageSequence | None] | None:
        """Of each stage the way that it takes beside the others; None where none fit together."""
        most = max(len(ways) for ways in lists.values())
        table = np.zeros((4, len(self.stages), most))
        num = np.ones(len(self.stages), np.int64)
        for place, own in lists.items():
            num[place] = len(own)
            table[0, place, : len(own)] = [way.seconds for way in own]
            table[1:, place, : len(own)] = np.array([self._sizes(place, way) for way in own]).T
        ways = Ways(num, table[0], table[1], table[2] / self.parts, table[3] / self.parts)
        starts = np.round(np.linspace(0.0, 1.0, NUM_STARTS)[:, None] * (num - 1)).astype(np.int64)
        moments = self.moments
        best = spread_ways(ways, starts, moments.held, moments.running, moments.backward, limit_bytes)
        if best[0] < 0:
            return None
        return [lists[place][best[place]] if place in lists else None for place in range(len(self.stages))]

    def _from_tables(self, room_bytes: float) -> list[Choice] | None:
        """The fastest sequences of `StageTable`; None where these do not fit either."""
        filled = self._filled()
        least = np.array([self._least_sizes(place) for place in range(len(self.stages))], np.float64).T[:, None]
        if self.moments.peak_bytes(least[0], least[1] / self.parts, least[2] / self.parts)[0] > room_bytes:
            return None
        lists: dict[int, list[StageSequence]] = {}
        most = self.moments.held.max(axis=0)
        for places in self._kinds().values():
            runs, others = self.choices.runs(self.stages[places[0]]), self._others(places)
            share = self.parts * room_bytes * float(most[places].sum() / most[filled].sum())
            table = StageTable(runs.problem, int(share - others * self._lasting_bytes(places[0])))
            ways = [_measured(runs.problem, one) for one in table.sequences(others + 1.0)]
            if not ways:
                return None
            lists.update(dict.fromkeys(places, undominated(ways)))
        found = self._spread(lists, room_bytes)
        if found is None:
            return None
        chosen, peak = self._exact(found)
        return chosen if peak <= room_bytes else None

    def _least_sizes(self, place: int) -> tuple[float, float, float]:
        """Sizes that no sequence of a stage is below: it keeps what it received, and rises by the least that its chain can do with."""
        if not self.stages[place].blocks:
            return 0.0, 0.0, 0.0
        runs = self.choices.runs(self.stages[place])
        kept = runs.problem.boundary_bytes[0] + self._lasting_bytes(place)
        return kept, 0.0, runs.least_peak_bytes - kept


def _seconds(chosen: Sequence[Choice]) -> float:
    return sum(one.seconds for one in chosen)


def _measured(problem: ChainProblem, operations: tuple[Operation, ...]) -> StageSequence:
    seconds, peak = evaluate(problem, operations)
    return StageSequence(operations=operations, seconds=seconds, kept_bytes=kept_bytes(problem, operations), peak_bytes=peak)


def best_operations(
    choices: StageChoices, order: Order, static: Sequence[int], *, budget_bytes: int, spare: Sequence[int] = ()
) -> tuple[tuple[Operation, ...], ...]:
    """Of each stage the fastest sequence under its rank's memory, blocks counted from the stage's first.

    **Model**: a rank's activations may take what the budget leaves beside what lives through the step. They are what its stages hold at each moment of the order, plus what the running
    pass adds (`Moments`). Where nothing need run again, nothing does; else a rank's only stage has the fastest sequence of `StageRuns`, and stages that share a rank each take one of many
    (`spread_ways`). Where blocks differ too much for that, and where only running blocks more than once again fits, `StageTable` is asked. Costs that decide whether it fits are exact
    (`stage_cost`); time counts the collectives of what runs again.

    Args:
        choices: of the stages.
        order: of the pipeline.
        static: per rank, bytes that live through the step.
        budget_bytes: of a rank.
        spare: per rank, bytes that are left free; empty: none.

    Raises:
        InfeasibleError: nothing fits on some rank; says what would.
    """
    chosen: dict[int, Choice] = {}
    for number, alive in enumerate(static):
        rank, free = _Rank(choices, order, number), spare[number] if spare else 0
        room = budget_bytes - alive - free
        found, peak = rank.fastest(room)
        if peak > room:
            needed = alive + free + int(np.ceil(peak))
            raise InfeasibleError(
                limit=f"pipeline rank {number} holds no schedule in {budget_bytes} bytes ({format_bytes(budget_bytes)}), {format_bytes(alive)} of which live through the step",
                smallest_change=f"the least budget that fits there is {needed} bytes ({format_bytes(needed)})", needed_bytes=needed,
            )  # fmt: skip
        for stage, choice in zip(rank.stages, found, strict=True):
            known = chosen.setdefault(stage.index, choice)
            if choice.cost.forward.net_bytes < known.cost.forward.net_bytes:  # a stage on two ranks: what both can hold
                chosen[stage.index] = choice
    return tuple(chosen[stage.index].operations for stage in choices.setting.stages)


def best_sequence(choices: StageChoices, order: Order, static: Sequence[int], *, budget_bytes: int) -> tuple[Operation, ...]:
    """`best_operations` as one sequence, blocks counted over the whole model."""
    found = best_operations(choices, order, static, budget_bytes=budget_bytes)
    return tuple(
        operation._replace(block=operation.block + stage.first)
        for stage, own in zip(choices.setting.stages, found, strict=True)
        for operation in own
    )


def open_step(case: ParallelCase) -> OpenStep:
    """The step of a plan whose ``memory.recompute`` is ``optimal``, its sequences still to be found.

    Raises:
        InputError: the plan also offloads activations or weights: how much to recompute then is another problem.
    """
    memory = case.plan.memory
    if memory.activation_offload or memory.weight_offload:
        rule = 'with recompute = "optimal" no activations or weights are offloaded yet'
        key = "memory.activation_offload" if memory.activation_offload else "memory.weight_offload"
        raise plan_refusal(
            key, memory.activation_offload or memory.weight_offload, rule, "leave it at 0, or take another recompute"
        )
    return OpenStep(case.config, case.plan, case.cluster, case.device, case.order, seq_len=case.seq_len)


def optimal_sequence(case: ParallelCase) -> tuple[Operation, ...]:
    """What ``recompute = "optimal"`` stands for in a case, blocks counted over the whole model: `best_sequence` in the plan's budget, else in what the device has beside the context.

    Raises:
        InfeasibleError: nothing fits on some rank; says what would.
        InputError: as `open_step`.
    """
    step = open_step(case)
    return best_sequence(StageChoices(step, case.device), case.order, _static(step), budget_bytes=_budget_bytes(case))


def _static(step: OpenStep) -> list[int]:
    """Per rank, bytes that live through the step."""
    return [sum(resident) for resident in step.resident_bytes]


def _budget_bytes(case: ParallelCase) -> int:
    device, budget = case.device, case.plan.memory.budget_bytes
    return min(budget or device.memory_bytes, device.memory_bytes - device.context_bytes)


def simulate_on_cluster(
    source: ModelSource, plan: Plan, cluster: Cluster, *, gpus: int | None = None, folder: Path | None = None, engine: str = "compiled", reserved: bool = True,
    device: DeviceProfile | None = None,
) -> ParallelSimulation:  # fmt: skip
    """`simulate_source` of any plan: ``recompute = "optimal"`` is resolved first, again with less room where the allocator reserves more than the device has.

    Raises:
        InfeasibleError: no sequences fit.
    """
    if plan.memory.recompute != "optimal":
        return simulate_source(source, plan, cluster, gpus=gpus, folder=folder, engine=engine, reserved=reserved, device=device)
    case = parallel_case(source, plan, cluster, gpus=gpus, folder=folder, device=device)
    step = open_step(case)
    choices, static = StageChoices(step, case.device), _static(step)
    spare = [0] * len(static)
    for _ in range(MOST_ATTEMPTS):
        operations = best_operations(choices, case.order, static, budget_bytes=_budget_bytes(case), spare=spare)
        result = step.simulate(operations, engine=engine, reserved=reserved)
        room = case.device.memory_bytes - case.device.context_bytes
        beyond = [max(0, peak - room) for peak in result.peak_reserved_bytes]
        if not any(beyond):
            break
        spare = [own + more for own, more in zip(spare, beyond, strict=True)]
    return result
