"""Passes whose activations or weights travel to and from the host while they compute, and the optimizer's step there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from simulator.parallel.offload import DRAM, LINKS_PER_RANK, STAGED_CHUNKS, Offload, staged_bytes, weight_bytes
from simulator.parallel.stages import ChunkCost
from simulator.parallel.writer import Change, ProgramWriter
from simulator.pipeline.action import Action
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPass:
    """One pass to issue in chunks."""

    rank: int
    action: Action
    chunks: tuple[ChunkCost, ...]
    share: float
    """Of a micro-batch."""
    after: tuple[int, ...]
    """What the pass waits for."""
    before: int | None
    """First instruction of the rank's pass before this one."""
    less_s: float = 0.0
    """Of a backward pass, what another one does."""
    weight_share: float = 0.0
    """Part of what the pass frees that stays for another one."""

    @property
    def forward(self) -> bool:
        """Whether it is a forward pass."""
        return self.action.kind == "F"


class HostTraffic:
    """Issues what travels between devices and host."""

    def __init__(self, writer: ProgramWriter, offload: Offload, first_link: int) -> None:
        self.writer, self.offload, self.first_link = writer, offload, first_link
        self.leaving: dict[int, list[int]] = {}
        """Transfers of activations to the host, by rank."""
        self.held: dict[tuple[int, int, int, int], int] = {}
        """The transfer that took a chunk of (rank, stage, micro-batch, chunk) to the host."""
        self.down: dict[int, list[int]] = {}
        """Transfers of gradients to the host, by rank."""
        self.came: dict[tuple[int, int], int] = {}
        """Buckets that have gone to the host, by rank and place of the stage on it."""
        self.late: dict[int, list[int]] = {}
        """Parts of a late update on the host, by rank."""
        self.ahead: list[tuple[int, int]] = []
        """A transfer, and the instruction that it may start together with."""

    def settle(self) -> None:
        """Once all messages are tied to passes: what is fetched one pass ahead waits for what that pass waits for."""
        for index, companion in self.ahead:
            for other in self.writer.waits(companion):
                self.writer.wait(index, other)

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
            fetched = self._fetch(one, k, sizes[k], turn, made)
            waits = (*fetched, *(one.after if turn == 0 else ()), *(self._room(one.rank) if one.forward else ()))
            net = settled[turn + 1] - settled[turn] + kept[turn + 1] - kept[turn]
            dropped = self._weight_bytes(one.chunks[k])
            pieces = [
                (kind, seconds * one.share * (slower if kind is Kind.BACKWARD else 1.0))
                for kind, seconds in costs[turn].seconds
                if seconds > 0.0
            ]
            made.append(self._compute(one, pieces, waits, round(costs[turn].rise_bytes * one.share), net, dropped))
            if one.forward and sizes[k]:
                self._leave(one, k, sizes[k], made[-1][-1])
        return made[0][0], [own[-1] for own in made]

    def _compute(
        self, one: StagedPass, pieces: list[tuple[Kind, float]], waits: tuple[int, ...], rise: int, net: int, dropped: int
    ) -> list[int]:
        """Instructions of one chunk, the gradients' last; its bytes rise at its start and settle at its end."""
        pieces = sorted(pieces, key=lambda piece: piece[0] is Kind.BACKWARD) or [
            (Kind.FORWARD if one.forward else Kind.BACKWARD, 0.0)
        ]
        indices = []
        for place, (kind, seconds) in enumerate(pieces):
            start: tuple[Change, ...] = ((0.0, rise, MemoryClass.TRANSIENT),) if place == 0 else ()
            end: tuple[Change, ...] = (
                (AT_END, -rise, MemoryClass.TRANSIENT),
                (AT_END, net, MemoryClass.ACTIVATIONS),
                (AT_END, -dropped, MemoryClass.PARAMETERS),
            )
            memory = (*start, *(end if place == len(pieces) - 1 else ()))
            indices.append(
                self.writer.issue(
                    kind, one.rank, Stream.COMPUTE, seconds, after=waits if place == 0 else (), micro_batch=one.action.micro_batch,
                    stage=one.action.stage, memory=memory,
                )
            )  # fmt: skip
        return indices

    def _weight_bytes(self, chunk: ChunkCost) -> int:
        return weight_bytes(chunk, self.offload.weights, self.offload.element_bytes)

    def _room(self, rank: int) -> tuple[int, ...]:
        """The transfer whose end makes room for a chunk of a forward pass: with the one that computes, `STAGED_CHUNKS` hold offloaded bytes."""
        return tuple(self.leaving.get(rank, [])[-STAGED_CHUNKS : 1 - STAGED_CHUNKS])

    def _leave(self, one: StagedPass, k: int, size: int, after: int) -> None:
        index = self.transfer(
            one.rank, Stream.D2H, size, after=(after,), label=OUT, micro_batch=one.action.micro_batch, stage=one.action.stage,
            memory=((AT_END, -size, MemoryClass.ACTIVATIONS),),
        )  # fmt: skip
        self.leaving.setdefault(one.rank, []).append(index)
        self.held[one.rank, one.action.stage, one.action.micro_batch, k] = index

    def _fetch(self, one: StagedPass, k: int, size: int, turn: int, made: list[list[int]]) -> list[int]:
        """What a chunk needs from the host: at most one chunk ahead, and not before the rank's pass before this one."""
        wanted: list[tuple[int, MemoryClass, str, tuple[int, ...]]] = []
        weights = self._weight_bytes(one.chunks[k])
        if weights:
            wanted.append((weights, MemoryClass.PARAMETERS, FETCH, ()))
        if size and not one.forward:
            wanted.append(
                (size, MemoryClass.ACTIVATIONS, BACK, (self.held[one.rank, one.action.stage, one.action.micro_batch, k],))
            )
        fetched = []
        for own, memory_class, label, arrived in wanted:
            early = turn < STAGED_CHUNKS
            after = arrived if early else (*arrived, made[turn - STAGED_CHUNKS][-1])
            index = self.transfer(
                one.rank, Stream.H2D, own, after=after, label=label, micro_batch=one.action.micro_batch, stage=one.action.stage,
                memory=((0.0, own, memory_class),),
            )  # fmt: skip
            if early and one.before is not None:
                self.ahead.append((index, one.before))
            fetched.append(index)
        return fetched

    def leaves_each_time(self, rank: int, place: int) -> int:
        """Bytes of gradients of the rank's ``place``-th stage that go to the host after every micro-batch."""
        updates = self.offload.updates
        return int(updates[rank].each_bytes[place]) if updates and updates[rank].each_bytes else 0

    def gradients(self, rank: int, place: int, buckets: int, made: int, ready: int, *, last: bool) -> None:
        """Sends one of a stage's buckets of gradients to the host; the stage is the rank's ``place``-th.

        Gradients that go every time have no place of their own on the device: a bucket comes when it is made, at most two of them (one where a stage has
        no more) are there at once, and the host adds it to what it has.

        Args:
            rank: of the pipeline.
            place: of the stage on it.
            buckets: of the stage.
            made: the instruction that makes the bucket.
            ready: the one that reduces it, or ``made``.
            last: whether it is the last micro-batch's.
        """
        each = self.leaves_each_time(rank, place) // buckets
        whole = self.offload.updates[rank].down_bytes[place] / buckets if self.offload.updates and last else float(each)
        if whole <= 0.0:
            return
        sent = self.down.setdefault(rank, [])
        freed: tuple[Change, ...] = ()
        if each:
            self.writer.allocate(made, each, MemoryClass.GRADIENTS)
            freed = ((AT_END, -each, MemoryClass.GRADIENTS),)
            for other in sent[-1:] if buckets == 1 else sent[-STAGED_CHUNKS : 1 - STAGED_CHUNKS]:
                self.writer.wait(made, other)
        sent.append(self.transfer(rank, Stream.D2H, whole, after=(ready,), label=DOWN, memory=freed))
        if each and self.came.get((rank, place), 0) >= buckets:
            self._on_host(rank, _ADDING * each, (sent[-1],), label="add")
        self.came[rank, place] = self.came.get((rank, place), 0) + 1

    def _on_host(self, rank: int, moved_bytes: float, after: Sequence[int], *, label: str) -> int:
        """Issues work of the host that its memory bounds."""
        index = self.writer.issue(Kind.OPTIMIZER, rank, Stream.HOST, 0.0, after=after, label=label)
        self.writer.route(index, moved_bytes, inf, (self.first_link + LINKS_PER_RANK * rank + DRAM,))
        return index

    def begin(self, rank: int, parts: int) -> None:
        """Issues a late update: with the gradients of the step before, in ``parts``, beside all that the rank does now."""
        updates = self.offload.updates
        if updates and updates[rank].delayed and updates[rank].moved_bytes > 0.0:
            self.late[rank] = [self._on_host(rank, updates[rank].moved_bytes / parts, (), label="host") for _ in range(parts)]

    def update(self, rank: int, after: Sequence[int], step: int) -> int:
        """Issues the rank's optimizer step on the host, in as many parts as buckets came, and returns what the device waits for.

        Args:
            rank: of the pipeline.
            after: the rank's passes are over.
            step: the optimizer's step on the device.
        """
        last = step
        if self.offload.updates and self.offload.updates[rank].moved_bytes > 0.0:
            update, down = self.offload.updates[rank], self.down.get(rank, [])
            late = self.late.get(rank, [])
            parts = len(late) or max(1, min(MOST_PARTS, len(down)))
            ends = [step, *down]
            for part in range(parts):
                host = late[part] if late else self._on_host(rank, update.moved_bytes / parts, (*after, *down), label="host")
                ends.append(host)
                if update.up_bytes > 0.0:
                    ends.append(self.transfer(rank, Stream.H2D, update.up_bytes / parts, after=(host, *after), label=UP))
            last = self.writer.issue(Kind.OPTIMIZER, rank, Stream.COMPUTE, 0.0, after=ends, label="updated")
        if self.offload.returned_bytes and self.offload.returned_bytes[rank] > 0.0:
            self.transfer(rank, Stream.D2H, self.offload.returned_bytes[rank], after=(last,), label=RETURN)
        return last

    def transfer(
        self, rank: int, stream: Stream, size_bytes: float, *, after: Sequence[int], label: str, micro_batch: int = -1, stage: int = -1,
        memory: tuple[Change, ...] = (),
    ) -> int:  # fmt: skip
        """Issues a copy over the rank's share of its host link and of the host's memory."""
        index = self.writer.issue(
            Kind.TRANSFER, rank, stream, self.offload.path.latency_s, after=after, micro_batch=micro_batch, stage=stage, label=label, memory=memory
        )  # fmt: skip
        first = self.first_link + LINKS_PER_RANK * rank
        self.writer.route(index, size_bytes, inf, (first + (0 if stream is Stream.H2D else 1), first + 2, first + DRAM))
        return index
