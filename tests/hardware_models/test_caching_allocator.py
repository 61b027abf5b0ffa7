"""The caching allocator: sequences worked out by hand from its rules."""

from __future__ import annotations

import pytest

from hardware_models.caching_allocator import (
    ALL_STREAMS,
    AllocationEvent,
    AllocatorPeaks,
    CachingAllocator,
    apply_event,
    parse_alloc_conf,
    replay_allocations,
)
from hardware_models.errors import InputError
from hardware_models.units import MIB

Step = tuple[str, int] | str
EXPANDABLE = parse_alloc_conf("expandable_segments:True")


def events(*steps: Step) -> list[AllocationEvent]:
    """``("a", 5)`` allocates, ``"-a"`` frees, ``"empty"`` empties the cache; ``("a@1", 5)`` is on stream 1."""
    found = []
    for step in steps:
        if step == "empty":
            found.append(AllocationEvent(action="empty_cache"))
        elif isinstance(step, str):
            found.append(AllocationEvent(action="free", name=step[1:]))
        else:
            name, _, stream = step[0].partition("@")
            found.append(AllocationEvent(action="allocate", name=name, size_bytes=step[1], stream=int(stream or 0)))
    return found


def replay(*steps: Step, text: str = "", capacity_bytes: int | None = None) -> AllocatorPeaks:
    return replay_allocations(events(*steps), parse_alloc_conf(text), capacity_bytes)


def run(allocator: CachingAllocator, *steps: Step) -> None:
    for event in events(*steps):
        assert apply_event(allocator, event)


def address(allocator: CachingAllocator, wanted: str) -> int:
    (found,) = [start for name, start, _ in allocator.live_blocks() if name == wanted]
    return found


# -- sizes and pools ------------------------------------------------------------------------------------------------------------


def test_one_byte_is_a_block_of_512_in_a_segment_of_2_mib() -> None:
    found = replay(("a", 1))
    assert (found.peak_requested_bytes, found.peak_allocated_bytes, found.peak_reserved_bytes) == (1, 512, 2 * MIB)
    assert found.fragmentation_bytes == 2 * MIB - 512
    assert found.num_segments == 1


def test_nothing_is_allocated_for_no_bytes() -> None:
    found = replay(("a", 0), "-a", ("a", 0))
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (0, 0)


def test_the_small_pool_ends_at_1_mib() -> None:
    # 2 x 1 MiB fill one small segment; the third opens another: 4 MiB.
    assert replay(("a", MIB), ("b", MIB)).peak_reserved_bytes == 2 * MIB
    assert replay(("a", MIB), ("b", MIB), ("c", MIB)).peak_reserved_bytes == 4 * MIB
    # 1 MiB + 1 rounds to 1 MiB + 512, which is large: a segment of 20 MiB.
    found = replay(("a", MIB + 1))
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (MIB + 512, 20 * MIB)
    # MIB - 100 rounds up to exactly 1 MiB, which is still small.
    assert replay(("a", MIB - 100)).peak_reserved_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),  # below 10 MiB: shares 20; the rest is above 1 MiB: split
        (10 * MIB, 10 * MIB, 10 * MIB),  # from 10 MiB on: its own segment, a multiple of 2 MiB
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # rest 2 MiB - 512 > 1 MiB: split
        (11 * MIB, 12 * MIB, 12 * MIB),  # rest exactly 1 MiB: not above it, so the block keeps it
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # rest 1 MiB + 512: split
        (999 * MIB, 1000 * MIB, 1000 * MIB),
    ],
)
def test_segments_of_the_large_pool(requested: int, allocated: int, reserved: int) -> None:
    found = replay(("a", requested))
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (allocated, reserved)


def test_small_blocks_split_to_the_last_512_bytes() -> None:
    # 2 MiB - 512 in use, so one block of 512 is left: it serves one more byte, the next opens a segment.
    filling = [("a", MIB), ("b", MIB - 512)]
    assert replay(*filling, ("c", 1)).peak_reserved_bytes == 2 * MIB
    assert replay(*filling, ("c", 1), ("d", 1)).peak_reserved_bytes == 4 * MIB


def test_pools_do_not_share() -> None:
    # 20 MiB cached in the large pool do not serve 512 bytes: 20 + 2. Nor does a small segment serve a large block.
    assert replay(("a", 20 * MIB), "-a", ("b", 512)).peak_reserved_bytes == 22 * MIB
    assert replay(("a", 512), "-a", ("b", 2 * MIB)).peak_reserved_bytes == 22 * MIB


