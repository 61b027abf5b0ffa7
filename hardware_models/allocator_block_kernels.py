"""Compiled: blocks of the caching allocator and the lists of free ones, as `allocator_pool` has them for one stream.

Blocks are rows of one array, linked to their neighbours in a segment by row number. Four lists of rows are kept in order: free blocks of the small and of the large
pool by (size, address), and the parts of expandable segments without memory, of the small and of the large pool, by address.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Integers = NDArray[np.int64]

NONE = -1
SIZE, ADDRESS, POOL, MAPPED, ALLOCATED, REQUESTED, ORIGIN, BORN, BEFORE, AFTER, NUM_FIELDS = range(11)
"""Columns of a block; ``ORIGIN`` is the first address of its segment, ``BORN`` the pool's count of searches when it became free."""
SMALL, LARGE, UNMAPPED = range(3)
"""Lists of free blocks; those without memory are ``UNMAPPED`` further."""
(
    RESERVED, PEAK_RESERVED, NOW_REQUESTED, PEAK_REQUESTED, NOW_ALLOCATED, PEAK_ALLOCATED, FRAGMENTATION, FRAGMENTATION_PEAK, SEGMENTS, PEAK_SEGMENTS, RETRIES,
    NEXT_ADDRESS, NUM_BLOCKS, NUM_SPARE, SEARCHES, LENGTH,
) = (*range(15), 16)  # fmt: skip
"""Counts. ``SEARCHES`` has one for each pool, ``LENGTH`` one for each list."""
NUM_COUNTS = LENGTH + 4

part = njit(cache=True, error_model="numpy", _nrt=False)
"""Decorator of a function that makes no arrays: it counts no references to those that it is given."""


class Rules(NamedTuple):
    """Settings and limits of an allocator; -1: none."""

    divisions: Integers
    large_segment: int
    max_split: int
    rounding_limit: int
    capacity: int
    allowed: int
    collect_above: int
    """Reserved bytes above which old segments are returned."""
    expandable: bool
    rejects: bool
    """Gives up before the device is asked."""
    range_bytes: int
    """Addresses of an expandable segment, before they are rounded to pages."""


class Store(NamedTuple):
    """All that an allocator knows."""

    blocks: Integers
    """[rows, `NUM_FIELDS`]."""
    lists: Integers
    """[4, rows]: rows in order."""
    spare: Integers
    """Rows to use again."""
    counts: Integers


def new_store(rows: int) -> Store:
    """An allocator that has nothing yet."""
    return Store(
        blocks=np.empty((rows, NUM_FIELDS), np.int64), lists=np.empty((4, rows), np.int64), spare=np.empty(rows, np.int64),
        counts=np.zeros(NUM_COUNTS, np.int64),
    )  # fmt: skip


def grown(store: Store) -> Store:
    """The same with room for twice as many blocks."""
    rows = len(store.spare)
    larger = new_store(2 * rows)
    larger.blocks[:rows], larger.lists[:, :rows], larger.spare[:rows] = store.blocks, store.lists, store.spare
    return larger._replace(counts=store.counts)


@part  # type: ignore[untyped-decorator]
def place_of(store: Store, row: int, size: int, address: int) -> int:
    """Where in a list a block of such size and address is, or would be."""
    blocks, lists = store.blocks, store.lists
    low, high = 0, store.counts[LENGTH + row]
    while low < high:
        middle = (low + high) >> 1
        block = lists[row, middle]
        if row < UNMAPPED and blocks[block, SIZE] != size:
            earlier = blocks[block, SIZE] < size
        else:
            earlier = blocks[block, ADDRESS] < address
        if earlier:
            low = middle + 1
        else:
            high = middle
    return low


@part  # type: ignore[untyped-decorator]
def insert(store: Store, block: int) -> None:
    """A block enters the list that it belongs to."""
    blocks, lists, counts = store.blocks, store.lists, store.counts
    pool = blocks[block, POOL]
    row = pool if blocks[block, MAPPED] else UNMAPPED + pool
    blocks[block, BORN] = counts[SEARCHES + pool]
    place = place_of(store, row, blocks[block, SIZE], blocks[block, ADDRESS])
    for at in range(counts[LENGTH + row], place, -1):
        lists[row, at] = lists[row, at - 1]
    lists[row, place] = block
    counts[LENGTH + row] += 1


