"""Measure one training step: wall time, peak of live tensor bytes, and both over the course of the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from simulator.program import Kind, Stream
from simulator.sequence import Operation
from simulator.timeline import MemoryProfile, Span, Timeline
from simulator.tracing.live_storages import LiveStorages
from validation.lanes import Lanes

PERCENTILES = (10, 50, 90)
NS_PER_S = 1_000_000_000


class TimedStep(Protocol):
    """A kind of step that can be timed."""

    def inside(self) -> AbstractContextManager[None]:
        """Prepares for steps, and cleans up."""

    def __call__(self) -> None:
        """One whole step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Wall times of repeated steps."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median."""
        return float(np.median(self.seconds))

    def to_json(self) -> dict[str, float | int]:
        """Median, 10th and 90th percentile, number."""
        low, median, high = np.percentile(self.seconds, PERCENTILES)
        return {"median": float(median), "p10": float(low), "p90": float(high), "num": len(self.seconds)}


def synchronize(device: torch.device) -> None:
    """Waits for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_times(runs: Sequence[TimedStep], *, repeats: int, device: torch.device) -> tuple[StepTimes, ...]:
    """Wall times of several kinds of step, taken in turn so that a machine's drift meets all alike.

    Args:
        runs: each runs one whole step; what it does on entering and leaving is not timed.
        repeats: how many times each is run, after one run that is not counted.
        device: waited for.
    """
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, seconds in zip(runs, times, strict=True):
            with run.inside():
                synchronize(device)
                started = time.perf_counter()
                run()
                synchronize(device)
                if repeat:
                    seconds.append(time.perf_counter() - started)
    return tuple(StepTimes(seconds=tuple(seconds)) for seconds in times)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Memory of one step."""

    allocated_bytes: int
    """Live tensor bytes at most; on CUDA what the caching allocator counts."""
    reserved_bytes: int
    """What the caching allocator held at most; on a CPU, which keeps no pool, the same as allocated."""
    profile: MemoryProfile | None
    """Bytes over time, where they can be followed (CPU)."""
    host_bytes: int = 0
    """What the step keeps on the host of a device, or beside it where the device is the CPU."""


def peak_memory(step: Callable[[], object], resident: Iterable[torch.Tensor], *, device: torch.device) -> PeakMemory:
    """The peak over one step.

    Args:
        step: runs one whole step.
        resident: all tensors alive before it (parameters, buffers, optimizer states, the batch).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return PeakMemory(
            allocated_bytes=torch.cuda.max_memory_allocated(device),
            reserved_bytes=torch.cuda.max_memory_reserved(device),
            profile=None,
        )
    changes: list[tuple[float, int]] = []
    live = LiveStorages(lambda _, delta_bytes: changes.append((time.perf_counter(), delta_bytes)))
    live.add(resident)
    base = sum(delta for _, delta in changes)
    changes.clear()
    started = time.perf_counter()
    with live:
        step()
    levels = base + np.cumsum([0, *(delta for _, delta in changes)], dtype=np.int64)
    times = np.array([0.0, *(moment - started for moment, _ in changes)])
    profile = MemoryProfile(device=0, time_s=times, alive_bytes=levels[:, None])
    return PeakMemory(allocated_bytes=profile.peak_bytes, reserved_bytes=profile.peak_bytes, profile=profile)


def allocator_peak(step: Callable[[], object], resident: Iterable[torch.Tensor]) -> PeakMemory:
    """The peak over one step on a CPU by what its allocator gives and takes back, as the profiler tells: compiled code takes memory by no operator.

    Memory that an operator takes and gives back inside itself counts here.

    Args:
        step: runs one whole step.
        resident: all tensors alive before it.
    """
    base = sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in resident}.values())  # noqa: SLF001 - torch's only storage identity
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    roots: list[Any] = profiler.profiler.kineto_results.experimental_event_tree()
    changes = sorted(
        (event.start_time_ns, event.extra_fields.alloc_size) for event in _events(roots) if event.tag == _EventType.Allocation
    )
    levels = base + np.cumsum([0, *(size for _, size in changes)], dtype=np.int64)
    times = np.array([0.0, *((moment - changes[0][0]) / NS_PER_S for moment, _ in changes)])
    alive = MemoryProfile(device=0, time_s=times, alive_bytes=levels[:, None])
    return PeakMemory(allocated_bytes=alive.peak_bytes, reserved_bytes=alive.peak_bytes, profile=alive)


def _events(roots: Sequence[Any]) -> Iterator[Any]:
    for event in roots:
        yield event
        yield from _events(event.children)


class SpanRecorder:
    """Spans of a step: its operations and updates on the compute stream, and what ran beside them on other lanes."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._spans: list[tuple[Kind, str, int, int, Any, Any]] = []
        self._ran: set[tuple[int, int]] = set()
        lanes.drain()
        self._origin = self._begin = lanes.stamp()

    def begin(self) -> None:
        """An operation is given to the device."""
        self._begin = self._lanes.stamp()

    def end(self, operation: Operation, micro_batch: int) -> None:
        """It has been."""
        key = (micro_batch, operation.block)
        kind = Kind.BACKWARD if operation.kind == "B" else Kind.RECOMPUTE if key in self._ran else Kind.FORWARD
        self._ran.add(key)
        letter = {Kind.BACKWARD: "B", Kind.RECOMPUTE: "R", Kind.FORWARD: "F"}[kind]
        option = f":{operation.option}" if operation.option else ""
        self._add(kind, f"{letter}{operation.block}{option} mb{micro_batch}", micro_batch, operation.block)

    def update(self, block: int) -> None:
        """An update of parameters has been."""
        self._add(Kind.OPTIMIZER, "step" if block < 0 else f"step{block}", -1, block)

    def _add(self, kind: Kind, name: str, micro_batch: int, block: int) -> None:
        self._spans.append((kind, name, micro_batch, block, self._begin, self._lanes.stamp()))

    def timeline(self) -> Timeline:
        """All spans so far, once everything has ended."""
        self._lanes.drain()
        found = [
            self._span(Stream.COMPUTE, kind, name, micro_batch, block, begin, end)
            for kind, name, micro_batch, block, begin, end in self._spans
        ]
        for span in self._lanes.spans:
            kind = Kind.OPTIMIZER if span.label == "update" else Kind.TRANSFER
            block = str(span.block) if span.block >= 0 else ""
            micro_batch = f" mb{span.micro_batch}" if span.micro_batch >= 0 else ""
            name = f"{'step' if kind is Kind.OPTIMIZER else 'T'}{block}:{span.label}{micro_batch}"
            found.append(self._span(span.stream, kind, name, span.micro_batch, span.block, span.begin, span.end))
        return Timeline(spans=tuple(sorted(found, key=lambda span: (span.start_s, span.stream))))

    def _span(self, stream: Stream, kind: Kind, name: str, micro_batch: int, block: int, begin: Any, end: Any) -> Span:
        return Span(
            device=0, stream=stream, kind=kind, name=name, micro_batch=micro_batch, block=block,
            start_s=self._lanes.seconds(self._origin, begin), end_s=self._lanes.seconds(self._origin, end),
        )  # fmt: skip
