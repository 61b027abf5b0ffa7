"""Bytes on the device along a sequence, and the peak that any host schedule makes of them: what a search asks of one sequence beside many shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.host_schedule import HostSchedule, updated_groups
from simulator.program import Kind, Program
from simulator.workload import Block, BlockOption, Pass, Workload

_FLOW = frozenset({"output", "saved_input", "saved_output", "grad_input", "shared_gradient"})
"""Buffers by which lowering decides what to issue, and whose holders it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLevels:
    """Bytes above those that are resident, operation by operation, of a step that keeps all on the device.

    **Model**: errands change the level where an operation starts or ends, by whole parts, and the update on the device lets go only of gradients that stayed. So the peak with a
    host schedule is that of the sequence alone, moment by moment, plus what has come and gone until then.
    """

    start_bytes: NDArray[np.int64]
    """Level before each operation, and last before the update."""
    rise_bytes: NDArray[np.int64]
    """Most that each operation adds to it; 0 for the update, which only lets go."""

    def peak_bytes(self, workload: Workload, schedule: HostSchedule) -> int:
        """Most bytes above those that are resident with this schedule."""
        count = len(self.start_bytes) - 1
        freed = {block: sum(tensor.size_bytes for tensor in group) for block, group in updated_groups(workload, schedule)}
        moved = gone = peak = 0
        for number, moment in enumerate(schedule.moments):
            for verb, part in moment.before:
                if verb in {"drop", "load"}:
                    size = schedule.parts[part].size_bytes
                    moved += size if verb == "load" else -size
            place = min(number, count)
            peak = max(peak, int(self.start_bytes[place] + self.rise_bytes[place]) - gone + moved)
            moved -= sum(schedule.parts[part].size_bytes for verb, part in moment.after if verb == "release")
            gone += freed.get(moment.block, 0) if moment.kind == "update" else 0
        return peak


def sequence_levels(program: Program) -> SequenceLevels:
    """The levels of a program of one device that sends nothing to its host; its last instruction is the update."""
    offsets = program.memory_offsets
    after = np.concatenate(([0], np.cumsum(program.memory_bytes)))
    start = after[offsets[:-1]]
    rise = np.array([after[low : high + 1].max() for low, high in pairwise(offsets)], np.int64) - start
    rise[-1] = 0
    moments = program.kind != Kind.REDUCE  # adds up shared gradients at the end of a micro-batch: lets go, never takes
    return SequenceLevels(start_bytes=start[moments].astype(np.int64), rise_bytes=rise[moments])


def timing_workload(workload: Workload) -> Workload:
    """The same kernels without the bytes inside blocks: it lowers to the same instructions and waits in a fraction of the time, and says nothing about memory."""
    blocks: dict[int, Block] = {id(block): _timing_block(block) for block in workload.blocks}
    return replace(workload, blocks=tuple(blocks[id(block)] for block in workload.blocks))


def _timing_block(block: Block) -> Block:
    options = tuple(_changed(option, ("forward", "backward", "backward_accumulate")) for option in block.options)
    return replace(block, discard=_flow_only(block.discard), options=options)


def _changed(option: BlockOption, names: tuple[str, ...]) -> BlockOption:
    changes: dict[str, Any] = {name: _flow_only(getattr(option, name)) for name in names}
    return replace(option, **changes)


def _flow_only(run: Pass) -> Pass:
    return replace(run, memory=tuple(event for event in run.memory if event.buffer in _FLOW))
