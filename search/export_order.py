"""The order of a plan's pipeline as torch's runtime loads it."""

from __future__ import annotations

from search.export_case import Case
from simulator.pipeline.action import Order, actions_of
from simulator.pipeline.order_text import order_csv
from simulator.plan_sections import plan_refusal

ORDER_FILE = "pipeline_order.csv"


def schedule_order(case: Case) -> Order:
    """The order of a case with a pipeline, each rank's stages placed as torch can place them.

    Raises:
        InputError: stages lie neither in a loop nor in a V.
    """
    order = case.order
    assert order is not None, "a case with a pipeline holds its order"
    ranks = range(order.num_ranks)
    if stages_of_ranks(order) not in (_loop(order), [{rank, 2 * order.num_ranks - 1 - rank} for rank in ranks]):
        rule = "torch places stage s on rank s % pp, or two stages a rank in a V, but the order does neither"
        raise plan_refusal("pipeline.schedule", case.plan.pipeline.schedule, rule, "take an order of one direction")
    return order


def is_v(order: Order) -> bool:
    """Whether a rank's second stage lies on the way back."""
    return stages_of_ranks(order) != _loop(order)


def stages_of_ranks(order: Order) -> list[set[int]]:
    """Stages of each rank."""
    return [{action.stage for action in actions_of(cells)} for cells in order.ranks]


def order_file(case: Case) -> str:
    """The CSV, a row per rank, with lines that end alike on every system."""
    return order_csv(schedule_order(case)).replace("\r\n", "\n")


def _loop(order: Order) -> list[set[int]]:
    return [set(range(rank, order.num_stages, order.num_ranks)) for rank in range(order.num_ranks)]
