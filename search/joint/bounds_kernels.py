"""Compiled part of the time bounds: the least over all cuts into stages of the greatest over stages, from below."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HALVINGS = 40
"""Of the interval between a time that no cut reaches and one that some cut does: its end is below the least time by 1e-12 of it."""


@njit(cache=True)  # type: ignore[untyped-decorator]
def least_over_cuts(
    forward_s: Floats,
    returned_s: Floats,
    whole_s: Floats,
    weight_s: Floats,
    tail_s: Floats,
    share: float,
    message_s: float,
    num_ranks: int,
    split: bool,
) -> float:
    """A time that no cut into consecutive stages, one a rank, is below.

    Args:
        forward_s: sums over the pieces before each one; shape (pieces + 1,), as all that follow.
        returned_s: of what a gradient waits for.
        whole_s: forward and backward.
        weight_s: of weights' gradients.
        tail_s: what a rank does after its last pass.
        share: micro-batches.
        message_s: between neighbours.
        num_ranks: of the pipeline.
        split: whether weights' gradients are passes of their own.
    """
    low = share * whole_s[-1] / num_ranks
    high = share * whole_s[-1] + forward_s[-1] + returned_s[-1] + tail_s[-1] + 2 * num_ranks * message_s
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        if _all_fit(middle, forward_s, returned_s, whole_s, weight_s, tail_s, share, message_s, num_ranks, split):
            high = middle
        else:
            low = middle
    return float(low)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _all_fit(
    limit_s: float, forward_s: Floats, returned_s: Floats, whole_s: Floats, weight_s: Floats, tail_s: Floats, share: float, message_s: float,
    num_ranks: int, split: bool,
) -> bool:  # fmt: skip
    """Whether stages that each take as many pieces as the time allows take all."""
    done, last = 0, len(whole_s) - 1
    for stage in range(num_ranks):
        start = forward_s[done] + stage * message_s
        back = returned_s[done] + stage * message_s
        end = done
        while end < last:
            work = share * (whole_s[end + 1] - whole_s[done])
            tail = tail_s[end + 1] - tail_s[done]
            if split:
                weights = share * (weight_s[end + 1] - weight_s[done])
                taken = start + max(work + tail, work - weights + back)
            else:
                taken = start + work + max(tail, back)
            if taken > limit_s:
                break
            end += 1
        done = end
        if done == last:
            return True
    return False
