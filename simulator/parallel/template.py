"""Templates: the instructions of one distinct pass, written once. What they wait for outside of themselves is named; `stamp` finds it for each pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from simulator.program import Kind, MemoryClass, Stream

Change = tuple[float, int, MemoryClass]
"""Offset in seconds from the instruction's start, bytes, class."""


class Outside(IntEnum):
    """What an instruction may wait for beyond its own pass. Numbers are also those of `stamp_kernels`."""

    PREVIOUS = 0
    """All that ends the rank's pass before."""
    ARRIVAL = 1
    """The message for this pass, or what ends the pass on the same rank whose result it takes."""
    FORWARD = 2
    """Instruction ``number`` of the forward pass of the same stage and micro-batch."""
    LEFT = 3
    """The ``number``-th last transfer of activations to the host that the rank issued before this pass."""
    SENT = 4
    """The ``number``-th last transfer of gradients to the host that the rank issued before this pass."""
    ALL_SENT = 5
    """All transfers of gradients to the host that the rank has issued."""
    AHEAD = 6
    """What the first instruction of the rank's pass before waits for."""
    BEGINNING = 7
    """Instruction ``number`` of the rank's beginning."""
    LAST_OF_RANK = 8
    """All that ends the last pass of rank ``number``."""
    END_OF_RANK = 9
    """What the end of rank ``number`` gives to others."""


class Link(IntEnum):
    """Links of a route, relative to a pass; from `HOST` on, the rank's own links to the host in their order."""

    OUT = 0
    INTO_RECEIVER = 1
    INTO_OWN = 2
    HOST = 3


def outside(what: Outside, number: int = 0) -> int:
    """A wait for something beyond the own pass: a number below 0, where own instructions have theirs from 0 on."""
    return -1 - (int(what) + len(Outside) * number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """One instruction of a template."""

    kind: Kind
    stream: Stream
    duration_s: float
    waits: tuple[int, ...]
    """Own instructions, and `outside`."""
    memory: tuple[Change, ...] = ()
    label: str = ""
    stage: int | None = None
    """None: the pass's own, and its micro-batch; else this one and no micro-batch."""
    transfer: tuple[float, float, tuple[int, ...]] | None = None
    """Bytes, limit and links of a transfer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A pass, or a rank's beginning or end."""

    instructions: tuple[Issued, ...] = ()
    first: int = -1
    """The one that waits for what others send."""
    exits: tuple[int, ...] = ()
    """What the rank's next pass waits for."""
    delivers: tuple[int, ...] = ()
    """What the pass that takes the result waits for."""
    left: tuple[int, ...] = ()
    """Transfers of activations to the host."""
    sent: tuple[int, ...] = ()
    """Transfers of gradients to the host."""


class TemplateWriter:
    """Instructions in issue order; an index is given back for others to wait for."""

    def __init__(self) -> None:
        self.instructions: list[Issued] = []
        self.left: list[int] = []
        self.sent: list[int] = []

    def issue(
        self, kind: Kind, stream: Stream, duration_s: float, *, after: Iterable[int] = (), label: str = "", memory: Iterable[Change] = (),
        stage: int | None = None, transfer: tuple[float, float, tuple[int, ...]] | None = None,
    ) -> int:  # fmt: skip
        """Adds an instruction and returns its index; arguments as in `Issued`."""
        changes = tuple(change for change in memory if change[1])
        self.instructions.append(
            Issued(
                kind=kind, stream=stream, duration_s=duration_s, waits=tuple(dict.fromkeys(after)), memory=changes, label=label, stage=stage, transfer=transfer
            )
        )  # fmt: skip
        return len(self.instructions) - 1

    def add(self, index: int, *, waits: Sequence[int] = (), memory: Sequence[Change] = ()) -> None:
        """Makes an instruction wait for more, and adds bytes at its start."""
        one = self.instructions[index]
        self.instructions[index] = Issued(
            kind=one.kind, stream=one.stream, duration_s=one.duration_s, waits=tuple(dict.fromkeys((*one.waits, *waits))), memory=(*memory, *one.memory),
            label=one.label, stage=one.stage, transfer=one.transfer,
        )  # fmt: skip

    def before_last_left(self) -> tuple[int, ...]:
        """The transfer of activations before the last one, here or before this pass."""
        return (self.left[-2],) if len(self.left) > 1 else (outside(Outside.LEFT, 2 - len(self.left)),)

    def last_sent(self, place: int) -> tuple[int, ...]:
        """The ``place``-th last transfer of gradients, here or before this pass."""
        return (self.sent[-place],) if len(self.sent) >= place else (outside(Outside.SENT, place - len(self.sent)),)

    def template(self, *, first: int = -1, exits: Sequence[int] = (), delivers: Sequence[int] = ()) -> Template:
        """What has been issued."""
        return Template(
            instructions=tuple(self.instructions), first=first, exits=tuple(exits), delivers=tuple(delivers), left=tuple(self.left), sent=tuple(self.sent)
        )  # fmt: skip
