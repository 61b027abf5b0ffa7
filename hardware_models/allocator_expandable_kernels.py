"""Compiled: expandable segments of one stream. The rules are written in `allocator_expandable`."""

from __future__ import annotations

from hardware_models.allocator_block_kernels import (
    ADDRESS,
    AFTER,
    ALLOCATED,
    BEFORE,
    LENGTH,
    MAPPED,
    NEXT_ADDRESS,
    NONE,
    ORIGIN,
    POOL,
    RESERVED,
    SIZE,
    SMALL,
    UNMAPPED,
    Rules,
    Store,
    become_free,
    drop,
    erase,
    insert,
    is_split,
    link,
    merge,
    new_block,
    part,
    take_bytes,
)
from hardware_models.allocator_settings import SMALL_SEGMENT_BYTES


@part  # type: ignore[untyped-decorator]
def _page_bytes(rules: Rules, pool: int) -> int:
    return SMALL_SEGMENT_BYTES if pool == SMALL else rules.large_segment


@part  # type: ignore[untyped-decorator]
def _map(store: Store, rules: Rules, block: int, size: int) -> bool:
    """Maps the first ``size`` bytes of an unmapped block, in whole pages, and merges them with free neighbours."""
    blocks = store.blocks
    pool = blocks[block, POOL]
    page = _page_bytes(rules, pool)
    length = -(-size // page) * page
    if not take_bytes(store, rules, length):
        return False
    erase(store, block)
    blocks[block, MAPPED] = 1
    if length < blocks[block, SIZE]:
        rest = new_block(store, pool, blocks[block, SIZE] - length, blocks[block, ADDRESS] + length, blocks[block, ORIGIN])
        blocks[rest, MAPPED] = 0
        link(store, rest, blocks[block, AFTER])
        link(store, block, rest)
        blocks[block, SIZE] = length
        insert(store, rest)
    become_free(store, block)
    return True


@part  # type: ignore[untyped-decorator]
def _lowest(store: Store, pool: int, size: int) -> int:
    """First block of the lowest stretch of free and unmapped addresses that holds ``size`` bytes."""
    blocks = store.blocks
    for at in range(store.counts[LENGTH + UNMAPPED + pool]):
        start = store.lists[UNMAPPED + pool, at]
        before = blocks[start, BEFORE]
        if before != NONE and not blocks[before, ALLOCATED]:
            start = before
        total, block = 0, start
        while total < size and block != NONE and not blocks[block, ALLOCATED]:
            total += blocks[block, SIZE]
            block = blocks[block, AFTER]
        if total >= size:
            return int(start)
    return NONE


@part  # type: ignore[untyped-decorator]
def expand(store: Store, rules: Rules, pool: int, size: int) -> int:
    """A block of an expandable segment with memory for at least ``size`` bytes, in no list."""
    blocks, counts = store.blocks, store.counts
    found = _lowest(store, pool, size)
    if found == NONE:
        page = _page_bytes(rules, pool)
        length = -(-rules.range_bytes // page) * page
        found = new_block(store, pool, length, counts[NEXT_ADDRESS], counts[NEXT_ADDRESS])
        counts[NEXT_ADDRESS] += length
        if length < size:
            drop(store, found)
            return NONE
        blocks[found, MAPPED] = 0
        insert(store, found)
    while not blocks[found, MAPPED] or blocks[found, SIZE] < size:
        grows = blocks[found, MAPPED] == 1
        missing = size - blocks[found, SIZE] if grows else size
        if grows:
            found = blocks[found, AFTER]
        if not _map(store, rules, found, min(missing, blocks[found, SIZE])):
            return NONE
    erase(store, found)
    return int(found)


@part  # type: ignore[untyped-decorator]
def unmap(store: Store, rules: Rules, block: int) -> bool:
    """Unmaps the whole pages of a free block, if it has any; a segment without any mapped page goes altogether."""
    blocks = store.blocks
    pool, origin, start = blocks[block, POOL], blocks[block, ORIGIN], blocks[block, ADDRESS]
    page, end = _page_bytes(rules, pool), start + blocks[block, SIZE]
    first, last = origin + -(-(start - origin) // page) * page, origin + (end - origin) // page * page
    if first >= last:
        return False
    erase(store, block)
    if start < first:
        head = new_block(store, pool, first - start, start, origin)
        link(store, blocks[block, BEFORE], head)
        link(store, head, block)
        insert(store, head)
    if last < end:
        tail = new_block(store, pool, end - last, last, origin)
        link(store, tail, blocks[block, AFTER])
        link(store, block, tail)
        insert(store, tail)
    blocks[block, ADDRESS], blocks[block, SIZE], blocks[block, MAPPED] = first, last - first, 0
    store.counts[RESERVED] -= last - first
    merge(store, block, blocks[block, BEFORE])
    merge(store, block, blocks[block, AFTER])
    if is_split(store, block):
        insert(store, block)
    else:
        drop(store, block)
    return True
