"""One way to time a callable on a CPU and on a GPU, alone or beside others (standard library and torch only)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

_CPU_FLUSH_BYTES = 48 * 2**20
"""More than the last-level cache of most processors."""
_FLUSHES = 3
"""The flushed buffer over the second-level cache of a GPU: replacement is not strictly least recently used."""
_LEAST_FLUSH_BYTES, _MOST_FLUSH_BYTES = 32 * 2**20, 512 * 2**20
_CYCLES_PER_S = 2e9
"""Clock of a GPU, rounded up (H100: 1.98 GHz): a busy wait of so many cycles a second lasts at least that long."""
_HEAD_START = 1.5
"""Busy wait over the host seconds that it hides."""
_LEAST_WAIT_S, _MOST_WAIT_S = 2e-4, 0.1


class Stopwatch:
    """Seconds of a callable: wall clock on a CPU, events on a GPU; caches emptied on demand."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.host_s = 0.0
        """Host seconds a call of what was last timed."""
        self._scratch = torch.zeros(flush_bytes(device), dtype=torch.int8, device=device)

    def flush(self) -> None:
        """Evicts operands from the caches by writing a buffer larger than they are."""
        self._scratch.add_(1)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, run: Callable[[], object], repeats: int, *, host_s: float = 0.0) -> float:
        """Seconds of ``repeats`` calls in a row.

        Args:
            run: what is timed.
            repeats: how often.
            host_s: host seconds that one call takes (GPU only): the device is kept busy meanwhile, so that the host is not timed.
        """
        if self.device == "cuda":
            return self._time_cuda(run, repeats, host_s)
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return time.perf_counter() - begin

    def _time_cuda(self, run: Callable[[], object], repeats: int, host_s: float) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        keep_busy(repeats * host_s)
        begin.record()
        host_begin = time.perf_counter()
        for _ in range(repeats):
            run()
        self.host_s = (time.perf_counter() - host_begin) / repeats
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def flush_bytes(device: str) -> int:
    """Size of a buffer whose writing empties the device's last-level cache."""
    if device == "cpu":
        return _CPU_FLUSH_BYTES
    return min(_MOST_FLUSH_BYTES, max(_LEAST_FLUSH_BYTES, _FLUSHES * int(torch.cuda.get_device_properties(0).L2_cache_size)))


def keep_busy(host_s: float) -> None:
    """Lets the current stream of the GPU wait while the host, for ``host_s`` seconds, enqueues what comes next."""
    wait_s = min(_MOST_WAIT_S, max(_LEAST_WAIT_S, _HEAD_START * host_s))
    torch.cuda._sleep(int(wait_s * _CYCLES_PER_S))  # noqa: SLF001 - torch has no other kernel that only waits


class Lanes:
    """Times several callables at once, each on a stream of its own that starts when the others do."""

    def __init__(self) -> None:
        self._streams: dict[str, torch.cuda.Stream] = {}

    def seconds(self, lanes: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds from the common start to the end of each lane, by name.

        **Model**: one event before all lanes, which wait for it, and one behind each; the device waits while the host enqueues.
        """
        torch.cuda.synchronize()
        keep_busy(_MOST_WAIT_S / 10)
        start = torch.cuda.Event(enable_timing=True)
        start.record()
        ends = {}
        for name, run in lanes.items():
            if name not in self._streams:
                self._streams[name] = torch.cuda.Stream()
            stream = self._streams[name]
            stream.wait_event(start)
            with torch.cuda.stream(stream):
                run()
                ends[name] = torch.cuda.Event(enable_timing=True)
                ends[name].record(stream)
        torch.cuda.synchronize()
        return {name: float(start.elapsed_time(end)) / 1e3 for name, end in ends.items()}
