"""What ``schedlab pipeline`` prints: an order alone, from times per rank."""

from __future__ import annotations

from typing import Any

from hardware_models.units import MS_PER_S
from simulator.pipeline.catalogue import OrderRequest, make_order
from simulator.pipeline.grid import grid_of_spans
from simulator.pipeline.order_text import order_texts
from simulator.pipeline.play_order import PlayedOrder, RankTimes, play_order

GRID_WIDTH = 160
"""Characters of a picture where none are asked for."""


def play_request(request: OrderRequest) -> PlayedOrder:
    """The order of a request, played with the request's times.

    Raises:
        InputError, InfeasibleError: as `simulator.pipeline.catalogue.make_order` and `simulator.pipeline.play_order.play_order`.
    """
    return play_order(make_order(request), request.times, weight_share=request.weight_share)


def pipeline_report(played: PlayedOrder) -> dict[str, Any]:
    """JSON of ``schedlab pipeline``: lists are per rank.

    ``makespan_ms``, ``bubble_ratio``, ``peak_activations`` (M_B of each rank), ``orders`` (text of each rank).
    """
    return {
        "makespan_ms": played.makespan_s * MS_PER_S,
        "bubble_ratio": played.bubble_ratio,
        "peak_activations": list(played.peak_activations),
        "orders": list(order_texts(played.order)),
    }


def pipeline_grid(played: PlayedOrder, *, width: int = GRID_WIDTH) -> str:
    """Picture of ``--grid``: a row per rank on one time axis, each pass's text at its start, dots to its end, blanks when idle."""
    words = [[str(cell) for cell in cells] for cells in played.order.ranks]
    return grid_of_spans(words, [row.tolist() for row in played.start_s], [row.tolist() for row in played.end_s], width=width)


def times_in_ms(
    forward_ms: tuple[float, ...], input_gradient_ms: tuple[float, ...], weight_gradient_ms: tuple[float, ...], comm_ms: float
) -> RankTimes:
    """Times as the command line gives them, per rank or one for all, in seconds.

    Raises:
        InputError: a time is negative or not finite.
    """
    forward, gradient, weight = (
        tuple(value / MS_PER_S for value in values) for values in (forward_ms, input_gradient_ms, weight_gradient_ms)
    )
    return RankTimes(forward_s=forward, input_gradient_s=gradient, weight_gradient_s=weight, comm_s=comm_ms / MS_PER_S)
