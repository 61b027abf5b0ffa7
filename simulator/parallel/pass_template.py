"""One distinct pass of a stage -> its template: compute, the collectives it waits for, gradients, messages, and what travels to the host beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from simulator.parallel.communication import Exposed, StageCommunication
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.offload import Offload
from simulator.parallel.offload_step import HostTraffic, StagedPass
from simulator.parallel.stages import ChunkCost, PassCost, StageCost
from simulator.parallel.template import Change, Link, Outside, Template, TemplateWriter, outside
from simulator.pipeline.action import ActionKind
from simulator.program import Kind, MemoryClass, Stream

_STREAM_OF_AXIS = {"tp_s": Stream.TP, "cp_s": Stream.CP, "ep_s": Stream.EP}
_PREVIOUS = outside(Outside.PREVIOUS)
_ARRIVAL = outside(Outside.ARRIVAL)


class Sends(IntEnum):
    """Where the result of a pass goes."""

    NOWHERE = 0
    OWN_RANK = 1
    OTHER_RANK = 2


class PassShape(NamedTuple):
    """How a pass differs from other passes of its stage on a rank."""

    kind: ActionKind
    last: bool
    """Of the stage's passes on the rank that make gradients."""
    first: bool
    """Of all its passes there."""
    first_gradients: bool
    """Of those that make parameters' gradients."""
    sends: Sends


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A stage on a rank, as one kind of its micro-batches meets it."""

    cost: StageCost
    communication: StageCommunication
    sync: GradientSync
    gradient_message_bytes: float
    """To the stage before."""
    chunks: tuple[ChunkCost, ...] = ()
    """What passes are cut into where offloaded bytes travel beside them."""
    each_bytes: int = 0
    """Gradients that go to the host after every micro-batch."""
    down_bytes: float = 0.0
    """Gradients that have gone to the host when the last micro-batch is over."""
    dispatched: bool = False
    """Whether the rank may wait for its host."""
    stalls_s: tuple[float, float] = (0.0, 0.0)
    """For which an idle device waits for its host before a forward and a backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSetting:
    """What all passes of a step have in common."""

    share: float
    """Of a micro-batch that an action runs."""
    message_limit_bytes_per_s: float
    message_latency_s: float
    waits_for_messages: bool
    weight_share: float
    offload: Offload | None


def pass_template(setting: PassSetting, holding: Holding, shape: PassShape) -> Template:
    """The instructions of a pass."""
    return _PassWriter(setting, holding, shape).template()


def host_can_bind(cost: StageCost, kinds: frozenset[ActionKind]) -> bool:
    """Whether a rank can ever wait for its host to dispatch passes of such kinds.

    **Model**: the host dispatches passes one after the other and waits for nothing. If it needs no longer for any pass than the device computes on it, then
    it has dispatched n passes when their times are over at the earliest, so it is never behind.
    """
    return any(_dispatch_s(cost, kind) > _compute_s(cost, kind) for kind in kinds)


def _dispatch_s(cost: StageCost, kind: ActionKind) -> float:
    whole = cost.backward.host_s
    return {"F": cost.forward.host_s, "BW": whole, "B": whole - cost.weight_host_s, "W": cost.weight_host_s}[kind]


def _compute_s(cost: StageCost, kind: ActionKind) -> float:
    whole = cost.backward.total_s
    return {"F": cost.forward.total_s, "BW": whole, "B": whole - cost.weight_s, "W": cost.weight_s}[kind]


def _kind_of(kind: ActionKind) -> Kind:
    return Kind.FORWARD if kind == "F" else Kind.BACKWARD


