"""Compiled kernel of `search.stage_chain`: least times of a stage's blocks for one share of the memory."""

from __future__ import annotations

import numpy as np
from numba import njit

from search.chain_kernels import ChainArrays, Floats, Ints, row_of, slots_for


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def stage_choices(chain: ChainArrays, slot_bytes: int, times: Floats, kept_slots: int, own_slots: int) -> tuple[Floats, Ints]:
    """The recurrence of `StageTable`, backwards over blocks.

    Args:
        chain: the stage.
        slot_bytes: size of a slot.
        times: of sub-chains, as `least_times` returned them.
        kept_slots: most that a micro-batch keeps.
        own_slots: what the running micro-batch has.

    Returns:
        Seconds [blocks + 1, kept_slots + 1] of the blocks from the first index on, by slots kept below them, and the choices behind them [blocks, kept_slots + 1]: options
        as o >= 0, runs without graphs to boundary j as -j.
    """
    blocks, size, most = chain.discard_s.shape[0], kept_slots + 1, times.shape[1] - 1
    values = np.full((blocks + 1, size), np.inf)
    choices = np.zeros((blocks, size), np.int64)
    values[blocks] = 0.0
    for first in range(blocks - 1, -1, -1):
        for option in range(chain.num_options[first]):
            forward = chain.held_bytes[blocks - 1] + chain.forward_peak_bytes[first, option]
            peak = slots_for(max(forward, chain.backward_need_bytes[first, option]), slot_bytes)
            saved = slots_for(chain.saved_bytes[first, option], slot_bytes)
            for slot in range(min(size - saved, own_slots - peak + 1)):
                value = chain.option_s[first, option] + values[first + 1, slot + saved]
                if value < values[first, slot]:
                    values[first, slot], choices[first, slot] = value, option
        run_s, peak_bytes = 0.0, 0
        for middle in range(first + 1, blocks + 1):
            run_s += chain.discard_s[middle - 1]
            below = chain.boundary_bytes[middle - 1] if middle - 1 > first else 0
            peak_bytes = max(peak_bytes, below + chain.discard_peak_bytes[middle - 1])
            peak = slots_for(peak_bytes, slot_bytes)
            kept = slots_for(chain.boundary_bytes[middle], slot_bytes) if middle < blocks else 0
            row = row_of(first, middle - 1, blocks)
            for slot in range(min(size - kept, own_slots - peak + 1)):
                value = run_s + times[row, min(own_slots - slot, most)] + values[middle, slot + kept]
                if value < values[first, slot]:
                    values[first, slot], choices[first, slot] = value, -middle
    return values, choices
