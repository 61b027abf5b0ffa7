"""Host schedule: what of a step on one device lives on the host, and when each part goes and comes back.

The simulator lowers it and replay carries it out, errand by errand, so both do the same by construction. No torch, no times.

A step is a row of moments: the operations of each micro-batch, the optimizer's updates on the device, and its end. Around each there are errands:

- ``drop`` (before): the device's bytes of a part that has been stored two moments ago go, once the copy is done. So at most two
  stored parts are on the device: one that travels, one whose block computes.
- ``load`` (before): room is taken on the device, and the copy back begins, beside the moment that precedes the use.
- ``use`` (before): the moment waits for the copy.
- ``store`` (after, or before the first update): the copy to the host begins.
- ``update``, ``return``: the host updates parameters with gradients that were stored; updated parameters go up.
- ``release`` (after): the device's bytes go; the host has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from simulator.plan import Plan, expand_ranges
from simulator.workload import ParameterTensor, Workload

Verb = Literal["drop", "load", "use", "store", "update", "return", "release"]
PartKind = Literal["activations", "weights", "gradients", "updated"]

INPUT = -1
"""Member of a part of activations: the boundary that the block reads."""
SHARED = -1
"""Block of a part: parameters that several blocks use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShares:
    """Fractions of bytes that live on the host."""

    activations: tuple[float, ...]
    """Of what each block keeps from its forward to its backward pass."""
    weights: tuple[float, ...]
    """Of each block's own parameters."""
    optimizer: float = 0.0
    """Of the optimizer's states, updated there."""

    @property
    def any(self) -> bool:
        """Whether anything goes."""
        return any(self.activations) or any(self.weights) or self.optimizer > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors that travel together."""

    kind: PartKind
    micro_batch: int
    """-1 where a part belongs to no micro-batch."""
    block: int
    """`SHARED` for parameters of several blocks."""
    members: tuple[int, ...]
    """Of activations: `SavedTensor.packed`, or `INPUT`; else places among the block's own parameters (``updated``: that the device changes)."""
    sizes_bytes: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Of all members."""
        return sum(self.sizes_bytes)


class Errand(NamedTuple):
    """One thing to do for a part."""

    verb: Verb
    part: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A stretch of the device's compute stream, and the errands around it."""

    kind: Literal["operation", "update", "end"]
    block: int
    """Of an update: the block whose returning parameters it changes; `SHARED`: all that stay."""
    before: tuple[Errand, ...]
    after: tuple[Errand, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSchedule:
    """Parts, and the moments of a step in order."""

    parts: tuple[Part, ...]
    moments: tuple[Moment, ...]
    away: tuple[tuple[int, ...], ...]
    """By block: its own parameters that live on the host."""
    hosted: tuple[tuple[int, ...], ...]
    """By block: its own parameters that the host updates; last those of several blocks."""
    resident_bytes: int
    """On the host through the whole step."""
    staged_bytes: int
    """On the host at most at once, of activations: as many buffers of each size as are ever in use together."""

    @property
    def host_bytes(self) -> int:
        """Most bytes on the host."""
        return self.resident_bytes + self.staged_bytes

    def returned_bytes(self, number: int) -> int:
        """Bytes of a part of gradients whose parameters live on the device, so that they go up when the host has updated them."""
        part = self.parts[number]
        living = () if part.block == SHARED else self.away[part.block]
        return sum(size for place, size in zip(part.members, part.sizes_bytes, strict=True) if place not in living)

    def returning(self, block: int) -> tuple[int, ...]:
        """A block's parameters that live on the host and that the device updates."""
        return next((part.members for part in self.parts if part.kind == "updated" and part.block == block), ())


def host_shares(plan: Plan, num_blocks: int) -> HostShares:
    """The fractions of a plan that `simulator.plan.check_single_device` let pass, block by block; of exceptions that match, the last counts."""
    memory = plan.memory
    activations = [float(memory.activation_offload)] * num_blocks
    weights = [float(memory.weight_offload)] * num_blocks
    for position, exception in enumerate(memory.block):
        for block in expand_ranges(exception.blocks, num_blocks, key=f"memory.block[{position}].blocks"):
            if exception.activation_offload is not None:
                activations[block] = exception.activation_offload
            if exception.weight_offload is not None:
                weights[block] = exception.weight_offload
    return HostShares(activations=tuple(activations), weights=tuple(weights), optimizer=float(memory.optimizer_offload))


def tensors_of(workload: Workload, block: int) -> tuple[ParameterTensor, ...]:
    """A block's own parameters; those of several blocks for `SHARED`."""
    return workload.shared_parameters if block == SHARED else workload.blocks[block].parameters


def updated_groups(workload: Workload, schedule: HostSchedule) -> Iterator[tuple[int, tuple[ParameterTensor, ...]]]:
    """Parameters of each of the device's updates, in the order of the moments: (block or `SHARED` for all that stay, tensors)."""
    staying: list[ParameterTensor] = []
    for block, updated in zip([*range(len(workload.blocks)), SHARED], schedule.hosted, strict=True):
        gone = {*updated, *(schedule.away[block] if block != SHARED else ())}
        staying += [one for place, one in enumerate(tensors_of(workload, block)) if one.trained and place not in gone]
    yield SHARED, tuple(staying)
    for moment in schedule.moments:
        if moment.kind == "update" and moment.block != SHARED:
            yield (
                moment.block,
                tuple(workload.blocks[moment.block].parameters[place] for place in schedule.returning(moment.block)),
            )
