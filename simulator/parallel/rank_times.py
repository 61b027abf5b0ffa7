"""How long the passes of each pipeline rank take: what orders that are made for their times are made from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from simulator.parallel.lower_step import StepParts
from simulator.pipeline.play_order import RankTimes

TIMED_SCHEDULES = ("zb-1p", "zb-2p")
"""Schedules whose order depends on times; those in the shape of a V are made for equal ones (arXiv 2405.15362)."""
RESOLUTION = 1e-3
"""Part of the longest pass to which times are rounded: orders depend on ratios only, and plans of equal ratios share one."""


def rank_times(parts: StepParts) -> RankTimes:
    """Seconds of a micro-batch's passes on each rank, collectives included, and of a message.

    **Model**: a pass takes its compute and its collectives, or the host's time to launch it, whichever is longer.

    Args:
        parts: of a step whose ranks have one stage each.
    """
    forward, back, weight = [], [], []
    for cost, communication in zip(parts.costs, parts.communication, strict=True):
        forward.append(max(cost.forward.total_s + communication.forward.total_s, cost.forward.host_s))
        input_s = cost.backward.total_s - cost.weight_s + communication.backward.total_s
        back.append(max(input_s, cost.backward.host_s - cost.weight_host_s))
        weight.append(max(cost.weight_s, cost.weight_host_s))
    sent = max(communication.message_bytes for communication in parts.communication)
    comm_s = parts.message_latency_s + sent / parts.message_limit_bytes_per_s if parts.order.num_ranks > 1 else 0.0
    return RankTimes(forward_s=tuple(forward), input_gradient_s=tuple(back), weight_gradient_s=tuple(weight), comm_s=comm_s)


def relative_times(times: RankTimes) -> RankTimes:
    """The same in units of the longest pass, rounded to `RESOLUTION`."""
    longest = max(*times.forward_s, *times.input_gradient_s, *times.weight_gradient_s)

    def rounded(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple((np.round(np.array(values) / longest / RESOLUTION) * RESOLUTION).tolist())

    return replace(
        times, forward_s=rounded(times.forward_s), input_gradient_s=rounded(times.input_gradient_s), weight_gradient_s=rounded(times.weight_gradient_s),
        comm_s=rounded((times.comm_s,))[0],
    )  # fmt: skip
