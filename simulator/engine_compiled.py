"""The compiled engine: the same meaning as `engine_simpy`, a hundred times as fast."""

from __future__ import annotations

import numpy as np

from simulator.engine_kernels import record_kernel
from simulator.program import Program
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
    num = program.num_instructions
    stream_order = np.lexsort((np.arange(num), program.stream, program.device))
    keys = np.stack([program.device[stream_order], program.stream[stream_order]])
    first = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1 if num else np.empty(0, dtype=np.int64)
    offsets = np.concatenate([[0], first, [num]] if num else [[0]]).astype(np.int64)
    queue_of = np.empty(num, dtype=np.int64)
    queue_of[stream_order] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    transfers = program.transfers
    row = np.full(num, -1, dtype=np.int64)
    row[transfers.instruction] = np.arange(len(transfers.instruction))
    start_s, end_s, start_count, end_count = record_kernel(
        offsets, stream_order.astype(np.int64), queue_of, program.device.astype(np.int64), program.stream.astype(np.int64), program.duration_s,
        program.dependency_offsets, program.dependencies, row, transfers.size_bytes, transfers.limit_bytes_per_s, transfers.route_offsets, transfers.routes,
        transfers.link_bytes_per_s, program.slowdown,
    )  # fmt: skip
    return RunRecord(start_s=start_s, end_s=end_s, start_count=start_count, end_count=end_count)
