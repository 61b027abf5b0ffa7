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
        Stream.HOST: "host",
    }
)  # fmt: skip


def exposed_times(program: Program, record: RunRecord) -> dict[str, float]:
    """Seconds by class on the rank that ends last (ties: the lowest).

    **Model**: an instant belongs to the compute stream if that is busy; else to the transfer that the next compute instruction waits for (the chain of transfers
    that ends when it starts); else to the host; else it is bubble. What follows the last compute instruction belongs to the transfers that end the step.
    """
    start_s, end_s = record.start_s, record.end_s
    compute = program.stream == Stream.COMPUTE
    makespan_s = float(end_s.max())
    ends = [float(end_s[program.device == device].max()) for device in range(program.num_devices)]
    rank = int(np.argmax(np.array(ends) >= makespan_s))
    own = np.flatnonzero(compute & (program.device == rank))
    own = own[np.argsort(start_s[own], kind="stable")]
    times = dict.fromkeys(TIME_CLASSES, 0.0)
    free_s = 0.0
    for n in own:
        _explain(program, start_s, end_s, int(n), free_s, float(start_s[n]), times)
        times[KIND_CLASS[Kind(program.kind[n])]] += float(end_s[n] - start_s[n])
        free_s = max(free_s, float(end_s[n]))
    last = int(np.flatnonzero((program.device == rank) & (end_s == makespan_s))[0])
    if makespan_s > free_s:
        times[STREAM_CLASS.get(Stream(program.stream[last]), "bubble")] += makespan_s - free_s
    return times


def _explain(
    program: Program, start_s: Floats, end_s: Floats, n: int, free_s: float, until_s: float, times: dict[str, float]
) -> None:
    """Attributes the gap before an instruction: back along the transfers that it waited for."""
    while until_s > free_s:
        waits = program.dependencies[program.dependency_offsets[n] : program.dependency_offsets[n + 1]]
        late = [
            int(other)
            for other in waits
            if end_s[other] >= until_s and program.stream[other] != Stream.COMPUTE and start_s[other] < until_s
        ]
        if not late:
            times["bubble"] += until_s - free_s
            return
        n = min(late, key=lambda other: float(start_s[other]))
        begun_s = max(free_s, float(start_s[n]))
        times[STREAM_CLASS[Stream(program.stream[n])]] += until_s - begun_s
        until_s = begun_s
