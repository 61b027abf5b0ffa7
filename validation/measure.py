"""Measure one training step: wall time, peak of live tensor bytes, and both over the course of the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simulator.program import Kind, Stream
from simulator.sequence import Operation
from simulator.timeline import MemoryProfile, Span, Timeline
from simulator.tracing.live_storages import LiveStorages

PERCENTILES = (10, 50, 90)


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


def interleaved_times(steps: Sequence[Callable[[], object]], *, repeats: int, device: torch.device) -> tuple[StepTimes, ...]:
    """Wall times of several kinds of step, taken in turn so that a machine's drift meets all alike.

    Args:
        steps: each runs one whole step.
        repeats: how many times each is run, after one run that is not counted.
    """
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats + 1):
        for step, seconds in zip(steps, times, strict=True):
            synchronize(device)
            started = time.perf_counter()
            step()
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


class SpanRecorder:
    """Spans of a step's operations as they end one after the other on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[Span] = []
        self._ran: set[tuple[int, int]] = set()
        synchronize(device)
        self._origin = self._last = time.perf_counter()

    def operation(self, operation: Operation, micro_batch: int) -> None:
        """An operation has ended."""
        key = (micro_batch, operation.block)
        kind = Kind.BACKWARD if operation.kind == "B" else Kind.RECOMPUTE if key in self._ran else Kind.FORWARD
        self._ran.add(key)
        letter = {Kind.BACKWARD: "B", Kind.RECOMPUTE: "R", Kind.FORWARD: "F"}[kind]
        option = f":{operation.option}" if operation.option else ""
        self._end(kind, f"{letter}{operation.block}{option} mb{micro_batch}", micro_batch, operation.block)

    def optimizer(self) -> None:
        """The optimizer's step has ended."""
        self._end(Kind.OPTIMIZER, "step", -1, -1)

    def _end(self, kind: Kind, name: str, micro_batch: int, block: int) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self._spans.append(
            Span(
                device=0, stream=Stream.COMPUTE, kind=kind, name=name, micro_batch=micro_batch, block=block,
                start_s=self._last - self._origin, end_s=now - self._origin,
            )
        )  # fmt: skip
        self._last = now

    @property
    def timeline(self) -> Timeline:
        """All spans so far."""
        return Timeline(spans=tuple(self._spans))
