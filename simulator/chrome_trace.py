"""Runs as Chrome trace events (JSON), which Perfetto and chrome://tracing open.

A process for each run and device, a thread for each of its streams, a complete event for each span, an arrow for each message from its transfer to what waits for it
on another device, and a counter track of the bytes alive by class. Times are microseconds.

Source: Trace Event Format (Google, 2016), phases ``M``, ``X``, ``s``, ``f`` and ``C``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hardware_models.files import whole_file
from hardware_models.units import US_PER_S
from simulator.program import MemoryClass, Stream
from simulator.timeline import MemoryProfile, Message, Span, Timeline

Run = tuple[Timeline, Sequence[MemoryProfile]]
Event = dict[str, Any]


def trace_events(runs: Mapping[str, Run]) -> list[Event]:
    """Events of named runs (``predicted``, ``measured``), in order of run, device and time."""
    events: list[Event] = []
    first_process, first_flow = 0, 0
    for run, (timeline, profiles) in runs.items():
        devices = sorted({span.device for span in timeline.spans} | {profile.device for profile in profiles})
        for process, device in enumerate(devices, start=first_process):
            spans = [span for span in timeline.spans if span.device == device]
            events += _names(process, f"{run}: device {device}", sorted({span.stream for span in spans}))
            events += [_complete(process, span) for span in spans]
            for profile in profiles:
                if profile.device == device:
                    events += _counters(process, profile)
        processes = {device: process for process, device in enumerate(devices, start=first_process)}
        for flow, message in enumerate(timeline.messages, start=first_flow):
            events += _flow(flow, message, processes)
        first_process, first_flow = first_process + len(devices), first_flow + len(timeline.messages)
    return events


def write_chrome_trace(path: Path, runs: Mapping[str, Run]) -> None:
    """Writes the events of named runs to a JSON file."""
    document = {"displayTimeUnit": "ms", "traceEvents": trace_events(runs)}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


def _names(process: int, name: str, streams: Sequence[Stream]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    for stream in streams:
        thread = int(stream)
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": stream.name.lower()}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}


def _complete(process: int, span: Span) -> Event:
    return {
        "ph": "X", "name": span.name, "cat": span.kind.name.lower(), "pid": process, "tid": int(span.stream),
        "ts": span.start_s * US_PER_S, "dur": span.duration_s * US_PER_S,
        "args": {"block": span.block, "micro_batch": span.micro_batch},
    }  # fmt: skip


def _flow(flow: int, message: Message, processes: Mapping[int, int]) -> Iterator[Event]:
    """Both ends of an arrow; each lies at the start of its span, by which viewers find the span (``bp``: the one that encloses it)."""
    for phase, span in (("s", message.sent), ("f", message.awaited_by)):
        event = {
            "ph": phase, "name": "message", "cat": "message", "id": flow, "pid": processes[span.device], "tid": int(span.stream), "ts": span.start_s * US_PER_S,
        }  # fmt: skip
        yield event | {"bp": "e"} if phase == "f" else event


def _counters(process: int, profile: MemoryProfile) -> Iterator[Event]:
    by_class = profile.alive_bytes.shape[1] == len(MemoryClass)
    names = [one.name.lower() for one in MemoryClass] if by_class else ["all"]
    for time_s, row in zip(profile.time_s.tolist(), profile.alive_bytes.tolist(), strict=True):
        yield {
            "ph": "C", "name": "memory (bytes)", "pid": process, "ts": time_s * US_PER_S, "args": dict(zip(names, row, strict=True)),
        }  # fmt: skip
