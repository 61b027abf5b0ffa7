"""Which tensors of a step go to the host and around which moments: shares and a sequence -> `HostSchedule`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from simulator.host_schedule import INPUT, SHARED, Errand, HostSchedule, HostShares, Moment, Part, PartKind, Verb, tensors_of
from simulator.sequence import Operation
from simulator.workload import Block, Workload

MOMENTS_IN_FLIGHT = 2
"""Moments from the store of a part to its drop."""
LEAST_STAY = MOMENTS_IN_FLIGHT + 1
"""Moments between the making and the use of what goes to the host: one to leave beside, one to come back beside."""
ORDER: tuple[Verb, ...] = ("drop", "load", "use", "store", "update", "return", "release")
"""Of the errands on one side of a moment."""


@dataclass(slots=True)
class _Credit:
    """Chooses whole tensors so that of every stretch about a fraction goes: takes one when the fractions so far add up to it."""

    bytes: float = 0.0

    def takes(self, size_bytes: int, share: float) -> bool:
        """Whether the next tensor goes."""
        self.bytes += share * size_bytes
        if share <= 0.0 or self.bytes < size_bytes:
            return False
        self.bytes -= size_bytes
        return True


def host_schedule(
    workload: Workload, operations: Sequence[Operation], shares: HostShares, *, num_microbatches: int, optimizer_states: int
) -> HostSchedule | None:
    """The errands of a step; None where nothing goes to the host.

    Args:
        workload: one micro-batch.
        operations: its sequence.
        shares: which fractions go.
        num_microbatches: of the step.
        optimizer_states: tensors of a parameter's size that the optimizer keeps.
    """
    if not shares.any:
        return None
    away = _away(workload, shares)
    hosted = _hosted(workload, shares)
    planner = _Planner(workload, tuple(operations), num_microbatches, away, hosted)
    planner.plan_activations(shares)
    planner.plan_weights()
    planner.plan_updates()
    return HostSchedule(
        parts=tuple(planner.parts), moments=planner.moments(), away=away, hosted=hosted,
        resident_bytes=_resident_bytes(workload, away, hosted, optimizer_states), staged_bytes=planner.staged_bytes(),
    )  # fmt: skip


def _away(workload: Workload, shares: HostShares) -> tuple[tuple[int, ...], ...]:
    credit = _Credit()
    return tuple(
        tuple(place for place, tensor in enumerate(block.parameters) if credit.takes(tensor.size_bytes, share))
        for block, share in zip(workload.blocks, shares.weights, strict=True)
    )


def _hosted(workload: Workload, shares: HostShares) -> tuple[tuple[int, ...], ...]:
    credit = _Credit()
    groups = [*(block.parameters for block in workload.blocks), workload.shared_parameters]
    return tuple(
        tuple(
            place for place, tensor in enumerate(group) if tensor.trained and credit.takes(tensor.size_bytes, shares.optimizer)
        )
        for group in groups
    )


def _resident_bytes(
    workload: Workload, away: Sequence[Sequence[int]], hosted: Sequence[Sequence[int]], optimizer_states: int
) -> int:
    """Parameters that live on the host; of those that it updates its own copy (unless they live there), gradients and states."""
    groups = [*(block.parameters for block in workload.blocks), workload.shared_parameters]
    living = [*away, ()]
    total = 0
    for group, own, updated in zip(groups, living, hosted, strict=True):
        kept = {*own, *updated}
        total += sum(group[place].size_bytes for place in kept)
        total += sum((1 + optimizer_states) * group[place].size_bytes for place in updated)
    return total


@dataclass(slots=True)
class _Planner:
    """Collects errands by moment."""

    workload: Workload
    operations: tuple[Operation, ...]
    num_microbatches: int
    away: tuple[tuple[int, ...], ...]
    hosted: tuple[tuple[int, ...], ...]
    parts: list[Part] = field(default_factory=list)
    before: dict[int, list[Errand]] = field(default_factory=dict)
    after: dict[int, list[Errand]] = field(default_factory=dict)
    returning: tuple[int, ...] = ()
    """Blocks with parameters that live on the host while the device updates them."""

    def __post_init__(self) -> None:
        self.returning = tuple(block for block in range(len(self.away)) if self.returning_of(block))

    @property
    def num_operations(self) -> int:
        """Of the whole step."""
        return self.num_microbatches * len(self.operations)

    def returning_of(self, block: int) -> tuple[int, ...]:
        """Places of those parameters."""
        tensors = self.workload.blocks[block].parameters
        return tuple(place for place in self.away[block] if tensors[place].trained and place not in self.hosted[block])

    @property
    def end(self) -> int:
        """Number of the last moment."""
        return self.num_operations + 1 + len(self.returning)

    def part(self, kind: PartKind, block: int, members: Sequence[int], sizes: Sequence[int], micro_batch: int = -1) -> int:
        """Adds a part and returns its number."""
        self.parts.append(
            Part(kind=kind, micro_batch=micro_batch, block=block, members=tuple(members), sizes_bytes=tuple(sizes))
        )
        return len(self.parts) - 1

    def store(self, part: int, moment: int, *, used: int | None) -> None:
        """A part goes after a moment and comes back for another one, or for good."""
        self.errand("store", part, moment, after=True)
        self.errand("drop", part, min(moment + MOMENTS_IN_FLIGHT, self.end))
        if used is not None:
            self.load(part, used)

    def load(self, part: int, used: int) -> None:
        """A part comes beside the moment before the one that uses it."""
        self.errand("load", part, max(0, used - 1))
        self.errand("use", part, used)

    def errand(self, verb: Verb, part: int, moment: int, *, after: bool = False) -> None:
        """Adds an errand around a moment."""
        (self.after if after else self.before).setdefault(moment, []).append(Errand(verb, part))

    def plan_activations(self, shares: HostShares) -> None:
        """What blocks keep leaves after they ran forward and comes back before it is read."""
        for micro_batch in range(self.num_microbatches):
            credit, first = _Credit(), micro_batch * len(self.operations)
            for stay in _stays(self.workload, self.operations):
                share = shares.activations[stay.block]
                chosen = [(member, size) for member, size in stay.tensors if credit.takes(size, share)]
                if chosen:
                    members, sizes = zip(*chosen, strict=True)
                    part = self.part("activations", stay.block, members, sizes, micro_batch)
                    self.store(part, first + stay.made, used=first + stay.used)

    def plan_weights(self) -> None:
        """Parameters come before each run of their block and go after it; runs of one block in a row share one coming."""
        blocks = [operation.block for operation in self.operations] * self.num_microbatches
        for moment, block in enumerate(blocks):
            if not self.away[block]:
                continue
            if moment == 0 or blocks[moment - 1] != block:
                tensors = self.workload.blocks[block].parameters
                part = self.part("weights", block, self.away[block], [tensors[place].size_bytes for place in self.away[block]])
                self.load(part, moment)
            if moment + 1 == len(blocks) or blocks[moment + 1] != block:
                self.errand("release", part, moment, after=True)

    def plan_updates(self) -> None:
        """Gradients that the host updates with leave once they are whole; parameters that the device updates come, and go back."""
        last = (self.num_microbatches - 1) * len(self.operations)
        final = {
            operation.block: last + position for position, operation in enumerate(self.operations) if operation.kind == "B"
        }
        for block in [*final, SHARED]:
            members = self.hosted[block]
            if not members:
                continue
            tensors = tensors_of(self.workload, block)
            part = self.part("gradients", block, members, [tensors[place].size_bytes for place in members])
            self._host_update(part, self.num_operations if block == SHARED else final[block], block)
        for number, block in enumerate(self.returning):
            tensors, members = self.workload.blocks[block].parameters, self.returning_of(block)
            part = self.part("updated", block, members, [tensors[place].size_bytes for place in members])
            moment = self.num_operations + 1 + number
            self.load(part, moment)
            self.store(part, moment, used=None)

    def _host_update(self, part: int, moment: int, block: int) -> None:
        """Gradients of several blocks are whole before the device's update, those of one block after its last backward pass."""
        if block == SHARED:
            self.errand("store", part, moment)
            self.errand("drop", part, min(moment + MOMENTS_IN_FLIGHT, self.end))
        else:
            self.store(part, moment, used=None)
        after = block != SHARED
        self.errand("update", part, moment, after=after)
        if block == SHARED or set(self.hosted[block]) - set(self.away[block]):
            self.errand("return", part, moment, after=after)

    def moments(self) -> tuple[Moment, ...]:
        """All moments with their errands, each moment's in the order of `ORDER`."""

        def ordered(errands: dict[int, list[Errand]], moment: int) -> tuple[Errand, ...]:
            return tuple(sorted(errands.get(moment, ()), key=lambda errand: ORDER.index(errand.verb)))

        def moment_of(number: int) -> Moment:
            extra = number - self.num_operations
            kind: Literal["operation", "update", "end"] = (
                "operation" if extra < 0 else "end" if number == self.end else "update"
            )
            block = self.operations[number % len(self.operations)].block if extra < 0 else SHARED
            if kind == "update" and extra > 0:
                block = self.returning[extra - 1]
            return Moment(kind=kind, block=block, before=ordered(self.before, number), after=ordered(self.after, number))

        return tuple(moment_of(number) for number in range(self.end + 1))

    def staged_bytes(self) -> int:
        """Bytes of the buffers that stored activations need: a buffer is given back when what it holds has been used."""
        alive, most = Counter[int](), Counter[int]()
        for moment in self.moments():
            for verb, part in (*moment.before, *moment.after):
                if self.parts[part].kind != "activations":
                    continue
                for size in self.parts[part].sizes_bytes:
                    alive[size] += {"store": 1, "use": -1}.get(verb, 0)
                    most[size] = max(most[size], alive[size])
        return sum(size * count for size, count in most.items())