def test_streams_do_not_share() -> None:
    assert replay(("a", 20 * MIB), "-a", ("b", 20 * MIB)).peak_reserved_bytes == 20 * MIB
    assert replay(("a", 20 * MIB), "-a", ("b@1", 20 * MIB)).peak_reserved_bytes == 40 * MIB


# -- best fit, splitting, merging -----------------------------------------------------------------------------------------------


def test_the_smallest_block_that_fits_is_taken() -> None:
    # Segments 40, 16, 24 at 0, 40, 56. 14 MiB fits best in 16 (rest 2: split), 23 in 24 (rest 1: kept whole), then 20 in 40.
    allocator = CachingAllocator()
    run(
        allocator,
        ("a", 40 * MIB),
        ("b", 16 * MIB),
        ("c", 24 * MIB),
        "-a",
        "-b",
        "-c",
        ("x", 14 * MIB),
        ("y", 23 * MIB),
        ("z", 20 * MIB),
    )
    assert [address(allocator, name) for name in "xyz"] == [40 * MIB, 56 * MIB, 0]
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.allocated_bytes == (14 + 24 + 20) * MIB


def test_equal_blocks_are_taken_by_age_of_their_segment() -> None:
    allocator = CachingAllocator()
    run(allocator, ("a", 12 * MIB), ("b", 12 * MIB), ("c", 12 * MIB), "-c", "-b", "-a", ("x", 12 * MIB), ("y", 12 * MIB))
    assert [address(allocator, name) for name in "xy"] == [0, 12 * MIB]


def test_a_freed_segment_becomes_whole_again() -> None:
    # Four blocks of 5 MiB fill 20 MiB; freed in any order they merge, so that 20 MiB fit without a new segment.
    parts = [(name, 5 * MIB) for name in "abcd"]
    for order in ("abcd", "dcba", "bdac", "cadb"):
        allocator = CachingAllocator()
        run(allocator, *parts, *[f"-{name}" for name in order], ("x", 20 * MIB))
        assert allocator.reserved_bytes == 20 * MIB
        assert allocator.num_segments == 1


def test_a_hole_is_no_room_for_more_than_itself() -> None:
    # a b c of 5 MiB in one segment, 5 MiB left; a and c free: holes of 5 and 10. 6 MiB takes the 10, 6 MiB more open a segment.
    steps = [("a", 5 * MIB), ("b", 5 * MIB), ("c", 5 * MIB), "-a", "-c", ("x", 6 * MIB)]
    assert replay(*steps).peak_reserved_bytes == 20 * MIB
    assert replay(*steps, ("y", 6 * MIB)).peak_reserved_bytes == 40 * MIB


def test_empty_cache_keeps_segments_in_use() -> None:
    # a and b share 20 MiB, c has 30 alone. With a and c free, only c's segment is whole; with b free too, the other.
    steps: list[Step] = [("a", 5 * MIB), ("b", 5 * MIB), ("c", 30 * MIB), "-a", "-c", "empty"]
    assert replay(*steps).final_reserved_bytes == 20 * MIB
    assert replay(*steps, "-b").final_reserved_bytes == 20 * MIB
    assert replay(*steps, "-b", "empty").final_reserved_bytes == 0


# -- other streams --------------------------------------------------------------------------------------------------------------


def test_a_recorded_stream_defers_the_free() -> None:
    allocator = CachingAllocator()
    run(allocator, ("a", 20 * MIB))
    allocator.record_stream("a", 1)
    run(allocator, "-a")
    assert (allocator.allocated_bytes, allocator.active_bytes, allocator.requested_bytes) == (0, 20 * MIB, 20 * MIB)
    run(allocator, ("b", 20 * MIB))  # stream 1 is not done: a new segment
    assert allocator.reserved_bytes == 40 * MIB
    allocator.synchronize(1)
    assert allocator.active_bytes == 40 * MIB  # noticed at the next call to allocate only
    run(allocator, ("c", 20 * MIB))
    assert address(allocator, "c") == 0
    assert (allocator.reserved_bytes, allocator.active_bytes) == (40 * MIB, 40 * MIB)


