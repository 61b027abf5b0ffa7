"""The caching allocator's replay of repeated steps, compiled where its settings are torch's own (`hardware_models.allocator_kernels`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from hardware_models.allocator_kernels import Calls, replay_calls
from hardware_models.allocator_settings import AllocatorSettings
from hardware_models.caching_allocator import DEFAULT_SETTINGS, AllocationEvent, AllocatorPeaks

_BLOCKS_PER_NAME = 4
_LEAST_BLOCKS = 256


def has_plain_rules(settings: AllocatorSettings) -> bool:
    """Whether sizes and segments are all that settings change: no expandable segments, no blocks that are never split. What asks for a capacity never acts without one."""
    return settings.max_split_bytes is None and not settings.expandable_segments


def replay_steps(
    first: Sequence[AllocationEvent], again: Sequence[AllocationEvent], *, most_steps: int, settings: AllocatorSettings = DEFAULT_SETTINGS
) -> AllocatorPeaks:  # fmt: skip
    """Peaks and final values of a first step and as many more as add segments, and one that adds none, on a device without limit.

    Args:
        first: calls (``allocate`` and ``free`` on one stream) up to the end of the first step.
        again: of each later one; all that it allocates is freed in it.
        most_steps: after which it ends in any case.
        settings: with plain rules (`has_plain_rules`).
    """
    numbers: dict[Hashable, int] = {}
    calls = [_calls(events, numbers, settings) for events in (first, again)]
    room = _BLOCKS_PER_NAME * len(numbers) + _LEAST_BLOCKS
    counts = replay_calls(*calls, len(numbers), most_steps, room)
    while len(calls[0].names) and not counts.segments:
        room *= 2
        counts = replay_calls(*calls, len(numbers), most_steps, room)
    requested, allocated, reserved, peak_requested, peak_allocated, fragmentation, segments = map(int, counts)
    return AllocatorPeaks(
        peak_requested_bytes=peak_requested, peak_allocated_bytes=peak_allocated, peak_active_bytes=peak_allocated, peak_reserved_bytes=reserved,
        final_requested_bytes=requested, final_allocated_bytes=allocated, final_active_bytes=allocated, final_reserved_bytes=reserved,
        fragmentation_bytes=fragmentation, num_segments=segments, num_retries=0, out_of_memory_at=None,
    )  # fmt: skip


def _calls(events: Sequence[AllocationEvent], numbers: dict[Hashable, int], settings: AllocatorSettings) -> Calls:
    """Events as arrays, names numbered; what has no bytes is left out."""
    empty = {event.name for event in events if event.action == "allocate" and not event.size_bytes}
    real = [event for event in events if event.name not in empty] if empty else events
    names = np.array([numbers.setdefault(event.name, len(numbers)) for event in real], np.int64)
    sizes = np.array([event.size_bytes if event.action == "allocate" else 0 for event in real], np.int64)
    distinct, place = np.unique(sizes, return_inverse=True)
    blocks = np.array([settings.round_size(size) if size else 0 for size in distinct.tolist()], np.int64)
    segments = np.array([settings.segment_bytes(block) for block in blocks.tolist()], np.int64)
    return Calls(names, sizes, blocks[place], segments[place])
