"""The pipeline order that a plan names."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from simulator.pipeline.action import Order
from simulator.pipeline.catalogue import OrderRequest, make_order
from simulator.pipeline.check_order import check_order
from simulator.pipeline.play_order import RankTimes
from simulator.pipeline.zero_bubble_auto import EQUAL_TIMES
from simulator.plan import FILE_PREFIX, Plan
from simulator.plan_sections import plan_refusal


def order_of(plan: Plan, times: RankTimes = EQUAL_TIMES, *, folder: Path | None = None) -> Order:
    """The order of a plan's schedule.

    Args:
        plan: with its batch resolved.
        times: of the ranks, for schedules that are made for them (ZB-1p, ZB-2p).
        folder: where a relative ``file:ORDER.csv`` begins.

    Raises:
        InputError: the schedule cannot run so many ranks or micro-batches, or a file is no legal order or fits the plan not.
        InfeasibleError: the schedule needs more than ``pipeline.memory_limit``.
    """
    schedule, parallel, pipeline = plan.pipeline.schedule, plan.parallel, plan.pipeline
    if schedule.startswith(FILE_PREFIX):
        schedule = f"{FILE_PREFIX}{(folder or Path()) / schedule.removeprefix(FILE_PREFIX)}"
    request = OrderRequest(
        schedule=schedule, num_ranks=parallel.pp, num_microbatches=plan.num_microbatches, virtual_stages=parallel.virtual_stages,
        memory_limit=pipeline.memory_limit, chimera_mode=pipeline.chimera_mode, times=times,
    )  # fmt: skip
    order = _from_file(request) if schedule.startswith(FILE_PREFIX) else _generated(request)
    if order.num_stages != plan.num_stages:
        rule = f"the order has pp * virtual_stages == {plan.num_stages} stages, but got {order.num_stages}"
        raise plan_refusal("pipeline.schedule", plan.pipeline.schedule, rule)
    return order


def _from_file(request: OrderRequest) -> Order:
    """An order that can run; a file may change between two calls."""
    order = make_order(request)
    check_order(order)
    return order


@lru_cache(maxsize=1024)
def _generated(request: OrderRequest) -> Order:
    """An order that can run: generators are pure, and plans that a search compares ask for few orders."""
    return _from_file(request)
