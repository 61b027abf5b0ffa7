"""Lanes: what runs beside the compute stream. CUDA streams and events, or on a CPU one worker thread each, behind the same four calls.

A token stands for something that was queued: on a CPU a future, on CUDA an event on its stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hardware_models.microbench_worker import one_thread_worker
from simulator.program import Stream

Work = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpan:
    """One piece of work on a lane; times as `Lanes.seconds` reads them."""

    stream: Stream
    label: str
    micro_batch: int
    block: int
    begin: Any
    end: Any


class Lanes(Protocol):
    """The device's compute stream, seen from the host, and what runs beside it."""

    spans: list[LaneSpan]

    def mark(self) -> Any:
        """A token for all that the compute stream has been given so far."""

    def submit(self, span: LaneSpan, work: Work, after: Sequence[Any]) -> Any:
        """Queues work on a lane behind what it has, once ``after`` is done; returns its token."""

    def wait(self, token: Any) -> None:
        """Holds back what the compute stream is given from now on until the token's work is done."""

    def drain(self) -> None:
        """Returns once all lanes are empty; raises nothing."""

    def stamp(self) -> Any:
        """The compute stream's time here, for `seconds`."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two stamps; on CUDA once the device is idle."""

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Bytes on the host that copies reach without detour."""


@dataclass(slots=True)
class ThreadLanes:
    """A CPU as its own device: the calling thread computes, one worker of one thread a lane copies and updates."""

    spans: list[LaneSpan] = field(default_factory=list)
    _workers: dict[Stream, ThreadPoolExecutor] = field(default_factory=dict)
    _pending: list[Future[None]] = field(default_factory=list)

    def mark(self) -> None:
        """The calling thread has done what it was given."""
        return

    def submit(self, span: LaneSpan, work: Work, after: Sequence[Future[None] | None]) -> Future[None]:
        """Queues work for the lane's thread."""
        if span.stream not in self._workers:
            self._workers[span.stream] = one_thread_worker(span.stream.name)

        todo = [work]
        del work

        def run() -> None:
            for token in after:
                if token is not None:
                    token.result()
            begin = time.perf_counter()
            with torch.no_grad():
                todo.pop()()  # what it refers to goes before anybody is told that it is done
            self.spans.append(_stamped(span, begin, time.perf_counter()))

        future = self._workers[span.stream].submit(run)
        self._pending.append(future)
        return future

    def wait(self, token: Future[None] | None) -> None:
        """Blocks the calling thread; what the work raised is raised here."""
        if token is not None:
            token.result()

    def drain(self) -> None:
        """Lets all work end, whatever comes of it."""
        for future in self._pending:
            future.exception()
        self._pending.clear()

    def stamp(self) -> float:
        """The clock."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Their difference."""
        return end - begin

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Ordinary memory, touched once so that its pages are there."""
        return torch.zeros(size_bytes, dtype=torch.uint8)


@dataclass(slots=True)
class CudaLanes:
    """Streams of a GPU; work on `Stream.HOST` runs in a thread, which waits for events before and queues copies on a stream of its own."""

    device: torch.device
    spans: list[LaneSpan] = field(default_factory=list)
    _streams: dict[Stream, torch.cuda.Stream] = field(default_factory=dict)
    _thread: ThreadPoolExecutor | None = None
    _pending: list[Future[torch.cuda.Event]] = field(default_factory=list)

    def mark(self) -> torch.cuda.Event:
        """An event on the compute stream."""
        return self._event(torch.cuda.current_stream(self.device))

    def submit(self, span: LaneSpan, work: Work, after: Sequence[Any]) -> Any:
        """Queues work on the lane's stream, or for the host's thread."""
        if span.stream not in self._streams:
            self._streams[span.stream] = torch.cuda.Stream(self.device)
        stream = self._streams[span.stream]
        if span.stream is Stream.HOST:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="HOST")
            future = self._thread.submit(self._on_host, span, work, after, stream)
            self._pending.append(future)
            return future
        return self._on_stream(span, work, after, stream)

    def _on_stream(self, span: LaneSpan, work: Work, after: Sequence[Any], stream: torch.cuda.Stream) -> torch.cuda.Event:
        for token in after:
            stream.wait_event(_event_of(token))
        with torch.cuda.stream(stream), torch.no_grad():
            begin = self._event(stream)
            work()
            end = self._event(stream)
        self.spans.append(_stamped(span, begin, end))
        return end

    def _on_host(self, span: LaneSpan, work: Work, after: Sequence[Any], stream: torch.cuda.Stream) -> torch.cuda.Event:
        with torch.cuda.device(self.device):
            for token in after:
                _event_of(token).synchronize()
            return self._on_stream(span, work, (), stream)

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def wait(self, token: Any) -> None:
        """The compute stream waits; the host does so only for work of its own thread."""
        torch.cuda.current_stream(self.device).wait_event(_event_of(token))

    def drain(self) -> None:
        """Lets the host's thread and the device end."""
        for future in self._pending:
            future.exception()
        self._pending.clear()
        torch.cuda.synchronize(self.device)

    def stamp(self) -> torch.cuda.Event:
        """An event on the compute stream."""
        return self.mark()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two events."""
        return float(begin.elapsed_time(end)) / 1e3

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Pinned memory."""
        return torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)


def _event_of(token: Any) -> torch.cuda.Event:
    event: torch.cuda.Event = token.result() if isinstance(token, Future) else token
    return event


def _stamped(span: LaneSpan, begin: Any, end: Any) -> LaneSpan:
    return LaneSpan(
        stream=span.stream, label=span.label, micro_batch=span.micro_batch, block=span.block, begin=begin, end=end
    )  # fmt: skip


def lanes_of(device: torch.device) -> Lanes:
    """The lanes of a device."""
    return CudaLanes(device=device) if device.type == "cuda" else ThreadLanes()
