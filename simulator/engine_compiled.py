"""The compiled engine: the same meaning as `engine_simpy`, hundreds of times as fast."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simulator.engine_kernels import NOBODY, queues_kernel, record_kernel, times_kernel
from simulator.program import Program, Stream
from simulator.run_record import RunRecord, outcome_of
from simulator.timeline import MemoryProfile, Timeline


def run(program: Program) -> tuple[Timeline, tuple[MemoryProfile, ...]]:
    """What happens when the program runs: spans of all instructions, and bytes over time of each device, by device.

    Raises:
        DeadlockError: instructions wait for each other.
        MemoryBalanceError: more bytes of a class are freed than are alive.
    """
    return outcome_of(program, record(program))


def record(program: Program) -> RunRecord:
    """When each instruction starts and ends."""
    transfers = program.transfers
    offsets, queues = _queues(program)
    row = np.full(program.num_instructions, NOBODY, dtype=np.int64)
    row[transfers.instruction] = np.arange(len(transfers.instruction))
    start_s, end_s, start_count, end_count = record_kernel(
        len(Stream), offsets, queues, program.device, program.stream, program.duration_s, program.dependency_offsets, program.dependencies, row,
        transfers.size_bytes, transfers.limit_bytes_per_s, transfers.route_offsets, transfers.routes, transfers.link_bytes_per_s, program.slowdown,
    )  # fmt: skip
    return RunRecord(start_s=start_s, end_s=end_s, start_count=start_count, end_count=end_count)


def times(program: Program) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Start and end of each instruction of a program in which nothing shares links or slows anything: those of `record`, without their counts.

    **Model**: a start is the latest end of what it waits for, so that streams need no clock and no common order.

    Raises:
        ValueError: the program has transfers or a slow-down, or it cannot end.
    """
    if len(program.transfers.instruction) or (program.slowdown > 1.0).any():
        raise ValueError("times are known without a clock only where no transfers and no slow-down are, use record")
    offsets, queues = _queues(program)
    start_s, end_s, done = times_kernel(
        offsets, queues, program.duration_s, program.dependency_offsets, program.dependencies
    )  # fmt: skip
    if done < program.num_instructions:
        raise ValueError(f"only {done} of {program.num_instructions} instructions can end, use run to see which cannot")
    return start_s, end_s


def _queues(program: Program) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Instructions by stream: offsets by ``device * len(Stream) + stream``, and indices."""
    num_devices = max(program.num_devices, 1 + int(program.device.max(initial=0)))
    offsets, queues = queues_kernel(program.device, program.stream, num_devices, len(Stream))
    return offsets, queues
