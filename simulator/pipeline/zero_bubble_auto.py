"""ZB-1p, ZB-2p and the like: an order of forward passes, input and weight gradients made for given times and a limit of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from hardware_models.errors import InfeasibleError
from simulator.pipeline.action import Action, ActionKind, Order
from simulator.pipeline.play_order import WEIGHT_SHARE, RankTimes, play_order
from simulator.pipeline.sizes import check_sizes
from simulator.pipeline.zero_bubble import zb_h1, zb_h2
from simulator.pipeline.zero_bubble_kernels import MEMORY_SLACK, B, Choices, Costs, F, Ints, W, wave_order

EQUAL_TIMES = RankTimes(forward_s=(1.0,), input_gradient_s=(1.0,), weight_gradient_s=(1.0,))
"""Times where none are given: those of layers whose three passes are matrix products of the same size."""
_KINDS: dict[int, ActionKind] = {F: "F", B: "B", W: "W"}
_LARGEST_WARM_UPS = 4
"""Warm-ups that are tried one by one from the largest; below, only simple fractions of it."""
_FRACTIONS = (0.75, 0.5, 0.25)


def zb_auto(
    num_ranks: int,
    num_microbatches: int,
    *,
    memory_limit: float,
    times: RankTimes = EQUAL_TIMES,
    weight_share: float = WEIGHT_SHARE,
    name: str = "zb-auto",
) -> Order:
    """The best order among those that a heuristic makes with different choices, and ZB-H1 and ZB-H2 where they fit.

    The best is that whose rank of the largest span (first start to last end) has the smallest.

    ZB-1p is ``memory_limit`` p, ZB-2p is 2 p.

    Args:
        memory_limit: most activations of a rank, in that rank's M_B.
        times: per rank and micro-batch.
        weight_share: part of a micro-batch's activations that goes with its weight gradient.
        name: of the order.

    **Model**: waves of one forward pass down and one input gradient up; weight gradients fill gaps or make room, see
    `simulator.pipeline.zero_bubble_kernels`. Choices: how many forward passes go ahead, and four yes-or-no questions.

    **Source**: arXiv 2401.10241, section 3.1.

    **Not modelled**: optimality; the paper's integer program can be better.

    Raises:
        InfeasibleError: the limit is below one micro-batch.
    """
    check_sizes(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    if memory_limit < 1.0 - MEMORY_SLACK:
        limit = f"memory_limit {memory_limit:g} M_B of schedule {name}"
        raise InfeasibleError(limit=limit, smallest_change="memory_limit >= 1 would do: a rank holds a micro-batch or nothing")
    made = _best_wave_order(num_ranks, num_microbatches, memory_limit, times, weight_share)
    best_span = max(play_order(made, times, weight_share=weight_share).span_s)
    for ready in (zb_h1(num_ranks, num_microbatches), zb_h2(num_ranks, num_microbatches)):
        played = play_order(ready, times, weight_share=weight_share)
        if max(played.peak_activations) <= memory_limit + MEMORY_SLACK and max(played.span_s) < best_span:
            made, best_span = ready, max(played.span_s)
    return replace(made, name=name)


def _best_wave_order(
    num_ranks: int, num_microbatches: int, memory_limit: float, times: RankTimes, weight_share: float
) -> Order:
    """The best of the heuristic's orders."""
    costs = Costs(
        time=np.ascontiguousarray(times.per_rank(num_ranks)[: len(_KINDS)]),
        comm=times.comm_s,
        memory=np.array([1.0, weight_share - 1.0, -weight_share]),
        limit=float(memory_limit),  # a whole number would compile the heuristic again
    )
    best_span, best = np.inf, None
    for choices in _choices(int(min(memory_limit + MEMORY_SLACK, num_microbatches))):
        fits, span, kinds = wave_order(num_microbatches, costs, choices)
        if fits and span < best_span:
            best_span, best = span, kinds
    assert best is not None, "one micro-batch at a time always fits"
    return _order_of(best)


def _choices(most: int) -> Iterator[Choices]:
    warm_ups = {max(1, most - less) for less in range(_LARGEST_WARM_UPS)} | {max(1, int(most * part)) for part in _FRACTIONS}
    either = (True, False)
    for ahead, wait, hold, fill, empty in product(sorted(warm_ups, reverse=True), either, either, either, either):
        yield Choices(ahead, wait_for_first=wait, hold_forward=hold, fill_always=fill, empty_first=empty)


def _order_of(kinds: Ints) -> Order:
    ranks = []
    for rank, row in enumerate(kinds.tolist()):
        count = [0] * len(_KINDS)
        actions = []
        for code in row:
            actions.append(Action(rank, _KINDS[code], count[code]))
            count[code] += 1
        ranks.append(tuple(actions))
    return Order(name="zb-auto", num_stages=len(ranks), num_microbatches=kinds.shape[1] // len(_KINDS), ranks=tuple(ranks))