@part  # type: ignore[untyped-decorator]
def erase(store: Store, block: int) -> None:
    """A block leaves its list, before its size, address or memory change."""
    blocks, lists, counts = store.blocks, store.lists, store.counts
    row = blocks[block, POOL] if blocks[block, MAPPED] else UNMAPPED + blocks[block, POOL]
    counts[LENGTH + row] -= 1
    for at in range(place_of(store, row, blocks[block, SIZE], blocks[block, ADDRESS]), counts[LENGTH + row]):
        lists[row, at] = lists[row, at + 1]


@part  # type: ignore[untyped-decorator]
def new_block(store: Store, pool: int, size: int, address: int, origin: int) -> int:
    """A block with memory and without neighbours, in no list."""
    counts = store.counts
    if counts[NUM_SPARE]:
        counts[NUM_SPARE] -= 1
        block = store.spare[counts[NUM_SPARE]]
    else:
        block = counts[NUM_BLOCKS]
        counts[NUM_BLOCKS] += 1
    own = store.blocks
    own[block, SIZE], own[block, ADDRESS], own[block, POOL], own[block, ORIGIN] = size, address, pool, origin
    own[block, MAPPED], own[block, ALLOCATED], own[block, REQUESTED], own[block, BORN] = 1, 0, 0, 0
    own[block, BEFORE], own[block, AFTER] = NONE, NONE
    return int(block)


@part  # type: ignore[untyped-decorator]
def drop(store: Store, block: int) -> None:
    """A block is no more."""
    store.spare[store.counts[NUM_SPARE]] = block
    store.counts[NUM_SPARE] += 1


@part  # type: ignore[untyped-decorator]
def link(store: Store, before: int, after: int) -> None:
    """Makes two blocks neighbours; one of them may be none."""
    if before != NONE:
        store.blocks[before, AFTER] = after
    if after != NONE:
        store.blocks[after, BEFORE] = before


@part  # type: ignore[untyped-decorator]
def merge(store: Store, block: int, other: int) -> None:
    """Makes ``other``, a free neighbour in the same segment, part of ``block``, which is in no list; else does nothing."""
    blocks = store.blocks
    if other == NONE or blocks[other, ALLOCATED] or blocks[other, MAPPED] != blocks[block, MAPPED]:
        return
    erase(store, other)
    if blocks[block, BEFORE] == other:
        blocks[block, ADDRESS], blocks[block, BEFORE] = blocks[other, ADDRESS], NONE
        link(store, blocks[other, BEFORE], block)
    else:
        blocks[block, AFTER] = NONE
        link(store, block, blocks[other, AFTER])
    blocks[block, SIZE] += blocks[other, SIZE]
    drop(store, other)


@part  # type: ignore[untyped-decorator]
def become_free(store: Store, block: int) -> None:
    """A block without user joins its neighbours and enters its list."""
    merge(store, block, store.blocks[block, BEFORE])
    merge(store, block, store.blocks[block, AFTER])
    insert(store, block)


@part  # type: ignore[untyped-decorator]
def is_split(store: Store, block: int) -> bool:
    """Whether its segment holds other blocks too."""
    return bool(store.blocks[block, BEFORE] != NONE or store.blocks[block, AFTER] != NONE)


@part  # type: ignore[untyped-decorator]
def take_bytes(store: Store, rules: Rules, size: int) -> bool:
    """Reserves bytes if the device still has them."""
    counts = store.counts
    if rules.capacity >= 0 and counts[RESERVED] + size > rules.capacity:
        return False
    counts[RESERVED] += size
    counts[PEAK_RESERVED] = max(counts[PEAK_RESERVED], counts[RESERVED])
    return True


@part  # type: ignore[untyped-decorator]
def give_back(store: Store, block: int) -> None:
    """Returns a segment that is one free block."""
    erase(store, block)
    store.counts[RESERVED] -= store.blocks[block, SIZE]
    store.counts[SEGMENTS] -= 1
    drop(store, block)
