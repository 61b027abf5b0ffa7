"""A lower bound on the step of any pipeline order with a given placement of stages, under a limit of memory."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

from simulator.pipeline.play_order import RankTimes
from simulator.pipeline.zero_bubble_kernels import MEMORY_SLACK


def order_bound_s(
    rank_of_stage: tuple[int, ...], num_microbatches: int, *, times: RankTimes, memory_limit: float, weight_share: float
) -> float:
    """No order of forward passes, input and weight gradients has a smaller makespan.

    Args:
        rank_of_stage: placement; a rank's stages share its times and its M_B.
        num_microbatches: m.
        times: per rank and micro-batch.
        memory_limit: most activations of a rank, in its M_B.
        weight_share: part of them that goes with the weight gradient.

    Model:
        On a rank with v stages, let head be when it can begin, first_b when the first gradient can reach it, K = floor(v memory_limit). At
        most K passes forward can lie before its first B, so that it idles until max(head, first_b - K F / v), and
        makespan >= that + m (F + B + W). Its last B moreover needs all F and B and all but the W that memory lets it put off,
        floor(v memory_limit / x) at most, and is followed by the way of the last gradient to stage 0 and the last W there. For
        stages of equal times on rank 0: bubble >= (p - 1)(B + 2 comm) + (p - k) F.

    Source:
        The bubble before the first B: arXiv 2401.10241, section 3; for any rank, several stages a rank and deferred W by the same argument.

    Not modelled:
        What ranks do to one another beyond first and last micro-batch: the bound need not be met.
    """
    ranks = max(rank_of_stage) + 1
    chunks = [rank_of_stage.count(rank) for rank in range(ranks)]
    per_rank = times.per_rank(ranks)
    forward, gradient, weight = ([float(per_rank[kind, rank]) / chunks[rank] for rank in rank_of_stage] for kind in range(3))
    hops = [0.0, *(times.comm_s if a != b else 0.0 for a, b in pairwise(rank_of_stage))]
    down = list(accumulate(hop + own for hop, own in zip(hops, forward, strict=True)))
    to_first = list(accumulate(hop + own for hop, own in zip(hops, gradient, strict=True)))
    bound = 0.0
    for rank in range(ranks):
        first = rank_of_stage.index(rank)
        last = len(rank_of_stage) - 1 - list(reversed(rank_of_stage)).index(rank)
        head = down[first] - forward[first]
        first_b = down[-1] + to_first[-1] - to_first[last]
        own_f, own_b, own_w = (float(per_rank[kind, rank]) for kind in range(3))
        fits = min(num_microbatches * chunks[rank], math.floor(chunks[rank] * (memory_limit + MEMORY_SLACK)))
        begin = max(head, first_b - fits * own_f / chunks[rank])
        put_off = math.inf if weight_share == 0 else math.floor(chunks[rank] * (memory_limit + MEMORY_SLACK) / weight_share)
        weights = max(0.0, num_microbatches * chunks[rank] - put_off)
        last_b = begin + num_microbatches * (own_f + own_b) + weights * own_w / chunks[rank]
        way_down = to_first[first] - gradient[first] + weight[0]
        bound = max(bound, begin + num_microbatches * (own_f + own_b + own_w), last_b + way_down)
    return bound
