"""Compiled: calls of the caching allocator on one stream. The rules are written in `allocator_engine`.

**Not modelled** here: other streams (``record_stream``), which only recorded traces have.
"""

from __future__ import annotations

from hardware_models.allocator_block_kernels import (
    ADDRESS,
    AFTER,
    ALLOCATED,
    BEFORE,
    BORN,
    FRAGMENTATION,
    FRAGMENTATION_PEAK,
    LARGE,
    LENGTH,
    MAPPED,
    NEXT_ADDRESS,
    NONE,
    NOW_ALLOCATED,
    NOW_REQUESTED,
    NUM_BLOCKS,
    ORIGIN,
    PEAK_ALLOCATED,
    PEAK_REQUESTED,
    PEAK_RESERVED,
    PEAK_SEGMENTS,
    REQUESTED,
    RESERVED,
    RETRIES,
    SEARCHES,
    SEGMENTS,
    SIZE,
    SMALL,
    Integers,
    Rules,
    Store,
    become_free,
    erase,
    give_back,
    insert,
    is_split,
    link,
    new_block,
    part,
    place_of,
    take_bytes,
)
from hardware_models.allocator_expandable_kernels import expand, unmap
from hardware_models.allocator_settings import MIN_BLOCK_BYTES, SMALL_LIMIT_BYTES, bytes_of_block, bytes_of_segment

DONE, OUT_OF_MEMORY, IMPOSSIBLE, FULL = range(4)
"""How a replay ended. `FULL`: there is no room for more blocks (`grown`)."""
_ATTEMPTS = 3
_RESERVE = 3
"""Rows for each block: one call may cut each free one in three (pages that are unmapped in its middle)."""
_NEW = 4
"""Blocks that a call may need beyond those."""

_round_size, _segment_size = part(bytes_of_block), part(bytes_of_segment)


@part  # type: ignore[untyped-decorator]
def _empty_cache(store: Store, rules: Rules) -> None:
    """Returns every segment without live blocks, or every such page. What is cut off a block that goes holds no page itself."""
    for pool in (LARGE, SMALL):
        at = 0
        while at < store.counts[LENGTH + pool]:
            block = store.lists[pool, at]
            if rules.expandable:
                at += 0 if unmap(store, rules, block) else 1
            elif is_split(store, block):
                at += 1
            else:
                give_back(store, block)


@part  # type: ignore[untyped-decorator]
def _find(store: Store, rules: Rules, pool: int, size: int) -> int:
    """The cached block that fits best, taken out of its list."""
    blocks, lists, counts = store.blocks, store.lists, store.counts
    counts[SEARCHES + pool] += rules.collect_above >= 0
    at = place_of(store, pool, size, NONE)
    if at == counts[LENGTH + pool]:
        return NONE
    block = lists[pool, at]
    if rules.expandable:
        while at + 1 < counts[LENGTH + pool] and _reach(store, lists[pool, at + 1]) < _reach(store, block):
            at += 1
            block = lists[pool, at]
    has, limit = blocks[block, SIZE], rules.max_split
    if limit >= 0 and has >= limit and (size < limit or has >= size + rules.rounding_limit):
        return NONE
    erase(store, block)
    return int(block)


@part  # type: ignore[untyped-decorator]
def _reach(store: Store, block: int) -> int:
    """Bytes that the block has or could grow to by mapping what follows it."""
    blocks, after = store.blocks, store.blocks[block, AFTER]
    return int(blocks[block, SIZE] + (blocks[after, SIZE] if after != NONE and not blocks[after, MAPPED] else 0))


@part  # type: ignore[untyped-decorator]
def _should_split(rules: Rules, rest: int, size: int, pool: int) -> bool:
    if pool == SMALL or rules.expandable:
        return rest >= MIN_BLOCK_BYTES
    return rest > SMALL_LIMIT_BYTES and (rules.max_split < 0 or size < rules.max_split)


@part  # type: ignore[untyped-decorator]
def _rejects(store: Store, rules: Rules, segment: int) -> bool:
    return bool(rules.rejects and store.counts[RESERVED] + segment > rules.capacity)


@part  # type: ignore[untyped-decorator]
def _take(store: Store, rules: Rules, pool: int, size: int) -> int:
    """A block from the device."""
    counts, segment = store.counts, _segment_size(size, rules.large_segment)
    if (rules.allowed >= 0 and counts[RESERVED] + segment > rules.allowed) or _rejects(store, rules, segment):
        return NONE
    if rules.expandable:
        return int(expand(store, rules, pool, size))
    if not take_bytes(store, rules, segment):
        return NONE
    counts[SEGMENTS] += 1
    counts[PEAK_SEGMENTS] = max(counts[PEAK_SEGMENTS], counts[SEGMENTS])
    counts[NEXT_ADDRESS] += segment
    start = counts[NEXT_ADDRESS] - segment
    return int(new_block(store, pool, segment, start, start))


