"""The compiled replay against the allocator call by call: every count of random steps, repeated until they add nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from hardware_models.allocator_settings import parse_alloc_conf
from hardware_models.caching_allocator import AllocationEvent, AllocatorPeaks, CachingAllocator, apply_event, peaks_of
from hardware_models.compiled_allocator import StepCalls, calls_of, has_plain_rules, replay_steps
from hardware_models.units import KIB, MIB

SETTINGS = ("", "roundup_power2_divisions:4", "large_segment_size_mb:64", "garbage_collection_threshold:0.8")
MOST_STEPS = 5


def step(draw: random.Random, calls: int) -> list[AllocationEvent]:
    """Sizes of both pools, some of them again and again, freed in any order; all that comes goes."""
    sizes = [
        draw.choice((draw.randint(1, 900 * KIB), draw.randint(MIB, 12 * MIB), draw.randint(12 * MIB, 90 * MIB)))
        for _ in range(8)
    ]
    events: list[AllocationEvent] = []
    alive: list[int] = []
    for name in range(calls):
        while alive and draw.random() < 0.45:
            events.append(AllocationEvent(action="free", name=alive.pop(draw.randrange(len(alive)))))
        size = draw.choice((0, *sizes, *sizes, draw.randint(1, 40 * MIB)))
        events.append(AllocationEvent(action="allocate", name=name, size_bytes=size))
        alive.append(name)
    return [*events, *(AllocationEvent(action="free", name=name) for name in alive)]


def random_step(seed: int, calls: int) -> list[AllocationEvent]:
    """`step` with a generator of its own."""
    return step(random.Random(seed), calls)  # noqa: S311  # not for secrets


def repeated_replay(events: list[AllocationEvent]) -> Callable[[], AllocatorPeaks]:
    """The compiled replay of a step and its repeats, calls made arrays beforehand."""
    calls = calls_of(events)
    return lambda: replay_steps(calls, calls, most_steps=MOST_STEPS)


def call_by_call(first: list[AllocationEvent], again: list[AllocationEvent], text: str) -> AllocatorPeaks:
    allocator = CachingAllocator(parse_alloc_conf(text))
    for number in range(MOST_STEPS):
        before = allocator.peak_reserved_bytes
        for event in first if number == 0 else again:
            assert apply_event(allocator, event)
        if number and allocator.peak_reserved_bytes == before:
            break
    return peaks_of(allocator)


@pytest.mark.parametrize("text", SETTINGS)
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_allocator_call_by_call(seed: int, text: str) -> None:
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    again = step(draw, draw.randint(1, 250))
    lasting = [AllocationEvent(action="allocate", name=("state", n), size_bytes=draw.randint(1, 60 * MIB)) for n in range(20)]
    first = [*lasting[:12], *again, *lasting[12:]]
    lasts, repeats, late = calls_of([*lasting, *again]), calls_of(again), len(lasting)  # lasting ones have the first names
    calls = StepCalls(repeats.names + late, repeats.size_bytes)
    whole = StepCalls(*(np.concatenate((a[:12], b, a[12:late])) for a, b in zip(lasts, calls, strict=True)))
    found = replay_steps(whole, calls, most_steps=MOST_STEPS, settings=parse_alloc_conf(text))
    assert found == call_by_call(first, again, text)


def test_no_calls_reserve_nothing() -> None:
    assert replay_steps(calls_of(()), calls_of(()), most_steps=MOST_STEPS) == call_by_call([], [], "")


@pytest.mark.parametrize("text", ["expandable_segments:True", "max_split_size_mb:128"])
def test_other_rules_are_replayed_call_by_call(text: str) -> None:
    again = random_step(1, 60)
    calls = calls_of(again)
    assert replay_steps(calls, calls, most_steps=MOST_STEPS, settings=parse_alloc_conf(text)) == call_by_call(
        again, again, text
    )


def test_a_capacity_says_where_memory_ends() -> None:
    calls = calls_of([AllocationEvent(action="allocate", name=n, size_bytes=40 * MIB) for n in range(3)])
    assert replay_steps(calls, calls, most_steps=1, capacity_bytes=100 * MIB).out_of_memory_at == 2


def test_other_rules_are_told_apart() -> None:
    assert has_plain_rules(parse_alloc_conf("roundup_power2_divisions:4"))
    assert not has_plain_rules(parse_alloc_conf("max_split_size_mb:128"))
    assert not has_plain_rules(parse_alloc_conf("expandable_segments:True"))
