"""Where the time of the critical rank goes: computing, waiting for which transfer, or idle. The parts sum to the step."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from simulator.program import Kind, Program, Stream
from simulator.run_record import RunRecord

Floats = NDArray[np.float64]

TIME_CLASSES = ("compute", "recompute", "bubble", "tp", "cp", "ep", "pp", "dp", "offload", "optimizer", "host")
KIND_CLASS: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.FORWARD: "compute", Kind.BACKWARD: "compute", Kind.RECOMPUTE: "recompute", Kind.OPTIMIZER: "optimizer", Kind.REDUCE: "compute",
    }
)  # fmt: skip

STREAM_CLASS: Mapping[Stream, str] = MappingProxyType(
    {
        Stream.TP: "tp", Stream.CP: "cp", Stream.EP: "ep", Stream.DP: "dp", Stream.SEND: "pp", Stream.H2D: "offload", Stream.D2H: "offload",
        Stream.HOST: "host", Stream.DISPATCH: "host",
    }
)  # fmt: skip


def longest_span(program: Program, record: RunRecord) -> tuple[int, float, float]:
    """The rank with the longest time from its first compute instruction's start to its last end (ties: the lowest), and both."""
    compute = program.stream == Stream.COMPUTE
    spans = [
        (float(record.start_s[own & compute].min()), float(record.end_s[own].max()))
        for own in (program.device == device for device in range(program.num_devices))
    ]
    rank = max(range(len(spans)), key=lambda device: spans[device][1] - spans[device][0])
    return rank, *spans[rank]


def exposed_times(program: Program, record: RunRecord, *, staggered: bool = False) -> dict[str, float]:
    """Seconds by class on the rank that ends last (ties: the lowest), from the step's start.

    Args:
        program: of the step.
        record: of its run.
        staggered: ranks go from step to step each on its own: then the rank with the longest span counts (`longest_span`), from its own start.

    **Model**: an instant belongs to the compute stream if that is busy; else to the transfer that the next compute instruction waits for, and to those that this one
    waited for or stood behind on its stream, as far as they are the rank's own or messages; else to the host; else it is bubble: what other ranks do is not the rank's time.
    What follows the last compute instruction belongs to the transfers that end the step.
    """
    start_s, end_s = record.start_s, record.end_s
    compute = program.stream == Stream.COMPUTE
    makespan_s, free_s = float(end_s.max()), 0.0
    ends = [float(end_s[program.device == device].max(initial=0.0)) for device in range(program.num_devices)]
    rank = int(np.argmax(np.array(ends) >= makespan_s))
    if staggered:
        rank, free_s, makespan_s = longest_span(program, record)
    own = np.flatnonzero(compute & (program.device == rank))
    own = own[np.argsort(start_s[own], kind="stable")]
    times = dict.fromkeys(TIME_CLASSES, 0.0)
    before = _before_on_stream(program)
    for n in own:
        _explain(program, record, before, int(n), free_s, times)
        times[KIND_CLASS[Kind(program.kind[n])]] += float(end_s[n] - start_s[n])
        free_s = max(free_s, float(end_s[n]))
    if makespan_s > free_s:
        last = int(np.flatnonzero((program.device == rank) & (end_s == makespan_s))[0])
        times[STREAM_CLASS.get(Stream(program.stream[last]), "bubble")] += makespan_s - free_s
    return times


def _before_on_stream(program: Program) -> NDArray[np.int64]:
    """The instruction before each one on its stream, -1 for the first; shape (instructions,)."""
    place = np.lexsort((np.arange(program.num_instructions), program.stream, program.device))
    same = (program.device[place[1:]] == program.device[place[:-1]]) & (program.stream[place[1:]] == program.stream[place[:-1]])
    before = np.full(program.num_instructions, -1, dtype=np.int64)
    before[place[1:]] = np.where(same, place[:-1], -1)
    return before


def _explain(
    program: Program, record: RunRecord, before: NDArray[np.int64], n: int, free_s: float, times: dict[str, float]
) -> None:
    """Attributes the gap before a compute instruction: back along the transfers that it waited for."""
    rank, until_s = program.device[n], float(record.start_s[n])
    while until_s > free_s:
        late = [other for other in _transfers_before(program, before, n, rank) if record.end_s[other] >= until_s]
        if not late:
            times["bubble"] += until_s - free_s
            return
        n = min(late, key=lambda other: float(record.start_s[other]))
        begun_s = max(free_s, float(record.start_s[n]))
        times[STREAM_CLASS[Stream(program.stream[n])]] += until_s - begun_s
        until_s = begun_s


def _transfers_before(program: Program, before: NDArray[np.int64], n: int, rank: int) -> list[int]:
    """What must end before an instruction starts, of the rank's own transfers and of messages."""
    waits = program.dependencies[program.dependency_offsets[n] : program.dependency_offsets[n + 1]].tolist()
    if program.stream[n] != Stream.COMPUTE and before[n] >= 0:
        waits.append(int(before[n]))
    return [
        other
        for other in waits
        if program.stream[other] == Stream.SEND or (program.device[other] == rank and program.stream[other] != Stream.COMPUTE)
    ]
