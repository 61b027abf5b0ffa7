"""Recorded allocator traces: torch's memory snapshots as events to replay, and the reserved bytes that they show to compare with.

A trace is one entry of ``torch.cuda.memory._snapshot()["device_traces"]`` (a list per device), saved as JSON, recorded from before the
first allocation: ``torch.cuda.memory._record_memory_history(context=None, max_entries=...)``.

**Source**: TraceEntry in c10/core/CachingDeviceAllocator.h of torch 2.13, and the order in which malloc, free_locked and free_block of
c10/cuda/CUDACachingAllocator.cpp write them: a segment before the allocation that needed it, a completed free right behind its
request unless another stream still uses the block.

**Not modelled**: entries of private pools, which are taken for the default ones; what was allocated before the recording began.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hardware_models.caching_allocator import (
    ALL_STREAMS,
    DEFAULT_SETTINGS,
    AllocationEvent,
    AllocatorSettings,
    CachingAllocator,
    apply_event,
)
from hardware_models.errors import InputError

_IGNORED = frozenset({"snapshot", "oom", "annotate", "user_defined", "workspace_snapshot"})
"""Entries after which the allocator is as before; an allocation that failed shows what it released in entries of its own."""
_GIVEN = frozenset({"segment_free", "segment_unmap"})
_TAKEN = frozenset({"segment_alloc", "segment_map"})
_KNOWN = sorted({"alloc", "free_requested", "free_completed"} | _GIVEN | _TAKEN | _IGNORED)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotComparison:
    """Reserved bytes of a replay beside those that a trace shows, after each event."""

    num_events: int
    recorded_peak_reserved_bytes: int
    predicted_peak_reserved_bytes: int
    max_difference_bytes: int
    """Largest absolute difference after any event."""
    first_difference: int | None
    """Index of the first event after which the two differ; None: they never do."""
    unmatched_frees: int
    """Frees of blocks that were allocated before the recording began."""
    out_of_memory_at: int | None
    """Index of the event at which the replay ran out of memory, where the comparison ends."""

    @property
    def exact(self) -> bool:
        """Whether every reserved byte of the trace was predicted."""
        return self.first_difference is None and self.out_of_memory_at is None and self.unmatched_frees == 0


@dataclass(slots=True)
class _Reading:
    """A trace while it is read: events, and the reserved bytes that the trace shows after each."""

    events: list[AllocationEvent] = field(default_factory=list)
    reserved_bytes: list[int] = field(default_factory=list)
    names: dict[int, int] = field(default_factory=dict)
    deferred: dict[int, int] = field(default_factory=dict)
    now_bytes: int = 0
    count: int = 0
    unmatched: int = 0

    def emit(self, **values: Any) -> None:
        self.events.append(AllocationEvent(**values))
        self.reserved_bytes.append(self.now_bytes)


def read_trace(path: Path, *, device: int = 0) -> list[dict[str, Any]]:
    """Entries of one device from a JSON file that holds a whole snapshot or the list of entries itself.

    Raises:
        InputError: no JSON, or no entries of that device.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(source=str(path), key="", value=None, rule=f"no JSON could be read: {error}") from error
    if isinstance(found, dict):
        traces = found.get("device_traces", [])
        if not isinstance(traces, list) or not 0 <= device < len(traces):
            rule = "must hold a list for each device, this one among them"
            raise InputError(source=str(path), key=f"device_traces[{device}]", value=None, rule=rule)
        found = traces[device]
    if not isinstance(found, list):
        raise InputError(source=str(path), key="", value=type(found).__name__, rule="a trace is a list of entries")
    return found


def events_of_snapshot(entries: Sequence[Mapping[str, Any]], *, infer_empty_cache: bool = True) -> tuple[AllocationEvent, ...]:
    """The calls that made a trace.

    A free that completes later than it was requested becomes a stream that the block is recorded on, and that is done where the trace
    completes the free. Traces have no entry for empty_cache: a run of returned segments stands for one, unless
    ``infer_empty_cache`` is False (right where garbage collection or ``max_split_bytes`` returns some by itself).

    Raises:
        InputError: an entry without action, address, size or stream, or with an action that torch does not write.
    """
    return tuple(_read(entries, infer_empty_cache=infer_empty_cache).events)


