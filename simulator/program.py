"""Program: what each stream of each device executes, as arrays. Plans are lowered to it; engines run it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Kind(IntEnum):
    """What an instruction does."""

    FORWARD = 0
    RECOMPUTE = 1
    BACKWARD = 2
    OPTIMIZER = 3
    REDUCE = 4
    """Local accumulation of gradients."""


class Stream(IntEnum):
    """Queues of a device; each is first in, first out."""

    COMPUTE = 0
    H2D = 1
    D2H = 2
    HOST = 3


class MemoryClass(IntEnum):
    """What bytes are for."""

    PARAMETERS = 0
    GRADIENTS = 1
    OPTIMIZER_STATES = 2
    BATCH = 3
    ACTIVATIONS = 4
    """Boundaries between blocks and what graphs keep for the backward pass."""
    TRANSIENT = 5
    """Bytes that the running instruction allocates and frees again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Instructions in issue order; index ``n`` of every array belongs to instruction ``n``.

    Dependencies of ``n`` are ``dependencies[dependency_offsets[n]:dependency_offsets[n + 1]]``; its memory events likewise, at
    ``memory_time_s`` after its start. Instructions of one (device, stream) run in index order.
    """

    kind: NDArray[np.int8]
    device: NDArray[np.int32]
    stream: NDArray[np.int8]
    duration_s: NDArray[np.float64]
    micro_batch: NDArray[np.int32]
    """-1 where an instruction belongs to no micro-batch."""
    block: NDArray[np.int32]
    """-1 where an instruction belongs to no block."""
    option: tuple[str, ...]
    dependency_offsets: NDArray[np.int64]
    dependencies: NDArray[np.int64]
    memory_offsets: NDArray[np.int64]
    memory_time_s: NDArray[np.float64]
    memory_bytes: NDArray[np.int64]
    memory_class: NDArray[np.int8]
    resident_bytes: tuple[tuple[int, ...], ...]
    """Per device and `MemoryClass`: bytes alive before the first instruction."""

    @property
    def num_instructions(self) -> int:
        """Instructions over all devices and streams."""
        return len(self.kind)

    @property
    def num_devices(self) -> int:
        """Devices that hold memory; each may have several streams."""
        return len(self.resident_bytes)

    def label(self, index: int) -> str:
        """Text of one instruction, in the field's short form: ``F3 mb0``, ``R3 mb0``, ``B3 mb0``."""
        letter = {Kind.FORWARD: "F", Kind.RECOMPUTE: "R", Kind.BACKWARD: "B", Kind.OPTIMIZER: "step", Kind.REDUCE: "reduce"}
        block = "" if self.block[index] < 0 else str(self.block[index])
        option = f":{self.option[index]}" if self.option[index] else ""
        micro_batch = "" if self.micro_batch[index] < 0 else f" mb{self.micro_batch[index]}"
        return f"{letter[Kind(self.kind[index])]}{block}{option}{micro_batch}"
