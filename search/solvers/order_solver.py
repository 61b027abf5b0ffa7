"""The best known pipeline order under a limit of memory, and how far any order can be below it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hardware_models.errors import InfeasibleError
from search.solvers.order_bound import order_bound_s
from search.solvers.proof import Proof
from simulator.pipeline.action import Order
from simulator.pipeline.catalogue import OrderRequest, make_order
from simulator.pipeline.play_order import WEIGHT_SHARE, RankTimes, play_order
from simulator.pipeline.sizes import check_sizes
from simulator.pipeline.zero_bubble_kernels import MEMORY_SLACK

_ONE_WAY = ("zb-1p", "zb-h1", "zb-h2", "1f1b", "gpipe")
_V = ("zb-v", "v-half", "v-min")


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSolution:
    """An order, its makespan and what it holds."""

    proof: Proof
    """Of the makespan, over all orders of the placements asked for."""
    order: Order
    peak_activations: tuple[float, ...]
    """Per rank, in its M_B."""


def solve_order(
    num_ranks: int,
    num_microbatches: int,
    *,
    times: RankTimes,
    memory_limit: float,
    weight_share: float = WEIGHT_SHARE,
    folded: bool = True,
) -> OrderSolution:
    """The order of least makespan among all generators that fit.

    Args:
        num_ranks: p.
        num_microbatches: m.
        times: per rank and micro-batch.
        memory_limit: most activations of a rank, in its M_B.
        weight_share: part of them that goes with the weight gradient.
        folded: also orders in the shape of a V, two stages a rank.

    Returns:
        Exact where the bound of `order_bound_s` is met, else a bound. ZB's orders are made for the times and the limit, V's for the limit.

    Raises:
        InfeasibleError: the limit holds no micro-batch.

    Source:
        ZB-1p and ZB-2p: arXiv 2401.10241; the V family: arXiv 2405.15362; see `simulator.pipeline`.

    Not modelled:
        Overlapped pairs (DualPipe), interleaved orders of more than two stages a rank.
    """
    check_sizes("solve_order", num_ranks=num_ranks, num_microbatches=num_microbatches)
    found: list[tuple[float, tuple[float, ...], Order]] = []
    for order in _orders(num_ranks, num_microbatches, times, memory_limit, weight_share, folded=folded):
        played = play_order(order, times, weight_share=weight_share)
        if max(played.peak_activations) <= memory_limit + MEMORY_SLACK:
            found.append((played.makespan_s, played.peak_activations, order))
    if not found:
        raise InfeasibleError(
            limit=f"memory_limit {memory_limit:g} M_B holds no order of {num_ranks} ranks",
            smallest_change="memory_limit >= 1 would do: one micro-batch at a time",
        )
    makespan, peaks, order = min(found, key=lambda each: (each[0], max(each[1])))
    placements = [tuple(range(num_ranks))]
    if folded:
        placements.append((*range(num_ranks), *reversed(range(num_ranks))))
    bound = min(
        order_bound_s(placement, num_microbatches, times=times, memory_limit=memory_limit, weight_share=weight_share)
        for placement in placements
    )
    return OrderSolution(proof=Proof.of(makespan, bound), order=order, peak_activations=peaks)


def _orders(
    num_ranks: int, num_microbatches: int, times: RankTimes, memory_limit: float, weight_share: float, *, folded: bool
) -> Iterator[Order]:
    """What each generator makes; those that need more memory are left out."""
    requests = [(name, memory_limit if name == "zb-1p" else None) for name in _ONE_WAY]
    if folded:
        requests += [(name, None) for name in _V]
        requests.append(("zb-v", memory_limit))
    for name, limit in requests:
        request = OrderRequest(
            schedule=name, num_ranks=num_ranks, num_microbatches=num_microbatches, memory_limit=limit, times=times, weight_share=weight_share
        )  # fmt: skip
        try:
            yield make_order(request)
        except InfeasibleError:
            continue
