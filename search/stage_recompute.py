"""Optimal recompute over pipeline stages: what ``recompute = "optimal"`` stands for on a cluster, each stage under its own rank's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hardware_models.errors import InfeasibleError
from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes
from search.chain_of_workload import chain_of_workload
from search.chain_problem import ChainProblem
from search.stage_chain import StageTable
from simulator.lower import PassPrices
from simulator.model_source import ModelSource
from simulator.parallel.simulate_parallel import StageSetting, stage_setting
from simulator.parallel.simulate_source import ParallelCase, parallel_case, simulate_source
from simulator.parallel.simulation import ParallelSimulation
from simulator.parallel.stages import Stage, StageCost, stage_cost
from simulator.pipeline.action import Order, actions_of
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal
from simulator.sequence import Operation, checkpoint_blocks, keep_all
from simulator.workload import Block, BlockOption, Pass

MOST_COMBINATIONS = 40_000
"""Combinations of sequences of the unlike stages of one rank that are looked at; beyond, each stage's list is thinned evenly."""
MOST_ATTEMPTS = 4
"""Times that the budget is lowered by what the allocator reserves beyond it."""
FEW_BLOCKS = 24
"""Blocks of a stage up to which each number of checkpointed blocks is an expert's choice."""
_GRADIENTS = frozenset({"gradient", "shared_gradient"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way for a stage to run, with its exact cost."""

    operations: tuple[Operation, ...]
    cost: StageCost

    @property
    def seconds(self) -> float:
        """Of a micro-batch, forward and backward."""
        return self.cost.forward.total_s + self.cost.backward.total_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What a rank holds whenever it begins a pass: rows of ``held`` are micro-batches per stage of the rank, those of running backward passes included."""

    held: NDArray[np.float64]
    """Shape (moments, stages of the rank)."""
    running: NDArray[np.int64]
    """Which of the rank's stages; shape (moments,)."""
    backward: NDArray[np.bool_]

    def peak_bytes(
        self, kept: NDArray[np.float64], forward: NDArray[np.float64], backward: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Most bytes of activations; shape (choices,).

        Args:
            kept: by a micro-batch from forward to backward; shape (choices, stages of the rank).
            forward: most that the forward pass adds; same shape.
            backward: most that the backward pass adds.
        """
        rises = np.where(self.backward[:, None], backward.T[self.running], forward.T[self.running])
        peaks: NDArray[np.float64] = (self.held @ kept.T + rises).max(axis=0)
        return peaks


def moments_of(order: Order, rank: int, *, weight_share: float) -> Moments:
    """The moments of a rank at which its memory may be highest, each once.

    Args:
        order: of the pipeline.
        rank: of it.
        weight_share: part of what a micro-batch keeps that stays from its input gradient to its weight gradient.
    """
    stages = order.stages_of_rank[rank]
    place = {stage: n for n, stage in enumerate(stages)}
    part, held = 1.0 / order.microbatch_parts, [0.0] * len(stages)
    seen: dict[tuple[bool, int, tuple[float, ...]], None] = {}
    change = {"F": 1.0, "BW": -1.0, "B": weight_share - 1.0, "W": -weight_share}
    for action in actions_of(order.ranks[rank]):
        own = place[action.stage]
        if action.kind != "W":
            seen.setdefault((action.kind != "F", own, tuple(round(one, 9) for one in held)))
        held[own] += change[action.kind] * part
    rows = list(seen)
    return Moments(
        held=np.array([row[2] for row in rows], np.float64), running=np.array([row[1] for row in rows], np.int64),
        backward=np.array([row[0] for row in rows], np.bool_),
    )  # fmt: skip


KnownChoices = dict[tuple[object, ...], tuple[Choice, ...]]
"""Ways to run a stage, by what they depend on."""


class StageChoices:
    """Ways for the stages of a plan to run; like stages share them.

    Args:
        setting: stages, prices and what lives through the step.
        device: prices kernels.
        known: what plans of the same blocks and prices have found, and find here; None: nothing.
    """

    def __init__(self, setting: StageSetting, device: DeviceProfile, known: KnownChoices | None = None) -> None:
        self.setting, self.device = setting, device
        self._known: KnownChoices = {} if known is None else known

    def key(self, stage: Stage) -> tuple[object, ...]:
        """Like stages have equal ones."""
        return (*(id(block) for block in stage.blocks), stage.receives, stage.sends)

    def of(self, stage: Stage, limit_bytes: int, in_flight: float) -> tuple[Choice, ...]:
        """What experts would set and the solver's answers for a share of the memory, none as slow and as large as another.

        Args:
            stage: of the plan.
            limit_bytes: for its activations.
            in_flight: most micro-batches that it holds at once.
        """
        key = (*self.key(stage), limit_bytes, in_flight)
        if not stage.blocks:
            return (Choice(operations=(), cost=stage_cost(stage, (), self.setting.prices)),)
        if key not in self._known:
            problem = stage_problem(stage, self.setting.prices, self.device)
            found = dict.fromkeys((*_experts(stage), *StageTable(problem, limit_bytes).sequences(in_flight)))
            made = [Choice(operations=one, cost=stage_cost(stage, one, self.setting.prices)) for one in found]
            self._known[key] = tuple(_undominated(made))
        return self._known[key]


def stage_problem(stage: Stage, prices: PassPrices, device: DeviceProfile) -> ChainProblem:
    """The chain of a stage, gradients of parameters (which have buffers of their own) left out."""
    spared = {id(block): _without_gradients(block) for block in stage.blocks}
    workload = replace(stage.workload, blocks=tuple(spared[id(block)] for block in stage.blocks), gradient_bytes=0)
    problem = chain_of_workload(workload, device, first_micro_batch=False, pass_seconds=prices.seconds)
    gradients = (*problem.boundary_gradient_bytes[:-1], stage.blocks[-1].output_bytes if stage.sends else 0)
    received = stage.blocks[0].input_bytes if stage.receives else 0
    return replace(problem, boundary_bytes=(received, *problem.boundary_bytes[1:]), boundary_gradient_bytes=gradients)


def _without_gradients(block: Block) -> Block:
    def stripped(run: Pass) -> Pass:
        return replace(run, memory=tuple(event for event in run.memory if event.buffer not in _GRADIENTS))

    def option(one: BlockOption) -> BlockOption:
        return replace(one, backward=stripped(one.backward), backward_accumulate=stripped(one.backward_accumulate))

    return replace(block, options=tuple(option(one) for one in block.options))


def _experts(stage: Stage) -> Iterator[tuple[Operation, ...]]:
    """Keep all; keep what ``selective`` keeps; checkpoint each of the first n blocks (every second n of many)."""
    count = len(stage.blocks)
    everything = [block.options[0].name for block in stage.blocks]
    yield keep_all(count)
    yield checkpoint_blocks(count, (), [block.options[-1].name for block in stage.blocks])
    for last in range(1, count + 1) if count <= FEW_BLOCKS else (*range(2, count, 2), count):
        yield checkpoint_blocks(count, range(last), everything)


def _undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Choices that no other equals or beats in time, bytes kept and both peaks; fastest first."""

    def sizes(choice: Choice) -> tuple[float, ...]:
        return (choice.seconds, choice.cost.forward.net_bytes, choice.cost.forward.rise_bytes, choice.cost.backward.rise_bytes)

    kept: list[Choice] = []
    for choice in sorted(choices, key=sizes):
        if not any(all(a <= b for a, b in zip(sizes(other), sizes(choice), strict=True)) for other in kept):
            kept.append(choice)
    return kept


def optimal_sequence(case: ParallelCase, *, spare_bytes: int = 0) -> tuple[Operation, ...]:
    """What ``recompute = "optimal"`` stands for: of each stage the fastest sequence under its rank's memory, blocks counted over the whole model.

    **Model**: a rank's activations may take what the budget (else the device's memory less the context) leaves beside what lives through the step. They are what its
    stages hold at each moment of the order, plus what the running pass adds (`Moments`). Sequences come from `StageTable` and from experts; their costs are exact
    (`stage_cost`). Of all combinations on a rank that fit, the one with the least time is taken.

    Args:
        case: of a plan whose ``memory.recompute`` is ``optimal``.
        spare_bytes: left free on each rank.

    Raises:
        InfeasibleError: nothing fits on some rank; says what would.
        InputError: the plan also offloads activations or weights: how much to recompute then is another problem.
    """
    memory, order, device = case.plan.memory, case.order, case.device
    if memory.activation_offload or memory.weight_offload:
        rule = 'with recompute = "optimal" no activations or weights are offloaded yet'
        key = "memory.activation_offload" if memory.activation_offload else "memory.weight_offload"
        raise plan_refusal(
            key, memory.activation_offload or memory.weight_offload, rule, "leave it at 0, or take another recompute"
        )
    setting = stage_setting(case.config, case.plan, case.cluster, device, order, seq_len=case.seq_len)
    budget = min(memory.budget_bytes or device.memory_bytes, device.memory_bytes - device.context_bytes)
    static = [sum(resident) for resident in setting.resident_bytes]
    return best_sequences(StageChoices(setting, device), order, static, budget_bytes=budget - spare_bytes)


def best_sequences(choices: StageChoices, order: Order, static: Sequence[int], *, budget_bytes: int) -> tuple[Operation, ...]:
    """Of each stage the fastest sequence under its rank's memory (`optimal_sequence`), blocks counted over the whole model.

    Args:
        choices: of the stages.
        order: of the pipeline.
        static: per rank, bytes that live through the step.
        budget_bytes: of a rank.

    Raises:
        InfeasibleError: nothing fits on some rank; says what would.
    """
    chosen: dict[int, Choice] = {}
    for rank, alive in enumerate(static):
        for stage, choice in _best_of_rank(choices, order, rank, room=budget_bytes - alive, static=alive):
            known = chosen.setdefault(stage.index, choice)
            if choice.cost.forward.net_bytes < known.cost.forward.net_bytes:  # a stage on two ranks: what both can hold
                chosen[stage.index] = choice
    return tuple(
        operation._replace(block=operation.block + stage.first)
        for stage in choices.setting.stages
        for operation in (chosen[stage.index].operations if stage.blocks else ())
    )


def _best_of_rank(choices: StageChoices, order: Order, rank: int, *, room: int, static: int) -> list[tuple[Stage, Choice]]:
    setting = choices.setting
    stages = [setting.stages[stage] for stage in order.stages_of_rank[rank]]
    moments = moments_of(order, rank, weight_share=setting.weight_share)
    most = np.maximum(1.0 / order.microbatch_parts, moments.held.max(axis=0))
    kinds = list(dict.fromkeys(choices.key(stage) for stage in stages))
    kind_of = np.array([kinds.index(choices.key(stage)) for stage in stages])
    lists = []
    for kind in range(len(kinds)):
        own = int(np.argmax(kind_of == kind))
        limit = max(0, int(room * most[kind_of == kind].sum() / most.sum()))
        lists.append(choices.of(stages[own], limit, float(most[kind_of == kind].sum())))
    thinned = _thinned(lists)
    table = np.array(list(product(*(range(len(own)) for own in thinned))), np.int64)

    def values(read: int) -> NDArray[np.float64]:
        columns = [np.array([_numbers(choice)[read] for choice in own]) for own in thinned]
        return np.stack([columns[kind][table[:, kind]] for kind in kind_of], axis=1)

    peaks = moments.peak_bytes(values(1), values(2) / order.microbatch_parts, values(3) / order.microbatch_parts)
    seconds = values(0).sum(axis=1)
    fitting = np.flatnonzero(peaks <= room)
    if not len(fitting):
        needed = static + int(np.ceil(peaks.min()))
        raise InfeasibleError(
            limit=f"pipeline rank {rank} holds no schedule in {room + static} bytes ({format_bytes(room + static)}), {format_bytes(static)} of which live through the step",
            smallest_change=f"the least budget that fits there is {needed} bytes ({format_bytes(needed)})", needed_bytes=needed,
        )  # fmt: skip
    best = fitting[np.lexsort((peaks[fitting], seconds[fitting]))[0]]
    return [(stage, thinned[kind][table[best, kind]]) for stage, kind in zip(stages, kind_of.tolist(), strict=True)]


def _numbers(choice: Choice) -> tuple[float, float, float, float]:
    cost = choice.cost
    return (choice.seconds, cost.forward.net_bytes, cost.forward.rise_bytes, cost.backward.rise_bytes)


def _thinned(lists: Sequence[tuple[Choice, ...]]) -> list[tuple[Choice, ...]]:
    """Lists short enough for all combinations, first and last entries kept."""
    most = max(2, int(MOST_COMBINATIONS ** (1.0 / len(lists))))
    return [
        tuple(
            own[place]
            for place in dict.fromkeys(np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int).tolist())
        )
        for own in lists
    ]


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
    case, spare = parallel_case(source, plan, cluster, gpus=gpus, folder=folder, device=device), 0
    for _ in range(MOST_ATTEMPTS):
        sequence = optimal_sequence(case, spare_bytes=spare)
        result = simulate_source(
            source, plan, cluster, gpus=gpus, folder=folder, engine=engine, reserved=reserved, device=device, sequence=sequence
        )
        beyond = max(result.peak_reserved_bytes) + case.device.context_bytes - case.device.memory_bytes
        if beyond <= 0:
            break
        spare += beyond
    return result
