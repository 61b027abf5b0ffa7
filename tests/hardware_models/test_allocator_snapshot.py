"""Recorded allocator traces: read as calls, replayed, and compared byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hardware_models.allocator_snapshot import compare_with_snapshot, events_of_snapshot, read_trace
from hardware_models.caching_allocator import AllocationEvent, parse_alloc_conf
from hardware_models.errors import InputError
from hardware_models.units import MIB

BASE = 0x7F0000000000


def entry(action: str, offset: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": BASE + offset, "size": size, "stream": stream, "time_us": 0}


def freed(offset: int, size: int) -> list[dict[str, Any]]:
    return [entry("free_requested", offset, size), entry("free_completed", offset, size)]


def trace() -> list[dict[str, Any]]:
    """By hand: 5 MiB and 6 MiB in a segment of 20; both free; 15 MiB + 1 in the same; the small pool; all but that returned."""
    return [
        entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 5 * MIB), entry("alloc", 5 * MIB, 6 * MIB),
        *freed(0, 5 * MIB), *freed(5 * MIB, 6 * MIB),
        entry("alloc", 0, 15 * MIB + 1),
        entry("segment_alloc", 64 * MIB, 2 * MIB), entry("alloc", 64 * MIB, 100),
        *freed(0, 15 * MIB + 1), entry("snapshot", 0, 0),
        entry("segment_free", 0, 20 * MIB),
    ]  # fmt: skip


def test_a_trace_is_its_calls() -> None:
    def allocate(name: int, size: int) -> AllocationEvent:
        return AllocationEvent(action="allocate", name=name, size_bytes=size)

    def free(name: int) -> AllocationEvent:
        return AllocationEvent(action="free", name=name)

    expected = (
        allocate(0, 5 * MIB), allocate(1, 6 * MIB), free(0), free(1), allocate(2, 15 * MIB + 1), allocate(3, 100), free(2),
        AllocationEvent(action="empty_cache"),
    )  # fmt: skip
    assert events_of_snapshot(trace()) == expected
    assert events_of_snapshot(trace(), infer_empty_cache=False) == expected[:-1]


def test_a_trace_that_follows_the_rules_is_met_exactly() -> None:
    found = compare_with_snapshot(trace())
    assert found.exact
    assert (found.num_events, found.max_difference_bytes) == (8, 0)
    assert found.recorded_peak_reserved_bytes == found.predicted_peak_reserved_bytes == 22 * MIB


def test_a_segment_too_many_is_found() -> None:
    wrong = trace()
    wrong.insert(7, entry("segment_alloc", 128 * MIB, 16 * MIB))  # as if the freed 20 MiB could not serve 15 MiB + 1
    found = compare_with_snapshot(wrong)
    assert not found.exact
    assert (found.first_difference, found.max_difference_bytes) == (4, 16 * MIB)
    assert found.recorded_peak_reserved_bytes == 38 * MIB


def test_other_settings_are_told_apart() -> None:
    # Two tensors of 12 MiB: two segments of 12, but two pages of 20 of an expandable one.
    plain = [entry("segment_alloc", 0, 12 * MIB), entry("alloc", 0, 12 * MIB), entry("segment_alloc", 12 * MIB, 12 * MIB), entry("alloc", 12 * MIB, 12 * MIB)]  # fmt: skip
    paged = [entry("segment_map", 0, 20 * MIB), entry("alloc", 0, 12 * MIB), entry("segment_map", 20 * MIB, 20 * MIB), entry("alloc", 12 * MIB, 12 * MIB)]  # fmt: skip
    expandable = parse_alloc_conf("expandable_segments:True")
    assert compare_with_snapshot(plain).exact
    assert compare_with_snapshot(paged, expandable).exact
    assert not compare_with_snapshot(plain, expandable).exact
    assert not compare_with_snapshot(paged).exact


def test_a_free_that_completes_later_holds_the_block() -> None:
    # While the free of a is pending, b needs a segment of its own; once it has completed, c gets a's.
    steps = [
        entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 20 * MIB), entry("free_requested", 0, 20 * MIB),
        entry("segment_alloc", 32 * MIB, 20 * MIB), entry("alloc", 32 * MIB, 20 * MIB),
        entry("free_completed", 0, 20 * MIB), entry("alloc", 0, 20 * MIB),
    ]  # fmt: skip
    assert [
        event.action for event in events_of_snapshot(steps)
    ] == "allocate record_stream free allocate synchronize allocate".split()
    assert compare_with_snapshot(steps).exact


def test_runs_of_returned_segments_are_one_call() -> None:
    steps = [
        entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 20 * MIB), entry("segment_alloc", 32 * MIB, 30 * MIB),
        entry("alloc", 32 * MIB, 30 * MIB), *freed(0, 20 * MIB), *freed(32 * MIB, 30 * MIB),
        entry("segment_free", 0, 20 * MIB), entry("segment_free", 32 * MIB, 30 * MIB),
        entry("segment_alloc", 0, 50 * MIB), entry("alloc", 0, 50 * MIB), entry("oom", 0, 90 * MIB),
    ]  # fmt: skip
    assert [event.action for event in events_of_snapshot(steps)].count("empty_cache") == 1
    assert compare_with_snapshot(steps).exact
    assert compare_with_snapshot(steps, capacity_bytes=60 * MIB).exact
    assert compare_with_snapshot(steps, capacity_bytes=49 * MIB).out_of_memory_at == 1


def test_partial_returns_are_left_to_the_settings() -> None:
    # max_split_size 20, 80 MiB: the cached 60 goes for a request of 21, the cached small segment stays.
    steps = [
        entry("segment_alloc", 0, 60 * MIB), entry("alloc", 0, 60 * MIB), entry("segment_alloc", 64 * MIB, 2 * MIB),
        entry("alloc", 64 * MIB, 8), *freed(0, 60 * MIB), *freed(64 * MIB, 8),
        entry("segment_free", 0, 60 * MIB), entry("segment_alloc", 0, 22 * MIB), entry("alloc", 0, 21 * MIB),
    ]  # fmt: skip
    assert compare_with_snapshot(steps, parse_alloc_conf("max_split_size_mb:20"), 80 * MIB).exact


def test_frees_of_what_came_before_are_counted() -> None:
    found = compare_with_snapshot([*freed(0, 512), *trace()])
    assert found.unmatched_frees == 1
    assert found.first_difference is None
    assert not found.exact


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"action": "grow"}, r"memory snapshot: \[0\].action = 'grow': must be one of alloc, annotate, free_completed"),
        ({}, r"\[0\].action"),
        ({"action": "alloc", "addr": 1, "stream": 0}, r"\[0\].size: must be a whole number"),
        ({"action": "segment_alloc", "size": "2 MiB"}, r"\[0\].size = '2 MiB': must be a whole number"),
    ],
)
def test_bad_entries_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        events_of_snapshot([bad])


def test_traces_are_read_from_json(tmp_path: Path) -> None:
    whole, bare = tmp_path / "snapshot.json", tmp_path / "trace.json"
    whole.write_text(json.dumps({"segments": [], "device_traces": [[], trace()]}))
    bare.write_text(json.dumps(trace()))
    assert read_trace(whole, device=1) == read_trace(bare) == trace()
    with pytest.raises(InputError, match=r"device_traces\[2\]: must hold a list for each device"):
        read_trace(whole, device=2)
    (tmp_path / "other.json").write_text("3")
    with pytest.raises(InputError, match="a trace is a list of entries"):
        read_trace(tmp_path / "other.json")
    with pytest.raises(InputError, match="no JSON could be read"):
        read_trace(tmp_path / "none.json")
