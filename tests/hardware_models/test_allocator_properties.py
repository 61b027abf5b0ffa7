"""The caching allocator on any sequence: what must hold after every call, and a naive model that must agree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.caching_allocator import (
    AllocationEvent,
    CachingAllocator,
    apply_event,
    parse_alloc_conf,
    replay_allocations,
)
from hardware_models.units import KIB, MIB

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 3 * MIB),
    st.integers(MIB, 40 * MIB),
    st.sampled_from([MIB, 10 * MIB, 11 * MIB, 20 * MIB]),
)
CALLS = st.lists(st.tuples(st.integers(0, 9), SIZES, st.integers(0, 1)), max_size=60)
"""(what, size, stream): 0 to 5 allocate, 6 to 8 free some allocation (8: used by stream 2), 9 empties the cache or ends stream 2."""
TEXTS = st.sampled_from(["", "expandable_segments:True", "max_split_size_mb:24", "roundup_power2_divisions:4"])


def calls(drawn: Sequence[tuple[int, int, int]], *, streams: bool = True) -> list[AllocationEvent]:
    found, live = [], list[int]()
    for name, (what, size, stream) in enumerate(drawn):
        if what <= 5:
            found.append(AllocationEvent(action="allocate", name=name, size_bytes=size, stream=stream))
            live.append(name)
        elif what <= 8 and live:
            gone = live.pop(size % len(live))
            if what == 8 and streams:
                found.append(AllocationEvent(action="record_stream", name=gone, stream=2))
            found.append(AllocationEvent(action="free", name=gone))
        elif what == 9 and streams and stream:
            found.append(AllocationEvent(action="synchronize", stream=2))
        elif what == 9:
            found.append(AllocationEvent(action="empty_cache"))
    return [*found, *[AllocationEvent(action="free", name=name) for name in live]]


@given(drawn=CALLS, text=TEXTS)
def test_what_holds_after_every_call(drawn: list[tuple[int, int, int]], text: str) -> None:
    allocator = CachingAllocator(parse_alloc_conf(text))
    for event in calls(drawn):
        assert apply_event(allocator, event)
        assert 0 <= allocator.allocated_bytes <= allocator.active_bytes <= allocator.reserved_bytes
        assert 0 <= allocator.requested_bytes <= allocator.active_bytes  # torch counts requested bytes until a free completes
        assert allocator.reserved_bytes % (2 * MIB) == 0
        blocks = sorted((start, size) for _, start, size in allocator.live_blocks())
        assert sum(size for _, size in blocks) == allocator.allocated_bytes
        assert all(start + size <= following for (start, size), (following, _) in pairwise(blocks))
        assert all(start % 512 == 0 and size % 512 == 0 for start, size in blocks)
        free = [block for pool in (allocator.small, allocator.large) for block in pool.free_blocks()]
        assert allocator.active_bytes + sum(block.size for block in free) == allocator.reserved_bytes
        assert not any(block.after is other for block in free for other in free), "free neighbours merge"
    allocator.synchronize()
    allocator.allocate("last", 1)  # notices that the streams are done
    allocator.free("last")
    if text != "expandable_segments:True":
        assert not any(block.is_split for block in allocator.large.free_blocks() + allocator.small.free_blocks())
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.num_segments == 0
    assert not allocator.small.free_blocks() + allocator.large.free_blocks()


@given(drawn=CALLS, text=TEXTS, capacity=st.integers(10, 120))
def test_capacity_is_never_exceeded(drawn: list[tuple[int, int, int]], text: str, capacity: int) -> None:
    found = replay_allocations(calls(drawn), parse_alloc_conf(text), capacity * MIB)
    assert found.peak_reserved_bytes <= capacity * MIB
    free = replay_allocations(calls(drawn), parse_alloc_conf(text))
    assert free.out_of_memory_at is None
    if free.peak_reserved_bytes <= capacity * MIB:
        assert found == free


class Naive:
    """The default rules over plain lists: a segment is [pool, stream, [[size, name or None], ..]]."""

    def __init__(self, capacity: int) -> None:
        self.segments: list[tuple[bool, int, list[list[int | None]]]] = []
        self.capacity = capacity

    def reserved(self) -> int:
        """Bytes of all segments."""
        return sum(int(size or 0) for _, _, blocks in self.segments for size, _ in blocks)

    def allocated(self) -> int:
        """Bytes of all blocks that are handed out."""
        return sum(int(size or 0) for _, _, blocks in self.segments for size, name in blocks if name is not None)

    def empty(self) -> None:
        """Drops whole free segments."""
        self.segments = [one for one in self.segments if not (len(one[2]) == 1 and one[2][0][1] is None)]

    def allocate(self, name: int, requested: int, stream: int) -> bool:
        """Whether a block was found."""
        size = max(512, (requested + 511) // 512 * 512)
        small = size <= MIB
        fitting = [
            (int(block[0] or 0), place, at)
            for place, (pool, owner, blocks) in enumerate(self.segments) if (pool, owner) == (small, stream)
            for at, block in enumerate(blocks) if block[1] is None and int(block[0] or 0) >= size
        ]  # fmt: skip
        if not fitting:
            segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            if self.reserved() + segment > self.capacity:
                self.empty()
            if self.reserved() + segment > self.capacity:
                return False
            self.segments.append((small, stream, [[segment, None]]))
            fitting = [(segment, len(self.segments) - 1, 0)]
        found, place, at = min(fitting)
        rest = found - size
        splits = rest >= 512 if small else rest > MIB
        self.segments[place][2][at : at + 1] = [[size, name], [rest, None]] if splits else [[found, name]]
        return True

    def free(self, name: int) -> None:
        """Marks a block free and joins neighbours."""
        for _, _, blocks in self.segments:
            for block in blocks:
                if block[1] == name:
                    block[1] = None
            for at in range(len(blocks) - 1, 0, -1):
                if blocks[at][1] is None and blocks[at - 1][1] is None:
                    blocks[at - 1][0] = int(blocks[at - 1][0] or 0) + int(blocks.pop(at)[0] or 0)


@given(drawn=CALLS, capacity=st.integers(20, 400))
def test_a_naive_model_agrees(drawn: list[tuple[int, int, int]], capacity: int) -> None:
    allocator, naive = CachingAllocator(capacity_bytes=capacity * MIB), Naive(capacity * MIB)
    for event in calls(drawn, streams=False):
        name = int(str(event.name))
        if event.action == "allocate":
            fits = allocator.allocate(name, event.size_bytes, stream=event.stream)
            assert fits == naive.allocate(name, event.size_bytes, event.stream)
            if not fits:
                break
        elif event.action == "free":
            allocator.free(name)
            naive.free(name)
        else:
            allocator.empty_cache()
            naive.empty()
        assert (allocator.reserved_bytes, allocator.allocated_bytes) == (naive.reserved(), naive.allocated())
        assert allocator.num_segments == len(naive.segments)


@pytest.mark.benchmark
def test_a_hundred_thousand_pairs_take_less_than_two_seconds() -> None:
    # Sizes over seven decades by a linear congruence; at most 1,000 alive.
    steps, seed = [], 1
    for name in range(100_000):
        seed = (1103515245 * seed + 12345) % 2**31
        steps.append(AllocationEvent(action="allocate", name=name, size_bytes=1 + seed % 2 ** (4 + seed // 2**10 % 24)))
        if name >= 1000:
            steps.append(AllocationEvent(action="free", name=name - 1000))
    start = time.perf_counter()
    assert replay_allocations(steps).out_of_memory_at is None
    assert time.perf_counter() - start < 2
