"""One way to time a callable on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = {"cpu": 48 * 2**20, "cuda": 256 * 2**20}
"""More than the last-level cache of the device."""


class Stopwatch:
    """Seconds of a callable: wall clock on a CPU, events on a GPU; caches emptied on demand."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._scratch = torch.zeros(_FLUSH_BYTES[device], dtype=torch.int8, device=device)

    def flush(self) -> None:
        """Evicts operands from the caches by writing a buffer larger than they are."""
        self._scratch.add_(1)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds of ``repeats`` calls in a row."""
        if self.device == "cuda":
            return self._time_cuda(run, repeats)
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return time.perf_counter() - begin

    def _time_cuda(self, run: Callable[[], object], repeats: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # noqa: SLF001 - keeps the device busy while the host enqueues, so its dispatch is not timed
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