class _PassWriter:
    """Writes one template."""

    def __init__(self, setting: PassSetting, holding: Holding, shape: PassShape) -> None:
        self.setting, self.holding, self.shape = setting, holding, shape
        self.sync, self.kind = holding.sync, shape.kind
        self.writer = TemplateWriter()
        self.host = HostTraffic(self.writer, setting.offload) if setting.offload else None

    def template(self) -> Template:
        stall = self._stall()
        dispatch = self._dispatch()
        gathered = self._gather()
        first, indices = self._compute((_PREVIOUS, *gathered[:1], *stall))
        first = (*stall, first)[0]
        indices = self._dispatched(dispatch, indices)
        communication = self.holding.communication
        exposed = {"F": communication.forward, "W": Exposed()}.get(self.kind, communication.backward)
        ends = (self._exposed(exposed, indices[-1]), *gathered[1:])
        self._reduce(indices)
        message = self._send(ends[0]) if self.shape.sends is Sends.OTHER_RANK else None
        self.writer.add(first, waits=(_ARRIVAL,))
        waits = (message,) if message is not None and self.setting.waits_for_messages else ()
        return self.writer.template(
            first=first, exits=(*ends, *waits), delivers=ends if message is None else (message,)
        )  # fmt: skip

    def _stall(self) -> tuple[int, ...]:
        """The host begins with the pass when the device is idle and the message has arrived."""
        seconds = {"F": self.holding.stalls_s[0], "W": 0.0}.get(self.kind, self.holding.stalls_s[1])
        if seconds <= 0.0:
            return ()
        return (self.writer.issue(Kind.DISPATCH, Stream.DISPATCH, seconds, after=(_PREVIOUS,), label="sync"),)

    def _dispatch(self) -> int | None:
        """The host launches the pass's kernels, where that can matter."""
        if not self.holding.dispatched:
            return None
        seconds = _dispatch_s(self.holding.cost, self.kind) * self.setting.share
        return self.writer.issue(Kind.DISPATCH, Stream.DISPATCH, seconds) if seconds > 0.0 else None

    def _dispatched(self, dispatch: int | None, indices: list[int]) -> list[int]:
        """Computing is not over before the last kernel was launched; what comes next on the device waits, too."""
        if dispatch is None:
            return indices
        return [*indices[:-1], self.writer.issue(_kind_of(self.kind), Stream.COMPUTE, 0.0, after=(dispatch,), label="launched")]

    def _compute(self, after: tuple[int, ...]) -> tuple[int, list[int]]:
        """The first compute instruction, and those that end: all, or the last of each chunk."""
        cost, share = self.holding.cost, self.setting.share
        if self.kind == "W":
            freed, seconds = -self._kept_for_weights(), cost.weight_s * share
            memory = ((seconds, freed, MemoryClass.ACTIVATIONS),)
            index = self.writer.issue(Kind.BACKWARD, Stream.COMPUTE, seconds, after=after, label="W", memory=memory)
            return index, [index]
        less_s = cost.weight_s if self.kind == "B" else 0.0
        if self.host and self.host.offload.stages_passes:
            weight_share = self.setting.weight_share if self.kind == "B" else 0.0
            return self.host.run(
                StagedPass(
                    forward=self.kind == "F", chunks=self.holding.chunks, share=share, after=after, less_s=less_s, weight_share=weight_share
                )
            )  # fmt: skip
        indices = self._pieces(cost.forward if self.kind == "F" else cost.backward, less_s, after)
        return indices[0], indices

    def _pieces(self, cost: PassCost, less_s: float, after: tuple[int, ...]) -> list[int]:
        """Compute instructions of a pass; the bytes rise at its start and settle at its end.

        Of a backward pass the gradients come last: that piece is cut into buckets, and shorter where the weights' gradient is a pass of its own.
        """
        share = self.setting.share
        pieces = [(kind, seconds * share) for kind, seconds in cost.seconds if seconds > 0.0] or [(_kind_of(self.kind), 0.0)]
        pieces.sort(key=lambda piece: piece[0] is Kind.BACKWARD)
        pieces[-1] = (pieces[-1][0], max(0.0, pieces[-1][1] - less_s * share))
        chunks = self.sync.chunks if self.kind == "BW" and (self.shape.last or self.holding.each_bytes) else 1
        pieces = [*pieces[:-1], *[(pieces[-1][0], pieces[-1][1] / chunks)] * chunks]
        rise, net = round(cost.rise_bytes * share), round(cost.net_bytes * share)
        kept = self._kept_for_weights() if self.kind == "B" else 0
        start: tuple[Change, ...] = ((0.0, rise, MemoryClass.TRANSIENT),)
        indices: list[int] = []
        for place, (kind, seconds) in enumerate(pieces):
            end: tuple[Change, ...] = ((seconds, -rise, MemoryClass.TRANSIENT), (seconds, net + kept, MemoryClass.ACTIVATIONS))
            memory = (*(start if place == 0 else ()), *(end if place == len(pieces) - 1 else ()))
            indices.append(self.writer.issue(kind, Stream.COMPUTE, seconds, after=after if place == 0 else (), memory=memory))
        return indices

    def _kept_for_weights(self) -> int:
        """Bytes that the input's gradient leaves for the weights' one."""
        return round(-round(self.holding.cost.backward.net_bytes * self.setting.share) * self.setting.weight_share)

    def _exposed(self, exposed: Exposed, before: int) -> int:
        """Collectives that the pass waits for, after its compute (only their sum counts)."""
        for name, stream in _STREAM_OF_AXIS.items():
            seconds = getattr(exposed, name) * self.setting.share
            if seconds > 0.0:
                before = self.writer.issue(Kind.TRANSFER, stream, seconds, after=(before,), label=name[:2])
        return before

    def _gather(self) -> tuple[int, ...]:
        """What the pass waits for before it starts, and what must be over when it ends; empty: nothing.

        Under ZeRO 3 each pass gathers parameters; under ZeRO 1 and 2 the first of a stage does, if that overlaps.
        """
        sync = self.sync
        after: tuple[int, ...] = (_PREVIOUS,)
        if self.kind == "W":
            return ()
        gathers = sync.forward_gathers if self.kind == "F" else sync.backward_gathers
        first_s, rest_s = gathers.first_s, gathers.rest_s
        if sync.gather_overlaps and sync.gather_s > 0.0 and self.shape.first:
            first_s, after = sync.gather_s / sync.chunks, ()
            rest_s = sync.gather_s - first_s
        if first_s <= 0.0:
            return ()
        first = self.writer.issue(Kind.TRANSFER, Stream.DP, first_s, after=after, label="gather")
        return first, self.writer.issue(Kind.TRANSFER, Stream.DP, rest_s, after=(first,), label="gather")

    def _reduce(self, indices: Sequence[int]) -> None:
        """Gradients between replicas: bucket by bucket behind the last backward pass, or after each one under ZeRO 3."""
        sync, last = self.sync, self.shape.last and self.kind != "F"
        reduces = last or (sync.every_micro_batch and self.kind in {"BW", "W"})
        leaves = last or (self.holding.each_bytes > 0 and self.kind in {"BW", "W"})
        if not sync.reduce_overlaps or not (reduces or leaves):
            return
        chunks = indices[-sync.chunks :] if leaves and self.kind == "BW" else indices[-1:]
        for index in chunks:
            ready = index
            if sync.reduce_s > 0.0 and reduces:
                ready = self.writer.issue(Kind.TRANSFER, Stream.DP, sync.reduce_s / len(chunks), after=(index,), label="reduce")
            if self.host and leaves:
                self.host.gradients(
                    self.holding.each_bytes, self.holding.down_bytes, len(chunks), index, ready, first=self.shape.first_gradients, last=last
                )  # fmt: skip

    def _send(self, end: int) -> int:
        """The boundary to the next stage, or its gradient to the one before."""
        forward = self.kind == "F"
        size = self.holding.communication.message_bytes if forward else self.holding.gradient_message_bytes
        return self.writer.issue(
            Kind.TRANSFER, Stream.SEND, self.setting.message_latency_s, after=(end,), label="send" if forward else "send grad",
            transfer=(size * self.setting.share, self.setting.message_limit_bytes_per_s, (Link.OUT, Link.INTO_RECEIVER)),
        )  # fmt: skip
