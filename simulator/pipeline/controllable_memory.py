"""Orders in the shape of a V under a limit of memory: V-Min, V-Half and all between them and ZB-V."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from hardware_models.errors import InfeasibleError
from simulator.pipeline.action import Action, ActionKind, Order
from simulator.pipeline.sizes import check_sizes
from simulator.pipeline.v_kernels import B0, B1, F0, F1, PERIOD, W0, W1, Ints, close_gaps, fill_warm_up, peak_of, repeat_block
from simulator.pipeline.zero_bubble_kernels import MEMORY_SLACK

CHUNKS = 2
"""Chunks of a rank: one on the way down, one on the way back."""
_PASSES: dict[int, tuple[ActionKind, int]] = {
    F0: ("F", 0), F1: ("F", 1), B1: ("B", 1), B0: ("B", 0), W1: ("W", 1), W0: ("W", 0),
}  # fmt: skip
"""Kind and chunk of each pass."""
_GAPS = (1, 3, 5)
"""Slots tried at the turns of a micro-batch's way: odd, so that the ways down and up fall on slots of different parity."""
_LAST_HOPS = ((0, 0), (1, 0), (0, 1))
"""Slots less between the last two ranks forward, and slots more backward: what a limit of an odd number of chunks takes."""
_STEPS = (1, 2)
"""Slots from a rank to the next on the first ranks that are tried; on the others there is one more."""


def v_min(num_ranks: int, num_microbatches: int) -> Order:
    """The V of least memory: each micro-batch goes its way without a stop.

    **Model** (F = B = W, large m): floor((p + 4) / 3) M_B, bubble as in `bubble_slots`.

    **Source**: arXiv 2405.15362.
    """
    return _named("v-min", num_ranks, num_microbatches, 2 * ((num_ranks + 4) // 3))


def v_half(num_ranks: int, num_microbatches: int) -> Order:
    """The V of half of 1F1B's memory.

    **Model** (F = B = W, large m): floor((p + 2) / 2) M_B, bubble as in `bubble_slots`.

    **Source**: arXiv 2405.15362.
    """
    return _named("v-half", num_ranks, num_microbatches, 2 * ((num_ranks + 2) // 2))


def v_limited(num_ranks: int, num_microbatches: int, *, memory_limit: float, name: str = "v") -> Order:
    """The V of least bubble at equal times among those tried, under a limit of memory.

    Tried are all blocks whose steps from rank to rank are 1 slot on the first ranks and 2 on the others, or 2 and 3, with few slots at the
    turns; each is repeated, its warm-up filled up to the limit and its gaps closed.

    Args:
        memory_limit: most activations of a rank in M_B, counted as if all of them went with the weight gradient.
        name: of the order.

    **Model** (F = B = W, large m, even k = 2 x memory_limit): bubble as in `bubble_slots`; for odd k up to one slot more.

    **Source**: repeat a block, squeeze, reorder: arXiv 2405.15362.

    **Not modelled**: unequal times, which change what would be best.

    Raises:
        InfeasibleError: no block fits the limit.
    """
    check_sizes(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    limit = int(CHUNKS * (memory_limit + MEMORY_SLACK))
    peaks = [(_peak_of_block(block, num_microbatches), block) for block in _blocks(num_ranks)]
    least = min(peak for peak, _ in peaks)
    if least > limit:
        change = f"memory_limit >= {least / CHUNKS:g} would do"
        raise InfeasibleError(
            limit=f"memory_limit {memory_limit:g} M_B of schedule {name} on {num_ranks} ranks", smallest_change=change
        )
    fullest = max(peak for peak, _ in peaks if peak <= limit)
    best_span, best = 0, None
    for peak, block in peaks:
        if not fullest - 1 <= peak <= fullest:
            continue
        passes = repeat_block(block, num_microbatches)
        for tried in (fill_warm_up(passes, limit), passes):
            span, closed = close_gaps(tried, limit)
            if span >= 0 and (best is None or span < best_span):
                best_span, best = span, closed
    assert best is not None, "a repeated block runs as it is"
    return _order_of(best, name)


def bubble_slots(num_ranks: int, limit: int) -> int:
    """Slots that the rank with the largest span idles at least, once there are many micro-batches.

    **Model**: 3 p - 1 - 3 k + max(3 p, p - 1 + 2 (1 + floor((k + 1) / 2))) in times of half a rank's pass, F = B = W.

    **Source**: the authors' scheduler, techniques.md section 8.3; for 2 floor((p + 4) / 3) <= k <= 2 p.
    """
    down_and_up = num_ranks - 1 + 2 * (1 + (limit + 1) // 2)
    return 3 * num_ranks - 1 - 3 * limit + max(3 * num_ranks, down_and_up)


def _named(name: str, num_ranks: int, num_microbatches: int, limit: int) -> Order:
    return v_limited(num_ranks, num_microbatches, memory_limit=limit / CHUNKS, name=name)


def _peak_of_block(block: Ints, num_microbatches: int) -> int:
    """Peak of the repeated block; once the first micro-batch has gone all its way, nothing new happens."""
    enough = int(block.max()) // PERIOD + 2
    return int(peak_of(repeat_block(block, min(num_microbatches, enough))))


def _blocks(num_ranks: int) -> Iterator[Ints]:
    """[4, ranks] slots of a micro-batch's passes, different modulo `PERIOD` on every rank, each block once."""
    seen = set()
    hops = np.arange(num_ranks - 1)
    for step, wide, (less, more), second, third in product(_STEPS, range(num_ranks), _LAST_HOPS, _GAPS, _GAPS):
        steps = step + (hops >= num_ranks - 1 - wide)
        last = hops == num_ranks - 2
        forward, backward = (np.concatenate(([0], np.cumsum(each))) for each in (steps - less * last, steps + more * last))
        block = np.empty((4, num_ranks), dtype=np.int64)
        block[F0] = forward
        block[F1] = forward[-1] + 1 + forward[-1] - forward
        block[B1] = block[F1][0] + second + backward
        block[B0] = block[B1][-1] + third + backward[-1] - backward
        apart = (np.diff(np.sort(block % PERIOD, axis=0), axis=0) > 0).all()
        if apart and (steps > less * last).all() and block.tobytes() not in seen:
            seen.add(block.tobytes())
            yield block


def _order_of(passes: Ints, name: str) -> Order:
    num_ranks, length = passes.shape
    ranks = []
    for rank, row in enumerate(passes.tolist()):
        stages, count = (rank, 2 * num_ranks - 1 - rank), [0] * len(_PASSES)
        actions = []
        for code in row:
            kind, chunk = _PASSES[code]
            actions.append(Action(stages[chunk], kind, count[code]))
            count[code] += 1
        ranks.append(tuple(actions))
    return Order(name=name, num_stages=CHUNKS * num_ranks, num_microbatches=length // PERIOD, ranks=tuple(ranks))
