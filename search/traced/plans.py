"""Simulate any plan of a traced model on a cluster: what ``recompute = "optimal"`` stands for is solved first, each stage under its rank's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from hardware_models.profile import DeviceProfile
from search.stage_choices import StageChoices
from search.stage_recompute import MOST_ATTEMPTS, best_sequence
from simulator.lower import PassPrices
from simulator.parallel.default_cut import in_flight
from simulator.parallel.simulate_parallel import WEIGHT_SHARE
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.parallel.stages import Stage, StageCost, stage_cost
from simulator.parallel.traced_step import TracedStep, parameters_of, resident_bytes
from simulator.pipeline.action import Order, actions_of
from simulator.plan import Plan
from simulator.sequence import Operation
from simulator.tracing.simulate_stages import StagesCase, StageSimulator
from simulator.tracing.stage_chain import StageLibrary
from simulator.workload import Block

_GATHERED_BLOCKS = 2
"""Whose parameters are there at once: the one that computes, and the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedSetting:
    """The stages of a plan as `search.stage_recompute` asks for them."""

    stages: tuple[Stage, ...]
    prices: PassPrices
    weight_share: float = WEIGHT_SHARE

    def cost(self, stage: Stage, operations: Sequence[Operation]) -> StageCost:
        """What a micro-batch costs on a stage."""
        key = ("cost", *map(id, stage.blocks), stage.receives, stage.sends, tuple(operations))
        return self.prices.once(key, lambda: stage_cost(stage, operations, self.prices))

    def again_s(self, stage: Stage) -> tuple[float, ...]:
        """No block waits for collectives when it runs again."""
        return (0.0,) * len(stage.blocks)


class StepCase(Protocol):
    """What of a plan's step decides which sequences are best, wherever it runs."""

    @property
    def plan(self) -> Plan:
        """Resolved."""

    @property
    def device(self) -> DeviceProfile:
        """Of every rank."""

    @property
    def order(self) -> Order:
        """Of the pipeline."""

    @property
    def step(self) -> TracedStep:
        """Without recompute."""

    @property
    def prices(self) -> PassPrices:
        """Of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPlans:
    """Simulates plans of one traced model on one cluster; what they share is made once."""

    simulator: StageSimulator

    def simulate(
        self, plan: Plan, *, gpus: int | None = None, folder: Path | None = None, engine: str = "compiled"
    ) -> StagesOnCluster:
        """A plan's prediction; ``optimal`` is solved again with less room where its sequences hold more than they were thought to.

        Raises:
            InputError: names the rule that the plan breaks.
            InfeasibleError: no sequences fit.
        """
        if plan.memory.recompute != "optimal":
            return self.simulator.case(plan, gpus=gpus, folder=folder).simulate(engine)
        case, spare = self.plain(plan, gpus=gpus, folder=folder), 0
        for _ in range(MOST_ATTEMPTS):
            found = self.solved(plan, self.sequence(case, spare_bytes=spare), gpus=gpus, folder=folder).simulate(engine)
            beyond = max(found.peak_memory_bytes) - budget_bytes(case)
            if beyond <= 0:
                break
            spare += beyond
        return found

    def plain(self, plan: Plan, *, gpus: int | None = None, folder: Path | None = None) -> StagesCase:
        """The case of a plan that recomputes nothing."""
        return self.simulator.case(replace(plan, memory=replace(plan.memory, recompute="none")), gpus=gpus, folder=folder)

    def solved(
        self, plan: Plan, sequence: Sequence[Operation], *, gpus: int | None = None, folder: Path | None = None
    ) -> StagesCase:
        """The case of a plan whose ``optimal`` stands for a sequence."""
        return self.simulator.case(plan, gpus=gpus, folder=folder, sequence=sequence)

    def sequence(self, plain: StagesCase, *, spare_bytes: int = 0) -> tuple[Operation, ...]:
        """What ``optimal`` stands for: of each stage the fastest sequence under its rank's memory (`search.stage_recompute`), blocks counted over the whole model.

        Args:
            plain: the plan without recompute.
            spare_bytes: left free on each rank.

        Raises:
            InfeasibleError: nothing fits on some rank; says what would.
        """
        return sequence_of_stages(plain, self.simulator.stage_library(plain.plan), spare_bytes=spare_bytes)


def sequence_of_stages(plain: StepCase, library: StageLibrary, *, spare_bytes: int) -> tuple[Operation, ...]:
    """As `TracedPlans.sequence`, of stages of a library."""
    choices = StageChoices(TracedSetting(stages=stages_of(plain, library), prices=plain.prices), plain.device)
    return best_sequence(choices, plain.order, lived_bytes(plain), budget_bytes=budget_bytes(plain) - spare_bytes)


def budget_bytes(case: StepCase) -> int:
    """Most bytes of live tensors on a rank."""
    room, budget = case.device.memory_bytes - case.device.context_bytes, case.plan.memory.budget_bytes
    return room if budget is None else min(room, budget)


def stages_of(case: StepCase, library: StageLibrary) -> tuple[Stage, ...]:
    """The stages of a plan as the solvers take them; those whose backward pass the order splits know no option that recomputes inside of it."""
    stages, first = [], 0
    split = {action.stage for cells in case.order.ranks for action in actions_of(cells) if action.kind == "W"}
    for one in case.step.stages:
        blocks = tuple(_plain(block, library) if one.index in split else block for block in one.workload.blocks)
        workload = replace(one.workload, blocks=blocks)
        stages.append(Stage(index=one.index, first=first, workload=workload, receives=one.receives, sends=one.sends))
        first += len(blocks)
    return tuple(stages)


def _plain(block: Block, library: StageLibrary) -> Block:
    """The block with its first option only; the same object each time."""
    return library.once(("plain", id(block)), partial(replace, block, options=block.options[:1]))


def lived_bytes(case: StepCase) -> list[int]:
    """Per rank, bytes that live through the step beside activations, or that have gathered by its end: parameters, states, gradients, messages that were sent, parameters that are gathered."""
    return [sum(own) + _gathering_bytes(case, rank) for rank, own in enumerate(resident_bytes(case.step))]


def _gathering_bytes(case: StepCase, rank: int) -> int:
    step, order = case.step, case.order
    gradients = sum(held.size_bytes for held in parameters_of(step, rank).values() if held.trained)
    own = [step.stages[stage] for stage in order.stages_of_rank[rank]]
    sent = 0
    for stage in own:
        ahead = stage.sends and rank not in order.ranks_of_stage[stage.index + 1]
        back = stage.receives and rank not in order.ranks_of_stage[stage.index - 1]
        returned = order.num_microbatches - int(in_flight(order)[stage.index])
        sent += ahead * order.num_microbatches * stage.workload.blocks[-1].output_bytes
        sent += back * returned * stage.workload.blocks[0].input_bytes
    if step.shards is None:
        return gradients + sent
    sizes = [sum(stage.parameters[name].size_bytes for name in names) for stage in own for names in stage.parameters_of_block]
    gathered = sum(sizes) if step.shards.keeps else _GATHERED_BLOCKS * max(sizes)
    return step.shards.part(gradients) + gathered + sent
