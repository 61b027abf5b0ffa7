"""Compiled: what the instructions of stamped templates wait for. Numbers of waits are those of `template.Outside`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Integers = NDArray[np.int64]

PREVIOUS, ARRIVAL, FORWARD, LEFT, SENT, ALL_SENT, AHEAD, BEGINNING, LAST_OF_RANK, END_OF_RANK, NUM_OUTSIDE = range(11)
_RECENT = 2
"""Transfers to the host that later passes may wait for."""


class Lists(NamedTuple):
    """Lists of templates: those of template t are ``values[offsets[t]:offsets[t + 1]]``."""

    offsets: Integers
    values: Integers


@njit(cache=True)  # type: ignore[untyped-decorator]
def ragged_kernel(offsets: Integers, rows: Integers) -> tuple[Integers, Integers]:
    """Entries of rows, one row after the other: their offsets, and their indices among all entries."""
    found = np.zeros(len(rows) + 1, dtype=np.int64)
    for n in range(len(rows)):
        found[n + 1] = found[n] + offsets[rows[n] + 1] - offsets[rows[n]]
    index = np.empty(found[-1], dtype=np.int64)
    for n in range(len(rows)):
        for k in range(found[n + 1] - found[n]):
            index[found[n] + k] = offsets[rows[n]] + k
    return found, index


@njit(cache=True)  # type: ignore[untyped-decorator]
def waits_kernel(  # noqa: C901, PLR0912 - one branch for each member of `template.Outside`
    base: Integers, template: Integers, rank: Integers, first_block: Integers, producer: Integers, forward: Integers, instructions: Integers, first: Integers,
    waits: Lists, exits: Lists, delivers: Lists, left: Lists, sent: Lists,
) -> tuple[Integers, Integers]:  # fmt: skip
    """Dependencies of all instructions, ascending and each once: offsets and indices.

    Args:
        base: [blocks + 1], the first instruction of each block.
        template: of each block.
        rank, first_block, producer, forward: as in `order_blocks.OrderBlocks`.
        instructions: [templates + 1], where those of each template begin.
        first: of each template, the instruction that `AHEAD` means; -1: none.
        waits: by instruction of templates.
        exits, delivers, left, sent: by template.
    """
    offsets, out, size = np.zeros(base[-1] + 1, dtype=np.int64), np.empty(4 * base[-1] + 16, dtype=np.int64), 0
    recent_left, recent_sent = np.full(_RECENT, -1, dtype=np.int64), np.full(_RECENT, -1, dtype=np.int64)
    for block in range(len(template)):
        mine = template[block]
        begins = block == first_block[rank[block]]
        before = -1 if begins else block - 1
        if begins:
            for place in range(_RECENT):
                recent_left[place], recent_sent[place] = -1, -1
        for k in range(instructions[mine + 1] - instructions[mine]):
            n, start = base[block] + k, size
            for position in range(waits.offsets[instructions[mine] + k], waits.offsets[instructions[mine] + k + 1]):
                one = waits.values[position]
                if one >= 0:
                    out, size = _append(out, size, base[block] + one)
                    continue
                what, number = (-1 - one) % NUM_OUTSIDE, (-1 - one) // NUM_OUTSIDE
                if what == PREVIOUS:
                    out, size = _extend(out, size, exits, template, base, before)
                elif what == ARRIVAL:
                    out, size = _extend(out, size, delivers, template, base, producer[block])
                elif what == FORWARD:
                    other = forward[block]
                    out, size = _append(out, size, base[other] + left.values[left.offsets[template[other]] + number])
                elif what == LEFT:
                    out, size = _append(out, size, recent_left[_RECENT - number])
                elif what == SENT:
                    out, size = _append(out, size, recent_sent[_RECENT - number])
                elif what == ALL_SENT:
                    for other in range(first_block[rank[block]], block):
                        out, size = _extend(out, size, sent, template, base, other)
                elif what == AHEAD and before >= 0 and first[template[before]] >= 0:
                    leader = base[before] + first[template[before]]
                    for place in range(offsets[leader], offsets[leader + 1]):
                        out, size = _append(out, size, out[place])
                elif what == BEGINNING:
                    out, size = _append(out, size, base[first_block[rank[block]]] + number)
                elif what == LAST_OF_RANK:
                    out, size = _extend(out, size, exits, template, base, first_block[number + 1] - 2)
                elif what == END_OF_RANK:
                    out, size = _extend(out, size, exits, template, base, first_block[number + 1] - 1)
            size = _tidy(out, start, size)
            offsets[n + 1] = size
        _remember(recent_left, left, mine, base[block])
        _remember(recent_sent, sent, mine, base[block])
    return offsets, out[:size].copy()


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _append(out: Integers, size: int, value: int) -> tuple[Integers, int]:
    """Adds a number, if there is one (not below 0), and makes room first."""
    if value < 0:
        return out, size
    if size == len(out):
        grown = np.empty(2 * size, dtype=np.int64)
        for place in range(size):  # not a slice: its check of shapes would take longer to compile than all else here
            grown[place] = out[place]
        out = grown
    out[size] = value
    return out, size + 1


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _extend(out: Integers, size: int, lists: Lists, template: Integers, base: Integers, block: int) -> tuple[Integers, int]:
    """Adds the instructions that a list of a block's template names; nothing where there is no block."""
    if block >= 0:
        for position in range(lists.offsets[template[block]], lists.offsets[template[block] + 1]):
            out, size = _append(out, size, base[block] + lists.values[position])
    return out, size


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _tidy(out: Integers, start: int, size: int) -> int:
    """Sorts ``out[start:size]`` and keeps each number once; returns where it ends."""
    for at in range(start + 1, size):
        value, place = out[at], at
        while place > start and out[place - 1] > value:
            out[place] = out[place - 1]
            place -= 1
        out[place] = value
    kept = start
    for at in range(start, size):
        if kept == start or out[at] != out[kept - 1]:
            out[kept] = out[at]
            kept += 1
    return kept


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _remember(recent: Integers, lists: Lists, template: int, base: int) -> None:
    """Appends a template's transfers to the rank's last ones."""
    for position in range(lists.offsets[template], lists.offsets[template + 1]):
        for place in range(_RECENT - 1):
            recent[place] = recent[place + 1]
        recent[_RECENT - 1] = base + lists.values[position]
