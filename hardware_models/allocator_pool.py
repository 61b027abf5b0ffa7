"""Blocks and pools of the caching allocator: free blocks by size, merging with neighbours, and what the device has given."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment's addresses; neighbours in the same segment are linked."""

    stream: int
    size: int
    address: int
    small: bool
    """Belongs to the small pool."""
    page_bytes: int = 0
    """Granularity in which the block's expandable segment is mapped; 0 for blocks of ordinary segments."""
    segment_start: int = 0
    """First address of the expandable segment."""
    mapped: bool = True
    """Backed by memory; False only in the unused part of an expandable segment."""
    allocated: bool = False
    requested: int = 0
    waiting: int = 0
    """Events that must complete before the freed block can be used again."""
    uses: set[int] | None = None
    """Other streams that use the block (record_stream)."""
    born: int = 0
    """The pool's count of searches when the block became free: its age for garbage collection."""
    before: Block | None = None
    after: Block | None = None

    @property
    def is_split(self) -> bool:
        """Whether the segment holds other blocks too."""
        return self.before is not None or self.after is not None

    @property
    def reach(self) -> int:
        """Bytes that the block has or could grow to by mapping what follows it."""
        after = self.after
        return self.size + (after.size if after is not None and not after.mapped else 0)

    def link_after(self, before: Block, after: Block | None) -> None:
        """Enters the block into its segment's chain between two neighbours."""
        self.before, self.after = before, after
        before.after = self
        if after is not None:
            after.before = self


@dataclass(slots=True, eq=False)
class Pool:
    """Free blocks per stream, ordered by (size, address): the first that is large enough fits best.

    Segments get rising addresses in the order in which they are made, so a tie goes to the oldest segment, then to the lower address.
    """

    small: bool
    free: dict[int, list[tuple[int, int, Block]]] = field(default_factory=dict)
    unmapped: dict[int, list[tuple[int, Block]]] = field(default_factory=dict)
    """Unused parts of expandable segments, by address."""
    searches: int = 0

    def first_of(self, size: int, stream: int) -> tuple[int, list[tuple[int, int, Block]]]:
        """Where the free blocks of a stream begin that hold ``size`` bytes, and all its free blocks in order."""
        entries = self.free.get(stream)
        if entries is None:
            entries = self.free[stream] = []
        return bisect_left(entries, (size,)), entries

    def insert(self, block: Block) -> None:
        """A mapped block becomes free."""
        block.born = self.searches
        insort(self.free.setdefault(block.stream, []), (block.size, block.address, block))

    def erase(self, block: Block) -> None:
        """A free block leaves the pool, before its size or address changes."""
        entries = self.free[block.stream]
        position = bisect_left(entries, (block.size, block.address))
        assert entries[position][2] is block
        del entries[position]

    def insert_unmapped(self, block: Block) -> None:
        """A part of an expandable segment has no memory."""
        insort(self.unmapped.setdefault(block.stream, []), (block.address, block))

    def erase_unmapped(self, block: Block) -> None:
        """A part of an expandable segment gets memory, or goes with its segment."""
        entries = self.unmapped[block.stream]
        del entries[bisect_left(entries, (block.address,))]

    def merge(self, block: Block, other: Block | None) -> None:
        """Makes ``other``, a free neighbour in the same segment, part of ``block``, which is in no list; else does nothing."""
        if other is None or other.allocated or other.waiting or other.mapped != block.mapped:
            return
        if other.mapped:
            self.erase(other)
        else:
            self.erase_unmapped(other)
        if block.before is other:
            block.address, block.before = other.address, other.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = other.after
            if block.after is not None:
                block.after.before = block
        block.size += other.size

    def split(self, block: Block, size: int) -> Block:
        """The first ``size`` bytes of a block as a block of its own; the rest becomes free."""
        head = Block(block.stream, size, block.address, self.small, block.page_bytes, block.segment_start, before=block.before)
        if head.before is not None:
            head.before.after = head
        head.after, block.before = block, head
        block.address += size
        block.size -= size
        self.insert(block)
        return head

    def free_blocks(self) -> list[Block]:
        """All free blocks, by stream, size and address."""
        return [block for stream in sorted(self.free) for _, _, block in self.free[stream]]


@dataclass(slots=True)
class DeviceMemory:
    """Bytes that the allocator holds of the device, and addresses for new segments."""

    capacity: int | None
    reserved: int = 0
    peak: int = 0
    num_takes: int = 0
    num_returns: int = 0
    next_address: int = 0

    def take(self, size: int) -> bool:
        """Reserves bytes if the device still has them."""
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.peak = max(self.peak, self.reserved)
        self.num_takes += 1
        return True

    def give_back(self, size: int) -> None:
        """Returns bytes to the device."""
        self.reserved -= size
        self.num_returns += 1

    def address_range(self, size: int) -> int:
        """Start of addresses that no segment had before."""
        start = self.next_address
        self.next_address += size
        return start
