"""PipeDream-2BW: 1F1B that does not drain between steps, on two versions of the weights."""

from __future__ import annotations

from dataclasses import replace

from simulator.pipeline.action import Order
from simulator.pipeline.one_way import one_f_one_b
from simulator.pipeline.sizes import check_sizes


def pipedream_2bw(num_ranks: int, num_microbatches: int, *, num_steps: int = 1) -> Order:
    """1F1B over the micro-batches of ``num_steps`` steps one after the other, each rank holding two versions of its weights.

    **Model**: once filled, a step takes m (F + B); rank r holds min(m, p - r) micro-batches and two versions of its weights. Micro-batch j
    (counted over all steps) uses the weights of `weight_version`.

    **Source**: arXiv 2006.09503, section 3.1.

    **Not modelled**: what stale weights do to convergence.

    Raises:
        InputError: m < p, for which two versions would not do.
    """
    check_sizes("pipedream-2bw", num_ranks=num_ranks, num_microbatches=num_microbatches)
    order = one_f_one_b(num_ranks, num_microbatches * num_steps)
    return replace(order, name="pipedream-2bw", weight_versions=2)


def weight_version(micro_batch: int, num_microbatches: int) -> int:
    """Updates that the weights of a micro-batch have seen: all steps but the last one before its own.

    **Source**: arXiv 2006.09503: W(t + 1) = W(t) - lr grad f(W(t - 1)).
    """
    return max(0, micro_batch // num_microbatches - 1)
