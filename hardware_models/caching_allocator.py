"""Replay of a sequence of allocations and frees: what PyTorch's CUDA caching allocator allocates and reserves for it at most."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from hardware_models.allocator_engine import DEFAULT_SETTINGS, CachingAllocator
from hardware_models.allocator_settings import AllocatorSettings, parse_alloc_conf
from hardware_models.errors import InputError

__all__ = [
    "DEFAULT_SETTINGS",
    "AllocationEvent",
    "AllocatorPeaks",
    "AllocatorSettings",
    "CachingAllocator",
    "apply_event",
    "parse_alloc_conf",
    "peaks_of",
    "replay_allocations",
]

Action = Literal["allocate", "free", "record_stream", "synchronize", "empty_cache"]
ACTIONS: tuple[str, ...] = get_args(Action)
ALL_STREAMS = -1
"""Stream of a ``synchronize`` event that waits for the whole device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationEvent:
    """One call to the allocator.

    ``synchronize`` says that the work queued so far on ``stream`` is done; only blocks with a recorded stream wait for that.
    """

    action: Action
    name: Hashable = 0
    """Which allocation; a name may be used again once it is freed."""
    size_bytes: int = 0
    """Requested bytes; of ``allocate`` only."""
    stream: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorPeaks:
    """Bytes after a replay, as torch.cuda.memory_stats counts them.

    Requested by tensors; allocated in blocks (rounded); active: allocated, or freed and still in use by another stream; reserved of
    the device.
    """

    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_active_bytes: int
    peak_reserved_bytes: int
    final_requested_bytes: int
    final_allocated_bytes: int
    final_active_bytes: int
    final_reserved_bytes: int
    fragmentation_bytes: int
    """Reserved less allocated once the call that reached the reserved peak first was done."""
    num_segments: int
    """Most ordinary segments at one moment (``segment.all.peak``, which leaves expandable ones out)."""
    num_retries: int
    """Requests that were tried again after all cached blocks had been released (``num_alloc_retries``)."""
    out_of_memory_at: int | None
    """Index of the event that found no memory, where the replay ends; None: all events were replayed."""


def apply_event(allocator: CachingAllocator, event: AllocationEvent) -> bool:
    """Makes one call; False: out of memory.

    Raises:
        InputError: a name that is allocated already or not at all, a negative size, an unknown action.
    """
    if event.action == "allocate":
        return allocator.allocate(event.name, event.size_bytes, stream=event.stream)
    if event.action == "free":
        allocator.free(event.name)
    elif event.action == "record_stream":
        allocator.record_stream(event.name, event.stream)
    elif event.action == "synchronize":
        allocator.synchronize(None if event.stream == ALL_STREAMS else event.stream)
    elif event.action == "empty_cache":
        allocator.empty_cache()
    else:
        raise InputError(
            source="allocation events", key="action", value=event.action, rule=f"must be one of {', '.join(ACTIONS)}"
        )
    return True


def peaks_of(allocator: CachingAllocator, *, out_of_memory_at: int | None = None) -> AllocatorPeaks:
    """What an allocator has counted so far."""
    return AllocatorPeaks(
        peak_requested_bytes=allocator.peak_requested_bytes, peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_active_bytes=allocator.peak_active_bytes, peak_reserved_bytes=allocator.peak_reserved_bytes,
        final_requested_bytes=allocator.requested_bytes, final_allocated_bytes=allocator.allocated_bytes,
        final_active_bytes=allocator.active_bytes, final_reserved_bytes=allocator.reserved_bytes,
        fragmentation_bytes=allocator.fragmentation_bytes, num_segments=allocator.peak_segments,
        num_retries=allocator.num_retries, out_of_memory_at=out_of_memory_at,
    )  # fmt: skip


def replay_allocations(
    events: Iterable[AllocationEvent], settings: AllocatorSettings = DEFAULT_SETTINGS, capacity_bytes: int | None = None
) -> AllocatorPeaks:
    """Peaks and final values of a sequence of calls on an empty allocator.

    Args:
        events: the calls in order.
        settings: PYTORCH_ALLOC_CONF (`parse_alloc_conf`).
        capacity_bytes: what the device can give the allocator; None: no limit.

    Returns:
        Out of memory is a result (``out_of_memory_at``), not an error: a search asks for many programs that do not fit.

    Raises:
        InputError: a name that is allocated already or not at all, a negative size, an unknown action.
    """
    allocator = CachingAllocator(settings, capacity_bytes=capacity_bytes)
    for index, event in enumerate(events):
        if not apply_event(allocator, event):
            return peaks_of(allocator, out_of_memory_at=index)
    return peaks_of(allocator)
