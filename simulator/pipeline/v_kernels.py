"""Compiled kernels of orders in the shape of a V, in slots of time: every pass of every chunk takes one.

A micro-batch meets each rank six times. The passes are numbered along its way: down as forward passes of the first chunk (0), up as those
of the second (1), down as input gradients of the second chunk (2), up as those of the first (3); 4 and 5 are the weight gradients that
belong to 2 and 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Ints = npt.NDArray[np.int64]

F0, F1, B1, B0, W1, W0 = range(6)
"""Passes of a rank."""
PERIOD = 6
"""Slots from one micro-batch to the next once all ranks are busy: one for each pass."""
CHANGE = np.array([1, 1, 0, 0, -1, -1], dtype=np.int64)
"""Change of the chunks' activations that a rank holds; they go with the weight gradient (the safe side: part may go before)."""


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def repeat_block(block: Ints, num_microbatches: int) -> Ints:
    """Passes [ranks, 6 m] of a block of slots that is repeated every `PERIOD` slots; weight gradients go into free slots.

    Args:
        block: [4, ranks], slots of passes 0 to 3 of the first micro-batch, on each rank different modulo `PERIOD`.
    """
    ranks = block.shape[1]
    passes = np.zeros((ranks, PERIOD * num_microbatches), dtype=np.int64)
    for rank in range(ranks):
        count, waiting = np.zeros(4, dtype=np.int64), np.zeros(2 * num_microbatches, dtype=np.int64)
        filled, queued, taken, slot = 0, 0, 0, block[F0, rank]
        while filled < passes.shape[1]:
            due = -1
            for kind in range(4):
                if count[kind] < num_microbatches and block[kind, rank] + PERIOD * count[kind] == slot:
                    due = kind
            if due >= 0:
                passes[rank, filled] = due
                count[due] += 1
                filled += 1
                if due >= B1:
                    waiting[queued] = due + 2
                    queued += 1
            elif taken < queued:
                passes[rank, filled] = waiting[taken]
                taken += 1
                filled += 1
            slot += 1
    return passes


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def peak_of(passes: Ints) -> int:
    """Most activations of any rank, in chunks."""
    peak = 0
    for rank in range(passes.shape[0]):
        held = 0
        for kind in passes[rank]:
            held += CHANGE[kind]
            peak = max(peak, held)
    return peak


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def fill_warm_up(passes: Ints, limit: int) -> Ints:
    """The passes with those before each rank's first pass 3 put in another order.

    Forward passes up to the limit come first, as many of the second chunk as the rank's place allows (one on the first rank, half the
    limit at most) and those in turn with the first chunk's; then input gradient, weight gradient, forward pass, again and again.
    """
    ranks, out = passes.shape[0], passes.copy()
    for rank in range(ranks):
        length = int(np.argmax(passes[rank] == B0))
        left = np.zeros(6, dtype=np.int64)
        for kind in passes[rank, :length]:
            left[kind] += 1
        second = min(rank + 1, limit // 2)
        first = min(limit - second, left[F0])
        second = min(second, left[F1])
        alone = min(2 * (ranks - 1 - rank), first)
        out[rank, :alone] = F0
        left[F0] -= alone
        at, first = alone, first - alone
        while first > 0 or second > 0:
            for kind in (F0, F1):
                if (first if kind == F0 else second) > 0:
                    out[rank, at] = kind
                    left[kind] -= 1
                    at += 1
            first, second = max(0, first - 1), max(0, second - 1)
        while at < length:
            for kind in (B1, W1, F1 if left[F1] > 0 else F0):
                if left[kind] > 0:
                    out[rank, at] = kind
                    left[kind] -= 1
                    at += 1
    return out


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _end_of_input(kind: int, rank: int, index: int, end: Ints) -> int:
    """Slot after the one in which the input of a pass was made; -1 if it is not."""
    last = end.shape[1] - 1
    if kind >= W1:
        return int(end[kind - 2, rank, index])
    if kind in (F0, B1):
        if rank > 0:
            return int(end[kind, rank - 1, index])
        return 0 if kind == F0 else int(end[F1, 0, index])
    return int(end[kind, rank + 1, index]) if rank < last else int(end[kind - 1, last, index])


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _choose(
    row: Ints, used: npt.NDArray[np.bool_], head: int, rank: int, slot: int, held: int, limit: int, count: Ints, end: Ints
) -> int:
    """Place in the row of the first pass that can run now without ever raising the rank's memory above the limit; -1 if none.

    Once all forward passes have run, weight gradients come after every input gradient that can run.
    """
    draining = count[F0, rank] == end.shape[2] and count[F1, rank] == end.shape[2]
    seen = np.zeros(6, dtype=np.bool_)
    ahead, peak, spare = 0, 0, -1
    for place in range(head, row.size):
        if used[place]:
            continue
        kind = row[place]
        if not seen[kind]:
            seen[kind] = True
            ready = _end_of_input(kind, rank, count[kind, rank], end)
            fits = kind > F1 or held + 1 + peak <= limit
            if 0 <= ready <= slot and fits:
                if not (draining and kind >= W1):
                    return place
                spare = place if spare < 0 else spare
            if seen.all():
                break
        ahead += CHANGE[kind]
        peak = max(peak, ahead)
    return spare


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def close_gaps(passes: Ints, limit: int) -> tuple[int, Ints]:
    """Longest time from a rank's first to its last slot, -1 where the passes get stuck, and the passes as they ran.

    Slot by slot, each rank runs the first of its passes that can run, see `_choose`.
    """
    ranks, length = passes.shape
    end = np.full((6, ranks, length // PERIOD), -1, dtype=np.int64)
    count = np.zeros((6, ranks), dtype=np.int64)
    used, out = np.zeros(passes.shape, dtype=np.bool_), np.zeros_like(passes)
    done, head, held = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    begin, slot, longest, moved = np.zeros(ranks, dtype=np.int64), 0, 0, True
    while moved:
        moved = False
        for rank in range(ranks):
            if done[rank] == length:
                continue
            place = _choose(passes[rank], used[rank], head[rank], rank, slot, held[rank], limit, count, end)
            if place < 0:
                continue
            kind = passes[rank, place]
            if done[rank] == 0:
                begin[rank] = slot
            end[kind, rank, count[kind, rank]] = slot + 1
            count[kind, rank] += 1
            held[rank] += CHANGE[kind]
            out[rank, done[rank]] = kind
            used[rank, place] = True
            done[rank] += 1
            while head[rank] < length and used[rank, head[rank]]:
                head[rank] += 1
            longest, moved = max(longest, slot + 1 - begin[rank]), True
        slot += 1
    return (longest if done.min() == length else -1), out
