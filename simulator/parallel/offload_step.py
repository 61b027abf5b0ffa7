"""Passes whose activations or weights travel to and from the host while they compute, and the optimizer's step there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from simulator.parallel.offload import DRAM, STAGED_CHUNKS, HostUpdate, Offload, staged_bytes, weight_bytes
from simulator.parallel.stages import ChunkCost
from simulator.parallel.template import Change, Link, Outside, TemplateWriter, outside
from simulator.program import Kind, MemoryClass, Stream

AT_END = inf
"""Offset of a memory event at the end of an instruction, however long that takes."""
OUT, BACK, FETCH, DOWN, UP, RETURN = "offload", "reload", "fetch", "grads", "params", "return"
"""Labels of transfers: activations to the host, back from there, parameters from there for a pass; gradients to the host, parameters that it has updated
from there, parameters that the device has updated to there."""

MOST_PARTS = 16
"""Of the host's step, so that parameters go up while it goes on."""
_ADDING = 3
"""Bytes that the host moves for each that it adds to a sum: both read, one written."""
_NO_PASS = -1
"""Stage of what belongs to the step, not to a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPass:
    """One pass to issue in chunks."""

    forward: bool
    chunks: tuple[ChunkCost, ...]
    share: float
    """Of a micro-batch."""
    after: tuple[int, ...]
    """What the pass waits for."""
    less_s: float = 0.0
    """Of a backward pass, what another one does."""
    weight_share: float = 0.0
    """Part of what the pass frees that stays for another one."""


class HostTraffic:
    """Issues what travels between a device and its host."""

    def __init__(self, writer: TemplateWriter, offload: Offload) -> None:
        self.writer, self.offload = writer, offload

    def run(self, one: StagedPass) -> tuple[int, list[int]]:
        """Issues a pass.

        Returns:
            Its first compute instruction, and the last one of each chunk: in a backward pass those that make gradients.
        """
        turns = range(len(one.chunks)) if one.forward else range(len(one.chunks) - 1, -1, -1)
        costs = [one.chunks[k].forward if one.forward else one.chunks[k].backward for k in turns]
        total_s = sum(seconds for cost in costs for kind, seconds in cost.seconds if kind is Kind.BACKWARD)
        slower = max(0.0, 1.0 - one.less_s / total_s) if total_s > 0.0 else 1.0
        sizes = staged_bytes(one.chunks, self.offload.activations, one.share)
        settled = [round(net * one.share) for net in accumulate((cost.net_bytes for cost in costs), initial=0)]
        kept = [max(0, round(-net * one.weight_share)) for net in settled]
        made: list[list[int]] = []
        for turn, k in enumerate(turns):
            fetched = self._fetch(one, k, sizes, turn, made)
            room = self.writer.before_last_left() if one.forward else ()
            waits = (*fetched, *(one.after if turn == 0 else ()), *room)
            net = settled[turn + 1] - settled[turn] + kept[turn + 1] - kept[turn]
            pieces = [
                (kind, seconds * one.share * (slower if kind is Kind.BACKWARD else 1.0))
                for kind, seconds in costs[turn].seconds
                if seconds > 0.0
            ]
            dropped = self._weight_bytes(one.chunks[k])
            made.append(self._compute(one, pieces, waits, round(costs[turn].rise_bytes * one.share), net, dropped))
            if one.forward and sizes[k]:
                memory = ((AT_END, -sizes[k], MemoryClass.ACTIVATIONS),)
                self.writer.left.append(self._copy(Stream.D2H, sizes[k], after=(made[-1][-1],), label=OUT, memory=memory))
        return made[0][0], [own[-1] for own in made]

    def _compute(
        self, one: StagedPass, pieces: list[tuple[Kind, float]], waits: tuple[int, ...], rise: int, net: int, dropped: int
    ) -> list[int]:
        """Instructions of one chunk, the gradients' last; its bytes rise at its start and settle at its end."""
        pieces = sorted(pieces, key=lambda piece: piece[0] is Kind.BACKWARD) or [
            (Kind.FORWARD if one.forward else Kind.BACKWARD, 0.0)
        ]
        start: tuple[Change, ...] = ((0.0, rise, MemoryClass.TRANSIENT),)
        end: tuple[Change, ...] = (
            (AT_END, -rise, MemoryClass.TRANSIENT), (AT_END, net, MemoryClass.ACTIVATIONS), (AT_END, -dropped, MemoryClass.PARAMETERS),
        )  # fmt: skip
        return [
            self.writer.issue(
                kind,
                Stream.COMPUTE,
                seconds,
                after=waits if place == 0 else (),
                memory=(*(start if place == 0 else ()), *(end if place == len(pieces) - 1 else ())),
            )
            for place, (kind, seconds) in enumerate(pieces)
        ]

    def _weight_bytes(self, chunk: ChunkCost) -> int:
        return weight_bytes(chunk, self.offload.weights, self.offload.element_bytes)

    def _fetch(self, one: StagedPass, k: int, sizes: Sequence[int], turn: int, made: list[list[int]]) -> list[int]:
        """What a chunk needs from the host: at most one chunk ahead, and not before the rank's pass before this one."""
        wanted: list[tuple[int, MemoryClass, str, tuple[int, ...]]] = []
        weights = self._weight_bytes(one.chunks[k])
        if weights:
            wanted.append((weights, MemoryClass.PARAMETERS, FETCH, ()))
        if sizes[k] and not one.forward:
            gone = outside(Outside.FORWARD, sum(size > 0 for size in sizes[:k]))
            wanted.append((sizes[k], MemoryClass.ACTIVATIONS, BACK, (gone,)))
        early = (outside(Outside.AHEAD),) if turn < STAGED_CHUNKS else (made[turn - STAGED_CHUNKS][-1],)
        return [
            self._copy(Stream.H2D, own, after=(*arrived, *early), label=label, memory=((0.0, own, memory_class),))
            for own, memory_class, label, arrived in wanted
        ]

    def gradients(
        self, each_bytes: int, down_bytes: float, buckets: int, made: int, ready: int, *, first: bool, last: bool
    ) -> None:
        """Sends one of a stage's buckets of gradients to the host.

        Gradients that go every time have no place of their own on the device: a bucket comes when it is made, at most two of them (one where a stage has
        no more) are there at once, and the host adds it to what it has.

        Args:
            each_bytes: of the stage, that go after every micro-batch.
            down_bytes: of the stage, that have gone when the last micro-batch is over.
            buckets: of the stage.
            made: the instruction that makes the bucket.
            ready: the one that reduces it, or ``made``.
            first: whether it is the first micro-batch's: the host has nothing to add it to.
            last: whether it is the last micro-batch's.
        """
        each = each_bytes // buckets
        whole = down_bytes / buckets if last else float(each)
        if whole <= 0.0:
            return
        freed: tuple[Change, ...] = ()
        if each:
            room = self.writer.last_sent(1 if buckets == 1 else STAGED_CHUNKS)
            self.writer.add(made, waits=room, memory=((0.0, each, MemoryClass.GRADIENTS),))
            freed = ((AT_END, -each, MemoryClass.GRADIENTS),)
        sent = self._copy(Stream.D2H, whole, after=(ready,), label=DOWN, memory=freed, stage=_NO_PASS)
        self.writer.sent.append(sent)
        if each and not first:
            self._on_host(_ADDING * each, (sent,), label="add")

    def _on_host(self, moved_bytes: float, after: Sequence[int], *, label: str) -> int:
        """Issues work of the host that its memory bounds."""
        return self.writer.issue(
            Kind.OPTIMIZER, Stream.HOST, 0.0, after=after, label=label, stage=_NO_PASS, transfer=(moved_bytes, inf, (Link.HOST + DRAM,))
        )  # fmt: skip

    def late_update(self, update: HostUpdate, parts: int) -> None:
        """Issues an update with the gradients of the step before, in parts, beside all that the rank does now."""
        if update.delayed and update.moved_bytes > 0.0:
            for _ in range(parts):
                self._on_host(update.moved_bytes / parts, (), label="host")

    def update(self, update: HostUpdate, after: Sequence[int], step: int, *, late: range, sent: int) -> int:
        """Issues the rank's optimizer step on the host, in as many parts as buckets came, and returns what the device waits for.

        Args:
            update: the rank's.
            after: the rank's passes are over.
            step: the optimizer's step on the device.
            late: instructions of the rank's beginning that update; empty: none.
            sent: transfers of gradients that the rank has issued.
        """
        if update.moved_bytes <= 0.0:
            return step
        parts = len(late) or max(1, min(MOST_PARTS, sent))
        came = (outside(Outside.ALL_SENT), *self.writer.sent)
        ends = [step, *came]
        for part in range(parts):
            host = (
                outside(Outside.BEGINNING, late[part])
                if late
                else self._on_host(update.moved_bytes / parts, (*after, *came), label="host")
            )
            ends.append(host)
            if update.up_bytes > 0.0:
                ends.append(self._copy(Stream.H2D, update.up_bytes / parts, after=(host, *after), label=UP, stage=_NO_PASS))
        return self.writer.issue(Kind.OPTIMIZER, Stream.COMPUTE, 0.0, after=ends, label="updated", stage=_NO_PASS)

    def give_back(self, size_bytes: float, after: int) -> None:
        """Sends parameters that the device has updated and that live on the host."""
        if size_bytes > 0.0:
            self._copy(Stream.D2H, size_bytes, after=(after,), label=RETURN, stage=_NO_PASS)

    def _copy(
        self, stream: Stream, size_bytes: float, *, after: Sequence[int], label: str, memory: tuple[Change, ...] = (), stage: int | None = None
    ) -> int:  # fmt: skip
        """Issues a copy over the rank's share of its host link and of the host's memory."""
        links = (Link.HOST + (0 if stream is Stream.H2D else 1), Link.HOST + 2, Link.HOST + DRAM)
        return self.writer.issue(
            Kind.TRANSFER, stream, self.offload.path.latency_s, after=after, label=label, memory=memory, stage=stage, transfer=(size_bytes, inf, links)
        )  # fmt: skip
