"""Small requests for searches over traced models, and every plan of their spaces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, InputError
from hardware_models.network.cluster_file import load_cluster
from search.traced.cuts import cuts_of
from search.traced.plans import TracedPlans
from search.traced.request import TracedRequest, traced_request
from search.traced.space import TracedSpace
from search.traced.traced_search import plans_of
from search.trainers import trainer_of
from simulator.model_source import model_source
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.plan import Plan

MLP = "tests.small_models:residual_mlp"
CONVOLUTIONS = "tests.small_models:sized_convolution_net"


@cache
def request_of(
    model: str = MLP, *, cluster: str = "a40-pairs", gpus: int = 2, batch: int = 4, budget: int | None = None, allow: tuple[str, ...] = ()
) -> TracedRequest:  # fmt: skip
    """A request for a small model."""
    sized = load_cluster(cluster).with_gpus(gpus)
    device = load_hardware(sized.device)
    return traced_request(
        model_source(model, batch=batch), sized, device, trainer_of("any"), global_batch=batch, allow=allow, budget_bytes=budget
    )  # fmt: skip


@cache
def shared_plans(model: str, cluster: str, gpus: int, batch: int) -> TracedPlans:
    """What simulates a model's plans, whatever the budget: traced once for all tests."""
    return plans_of(request_of(model, cluster=cluster, gpus=gpus, batch=batch))


def every_plan(space: TracedSpace, plans: TracedPlans) -> Iterator[Plan]:
    """All plans of a space: each cut of each point, without recompute, with the best one for its memory, and with all of it."""
    for index in range(len(space)):
        plain = space.plan(index)
        try:
            case = plans.plain(plain)
        except InputError:
            continue
        for cut in cuts_of(case, plans.simulator.stage_library(case.plan)):
            own = replace(plain, pipeline=replace(plain.pipeline, partition=cut))
            for recompute in ("none", "optimal", "full"):
                yield replace(own, memory=replace(own.memory, recompute=recompute))


def simulated(plans: TracedPlans, plan: Plan, *, engine: str = "compiled") -> StagesOnCluster | None:
    """A plan's prediction; None where nothing fits."""
    try:
        return plans.simulate(plan, engine=engine)
    except InfeasibleError:
        return None
