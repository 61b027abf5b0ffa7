"""Predict any plan of a model on any cluster, be the model generated from a configuration or traced."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from search.stage_recompute import simulate_on_cluster
from simulator.model_source import ModelSource
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan

if TYPE_CHECKING:
    from simulator.tracing.simulate_stages import StageSimulator


class PlanSimulator:
    """Plans of one model; what is traced is traced once, for all plans and clusters that are asked for.

    Args:
        source: of the model.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self._stages: StageSimulator | None = None

    def simulate(
        self, plan: Plan, cluster: Cluster, device: DeviceProfile, *, gpus: int | None = None, folder: Path | None = None, engine: str = "compiled",
        reserved: bool = True,
    ) -> ParallelSimulation | StagesOnCluster:  # fmt: skip
        """A plan's prediction, ``recompute = "optimal"`` solved first.

        Args:
            plan: its degrees say how many GPUs of the cluster it uses.
            cluster: with any number of GPUs.
            device: of the cluster.
            gpus: what the plan's degrees must give; None: whatever they give.
            folder: where relative files of the plan begin.
            engine: one of `simulator.simulate.ENGINES`.
            reserved: whether to replay the caching allocator of a generated model's ranks; else reserved bytes are the live ones.

        Raises:
            InputError: names the rule that the plan breaks.
            InfeasibleError: no sequences fit.
        """
        if self.source.config is not None:
            source = self.source.with_plan_batch(plan)
            return simulate_on_cluster(
                source, plan, cluster, gpus=gpus, folder=folder, engine=engine, reserved=reserved, device=device
            )
        from search.traced.plans import TracedPlans  # noqa: PLC0415 - torch only where a module is traced
        from simulator.tracing.simulate_stages import StageSimulator  # noqa: PLC0415 - as above

        if self._stages is None:
            self._stages = StageSimulator(source=self.source, cluster=cluster, device=device)
        plans = TracedPlans(simulator=self._stages.on(cluster, device))
        return plans.simulate(plan, gpus=gpus, folder=folder, engine=engine)