def compare_with_snapshot(
    entries: Sequence[Mapping[str, Any]], settings: AllocatorSettings = DEFAULT_SETTINGS, capacity_bytes: int | None = None
) -> SnapshotComparison:
    """Replays a trace and compares the reserved bytes after each event with those that its segments add up to.

    Args:
        entries: the trace of one device.
        settings: the PYTORCH_ALLOC_CONF under which it was recorded.
        capacity_bytes: what the device could give the allocator; None: no limit.

    Raises:
        InputError: as `events_of_snapshot`.
    """
    by_itself = settings.garbage_collection_threshold > 0 or settings.max_split_bytes is not None
    reading = _read(entries, infer_empty_cache=not by_itself)
    allocator = CachingAllocator(settings, capacity_bytes=capacity_bytes)
    largest, first, failed = 0, None, None
    for index, (event, recorded) in enumerate(zip(reading.events, reading.reserved_bytes, strict=True)):
        if not apply_event(allocator, event):
            failed = index
            break
        difference = abs(allocator.reserved_bytes - recorded)
        largest = max(largest, difference)
        if difference and first is None:
            first = index
    return SnapshotComparison(
        num_events=len(reading.events),
        recorded_peak_reserved_bytes=max(reading.reserved_bytes, default=0),
        predicted_peak_reserved_bytes=allocator.peak_reserved_bytes,
        max_difference_bytes=largest,
        first_difference=first,
        unmatched_frees=reading.unmatched,
        out_of_memory_at=failed,
    )


def _read(entries: Sequence[Mapping[str, Any]], *, infer_empty_cache: bool) -> _Reading:
    reading, run = _Reading(), False
    for index, entry in enumerate(entries):
        action = entry.get("action")
        if action not in _KNOWN:
            rule = f"must be one of {', '.join(_KNOWN)}"
            raise InputError(source="memory snapshot", key=f"[{index}].action", value=action, rule=rule)
        if action in _GIVEN:
            reading.now_bytes -= _number(entry, index, "size")
            if infer_empty_cache and not run:
                reading.emit(action="empty_cache")
            elif infer_empty_cache:
                reading.reserved_bytes[-1] = reading.now_bytes
            run = infer_empty_cache
            continue
        if action in _IGNORED:
            continue
        run = False
        if action in _TAKEN:
            reading.now_bytes += _number(entry, index, "size")
        elif action == "alloc":
            reading.names[_number(entry, index, "addr")] = reading.count
            reading.emit(
                action="allocate", name=reading.count, size_bytes=_number(entry, index, "size"),
                stream=_number(entry, index, "stream"),
            )  # fmt: skip
            reading.count += 1
        else:
            _read_free(reading, entries, index)
    return reading


def _read_free(reading: _Reading, entries: Sequence[Mapping[str, Any]], index: int) -> None:
    """A request to free, or the completion of one that had to wait."""
    address = _number(entries[index], index, "addr")
    if entries[index]["action"] == "free_completed":
        if address in reading.deferred:
            reading.emit(action="synchronize", stream=reading.deferred.pop(address))
        return
    name = reading.names.pop(address, None)
    if name is None:
        reading.unmatched += 1
        return
    following = entries[index + 1] if index + 1 < len(entries) else {}
    if following.get("action") != "free_completed" or following.get("addr") != address:
        stream = ALL_STREAMS - 1 - name
        reading.deferred[address] = stream
        reading.emit(action="record_stream", name=name, stream=stream)
    reading.emit(action="free", name=name)


def _number(entry: Mapping[str, Any], index: int, key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int):
        rule = "must be a whole number"
        raise InputError(source="memory snapshot", key=f"[{index}].{key}", value=value, rule=rule)
    return value
