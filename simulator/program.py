"""Program: what each stream of each device executes, as arrays. Plans are lowered to it; engines run it."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    TRANSFER = 5
    """Bytes over links: a copy, a message, a collective."""
    DISPATCH = 6
    """The host launches the kernels of a pass."""


class Stream(IntEnum):
    """Queues of a device; each is first in, first out."""

    COMPUTE = 0
    H2D = 1
    D2H = 2
    HOST = 3
    TP = 4
    """Collectives of tensor parallelism."""
    CP = 5
    EP = 6
    DP = 7
    """Collectives of data parallelism and ZeRO."""
    SEND = 8
    """Messages to the neighbouring pipeline ranks; the receiver's share of the links is part of the route."""
    DISPATCH = 9
    """The thread of the host that launches kernels; `HOST` is its cores and memory, which update parameters."""


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
    FRAMEWORK = 6
    """Workspaces of libraries, and what the framework keeps for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    """Instructions whose time depends on what else uses their links, in increasing order; row ``k`` of each array belongs to one of them.

    The links of row ``k`` are ``routes[route_offsets[k]:route_offsets[k + 1]]``, indices into ``link_bytes_per_s``.
    """

    instruction: NDArray[np.int64]
    size_bytes: NDArray[np.float64]
    """Positive."""
    limit_bytes_per_s: NDArray[np.float64]
    """Most that the transfer takes when it is alone; positive, may be infinite where it has a route."""
    route_offsets: NDArray[np.int64]
    routes: NDArray[np.int64]
    link_bytes_per_s: NDArray[np.float64]


def no_transfers() -> Transfers:
    """Of a program without any."""
    return Transfers(
        instruction=np.empty(0, dtype=np.int64), size_bytes=np.empty(0), limit_bytes_per_s=np.empty(0), route_offsets=np.zeros(1, dtype=np.int64),
        routes=np.empty(0, dtype=np.int64), link_bytes_per_s=np.empty(0),
    )  # fmt: skip


def no_slowdown() -> NDArray[np.float64]:
    """Streams that do not disturb each other: shape ``(len(Stream), len(Stream))``, all 1."""
    return np.ones((len(Stream), len(Stream)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Instructions in issue order; index ``n`` of every array belongs to instruction ``n``.

    ``duration_s`` is the time alone; of a transfer the latency before its bytes flow. Dependencies of ``n`` are ``dependencies[dependency_offsets[n]:dependency_offsets[n + 1]]``; its memory events likewise, at
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
    option_index: NDArray[np.int16]
    """Into ``option_names``."""
    dependency_offsets: NDArray[np.int64]
    dependencies: NDArray[np.int64]
    memory_offsets: NDArray[np.int64]
    memory_time_s: NDArray[np.float64]
    memory_bytes: NDArray[np.int64]
    memory_class: NDArray[np.int8]
    resident_bytes: tuple[tuple[int, ...], ...]
    """Per device and `MemoryClass`: bytes alive before the first instruction."""
    option_names: tuple[str, ...] = ("",)
    """Distinct ones."""
    transfers: Transfers = field(default_factory=no_transfers)
    slowdown: NDArray[np.float64] = field(default_factory=no_slowdown)
    """``slowdown[a, b]`` >= 1: time of an instruction on stream a while stream b of its device runs one, over its time alone."""

    @property
    def num_instructions(self) -> int:
        """Instructions over all devices and streams."""
        return len(self.kind)

    @property
    def option(self) -> tuple[str, ...]:
        """Of each instruction, how its block is run, or what it is for."""
        return tuple(self.option_names[index] for index in self.option_index.tolist())

    @property
    def num_devices(self) -> int:
        """Devices that hold memory; each may have several streams."""
        return len(self.resident_bytes)

    def label(self, index: int) -> str:
        """Text of one instruction, in the field's short form: ``F3 mb0``, ``R3 mb0``, ``B3 mb0``."""
        letter = {
            Kind.FORWARD: "F",
            Kind.RECOMPUTE: "R",
            Kind.BACKWARD: "B",
            Kind.OPTIMIZER: "step",
            Kind.REDUCE: "reduce",
            Kind.TRANSFER: "T",
            Kind.DISPATCH: "launch",
        }
        block = "" if self.block[index] < 0 else str(self.block[index])
        name = self.option_names[self.option_index[index]]
        option = f":{name}" if name else ""
        micro_batch = "" if self.micro_batch[index] < 0 else f" mb{self.micro_batch[index]}"
        return f"{letter[Kind(self.kind[index])]}{block}{option}{micro_batch}"
