"""What the stages of a plan may recompute: solvers of like stages shared, sequences with their exact cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hardware_models.profile import DeviceProfile
from search.chain_of_workload import chain_of_workload
from search.chain_problem import ChainProblem
from search.stage_runs import StageRuns
from simulator.lower import PassPrices
from simulator.parallel.recompute import layer_runs
from simulator.parallel.stages import Stage, StageCost
from simulator.sequence import Operation, keep_all
from simulator.workload import Block, BlockOption, Pass

MOST_KINDS = 6
"""Kinds of blocks of a transformer: embedding, attention, two networks, the last one, head. Chains of more are no layers."""
FEW_KINDS = 3
"""Kinds up to which a chain has one kind of layer, and an end."""
_GRADIENTS = frozenset({"gradient", "shared_gradient"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way for a stage to run, with its exact cost."""

    operations: tuple[Operation, ...]
    cost: StageCost
    again_s: float = 0.0
    """Of the collectives of what runs again."""

    @property
    def seconds(self) -> float:
        """Of a micro-batch, forward and backward, without the collectives of what runs once."""
        return self.cost.forward.total_s + self.cost.backward.total_s + self.again_s


class StageSetting(Protocol):
    """What decides how much each stage should recompute."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Blocks with every option that a sequence may name."""

    @property
    def prices(self) -> PassPrices:
        """Of passes; plans that share them share solvers."""

    @property
    def weight_share(self) -> float:
        """Part of a micro-batch's activations that only the weights' gradient needs."""

    def cost(self, stage: Stage, operations: Sequence[Operation]) -> StageCost:
        """What a micro-batch costs on a stage."""

    def again_s(self, stage: Stage) -> tuple[float, ...]:
        """Of each block of a stage: seconds of the collectives that it waits for when it runs forward once more."""


class StageChoices:
    """Ways for the stages of a plan to run; like stages share them, of all plans with the same prices.

    Args:
        setting: stages, and what their sequences cost.
        device: prices kernels.
    """

    def __init__(self, setting: StageSetting, device: DeviceProfile) -> None:
        self.setting, self.device = setting, device
        self._runs: dict[int, StageRuns] = {}
        """By kind."""
        self._plain: dict[int, Choice] = {}
        """By kind."""
        self._kinds: dict[int, int] = {}
        """By number of a stage."""
        self._numbers: dict[tuple[object, ...], int] = {}
        """Of kinds."""
        self._choices: dict[tuple[int, int], Choice] = {}
        """By kind and sequence, which each choice keeps alive."""

    def kind(self, stage: Stage) -> int:
        """Like stages have equal ones."""
        if stage.index not in self._kinds:
            key = (*(id(block) for block in stage.blocks), stage.receives, stage.sends)
            self._kinds[stage.index] = self._numbers.setdefault(key, len(self._numbers))
        return self._kinds[stage.index]

    def choice(self, stage: Stage, operations: tuple[Operation, ...]) -> Choice:
        """A sequence with its cost."""
        key = (self.kind(stage), id(operations))
        if key not in self._choices:
            cost, again_s = self.setting.cost(stage, operations), self.setting.again_s(stage)
            again = sum(again_s[block] for block in cost.recomputed)
            self._choices[key] = Choice(operations=operations, cost=cost, again_s=again)
        return self._choices[key]

    def plain(self, stage: Stage) -> Choice:
        """Nothing runs again."""
        kind = self.kind(stage)
        if kind not in self._plain:
            self._plain[kind] = self.choice(stage, keep_all(len(stage.blocks)) if stage.blocks else ())
        return self._plain[kind]

    def unlike(self, stage: Stage) -> bool:
        """Whether a stage's blocks differ too much for its order of segments to be known."""
        kinds = len({id(block) for block in stage.blocks})
        return kinds > MOST_KINDS or (kinds > FEW_KINDS and 2 * kinds > len(stage.blocks))

    def runs(self, stage: Stage) -> StageRuns:
        """The solver of a stage that has blocks."""
        kind = self.kind(stage)
        if kind not in self._runs:
            again_s = self.setting.again_s(stage)
            key = ("stage runs", *map(id, stage.blocks), stage.receives, stage.sends, again_s)
            self._runs[kind] = self.setting.prices.once(key, lambda: self._solver(stage, again_s))
        return self._runs[kind]

    def _solver(self, stage: Stage, again_s: Sequence[float]) -> StageRuns:
        problem = stage_problem(stage, self.setting.prices, self.device)
        discard_s = tuple(own + more for own, more in zip(problem.discard_s, again_s, strict=True))
        seen: set[tuple[int, ...]] = set()
        starts = [0]
        for first, end, is_layer in layer_runs(stage.blocks):
            layer = tuple(id(block) for block in stage.blocks[first:end])
            if is_layer and layer not in seen:
                starts.append(first)
                seen.add(layer)
        return StageRuns(replace(problem, discard_s=discard_s), starts)


def stage_problem(stage: Stage, prices: PassPrices, device: DeviceProfile) -> ChainProblem:
    """The chain of a stage, gradients of parameters (which have buffers of their own) left out, and what it sends on, which it does not keep."""
    spared = {id(block): _without_gradients(block) for block in {id(own): own for own in stage.blocks}.values()}
    workload = replace(stage.workload, blocks=tuple(spared[id(block)] for block in stage.blocks), gradient_bytes=0)
    problem = chain_of_workload(workload, device, first_micro_batch=False, pass_seconds=prices.seconds)
    received = stage.blocks[0].input_bytes if stage.receives else 0
    last = stage.blocks[-1]
    sent = [0 if option.keeps_output or not stage.sends else last.output_bytes for option in last.options]
    saved = tuple(own - gone for own, gone in zip(problem.saved_bytes[-1], sent, strict=True))
    return replace(
        problem, boundary_bytes=(received, *problem.boundary_bytes[1:]), saved_bytes=(*problem.saved_bytes[:-1], saved)
    )


def _without_gradients(block: Block) -> Block:
    def stripped(run: Pass) -> Pass:
        return replace(run, memory=tuple(event for event in run.memory if event.buffer not in _GRADIENTS))

    def option(one: BlockOption) -> BlockOption:
        return replace(one, backward=stripped(one.backward), backward_accumulate=stripped(one.backward_accumulate))

    return replace(block, options=tuple(option(one) for one in block.options))