def test_all_recorded_streams_must_be_done() -> None:
    for done, reserved in (((1,), 40), ((2,), 40), ((2, 1), 20), ((ALL_STREAMS,), 20)):
        steps = [
            *events(("a", 20 * MIB)), AllocationEvent(action="record_stream", name="a", stream=1),
            AllocationEvent(action="record_stream", name="a", stream=2), AllocationEvent(action="record_stream", name="a", stream=0),
            *events("-a"), *[AllocationEvent(action="synchronize", stream=one) for one in done], *events(("b", 20 * MIB)),
        ]  # fmt: skip
        assert replay_allocations(steps).peak_reserved_bytes == reserved * MIB, done


def test_the_own_stream_and_late_work_do_not_count() -> None:
    allocator = CachingAllocator()
    run(allocator, ("a", 20 * MIB), ("b", 20 * MIB))
    allocator.record_stream("a", 0)  # its own stream: nothing to wait for
    allocator.record_stream("b", 1)
    allocator.synchronize(1)  # before the free, which is what queues the event
    run(allocator, "-a", "-b", ("x", 20 * MIB))
    assert address(allocator, "x") == 0
    run(allocator, ("y", 20 * MIB))
    assert allocator.reserved_bytes == 60 * MIB


def test_empty_cache_waits_for_streams() -> None:
    allocator = CachingAllocator()
    run(allocator, ("a", 20 * MIB))
    allocator.record_stream("a", 1)
    run(allocator, "-a", "empty")
    assert (allocator.reserved_bytes, allocator.active_bytes) == (0, 0)


# -- limits ---------------------------------------------------------------------------------------------------------------------


def test_cached_segments_are_returned_before_giving_up() -> None:
    # 50 MiB: a 20 (cached), b 20 (in use), then 30: 70 > 50, a is returned, 20 + 30 = 50. Then 2 MiB need 20 more: out of memory.
    steps: list[Step] = [("a", 20 * MIB), ("b", 20 * MIB), "-a", ("c", 30 * MIB)]
    found = replay(*steps, capacity_bytes=50 * MIB)
    assert (found.peak_reserved_bytes, found.num_retries, found.out_of_memory_at) == (50 * MIB, 1, None)
    failed = replay(*steps, ("d", 2 * MIB), ("e", 1), capacity_bytes=50 * MIB)
    assert (failed.out_of_memory_at, failed.num_retries) == (4, 2)
    assert failed.final_allocated_bytes == 50 * MIB


def test_a_fragmented_cache_is_out_of_memory_with_room_to_spare() -> None:
    # 40 MiB: two segments of 20, each with 5 MiB in use and 15 free: 30 free, but not 16 together.
    steps: list[Step] = [("a", 5 * MIB), ("b", 15 * MIB), ("c", 5 * MIB), ("d", 15 * MIB), "-b", "-d"]
    assert replay(*steps, ("x", 15 * MIB), capacity_bytes=40 * MIB).out_of_memory_at is None
    assert replay(*steps, ("x", 16 * MIB), capacity_bytes=40 * MIB).out_of_memory_at == 6
    # Expandable pages are one range: [5, 20) and [25, 40). 16 do not fit there either.
    assert replay(*steps, ("x", 16 * MIB), text="expandable_segments:True", capacity_bytes=40 * MIB).out_of_memory_at == 6


def test_the_memory_fraction_is_a_limit_too() -> None:
    text = "per_process_memory_fraction:0.5"
    assert replay(("a", 50 * MIB), text=text, capacity_bytes=100 * MIB).out_of_memory_at is None
    assert replay(("a", 50 * MIB + 1), text=text, capacity_bytes=100 * MIB).out_of_memory_at == 0
    assert replay(("a", 30 * MIB), "-a", ("b", 50 * MIB), text=text, capacity_bytes=100 * MIB).num_retries == 1
    # 9 MiB beside 40 would fit 50, but their segment is 20.
    assert replay(("a", 40 * MIB), ("b", 9 * MIB), text=text, capacity_bytes=100 * MIB).out_of_memory_at == 1


def test_rejection_spares_the_retries() -> None:
    steps: list[Step] = [("a", 30 * MIB), "-a", ("b", 40 * MIB)]
    assert replay(*steps, capacity_bytes=50 * MIB).out_of_memory_at is None
    rejected = replay(*steps, text="throw_on_cudamalloc_oom:True", capacity_bytes=50 * MIB)
    assert (rejected.out_of_memory_at, rejected.num_retries, rejected.final_reserved_bytes) == (2, 0, 30 * MIB)


