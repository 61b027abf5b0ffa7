"""What a user reads of an answer: the way from each expert's plan to it, what limits it now, and what its time hangs on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hardware_models.errors import InfeasibleError
from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from search.joint.explain import Change, Forecast, changes
from search.plan_simulator import PlanSimulator
from simulator.model_source import ModelSource
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from simulator.what_if import Effect, Prediction, Setting, sensitivities

FACTOR = 2.0
"""How much better and worse each value of the hardware is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a plan, and what next."""

    ways: dict[str, tuple[Change, ...]]
    """By the expert's name."""
    simulation: ParallelSimulation | StagesOnCluster
    """Of the plan."""
    effects: tuple[tuple[Effect, Effect], ...]
    """Of each value of the hardware, better and worse by `FACTOR`, by live bytes; what the step's time hangs on most comes first."""

    def limits(self) -> dict[str, Any]:
        """What limits the plan now: parts of the step on the rank that ends last, largest first, and the rank whose memory is fullest."""
        found = self.simulation
        peaks = found.peak_memory_bytes
        fullest = max(range(len(peaks)), key=peaks.__getitem__)
        room = (
            self.simulation.plan.memory.budget_bytes
            or self.simulation.device.memory_bytes - self.simulation.device.context_bytes
        )
        parts = sorted(found.breakdown_s.items(), key=lambda part: -part[1])
        return {
            "bottleneck": found.bottleneck, "time_breakdown_s": dict(parts), "fullest_rank": fullest, "peak_memory_bytes": peaks[fullest],
            "memory_share": peaks[fullest] / room,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "ways": {name: [one.to_json() for one in way] for name, way in self.ways.items()}, "limits": self.limits(),
            "sensitivities": [effect.to_json() for pair in self.effects for effect in pair],
        }  # fmt: skip


def explained(
    plan: Plan, expert_plans: dict[str, Plan], cluster: Cluster, source: ModelSource, device: DeviceProfile
) -> Explanation:
    """The explanation of a plan; some tens of simulations for each expert. Whether a plan fits is told by its live bytes: the allocator's reserve takes longer than all else.

    Args:
        plan: that won.
        expert_plans: against which it is explained, by name.
        cluster: with exactly the devices of the search.
        source: of the model.
        device: profile of the cluster's devices.
    """
    plans, known = PlanSimulator(source), dict[Plan, ParallelSimulation | StagesOnCluster]()

    def simulated(one: Plan) -> ParallelSimulation | StagesOnCluster:
        if one not in known:
            known[one] = plans.simulate(one, cluster, device, gpus=cluster.num_gpus, reserved=False)
        return known[one]

    def forecast(one: Plan) -> Forecast:
        found = simulated(one)
        return Forecast(step_time_s=found.step_time_s, fits=found.fits)

    best = simulated(plan)
    base = Prediction(step_time_s=best.step_time_s, bottleneck=best.bottleneck, fits=best.fits)

    def predict(setting: Setting) -> Prediction:
        gpus = setting.cluster.num_gpus
        try:
            found = plans.simulate(setting.plan, setting.cluster, setting.device, gpus=gpus, reserved=False)
        except InfeasibleError:  # no sequence fits less memory: its time is that of the plan, which does not fit
            return replace(base, fits=False)
        return Prediction(step_time_s=found.step_time_s, bottleneck=found.bottleneck, fits=found.fits)

    pairs = sensitivities(Setting(plan=plan, cluster=cluster, device=device), base, predict, factor=FACTOR)
    ways = {name: changes(plan, theirs, forecast) for name, theirs in expert_plans.items()}
    return Explanation(ways=ways, simulation=best, effects=tuple(pairs))