class _Stay(NamedTuple):
    """What a block keeps on the device from one operation to another one that reads it."""

    made: int
    used: int
    block: int
    tensors: tuple[tuple[int, int], ...]
    """(member, bytes)."""


def _stays(workload: Workload, operations: Sequence[Operation]) -> Iterator[_Stay]:
    """Stays long enough to go away in, in order of their making.

    A block's tensors stay from its forward to its backward pass, a checkpointed input from the run that keeps it to the next that reads it. An
    input that is computed anew meanwhile stays on the device. The first block's input is the batch, which stays resident.
    """
    runs: list[list[int]] = [[] for _ in workload.blocks]
    """By block, the positions of its forward runs."""
    backward = [0] * len(workload.blocks)
    for position, operation in enumerate(operations):
        if operation.kind == "B":
            backward[operation.block] = position
        else:
            runs[operation.block].append(position)
    for made, (kind, index, option) in enumerate(operations):
        if kind not in {"F_all", "F_ck"}:
            continue
        used = backward[index] if kind == "F_all" else next((run for run in runs[index] if run > made), made)
        if used - made < LEAST_STAY:
            continue
        block = workload.blocks[index]
        takes_input = index > 0 and (kind == "F_ck" or block.option(option).keeps_input)
        if takes_input:
            takes_input = not any(made <= run < used for run in runs[index - 1])  # made anew meanwhile
        tensors = [(INPUT, block.input_bytes)] if takes_input else []
        if kind == "F_all":
            tensors += _own_tensors(block, option)
        yield _Stay(made, used, index, tuple(tensors))


def _own_tensors(block: Block, option: str) -> list[tuple[int, int]]:
    return sorted((tensor.packed, tensor.size_bytes) for tensor in block.option(option).saved if tensor.packed >= 0)