# -- max_split_size, garbage collection -------------------------------------------------------------------


def test_oversize_blocks_are_neither_split_nor_lent() -> None:
    text = "max_split_size_mb:20"
    # 21 MiB is oversize: its segment of 22 stays whole, so 22 count as allocated. Freed, it does not serve 5 MiB: 22 + 20.
    found = replay(("a", 21 * MIB), "-a", ("b", 5 * MIB), text=text)
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (22 * MIB, 42 * MIB)
    # A cached 60 serves 41 (60 < 41 + 20), whole; it does not serve 40 (60 >= 40 + 20): 60 + 40.
    assert replay(("a", 60 * MIB), "-a", ("b", 41 * MIB), text=text).final_allocated_bytes == 60 * MIB
    assert replay(("a", 60 * MIB), "-a", ("b", 40 * MIB), text=text).peak_reserved_bytes == 100 * MIB
    wider = text + ",max_non_split_rounding_mb:21"
    assert replay(("a", 60 * MIB), "-a", ("b", 40 * MIB), text=wider).peak_reserved_bytes == 60 * MIB


def test_oversize_blocks_go_first_when_the_device_is_full() -> None:
    # 80 MiB: 60 cached and too large to lend, 10 in use; 21 needs 22: 92 > 80. The 60 goes, without a retry: 10 + 22.
    text = "max_split_size_mb:20"
    steps: list[Step] = [("a", 60 * MIB), "-a", ("b", 10 * MIB), ("c", 21 * MIB)]
    found = replay(*steps, text=text, capacity_bytes=80 * MIB)
    assert (found.final_reserved_bytes, found.num_retries) == (32 * MIB, 0)
    # 100 MiB: 40, 30 and 24 cached; 44 fits none. Largest first: 40 < 44, 40 + 30 >= 44; the 24 stays: 24 + 44.
    steps = [("a", 40 * MIB), ("b", 30 * MIB), ("c", 24 * MIB), "-a", "-b", "-c", ("d", 44 * MIB)]
    found = replay(*steps, text=text, capacity_bytes=100 * MIB)
    assert (found.final_reserved_bytes, found.num_retries) == (68 * MIB, 0)
    assert replay(*steps, capacity_bytes=100 * MIB).final_reserved_bytes == 44 * MIB  # without the limit: all of them, a retry


def test_garbage_collection_returns_what_is_older_than_average() -> None:
    # 100 of 200 MiB allowed, collected above 70. a, b of 30 (searches 1, 2); a free (born at 2); 12 on stream 1 (search 3, reserved
    # 72); b free (born at 3); 40: search 4, none fits, 72 > 70. Ages 2 and 1, mean 1.5: a goes (30 >= 72 - 70). 72 - 30 + 40 = 82.
    steps: list[Step] = [("a", 30 * MIB), ("b", 30 * MIB), "-a", ("c@1", 12 * MIB), "-b", ("d", 40 * MIB)]
    text = "per_process_memory_fraction:0.5"
    collected = replay(*steps, text=text + ",garbage_collection_threshold:0.7", capacity_bytes=200 * MIB)
    assert (collected.final_reserved_bytes, collected.num_retries) == (82 * MIB, 0)
    # Without it 72 + 40 > 100: a retry that returns both: 12 + 40.
    plain = replay(*steps, text=text, capacity_bytes=200 * MIB)
    assert (plain.final_reserved_bytes, plain.num_retries) == (52 * MIB, 1)
    # Equal ages: both go, though one would be enough. 30 + 30 cached, 60 > 50; then 40.
    steps = [("a", 30 * MIB), ("b", 30 * MIB), "-a", "-b", ("d", 40 * MIB)]
    text += ",garbage_collection_threshold:0.5"
    assert replay(*steps, text=text, capacity_bytes=200 * MIB).final_reserved_bytes == 40 * MIB


# -- expandable segments --------------------------------------------------------------------------------------------------------


def test_an_expandable_segment_grows_by_pages() -> None:
    # 12: one page of 20, 8 left. 12 more: the 8 at the end and one page: 40, of which 24 are used. Alone: 12 + 12.
    allocator = CachingAllocator(EXPANDABLE)
    run(allocator, ("a", 12 * MIB), ("b", 12 * MIB))
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (40 * MIB, 24 * MIB)
    assert address(allocator, "b") == 12 * MIB
    assert replay(("a", 12 * MIB), ("b", 12 * MIB)).peak_reserved_bytes == 24 * MIB
    # Small blocks have pages of 2 MiB: 3 x 1 MiB are 4.
    assert replay(*[(name, MIB) for name in "abc"], text="expandable_segments:True").peak_reserved_bytes == 4 * MIB


