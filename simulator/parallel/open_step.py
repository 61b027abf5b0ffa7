"""A step before it is known what its stages recompute."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from simulator.parallel.simulate_parallel import WEIGHT_SHARE, Assembly
from simulator.parallel.simulation import ParallelSimulation
from simulator.parallel.stages import Stage, StageCost
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.presets import TransformerConfig
from simulator.sequence import Operation


class OpenStep:
    """A step whose ``memory.recompute`` is still to be found: what sequences of its stages cost, and the step that they make; arguments and errors as in `simulate_parallel`."""

    weight_share = WEIGHT_SHARE
    """Part of a micro-batch's activations that only the weights' gradient needs."""

    def __init__(
        self, config: TransformerConfig, plan: Plan, cluster: Cluster, device: DeviceProfile, order: Order, *, seq_len: int
    ) -> None:  # fmt: skip
        self._made = Assembly(config, plan, cluster, device, order, seq_len, is_open=True)
        self.stages, self.prices = self._made.stages, self._made.prices
        self.resident_bytes = tuple(self._made.resident_bytes())
        """Per pipeline rank and `MemoryClass`: alive through the step."""
        self._again_s: dict[int, float] = {}

    def cost(self, stage: Stage, operations: Sequence[Operation]) -> StageCost:
        """What a micro-batch costs on a stage."""
        return self._made.model.stage_cost(stage, operations)

    def again_s(self, stage: Stage) -> tuple[float, ...]:
        """Of each block of a stage: seconds of the collectives that it waits for when it runs forward once more."""
        attention_s, communication = self._made.model.attention_s(), self._made.communication
        for block in stage.blocks:
            if id(block) not in self._again_s:
                self._again_s[id(block)] = communication.block(block, attention_s, again=True).total_s
        return tuple(self._again_s[id(block)] for block in stage.blocks)

    def simulate(self, operations: Sequence[Sequence[Operation]], *, engine: str, reserved: bool) -> ParallelSimulation:
        """The step whose stages run their blocks so, indices counted from each stage's first block."""
        made = copy(self._made)
        made.operations = [tuple(own) for own in operations]
        return made.simulate(engine, reserved=reserved)
