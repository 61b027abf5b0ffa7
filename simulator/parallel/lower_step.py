"""A pipeline order, the cost of its stages and their communication -> the Program of one training step: one device per pipeline rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.parallel.communication import Exposed, StageCommunication
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.offload import Offload
from simulator.parallel.offload_step import HostTraffic, StagedPass
from simulator.parallel.optimizer_step import GradientCheck
from simulator.parallel.stages import PassCost, StageCost
from simulator.parallel.writer import Change, ProgramWriter
from simulator.pipeline.action import Action, Order
from simulator.program import Kind, MemoryClass, Program, Stream

_STREAM_OF_AXIS = {"tp_s": Stream.TP, "cp_s": Stream.CP, "ep_s": Stream.EP}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """All that a step consists of, by stage."""

    order: Order
    costs: Sequence[StageCost]
    communication: Sequence[StageCommunication]
    sync: Sequence[GradientSync]
    optimizer_s: Sequence[float]
    """Per pipeline rank."""
    tied_s: float
    """All-reduce of the gradients of the table that first and last stage share."""
    message_limit_bytes_per_s: float
    message_latency_s: float
    link_bytes_per_s: Sequence[float]
    """Of each rank: link out, link in."""
    waits_for_messages: bool = False
    """A rank computes on only when its message has arrived."""
    weight_share: float
    """Part of a micro-batch's activations that only the weights' gradient needs."""
    offload: Offload | None = None
    """What lives on the host; None: nothing."""
    check: GradientCheck | None = None
    """What is done to gradients before the optimizer steps; None: nothing."""
    load_s: Sequence[float] = ()
    """Of each rank: copy of the first micro-batch, which its first pass waits for; empty: nothing is copied."""


class _Step:
    """Issues actions rank by rank; messages tie them together afterwards."""

    def __init__(self, parts: StepParts) -> None:
        self.parts = parts
        offload = parts.offload
        own = offload.path.capacities * parts.order.num_ranks if offload else ()
        self.writer = ProgramWriter([*parts.link_bytes_per_s, *own])
        self.host = HostTraffic(self.writer, offload, len(parts.link_bytes_per_s)) if offload else None
        self.first: dict[Action, int] = {}
        """The instruction of an action that waits for what others send."""
        self.last: dict[Action, tuple[int, ...]] = {}
        """Instructions that end an action."""
        self.messages: dict[Action, tuple[int, ...]] = {}
        self.rank_of: dict[Action, int] = {}
        self.backwards: dict[tuple[int, int], list[Action]] = {}
        self.previous: list[tuple[int, ...]] = [()] * parts.order.num_ranks
        self.pass_before: list[int | None] = [None] * parts.order.num_ranks
        """First instruction of each rank's pass before the present one."""
        self.gathered: set[tuple[int, int]] = set()
        """Rank and stage whose updated parameters are there."""
        self.tied: list[tuple[int, tuple[int, ...]]] = []
        """Each rank's part in the tied table's all-reduce, and what it waits for."""
        self.agreed: list[tuple[int, tuple[int, ...]]] = []
        """Each rank's part in the agreement about gradients, and the look at them that it waits for."""

    def lower(self, resident_bytes: Sequence[tuple[int, ...]], slowdown: NDArray[np.float64]) -> Program:
        order = self.parts.order
        for rank, cells in enumerate(order.ranks):
            for cell in cells:
                for action in cell.parts:
                    self.rank_of[action] = rank
                    if action.kind in {"B", "BW", "W"}:
                        self.backwards.setdefault((rank, action.stage), []).append(action)
        for rank, cells in enumerate(order.ranks):
            self._begin(rank)
            for cell in cells:
                for action in cell.parts:
                    self._action(rank, action)
            self._end(rank)
        for action in self.rank_of:
            self._receive(action)
        self._together(self.tied)
        self._together(self.agreed)
        if self.host:
            self.host.settle()
        return self.writer.program(resident_bytes, slowdown)

    def _together(self, parts: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Each rank's part in a collective waits for what all of them wait for."""
        for index, _ in parts:
            for other in (other for _, waits in parts for other in waits):
                self.writer.wait(index, other)

    def _begin(self, rank: int) -> None:
        if self.parts.load_s and self.parts.load_s[rank] > 0.0:
            load = self.writer.issue(Kind.TRANSFER, rank, Stream.HOST, self.parts.load_s[rank], label="batch")
            self.previous[rank] = (load,)
        if self.host:
            self.host.begin(rank, sum(self.parts.sync[stage].chunks for stage in self.parts.order.stages_of_rank[rank]))

    def _action(self, rank: int, action: Action) -> None:
        stage = action.stage
        cost, communication = self.parts.costs[stage], self.parts.communication[stage]
        share = 1.0 / self.parts.order.microbatch_parts
        if action.kind == "W":
            self._weights(rank, action, cost, share)
            return
        whole = cost.forward if action.kind == "F" else cost.backward
        exposed = communication.forward if action.kind == "F" else communication.backward
        less_s = cost.weight_s if action.kind == "B" else 0.0
        gathered = self._gather(rank, action)
        if self.host and self.host.offload.stages_passes:
            first, indices = self._staged(self.host, rank, action, less_s, share, gathered)
        else:
            indices = self._compute(rank, action, whole, less_s, share, gathered)
            first = indices[0]
        ends = self._exposed(rank, action, exposed, share, indices[-1])
        ends = self._reduce(rank, action, indices, ends)
        self.first[action], self.last[action] = first, (*ends, *gathered[1])
        self.previous[rank], self.pass_before[rank] = self.last[action], first
        self._send(rank, action, ends)

    def _compute(
        self,
        rank: int,
        action: Action,
        cost: PassCost,
        less_s: float,
        share: float,
        gathered: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> list[int]:
        """Compute instructions of a pass; the bytes rise at its start and settle at its end.

        Of a backward pass the gradients come last: that piece is cut into buckets, and shorter where the weights' gradient is a pass of its own.
        """
        pieces = [(kind, seconds * share) for kind, seconds in cost.seconds if seconds > 0.0]
        pieces = pieces or [(Kind.FORWARD if action.kind == "F" else Kind.BACKWARD, 0.0)]
        pieces.sort(key=lambda piece: piece[0] is Kind.BACKWARD)
        pieces[-1] = (pieces[-1][0], max(0.0, pieces[-1][1] - less_s * share))
        in_buckets = action.kind == "BW" and (self._is_last(rank, action) or self._leaves(rank, action))
        chunks = self.parts.sync[action.stage].chunks if in_buckets else 1
        pieces = [*pieces[:-1], *[(pieces[-1][0], pieces[-1][1] / chunks)] * chunks]
        rise, net = round(cost.rise_bytes * share), round(cost.net_bytes * share)
        kept = self._kept_for_weights(cost, share) if action.kind == "B" else 0
        start: tuple[Change, ...] = ((0.0, rise, MemoryClass.TRANSIENT),)
        indices: list[int] = []
        for place, (kind, seconds) in enumerate(pieces):
            end: tuple[Change, ...] = ((seconds, -rise, MemoryClass.TRANSIENT), (seconds, net + kept, MemoryClass.ACTIVATIONS))
            memory = (*(start if place == 0 else ()), *(end if place == len(pieces) - 1 else ()))
            after = (*self.previous[rank], *gathered[0]) if place == 0 else ()
            indices.append(
                self.writer.issue(
                    kind,
                    rank,
                    Stream.COMPUTE,
                    seconds,
                    after=after,
                    micro_batch=action.micro_batch,
                    stage=action.stage,
                    memory=memory,
                )
            )
        return indices

    def _kept_for_weights(self, backward: PassCost, share: float) -> int:
        """Bytes that the input's gradient leaves for the weights' one."""
        return round(-round(backward.net_bytes * share) * self.parts.weight_share)

    def _weights(self, rank: int, action: Action, cost: StageCost, share: float) -> None:
        freed = -self._kept_for_weights(cost.backward, share)
        seconds = cost.weight_s * share
        index = self.writer.issue(
            Kind.BACKWARD, rank, Stream.COMPUTE, seconds, after=self.previous[rank], micro_batch=action.micro_batch, stage=action.stage, label="W",
            memory=((seconds, freed, MemoryClass.ACTIVATIONS),),
        )  # fmt: skip
        ends = self._reduce(rank, action, [index], (index,))
        self.first[action], self.last[action] = index, ends
        self.previous[rank], self.pass_before[rank] = (index,), index

    def _staged(
        self,
        host: HostTraffic,
        rank: int,
        action: Action,
        less_s: float,
        share: float,
        gathered: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> tuple[int, list[int]]:
        """A pass in chunks beside which the host's part travels: its first compute instruction, and the last one of each chunk."""
        staged = StagedPass(
            rank=rank, action=action, chunks=host.offload.chunks_of_stage[action.stage], share=share, after=(*self.previous[rank], *gathered[0]),
            before=self.pass_before[rank], less_s=less_s, weight_share=self.parts.weight_share if action.kind == "B" else 0.0,
        )  # fmt: skip
        return host.run(staged)

    def _exposed(self, rank: int, action: Action, exposed: Exposed, share: float, before: int) -> tuple[int, ...]:
        """Collectives that the pass waits for, after its compute (only their sum counts)."""
        for name, stream in _STREAM_OF_AXIS.items():
            seconds = getattr(exposed, name) * share
            if seconds > 0.0:
                before = self._collective(rank, action, seconds, stream=stream, after=(before,), label=name[:2])
        return (before,)

    def _gather(self, rank: int, action: Action) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the pass waits for before it starts, and what must be over when it ends.

        Under ZeRO 3 each pass gathers parameters; under ZeRO 1 and 2 the first of a stage does, if that overlaps.
        """
        sync, key = self.parts.sync[action.stage], (rank, action.stage)
        gathers = sync.forward_gathers if action.kind == "F" else sync.backward_gathers
        first_s, rest_s, after = gathers.first_s, gathers.rest_s, self.previous[rank]
        if sync.gather_overlaps and sync.gather_s > 0.0 and key not in self.gathered:
            self.gathered.add(key)
            first_s, after = sync.gather_s / sync.chunks, ()
            rest_s = sync.gather_s - first_s
        if first_s <= 0.0:
            return (), ()
        first = self._collective(rank, action, first_s, after=after, label="gather")
        return (first,), (self._collective(rank, action, rest_s, after=(first,), label="gather"),)

    def _collective(
        self, rank: int, action: Action, seconds: float, *, after: tuple[int, ...], label: str, stream: Stream = Stream.DP
    ) -> int:  # fmt: skip
        """Issues a collective."""
        return self.writer.issue(
            Kind.TRANSFER, rank, stream, seconds, after=after, micro_batch=action.micro_batch, stage=action.stage, label=label
        )

    def _is_last(self, rank: int, action: Action) -> bool:
        return self.backwards[rank, action.stage][-1] == action if action.kind != "F" else False

    def _reduce(self, rank: int, action: Action, indices: Sequence[int], ends: tuple[int, ...]) -> tuple[int, ...]:
        """Gradients between replicas: bucket by bucket behind the last backward pass, or after each one under ZeRO 3."""
        sync = self.parts.sync[action.stage]
        last = self._is_last(rank, action)
        reduces = last or (sync.every_micro_batch and action.kind != "B")
        leaves = last or self._leaves(rank, action)
        if not sync.reduce_overlaps or action.kind == "F" or not (reduces or leaves):
            return ends
        chunks = indices[-sync.chunks :] if leaves and action.kind == "BW" else indices[-1:]
        for index in chunks:
            ready = index
            if sync.reduce_s > 0.0 and reduces:
                ready = self._collective(rank, action, sync.reduce_s / len(chunks), after=(index,), label="reduce")
            if self.host and leaves:
                self.host.gradients(rank, self._place(rank, action.stage), len(chunks), index, ready, last=last)
        return ends

    def _leaves(self, rank: int, action: Action) -> bool:
        """Whether gradients go to the host after each of the stage's passes that make them."""
        return (
            self.host is not None
            and action.kind in {"BW", "W"}
            and self.host.leaves_each_time(rank, self._place(rank, action.stage)) > 0
        )

    def _place(self, rank: int, stage: int) -> int:
        """Which of the rank's stages it is."""
        return self.parts.order.stages_of_rank[rank].index(stage)

    def _send(self, rank: int, action: Action, ends: tuple[int, ...]) -> None:
        """The boundary to the next stage, or its gradient to the one before, if that is elsewhere."""
        target = self._target(action)
        receiver = self.rank_of.get(target) if target else None
        if target is None or receiver is None or receiver == rank:
            return
        parts, stage = self.parts, action.stage if action.kind == "F" else action.stage - 1
        index = self.writer.issue(
            Kind.TRANSFER, rank, Stream.SEND, parts.message_latency_s, after=ends, micro_batch=action.micro_batch, stage=action.stage,
            label="send" if action.kind == "F" else "send grad",
        )  # fmt: skip
        size = parts.communication[stage].message_bytes / parts.order.microbatch_parts
        self.writer.route(index, size, parts.message_limit_bytes_per_s, (2 * rank, 2 * receiver + 1))
        self.messages[action] = (index,)
        if parts.waits_for_messages:
            self.previous[rank] = (*self.previous[rank], index)

    def _target(self, action: Action) -> Action | None:
        """The pass that needs this one's result."""
        if action.kind == "F":
            return Action(action.stage + 1, "F", action.micro_batch) if action.stage + 1 < self.parts.order.num_stages else None
        if action.kind == "W" or action.stage == 0:
            return None
        candidates = (Action(action.stage - 1, kind, action.micro_batch) for kind in ("BW", "B"))
        return next((candidate for candidate in candidates if candidate in self.rank_of), None)

    def _receive(self, action: Action) -> None:
        target = self._target(action)
        if target is not None:
            for index in self.messages.get(action, self.last[action]):
                self.writer.wait(self.first[target], index)

    def _end(self, rank: int) -> None:
        """Gradients are reduced, the tied table's too, then the optimizer steps and parameters are gathered."""
        parts, stages = self.parts, self.parts.order.stages_of_rank[rank]
        after = self.previous[rank]
        for place, stage in enumerate(stages):
            sync, ready = parts.sync[stage], after[-1]
            if sync.reduce_s > 0.0 and not sync.reduce_overlaps:
                ready = self.writer.issue(
                    Kind.TRANSFER, rank, Stream.DP, sync.reduce_s, after=after, stage=stage, label="reduce"
                )
            if self.host and not sync.reduce_overlaps:
                self.host.gradients(rank, place, 1, ready, ready, last=True)
        ends_chain = {0, parts.order.num_stages - 1} & set(stages)
        if parts.tied_s > 0.0 and ends_chain:
            index = self.writer.issue(Kind.TRANSFER, rank, Stream.DP, parts.tied_s, after=after, label="tied")
            self.tied.append((index, after))
            after = (index,)
        elif any(parts.sync[stage].reduce_s > 0.0 for stage in stages):
            after = (*after, self.writer.issue(Kind.TRANSFER, rank, Stream.DP, 0.0, after=after, label="reduced"))
        after = self._check(rank, after)
        step = self.writer.issue(Kind.OPTIMIZER, rank, Stream.COMPUTE, parts.optimizer_s[rank], after=after)
        if self.host:
            step = self.host.update(rank, after, step)
        gather_s = sum(parts.sync[stage].gather_s for stage in stages if not parts.sync[stage].gather_overlaps)
        if gather_s > 0.0:
            self.writer.issue(Kind.TRANSFER, rank, Stream.DP, gather_s, after=(step,), label="gather")

    def _check(self, rank: int, after: tuple[int, ...]) -> tuple[int, ...]:
        """Gradients are looked through, and ranks agree on what they found: what the optimizer waits for."""
        check = self.parts.check
        if check is None:
            return after
        read = self.writer.issue(Kind.OPTIMIZER, rank, Stream.COMPUTE, check.read_s[rank], after=after, label="norm")
        if check.agree_s <= 0.0:
            return (read,)
        agreed = self.writer.issue(Kind.TRANSFER, rank, Stream.DP, check.agree_s, after=(read,), label="norm")
        self.agreed.append((agreed, (read,)))
        return (agreed,) if check.waits else (read,)


def lower_step(parts: StepParts, resident_bytes: Sequence[tuple[int, ...]], slowdown: NDArray[np.float64]) -> Program:
    """The program of one training step.

    **Model**: per pass one compute instruction per kind, then the collectives that it waits for; a message to the neighbour as a transfer over the links out of one rank
    and into the other; gradients go between replicas bucket by bucket behind the last backward pass; the optimizer steps when they are there. What lives on the host travels beside all that (`offload_step`).

    **Not modelled**: where inside a pass a collective lies (only the sums count); what an overlapped pair of passes gains (they run one after the other);
    the loader's processes.

    Args:
        parts: of the step.
        resident_bytes: per pipeline rank and `MemoryClass`.
        slowdown: as in `Program`.
    """
    return _Step(parts).lower(resident_bytes, slowdown)