def test_expandable_blocks_split_to_512_bytes() -> None:
    # 19 MiB in a page of 20: the rest of 1 MiB is free, and 1 MiB + 512 needs one more page behind it.
    found = replay(("a", 19 * MIB), ("b", MIB + 1), text="expandable_segments:True")
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (20 * MIB + 512, 40 * MIB)


def test_growing_tensors_tile_an_expandable_segment() -> None:
    # Each step needs 2 MiB more than the last: 20, 22 .. 28. Segments cannot be reused: their sum. A range grows to 40.
    steps: list[Step] = []
    for size in range(20, 30, 2):
        steps += [(f"a{size}", size * MIB), f"-a{size}"]
    assert replay(*steps).peak_reserved_bytes == (20 + 22 + 24 + 26 + 28) * MIB
    assert replay(*steps, text="expandable_segments:True").peak_reserved_bytes == 40 * MIB


def test_only_whole_free_pages_are_unmapped_and_the_gap_is_filled_first() -> None:
    # a 50: pages to 60. b 12 at 50: one page more, to 80. a free: pages [0, 40) go, [40, 60) holds b's start: 40 left.
    allocator = CachingAllocator(EXPANDABLE)
    run(allocator, ("a", 50 * MIB), ("b", 12 * MIB))
    assert allocator.reserved_bytes == 80 * MIB
    run(allocator, "-a", "empty")
    assert allocator.reserved_bytes == 40 * MIB
    # 30: [40, 50) and [62, 80) are too short. The gap at 0 gets two pages back and joins [40, 50): 80 again.
    run(allocator, ("c", 30 * MIB))
    assert (address(allocator, "c"), allocator.reserved_bytes) == (0, 80 * MIB)
    run(allocator, "-b", "-c", "empty")
    assert allocator.reserved_bytes == 0


def test_a_free_block_across_two_pages_stays_whole() -> None:
    # a, b, c of 12: pages to 40. b's [12, 24) crosses the border at 20 but holds no page: nothing goes, and 12 MiB fit there again.
    allocator = CachingAllocator(EXPANDABLE)
    run(allocator, ("a", 12 * MIB), ("b", 12 * MIB), ("c", 12 * MIB), "-b", "empty", ("d", 12 * MIB))
    assert (address(allocator, "d"), allocator.reserved_bytes) == (12 * MIB, 40 * MIB)


def test_the_open_end_of_a_range_counts_as_large() -> None:
    # a 18 at 0, b 10 at 18 (pages to 40), 12 left at 28; a free. 11 would fit the 12 best, but that can grow: the 18 is taken.
    allocator = CachingAllocator(EXPANDABLE)
    run(allocator, ("a", 18 * MIB), ("b", 10 * MIB), "-a", ("c", 11 * MIB))
    assert address(allocator, "c") == 0
    assert allocator.reserved_bytes == 40 * MIB


def test_an_expandable_range_gives_pages_back_for_another_pool() -> None:
    # 40 MiB: 30 cached in two pages; 1 MiB needs a small page: 42 > 40. All pages go, 2 come.
    found = replay(("a", 30 * MIB), "-a", ("b", MIB), text="expandable_segments:True", capacity_bytes=40 * MIB)
    assert (found.final_reserved_bytes, found.num_retries, found.out_of_memory_at) == (2 * MIB, 1, None)
    assert replay(("a", 50 * MIB), text="expandable_segments:True", capacity_bytes=40 * MIB).out_of_memory_at == 0


# -- errors ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("a", 1), ("a", 1)], "allocation events: a = 1: already allocated"),
        (["-a"], "allocation events: a: not allocated"),
        ([("a", 1), "-a", "-a"], "not allocated"),
        ([("a", -1)], "bytes must be >= 0"),
    ],
)
def test_impossible_calls_are_refused(steps: list[Step], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replay(*steps)


def test_unknown_actions_are_refused() -> None:
    with pytest.raises(InputError, match="must be one of allocate, free"):
        replay_allocations([AllocationEvent(action="leak")])  # type: ignore[arg-type]
