"""The value of a point: its fastest plan that fits, found by simulation over its inner decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hardware_models.errors import InputError
from hardware_models.profile import DeviceProfile
from search.joint.batch_study import NOTHING
from search.joint.bounds import TWO_WAYS
from search.joint.explain import Forecast
from search.joint.layer_tables import LayerTables
from search.joint.memory_variants import memory_variants
from search.joint.refusals import reason_of
from search.joint.space import JointSpace
from search.joint.step_bounds import Bound, StepBounds
from search.stage_recompute import simulate_on_cluster
from search.trainers import violations
from simulator.model_source import ModelSource
from simulator.parallel.memory import static_memory
from simulator.parallel.rank_times import TIMED_SCHEDULES
from simulator.parallel.simulation import ParallelSimulation
from simulator.pipeline.action import Order
from simulator.plan import Memory, Plan
from simulator.precision import STORED_AS


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinedPoint:
    """A point with the bounds of its plans."""

    index: int
    plain: Plan
    """Its plan that saves no memory."""
    orders: Mapping[Memory, Order]
    """Of the pipelines of its plans; none where the simulator refuses them."""
    ways: tuple[tuple[Bound, Memory], ...]
    """Least bound first."""
    refused: Mapping[str, int]

    @property
    def least_s(self) -> float:
        """Seconds that none of its plans is below."""
        return self.ways[0][0].seconds if self.ways else NOTHING


class Evaluator:
    """Simulates plans of a space.

    Args:
        space: whose points are asked for.
        source: of its model.
        device: profile of the cluster's devices.
    """

    def __init__(self, space: JointSpace, source: ModelSource, device: DeviceProfile) -> None:
        self.space, self.source, self.device = space, source, device
        self.tables = LayerTables(space.request, device)
        self.bounds = StepBounds(self.tables, source)
        self._refined: dict[int, RefinedPoint] = {}

    def simulate(self, plan: Plan, *, reserved: bool = True) -> ParallelSimulation:
        """A plan's prediction on the request's devices."""
        cluster = self.space.request.cluster
        return simulate_on_cluster(self.source, plan, cluster, gpus=cluster.num_gpus, reserved=reserved, device=self.device)

    def below(self, plan: Plan, best: float) -> ParallelSimulation:
        """A plan's prediction, with what the allocator reserves where it would be the best and fits by live bytes; that may ask ``optimal`` for other, slower sequences.

        Raises:
            InfeasibleError: no sequence of an ``optimal`` plan fits, or none leaves room for what the allocator reserves.
        """
        result = self.simulate(plan, reserved=False)
        return self.simulate(plan) if result.step_time_s < best and result.fits else result

    def forecast(self, plan: Plan) -> Forecast:
        """A plan's time, and whether it fits."""
        found = self.simulate(plan)
        return Forecast(step_time_s=found.step_time_s, fits=found.fits)

    def bound_s(self, plan: Plan) -> float:
        """Seconds that any plan of the request is not below; infinite where it does not fit or the simulator refuses it."""
        plain = replace(plan, memory=Memory(zero_stage=plan.memory.zero_stage, budget_bytes=plan.memory.budget_bytes))
        try:
            return self.bounds.bounds(plain, {plan.memory: self.bounds.order(plan)}, NOTHING)[0].seconds
        except InputError:
            return NOTHING

    def alone_s(self, index: int) -> float:
        """Seconds that no plan of a point is below by its passes alone; 0 where its order is made for times that are not known yet."""
        plain = self.space.plan(index)
        if plain.pipeline.schedule in TIMED_SCHEDULES:
            return 0.0
        try:
            order = self.bounds.order(plain)
        except InputError:
            return NOTHING  # the simulator refuses the point by name
        return self.bounds.alone(plain, order)

    def _ways(self, plain: Plan) -> list[Memory]:
        """What may be recomputed and what may live on the host."""
        return [
            one for one in memory_variants(self.space.request.trainer, plain) if not self._illegal(replace(plain, memory=one))
        ]

    def refined(self, index: int, incumbent: float) -> RefinedPoint:
        """A point with the bounds of its own plans (`search.joint.step_bounds`); made once for each point that is below the incumbent.

        Args:
            index: of the point.
            incumbent: best value so far: bounds that reach it are not looked at further.
        """
        if index not in self._refined:
            found = self._refine(index, incumbent)
            if found.least_s >= incumbent:
                return found
            self._refined[index] = found
        return self._refined[index]

    def _refine(self, index: int, incumbent: float) -> RefinedPoint:
        plain, refused, orders = self.space.plan(index), Counter[str](), dict[Memory, Order]()
        for memory in self._ways(plain):
            try:
                orders[memory] = self.bounds.order(replace(plain, memory=memory))
            except InputError as error:  # a plan that the simulator refuses by name
                refused[reason_of(error)] += 1
        bounds = self.bounds.bounds(plain, orders, incumbent)
        found = sorted(zip(bounds, orders, strict=True), key=lambda way: way[0].seconds)
        return RefinedPoint(index=index, plain=plain, orders=orders, ways=tuple(found), refused=refused)

    def states_bytes(self, plan: Plan, plain: Plan) -> int:
        """Bytes that no plan is below on its fullest rank: parameters, gradients and optimizer states, spread evenly over the pipeline.

        **Not counted**: activations, what ZeRO 3 has gathered, older versions of parameters, workspaces; parameters where some of them live on the host, and that fewer ranks shard experts.

        Args:
            plan: one of a point.
            plain: that of the same point that saves no memory.
        """
        elements = float(self.tables.table(plain).elements[-1]) / plan.parallel.pp
        static = static_memory(elements, 0.0, plan, dtype=STORED_AS[plan.precision.compute])
        copies = 2 if plan.pipeline.schedule in TWO_WAYS else 1
        return int(copies * ((0.0 if plan.memory.weight_offload else static.parameters) + static.gradients + static.states))

    def _illegal(self, plan: Plan) -> bool:
        return bool(violations(plan, self.space.request.trainer, layers=self.space.request.config.layers))
