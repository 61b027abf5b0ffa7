"""PyTorch's CUDA caching allocator as a model: what a sequence of allocations and frees reserves on the device, byte for byte.

**Model**: a request is rounded up to a block size. A free block of the same stream and pool (small: up to 1 MiB) that fits best serves
it and is split where the rest is worth keeping; else a segment is taken from the device. Freed blocks merge with free neighbours of
their segment. When the device has no room, cached segments are returned and the request is tried again.

**Source**: DeviceCachingAllocator in c10/cuda/CUDACachingAllocator.cpp (malloc, get_free_block, should_split, alloc_found_block,
free_locked, free_block, try_merge_blocks, garbage_collect_cached_blocks, release_available_cached_blocks, release_cached_blocks,
process_events), read in pytorch main at 076f02792ce5 as mirrored in cyyever/pytorch; constants in c10/core/AllocatorConfig.h of torch
2.13. Torch 2.8 has the same rules, but breaks ties between equal blocks by the device's addresses instead of by age of the segment.

**Not modelled**: private pools (CUDA graphs, MemPool); memory outside the allocator (context, NCCL, library workspaces that
bypass it); room that the driver loses to its own fragmentation: the device has room as long as reserved + new <= capacity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from hardware_models import allocator_expandable
from hardware_models.allocator_pool import Block, DeviceMemory, Pool
from hardware_models.allocator_settings import MIN_BLOCK_BYTES, SMALL_LIMIT_BYTES, SMALL_SEGMENT_BYTES, AllocatorSettings
from hardware_models.errors import InputError

DEFAULT_SETTINGS = AllocatorSettings()
"""What torch does without PYTORCH_ALLOC_CONF."""
_SOURCE = "allocation events"


class CachingAllocator:
    """The allocator of one device, call by call.

    ``requested_bytes``, ``allocated_bytes``, ``active_bytes`` and ``reserved_bytes`` are what torch.cuda.memory_stats counts under
    these names now (``.all.current``); ``peak_*`` their maxima.

    Args:
        settings: PYTORCH_ALLOC_CONF.
        capacity_bytes: what the device can give this allocator, and the whole of which ``memory_fraction`` is a fraction; None: no
            limit.
    """

    def __init__(self, settings: AllocatorSettings = DEFAULT_SETTINGS, *, capacity_bytes: int | None = None) -> None:
        self.settings = settings
        self.memory = DeviceMemory(capacity_bytes)
        self.small, self.large = Pool(small=True), Pool(small=False)
        self.requested_bytes = self.allocated_bytes = self.active_bytes = 0
        self.peak_requested_bytes = self.peak_allocated_bytes = self.peak_active_bytes = 0
        self.fragmentation_bytes = 0
        """Reserved less allocated when the call that reached the reserved peak first was done."""
        self.num_segments = self.peak_segments = self.num_retries = self.num_out_of_memory = 0
        self._fragmentation_peak = 0
        self._allowed = settings.allowed_bytes(capacity_bytes)
        self._collects = settings.garbage_collection_threshold > 0 and self._allowed is not None
        self._live: dict[Hashable, Block | None] = {}
        self._events: dict[int, deque[Block]] = {}
        self._completed: dict[int, int] = {}

    @property
    def reserved_bytes(self) -> int:
        """Bytes held of the device now."""
        return self.memory.reserved

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes held of the device at one moment."""
        return self.memory.peak

    def live_blocks(self) -> list[tuple[Hashable, int, int]]:
        """Name, address and size of each allocation that is handed out."""
        return [(name, block.address, block.size) for name, block in self._live.items() if block is not None]

    def allocate(self, name: Hashable, requested_bytes: int, *, stream: int = 0) -> bool:
        """Hands out a block; False: out of memory, and nothing but the cache has changed.

        Raises:
            InputError: the name is handed out already, or the size is negative.
        """
        if name in self._live or requested_bytes < 0:
            rule = "already allocated" if name in self._live else "bytes must be >= 0"
            raise InputError(source=_SOURCE, key=str(name), value=requested_bytes, rule=rule)
        if requested_bytes == 0:
            self._live[name] = None  # torch returns a null pointer and counts nothing
            return True
        if self._completed:
            self._process_events()
        size = self.settings.round_size(requested_bytes)
        pool = self.small if size <= SMALL_LIMIT_BYTES else self.large
        block = self._find(pool, size, stream) or self._obtain(pool, size, stream)
        if block is None:
            self.num_out_of_memory += 1
            return False
        if self._should_split(block, size, small=pool.small):
            block = pool.split(block, size)
        block.allocated, block.requested = True, requested_bytes
        self._live[name] = block
        self._count(block.size, requested_bytes)
        return True

    def free(self, name: Hashable) -> None:
        """Takes an allocation back; blocks that other streams use become free when those streams are done.

        Raises:
            InputError: nothing of that name is handed out.
        """
        block = self._block(name)
        del self._live[name]
        if block is None:
            return
        block.allocated = False
        self.allocated_bytes -= block.size
        if not block.uses:
            self._return_block(block)
            return
        for stream in sorted(block.uses):
            block.waiting += 1
            self._events.setdefault(stream, deque()).append(block)
        block.uses = None

    def record_stream(self, name: Hashable, stream: int) -> None:
        """Another stream uses the allocation: Tensor.record_stream.

        Raises:
            InputError: nothing of that name is handed out.
        """
        block = self._block(name)
        if block is not None and stream != block.stream:
            block.uses = {*(block.uses or ()), stream}

    def synchronize(self, stream: int | None = None) -> None:
        """The work queued so far on a stream (None: on all) is done; the allocator notices at its next call to allocate."""
        for one in [stream] if stream is not None else list(self._events):
            if one in self._events:
                self._completed[one] = len(self._events[one])

    def empty_cache(self) -> None:
        """Waits for all streams and returns every segment without live blocks (with expandable segments every such page)."""
        self.synchronize()
        self._process_events()
        for pool in (self.large, self.small):
            for block in pool.free_blocks():
                if block.page_bytes:
                    allocator_expandable.release(pool, self.memory, block)
                elif not block.is_split:
                    self._release(pool, block)

    def _block(self, name: Hashable) -> Block | None:
        if name not in self._live:
            raise InputError(source=_SOURCE, key=str(name), value=None, rule="not allocated")
        return self._live[name]

    def _count(self, size: int, requested_bytes: int) -> None:
        self.requested_bytes += requested_bytes
        self.allocated_bytes += size
        self.active_bytes += size
        self.peak_requested_bytes = max(self.peak_requested_bytes, self.requested_bytes)
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self.peak_active_bytes = max(self.peak_active_bytes, self.active_bytes)
        if self.memory.peak > self._fragmentation_peak:
            self._fragmentation_peak = self.memory.peak
            self.fragmentation_bytes = self.memory.reserved - self.allocated_bytes

    def _find(self, pool: Pool, size: int, stream: int) -> Block | None:
        """The cached block that fits best, taken out of the pool."""
        pool.searches += self._collects
        position, entries = pool.first_of(size, stream)
        if position == len(entries):
            return None
        block = entries[position][2]
        if self.settings.expandable_segments:
            while position + 1 < len(entries) and entries[position + 1][2].reach < block.reach:
                position += 1
                block = entries[position][2]
        limit = self.settings.max_split_bytes
        if (
            limit is not None
            and block.size >= limit
            and (size < limit or block.size >= size + self.settings.rounding_limit_bytes)
        ):
            return None
        pool.erase(block)
        return block

    def _should_split(self, block: Block, size: int, *, small: bool) -> bool:
        rest = block.size - size
        if small or self.settings.expandable_segments:
            return rest >= MIN_BLOCK_BYTES
        limit = self.settings.max_split_bytes
        return rest > SMALL_LIMIT_BYTES and (limit is None or size < limit)

    def _obtain(self, pool: Pool, size: int, stream: int) -> Block | None:
        """A block from the device, which is asked again after cached segments were returned."""
        if self._collects:
            self._collect_garbage()
        block = self._take(pool, size, stream)
        if block is not None or self._rejects(size):
            return block
        if self._release_available(pool, size, stream):
            block = self._take(pool, size, stream)
        if block is None:
            self.empty_cache()
            self.num_retries += 1
            block = self._take(pool, size, stream)
        return block

    def _take(self, pool: Pool, size: int, stream: int) -> Block | None:
        segment = self.settings.segment_bytes(size)
        if self._allowed is not None and self.memory.reserved + segment > self._allowed:
            return None
        if self._rejects(size):
            return None
        if self.settings.expandable_segments:
            page = SMALL_SEGMENT_BYTES if pool.small else self.settings.large_segment_bytes
            return allocator_expandable.expand(pool, self.memory, size=size, stream=stream, page_bytes=page)
        if not self.memory.take(segment):
            return None
        self.num_segments += 1
        self.peak_segments = max(self.peak_segments, self.num_segments)
        return Block(stream, segment, self.memory.address_range(segment), pool.small)

    def _rejects(self, size: int) -> bool:
        """Whether throw_on_cudamalloc_oom gives up before the device is asked."""
        capacity = self.memory.capacity
        if not self.settings.reject_above_fraction or capacity is None or self._allowed is not None:
            return False  # a fraction below 1 is checked first, and that check lets the retries go on
        return self.memory.reserved + self.settings.segment_bytes(size) > capacity

    def _release(self, pool: Pool, block: Block) -> None:
        pool.erase(block)
        self.memory.give_back(block.size)
        self.num_segments -= 1

    def _release_available(self, pool: Pool, size: int, stream: int) -> bool:
        """Returns the smallest oversize segment that is large enough, else the largest ones until they are together."""
        limit = self.settings.max_split_bytes
        if limit is None:
            return False
        wanted = max(size, limit)
        position, entries = pool.first_of(wanted, stream)
        if position < len(entries) and not entries[position][2].page_bytes:
            self._release(pool, entries[position][2])
            return True
        released = 0
        for _, _, block in reversed(entries[:position]):
            if released >= wanted or block.size < limit:
                break
            if not block.page_bytes:
                released += block.size
                self._release(pool, block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Returns unsplit large segments that were passed over more often than the average one, until enough is released."""
        assert self._allowed is not None
        threshold = int(self.settings.garbage_collection_threshold * self._allowed)
        target = self.memory.reserved - threshold
        blocks = [block for block in self.large.free_blocks() if not block.is_split]
        reclaimed, age = 0, sum(self.large.searches - block.born for block in blocks)
        progress = True
        while target > reclaimed and progress and blocks:
            mean, kept = age / len(blocks), list[Block]()
            for block in blocks:
                if block.page_bytes or self.large.searches - block.born < mean:
                    kept.append(block)
                    continue
                reclaimed += block.size
                age -= self.large.searches - block.born
                self._release(self.large, block)
            progress, blocks = len(kept) < len(blocks), kept

    def _process_events(self) -> None:
        """Frees what streams that are done had held back."""
        completed, self._completed = self._completed, {}
        for stream in sorted(completed):
            waiting = self._events[stream]
            for _ in range(completed[stream]):
                block = waiting.popleft()
                block.waiting -= 1
                if not block.waiting:
                    self._return_block(block)
            if not waiting:
                del self._events[stream]

    def _return_block(self, block: Block) -> None:
        pool = self.small if block.small else self.large
        self.active_bytes -= block.size
        self.requested_bytes -= block.requested
        pool.merge(block, block.before)
        pool.merge(block, block.after)
        pool.insert(block)
