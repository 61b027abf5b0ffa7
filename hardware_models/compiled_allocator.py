"""The caching allocator's replay of repeated steps, compiled where its settings are torch's own (`hardware_models.allocator_kernels`)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hardware_models.allocator_kernels import Calls, Ints, replay_calls
from hardware_models.allocator_settings import AllocatorSettings
from hardware_models.caching_allocator import (
    DEFAULT_SETTINGS,
    AllocationEvent,
    AllocatorPeaks,
    CachingAllocator,
    apply_event,
    peaks_of,
)

_BLOCKS_PER_NAME = 4
_LEAST_BLOCKS = 256


class StepCalls(NamedTuple):
    """Calls of the allocator on one stream, in their order."""

    names: Ints
    """Which allocation, from 0; a name may be used again once it is freed."""
    size_bytes: Ints
    """Requested; 0: the allocation goes."""

    @property
    def events(self) -> Iterator[AllocationEvent]:
        """The same one by one."""
        for name, size in zip(self.names.tolist(), self.size_bytes.tolist(), strict=True):
            yield AllocationEvent(action="allocate" if size else "free", name=name, size_bytes=size)


def calls_of(events: Sequence[AllocationEvent]) -> StepCalls:
    """Events as arrays, names numbered as they come; what has no bytes is left out."""
    numbers: dict[Hashable, int] = {}
    empty = {event.name for event in events if event.action == "allocate" and not event.size_bytes}
    real = [event for event in events if event.name not in empty] if empty else events
    names = np.array([numbers.setdefault(event.name, len(numbers)) for event in real], np.int64)
    return StepCalls(names, np.array([event.size_bytes if event.action == "allocate" else 0 for event in real], np.int64))


def replay_steps(
    first: StepCalls, again: StepCalls, *, most_steps: int, settings: AllocatorSettings = DEFAULT_SETTINGS, capacity_bytes: int | None = None
) -> AllocatorPeaks:  # fmt: skip
    """Peaks and final values of a first step and as many more as add segments, and one that adds none.

    Args:
        first: calls up to the end of the first step.
        again: of each later one; all that it allocates is freed in it.
        most_steps: after which it ends in any case.
        settings: the allocator's.
        capacity_bytes: what the device can give; None: no limit.

    Returns:
        ``out_of_memory_at`` counts the calls of the whole run.
    """
    if capacity_bytes is None and has_plain_rules(settings):
        return _compiled(first, again, most_steps, settings)
    allocator, count = CachingAllocator(settings, capacity_bytes=capacity_bytes), 0
    steps = (tuple(first.events), tuple(again.events))
    for index in range(most_steps):
        before = allocator.peak_reserved_bytes
        for event in steps[min(index, 1)]:
            if not apply_event(allocator, event):
                return peaks_of(allocator, out_of_memory_at=count)
            count += 1
        if index and allocator.peak_reserved_bytes == before:
            break
    return peaks_of(allocator)


def has_plain_rules(settings: AllocatorSettings) -> bool:
    """Whether sizes and segments are all that settings change: no expandable segments, no blocks that are never split. What asks for a capacity never acts without one."""
    return settings.max_split_bytes is None and not settings.expandable_segments


def _compiled(first: StepCalls, again: StepCalls, most_steps: int, settings: AllocatorSettings) -> AllocatorPeaks:
    num_names = 1 + max(int(own.names.max(initial=-1)) for own in (first, again))
    calls = [_sized(own, settings) for own in (first, again)]
    room = _BLOCKS_PER_NAME * num_names + _LEAST_BLOCKS
    counts = replay_calls(*calls, num_names, most_steps, room)
    while len(first.names) and not counts.segments:
        room *= 2
        counts = replay_calls(*calls, num_names, most_steps, room)
    requested, allocated, reserved, peak_requested, peak_allocated, fragmentation, segments = map(int, counts)
    return AllocatorPeaks(
        peak_requested_bytes=peak_requested, peak_allocated_bytes=peak_allocated, peak_active_bytes=peak_allocated, peak_reserved_bytes=reserved,
        final_requested_bytes=requested, final_allocated_bytes=allocated, final_active_bytes=allocated, final_reserved_bytes=reserved,
        fragmentation_bytes=fragmentation, num_segments=segments, num_retries=0, out_of_memory_at=None,
    )  # fmt: skip


def _sized(calls: StepCalls, settings: AllocatorSettings) -> Calls:
    """Calls with their blocks and segments."""
    distinct, place = np.unique(calls.size_bytes, return_inverse=True)
    blocks = np.array([settings.round_size(size) if size else 0 for size in distinct.tolist()], np.int64)
    segments = np.array([settings.segment_bytes(block) for block in blocks.tolist()], np.int64)
    return Calls(calls.names, calls.size_bytes, blocks[place], segments[place])