@part  # type: ignore[untyped-decorator]
def _obtain(store: Store, rules: Rules, pool: int, size: int) -> int:
    """A block from the device, which is asked again after cached segments were returned."""
    if rules.collect_above >= 0 and not rules.expandable:
        _collect_garbage(store, rules)
    for attempt in range(_ATTEMPTS):
        if attempt == 1:
            if _rejects(store, rules, _segment_size(size, rules.large_segment)):
                return NONE
            if rules.max_split < 0 or rules.expandable or not _release_available(store, rules, pool, size):
                continue
        elif attempt > 1:
            _empty_cache(store, rules)
            store.counts[RETRIES] += 1
        block = _take(store, rules, pool, size)
        if block != NONE:
            return int(block)
    return NONE


@part  # type: ignore[untyped-decorator]
def _release_available(store: Store, rules: Rules, pool: int, size: int) -> bool:
    """Returns the smallest oversize segment that is large enough, else the largest ones until they are together."""
    wanted, released = max(size, rules.max_split), 0
    at = place_of(store, pool, wanted, NONE)
    if at < store.counts[LENGTH + pool]:
        give_back(store, store.lists[pool, at])
        return True
    while at > 0 and released < wanted:
        at -= 1
        block = store.lists[pool, at]
        if store.blocks[block, SIZE] < rules.max_split:
            break
        released += store.blocks[block, SIZE]
        give_back(store, block)
    return released >= wanted


@part  # type: ignore[untyped-decorator]
def _collect_garbage(store: Store, rules: Rules) -> None:
    """Returns unsplit large segments that were passed over more often than the average one, until enough is released."""
    blocks, lists, counts = store.blocks, store.lists, store.counts
    target, searches = counts[RESERVED] - rules.collect_above, counts[SEARCHES + LARGE]
    number, age, reclaimed, progress = 0, 0, 0, True
    for at in range(counts[LENGTH + LARGE]):
        if not is_split(store, lists[LARGE, at]):
            number += 1
            age += searches - blocks[lists[LARGE, at], BORN]
    while target > reclaimed and progress and number:
        mean, at, progress = age / number, 0, False
        while at < counts[LENGTH + LARGE]:
            block = lists[LARGE, at]
            own = searches - blocks[block, BORN]
            if is_split(store, block) or own < mean:
                at += 1
                continue
            reclaimed += blocks[block, SIZE]
            age -= own
            number -= 1
            progress = True
            give_back(store, block)


@part  # type: ignore[untyped-decorator]
def _allocate(store: Store, rules: Rules, requested: int) -> int:
    """The block of a request; none: out of memory."""
    blocks, counts = store.blocks, store.counts
    size = _round_size(requested, rules.divisions)
    pool = SMALL if size <= SMALL_LIMIT_BYTES else LARGE
    block = _find(store, rules, pool, size)
    if block == NONE:
        block = _obtain(store, rules, pool, size)
        if block == NONE:
            return NONE
    if _should_split(rules, blocks[block, SIZE] - size, size, pool):
        head = new_block(store, pool, size, blocks[block, ADDRESS], blocks[block, ORIGIN])
        link(store, blocks[block, BEFORE], head)
        link(store, head, block)
        blocks[block, ADDRESS] += size
        blocks[block, SIZE] -= size
        insert(store, block)
        block = head
    blocks[block, ALLOCATED], blocks[block, REQUESTED] = 1, requested
    counts[NOW_REQUESTED] += requested
    counts[NOW_ALLOCATED] += blocks[block, SIZE]
    counts[PEAK_REQUESTED] = max(counts[PEAK_REQUESTED], counts[NOW_REQUESTED])
    counts[PEAK_ALLOCATED] = max(counts[PEAK_ALLOCATED], counts[NOW_ALLOCATED])
    if counts[PEAK_RESERVED] > counts[FRAGMENTATION_PEAK]:
        counts[FRAGMENTATION_PEAK] = counts[PEAK_RESERVED]
        counts[FRAGMENTATION] = counts[RESERVED] - counts[NOW_ALLOCATED]
    return int(block)


@part  # type: ignore[untyped-decorator]
def calls_kernel(
    store: Store, rules: Rules, block_of: Integers, tensor: Integers, size_bytes: Integers, first: int
) -> tuple[int, int]:
    """Makes calls one after the other: how it ended (`DONE` ..) and at which call.

    Args:
        store: what the allocator knows; changed.
        rules: of the allocator.
        block_of: of each tensor, its block; changed.
        tensor: of each call.
        size_bytes: that it asks for; 0: the tensor goes.
        first: call to begin with.
    """
    blocks, counts = store.blocks, store.counts
    for call in range(first, len(tensor)):
        name, size = tensor[call], size_bytes[call]
        block = block_of[name]
        if size < 0 or (block == NONE) != (size > 0):
            return IMPOSSIBLE, call
        if size:
            if _RESERVE * counts[NUM_BLOCKS] + _NEW > len(store.spare):
                return FULL, call
            block_of[name] = _allocate(store, rules, size)
            if block_of[name] == NONE:
                return OUT_OF_MEMORY, call
            continue
        block_of[name] = NONE
        blocks[block, ALLOCATED] = 0
        counts[NOW_ALLOCATED] -= blocks[block, SIZE]
        counts[NOW_REQUESTED] -= blocks[block, REQUESTED]
        become_free(store, block)
    return DONE, len(tensor)
