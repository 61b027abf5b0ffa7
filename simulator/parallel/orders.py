"""The pipeline order that a plan names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from simulator.pipeline.action import Order
from simulator.pipeline.check_order import check_order
from simulator.pipeline.one_way import gpipe, interleaved, looped_bfs, one_f_one_b
from simulator.pipeline.order_text import read_order
from simulator.pipeline.zero_bubble import zb_h1, zb_h2, zb_v
from simulator.plan import FILE_PREFIX, Plan
from simulator.plan_sections import plan_refusal

_MAKERS: Mapping[str, Callable[[int, int, int], Order]] = MappingProxyType(
    {
        "gpipe": lambda p, m, _v: gpipe(p, m), "1f1b": lambda p, m, _v: one_f_one_b(p, m), "zb-h1": lambda p, m, _v: zb_h1(p, m),
        "interleaved": lambda p, m, v: interleaved(p, m, virtual_stages=v), "looped-bfs": lambda p, m, v: looped_bfs(p, m, virtual_stages=v),
        "zb-h2": lambda p, m, _v: zb_h2(p, m), "zb-v": lambda p, m, _v: zb_v(p, m),
    }
)  # fmt: skip


def order_of(plan: Plan, *, folder: Path | None = None) -> Order:
    """The order of a plan's schedule.

    Args:
        plan: with its batch resolved.
        folder: where a relative ``file:ORDER.csv`` begins.

    Raises:
        InputError: the schedule cannot run so many ranks or micro-batches, a file is no legal order, or the schedule is not simulated yet.
    """
    schedule, parallel, num_microbatches = plan.pipeline.schedule, plan.parallel, plan.num_microbatches
    if schedule.startswith(FILE_PREFIX):
        order = read_order((folder or Path()) / schedule.removeprefix(FILE_PREFIX))
        _check_fits(order, plan)
    elif schedule in _MAKERS:
        order = _MAKERS[schedule](parallel.pp, num_microbatches, parallel.virtual_stages)
    else:
        raise plan_refusal(
            "pipeline.schedule", schedule, "not simulated yet in a step", f"take one of {', '.join(_MAKERS)}, or file:ORDER.csv"
        )
    check_order(order)
    return order


def _check_fits(order: Order, plan: Plan) -> None:
    found = order.num_ranks, order.num_stages, order.num_microbatches
    wanted = plan.parallel.pp, plan.num_stages, plan.num_microbatches
    if found != wanted:
        rule = f"ranks, stages and micro-batches == {wanted} by the plan must hold, but the file has {found}"
        raise plan_refusal("pipeline.schedule", plan.pipeline.schedule, rule)
