"""The compiled replay against the allocator call by call: every count of random steps, repeated until they add nothing, under every rule."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hardware_models.allocator_block_kernels import NUM_BLOCKS
from hardware_models.allocator_settings import parse_alloc_conf
from hardware_models.caching_allocator import AllocatorPeaks, CachingAllocator, peaks_of
from hardware_models.compiled_allocator import CompiledAllocator, StepCalls, replay_steps
from hardware_models.errors import InputError
from hardware_models.units import KIB, MIB

SETTINGS = (
    "", "roundup_power2_divisions:4", "large_segment_size_mb:64", "max_split_size_mb:24", "max_split_size_mb:40,max_non_split_rounding_mb:60",
    "expandable_segments:True", "expandable_segments:True,max_split_size_mb:24", "throw_on_cudamalloc_oom:True", "per_process_memory_fraction:0.7",
    "per_process_memory_fraction:0.8,garbage_collection_threshold:0.6", "per_process_memory_fraction:0.8,garbage_collection_threshold:0.6,max_split_size_mb:24",
    "per_process_memory_fraction:0.8,garbage_collection_threshold:0.6,expandable_segments:True",
)  # fmt: skip
SEEDS = 9
MOST_STEPS = 5
NO_CALLS = StepCalls(np.zeros(0, np.int64), np.zeros(0, np.int64))


def random_step(draw: random.Random, number: int) -> StepCalls:
    """Sizes of both pools, some of them again and again, freed in any order; all that comes goes."""
    sizes = [
        draw.choice((draw.randint(1, 900 * KIB), draw.randint(MIB, 12 * MIB), draw.randint(12 * MIB, 90 * MIB)))
        for _ in range(8)
    ]
    calls: list[tuple[int, int]] = []
    alive: list[int] = []
    for name in range(number):
        while alive and draw.random() < 0.45:
            calls.append((alive.pop(draw.randrange(len(alive))), 0))
        calls.append((name, draw.choice((*sizes, *sizes, draw.randint(1, 40 * MIB)))))
        alive.append(name)
    return as_arrays([*calls, *((name, 0) for name in alive)])


def with_lasting(step: StepCalls, draw: random.Random) -> StepCalls:
    """A first step: tensors that last come before it and behind it."""
    lasting = as_arrays([(int(step.names.max()) + 1 + n, draw.randint(1, 30 * MIB)) for n in range(12)])
    return StepCalls(*(np.concatenate((new[:8], own, new[8:])) for new, own in zip(lasting, step, strict=True)))


def as_arrays(calls: list[tuple[int, int]]) -> StepCalls:
    names, sizes = np.array(calls, dtype=np.int64).reshape(-1, 2).T.copy()
    return StepCalls(names, sizes)


def call_by_call(first: StepCalls, again: StepCalls, text: str, capacity_bytes: int | None) -> AllocatorPeaks:
    allocator, count = CachingAllocator(parse_alloc_conf(text), capacity_bytes=capacity_bytes), 0
    for number in range(MOST_STEPS):
        before = allocator.peak_reserved_bytes
        for name, size in zip(*(part.tolist() for part in (again if number else first)), strict=True):
            if not size:
                allocator.free(name)
            elif not allocator.allocate(name, size):
                return peaks_of(allocator, out_of_memory_at=count)
            count += 1
        if number and allocator.peak_reserved_bytes == before:
            break
    return peaks_of(allocator)


@pytest.mark.parametrize("text", SETTINGS)
def test_equals_the_allocator_call_by_call(text: str) -> None:
    """On devices without limit, of which all runs out or some cache must go, and that are just large enough."""
    retried = failed = 0
    for seed in range(SEEDS):
        draw = random.Random(seed)  # noqa: S311  # not for secrets
        again = random_step(draw, draw.randint(1, 150))
        first = with_lasting(again, draw)
        whole = call_by_call(first, again, text, None)
        least, most = whole.peak_allocated_bytes, whole.peak_reserved_bytes
        for capacity in (None, (least // 2, least, (least + most) // 2, most, most + most // 2)[seed % 5]):
            settings = parse_alloc_conf(text)
            found = replay_steps(first, again, most_steps=MOST_STEPS, settings=settings, capacity_bytes=capacity)
            assert found == (whole if capacity is None else call_by_call(first, again, text, capacity)), (seed, capacity)
            retried += found.num_retries > 0
            failed += found.out_of_memory_at is not None
    assert failed
    assert retried or "throw" in text


def test_no_calls_reserve_nothing() -> None:
    assert replay_steps(NO_CALLS, NO_CALLS, most_steps=MOST_STEPS) == call_by_call(NO_CALLS, NO_CALLS, "", None)


def test_room_for_blocks_grows() -> None:
    """2,000 blocks of two sizes, every second of which goes: free ones do not merge."""
    calls = as_arrays([(n, 512 + 512 * (n % 3)) for n in range(2000)] + [(n, 0) for n in range(0, 2000, 2)])
    allocator = CompiledAllocator(2000)
    first_rows = len(allocator.store.spare)
    assert allocator.make(calls)
    assert first_rows < allocator.store.counts[NUM_BLOCKS] < len(allocator.store.spare)
    reference = CachingAllocator()
    for name, size in zip(*(part.tolist() for part in calls), strict=True):
        assert reference.allocate(name, size) if size else reference.free(name) is None
    assert allocator.peaks() == peaks_of(reference)


@pytest.mark.parametrize("calls", [[(0, 1), (0, 1)], [(0, 0)], [(0, 1), (0, 0), (0, 0)], [(0, -1)]])
def test_impossible_calls_are_refused(calls: list[tuple[int, int]]) -> None:
    with pytest.raises(
        InputError, match=f"call {len(calls) - 1} = .*: an allocation comes once, with bytes > 0, and then goes once"
    ):
        CompiledAllocator(1).make(as_arrays(calls))
