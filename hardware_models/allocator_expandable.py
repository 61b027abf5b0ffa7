"""Expandable segments: address ranges larger than the device, mapped page by page as blocks ask for more.

**Model**: a stream has one address range per pool, of 9/8 of the device's memory, mapped in pages of 2 MiB (small pool) or of a large
segment (20 MiB). A request that no free block serves takes the lowest stretch of free and unmapped addresses that is long enough; what
is missing is mapped. Releasing unmaps the pages that lie wholly inside free blocks.

**Source**: ExpandableSegment, find_expandable_block, map_block, try_allocate_expandable_block, unmap_block and release_blocks in
c10/cuda/CUDACachingAllocator.cpp (torch 2.8 to 2.13, and pytorch main at 076f02792ce5, as mirrored in cyyever/pytorch).
"""

from __future__ import annotations

from hardware_models.allocator_pool import Block, DeviceMemory, Pool
from hardware_models.units import TIB

UNLIMITED_RANGE_BYTES = 64 * TIB
"""Address range of a segment where the device's memory is not given: beyond any device."""
_RANGE_SHARE = 8
"""A range is 1/8 larger than the device, for pages unmapped in its middle."""


def range_bytes(capacity_bytes: int | None) -> int:
    """Addresses of a segment, before they are rounded to pages."""
    return UNLIMITED_RANGE_BYTES if capacity_bytes is None else capacity_bytes + capacity_bytes // _RANGE_SHARE


def expand(pool: Pool, memory: DeviceMemory, *, size: int, stream: int, page_bytes: int) -> Block | None:
    """A mapped block of at least ``size`` bytes that is in no list, or None where the device has too little.

    Pages that were mapped before the device ran out stay mapped and free.
    """
    candidate: Block | None = _lowest(pool, size, stream)
    if candidate is None:
        candidate = _new_range(pool, memory, stream, page_bytes)
        if candidate.size < size:
            pool.erase_unmapped(candidate)
            return None
    if not candidate.mapped and not _map(pool, memory, candidate, min(candidate.size, size)):
        return None
    while candidate.size < size:
        following = candidate.after
        assert following is not None, "the addresses that follow were counted as usable"
        if not _map(pool, memory, following, min(size - candidate.size, following.size)):
            return None
        candidate = following
    pool.erase(candidate)
    return candidate


def release(pool: Pool, memory: DeviceMemory, block: Block) -> None:
    """Unmaps the whole pages of a free block; a segment without any mapped page goes altogether."""
    page, origin = block.page_bytes, block.segment_start
    end = block.address + block.size
    first = origin + -(-(block.address - origin) // page) * page
    last = origin + (end - origin) // page * page
    if first >= last:
        return
    pool.erase(block)
    if block.address < first:
        head = Block(block.stream, first - block.address, block.address, pool.small, page, origin, before=block.before)
        if head.before is not None:
            head.before.after = head
        head.after, block.before = block, head
        pool.insert(head)
    if last < end:
        tail = Block(block.stream, end - last, last, pool.small, page, origin)
        tail.link_after(block, block.after)
        pool.insert(tail)
    block.address, block.size, block.mapped = first, last - first, False
    memory.give_back(block.size)
    pool.merge(block, block.before)
    pool.merge(block, block.after)
    if block.is_split:
        pool.insert_unmapped(block)


def _lowest(pool: Pool, size: int, stream: int) -> Block | None:
    """First block of the lowest stretch of free and unmapped addresses that holds ``size`` bytes."""
    for _, unmapped in pool.unmapped.get(stream, ()):
        start = _usable(unmapped.before) or unmapped
        total, block = 0, _usable(start)
        while total < size and block is not None:
            total += block.size
            block = _usable(block.after)
        if total >= size:
            return start
    return None


def _usable(block: Block | None) -> Block | None:
    """The block, if it is neither handed out nor waiting for another stream."""
    return None if block is None or block.allocated or block.waiting else block


def _new_range(pool: Pool, memory: DeviceMemory, stream: int, page_bytes: int) -> Block:
    length = -(-range_bytes(memory.capacity) // page_bytes) * page_bytes
    start = memory.address_range(length)
    block = Block(stream, length, start, pool.small, page_bytes, start, mapped=False)
    pool.insert_unmapped(block)
    return block


def _map(pool: Pool, memory: DeviceMemory, block: Block, size: int) -> bool:
    """Maps the first ``size`` bytes of an unmapped block, in whole pages, and merges them with free neighbours."""
    length = -(-size // block.page_bytes) * block.page_bytes
    if not memory.take(length):
        return False
    pool.erase_unmapped(block)
    block.mapped = True
    if length < block.size:
        rest = Block(
            block.stream, block.size - length, block.address + length, pool.small, block.page_bytes, block.segment_start,
            mapped=False,
        )  # fmt: skip
        rest.link_after(block, block.after)
        block.size = length
        pool.insert_unmapped(rest)
    pool.merge(block, block.before)
    pool.merge(block, block.after)
    pool.insert(block)
    return True
