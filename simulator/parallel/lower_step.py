"""A pipeline order, the cost of its stages and their communication -> the Program of one training step: one device per pipeline rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from simulator.parallel.communication import StageCommunication
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.host_python import NO_STALLS, HostStalls
from simulator.parallel.offload import LINKS_PER_RANK, Offload
from simulator.parallel.optimizer_step import GradientCheck
from simulator.parallel.order_blocks import KINDS, order_blocks
from simulator.parallel.pass_template import Holding, PassSetting, PassShape, Sends, host_can_bind, pass_template
from simulator.parallel.rank_ends import RankEnd, beginning, ending, late_parts
from simulator.parallel.shared_adapters import on_adapters
from simulator.parallel.stages import StageCost
from simulator.parallel.stamp import stamp
from simulator.parallel.template import Template
from simulator.pipeline.action import Order
from simulator.program import Program, Stream

_LINKS_BETWEEN_RANKS = 2
"""Of a rank: out and in."""
_SHAPES = (len(KINDS), 2, 2, 2, len(Sends))
"""Values that each field of a `PassShape` can take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageVariant:
    """A stage as some of its micro-batches meet it."""

    cost: StageCost
    communication: StageCommunication


@dataclass(frozen=True, slots=True, kw_only=True)
class Exceptions:
    """Micro-batches that meet stages otherwise than `StepParts.costs` and `StepParts.communication` say."""

    variants: Sequence[tuple[StageVariant, ...]]
    """By stage."""
    variant_of: NDArray[np.int64]
    """[stages, micro-batches]: 0, or 1 + the place among the stage's variants."""


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
    exceptions: Exceptions | None = None
    """Micro-batches that are not as all others; None: none."""
    adapter_streams: frozenset[Stream] = frozenset()
    """Whose collectives share the links between ranks with messages (`shared_adapters`)."""
    stalls: HostStalls = NO_STALLS
    """What an idle device waits for its host."""
    attention_runs: Sequence[tuple[int, int]] = ()
    """Of each stage: runs of fused attention in a forward pass, and again in a backward pass; empty: none that the host waits for."""
    load_s: Sequence[float] = ()
    """Of each rank: copy of the first micro-batch, which its first pass waits for; empty: nothing is copied."""


def lower_step(parts: StepParts, resident_bytes: Sequence[tuple[int, ...]], slowdown: NDArray[np.float64]) -> Program:
    """The program of one training step.

    **Model**: per pass one compute instruction per kind, then the collectives that it waits for; a message to the neighbour as a transfer over the links out of one rank
    and into the other, which collectives that leave the node share (`shared_adapters`); gradients go between replicas bucket by bucket behind the last backward pass; the optimizer steps when they are there. What lives on the host travels
    beside all that (`offload_step`). Where the host may need longer to launch a pass than the device to compute it, it launches the rank's passes one after the other on a
    stream of its own, and a pass is not over before it is launched. Where the trainer synchronises host and device (`HostStalls`), a pass begins so much later than it could.

    Passes of a stage differ in little: each distinct one is written once (`pass_template`) and stamped over the order (`stamp`).

    **Not modelled**: where inside a pass a collective lies (only the sums count); what an overlapped pair of passes gains (they run one after the other); the loader's processes.

    Args:
        parts: of the step.
        resident_bytes: per pipeline rank and `MemoryClass`.
        slowdown: as in `Program`.
    """
    offload, order = parts.offload, parts.order
    own = offload.path.capacities * order.num_ranks if offload else ()
    templates, template = _Plan(parts).templates()
    if parts.adapter_streams:
        templates = [on_adapters(one, parts.adapter_streams, parts.message_limit_bytes_per_s) for one in templates]
    return stamp(
        order_blocks(order), templates, template, link_bytes_per_s=[*parts.link_bytes_per_s, *own], links_per_rank=(_LINKS_BETWEEN_RANKS, LINKS_PER_RANK),
        resident_bytes=resident_bytes, slowdown=slowdown,
    )  # fmt: skip


class _Plan:
    """Which template each block of the order gets."""

    def __init__(self, parts: StepParts) -> None:
        self.parts, self.blocks = parts, order_blocks(parts.order)
        self.setting = PassSetting(
            share=1.0 / parts.order.microbatch_parts, message_limit_bytes_per_s=parts.message_limit_bytes_per_s, message_latency_s=parts.message_latency_s,
            waits_for_messages=parts.waits_for_messages, weight_share=parts.weight_share, offload=parts.offload,
        )  # fmt: skip
        self.kinds = frozenset(KINDS[kind] for kind in np.flatnonzero(np.bincount(self.blocks.kind + 1)[1:]))
        self.holdings: dict[Holding, int] = {}
        """Distinct ones, numbered."""
        self.held: dict[tuple[int, int], Holding] = {}
        """By rank and stage, as most micro-batches meet it."""

    def templates(self) -> tuple[list[Template], NDArray[np.int64]]:
        """Distinct templates, and the one of each block."""
        most = 1 + max((len(own) for own in self.parts.exceptions.variants), default=0) if self.parts.exceptions else 1
        number = np.zeros((self.parts.order.num_ranks, self.parts.order.num_stages, most), dtype=np.int64)
        for rank, stages in enumerate(self.parts.order.stages_of_rank):
            dispatched = self._dispatched(rank)
            for place, stage in enumerate(stages):
                for variant, own in enumerate(self._variants(stage)):
                    held = self._holding(rank, place, stage, own, dispatched=dispatched)
                    self.held.setdefault((rank, stage), held)
                    number[rank, stage, variant] = self.holdings.setdefault(held, len(self.holdings))
        templates, template = self._passes(number)
        self._ends(templates, template)
        return templates, template

    def _passes(self, number: NDArray[np.int64]) -> tuple[list[Template], NDArray[np.int64]]:
        blocks = self.blocks
        sends = np.where(
            blocks.receiver < 0, Sends.NOWHERE, np.where(blocks.receiver == blocks.rank, Sends.OWN_RANK, Sends.OTHER_RANK)
        )
        columns = (blocks.kind, blocks.last, blocks.first, blocks.first_gradients, sends)
        shape = np.ravel_multi_index(columns, _SHAPES, mode="clip")
        code = np.where(
            blocks.stage < 0, -1, number[blocks.rank, blocks.stage, self._variant_of_block()] * prod(_SHAPES) + shape
        )
        found = np.flatnonzero(np.bincount(code + 1)) - 1
        place = np.zeros(code.max() + 2, dtype=np.int64)
        place[found + 1] = np.arange(len(found)) - 1
        held = list(self.holdings)
        templates = []
        for one in found[found >= 0].tolist():
            kind, last, first, first_gradients, sent = (int(value) for value in np.unravel_index(one % prod(_SHAPES), _SHAPES))
            passed = PassShape(KINDS[kind], bool(last), bool(first), bool(first_gradients), Sends(sent))
            templates.append(pass_template(self.setting, held[one // prod(_SHAPES)], passed))
        return templates, place[code + 1]

    def _ends(self, templates: list[Template], template: NDArray[np.int64]) -> None:
        """Adds each rank's beginning and end."""
        order, first_block = self.parts.order, self.blocks.first_block
        sent = np.array([len(one.sent) for one in templates])[template]
        tied = tuple(
            rank
            for rank, stages in enumerate(order.stages_of_rank)
            if self.parts.tied_s > 0.0 and {0, order.num_stages - 1} & set(stages)
        )
        for rank in range(order.num_ranks):
            begin, last = first_block[rank], first_block[rank + 1] - 1
            end = self._rank_end(rank, tied, sent=int(sent[begin + 1 : last].sum()))
            start = beginning(end)
            template[begin], template[last] = len(templates), len(templates) + 1
            templates += [start, ending(end, late=late_parts(end))]

    def _rank_end(self, rank: int, tied: tuple[int, ...], *, sent: int) -> RankEnd:
        parts, offload = self.parts, self.parts.offload
        return RankEnd(
            holdings=tuple((stage, self.held[rank, stage]) for stage in parts.order.stages_of_rank[rank]), optimizer_s=parts.optimizer_s[rank],
            tied_s=parts.tied_s if rank in tied else 0.0, tied_ranks=tied, check=parts.check, load_s=parts.load_s[rank] if parts.load_s else 0.0,
            rank=rank, num_ranks=parts.order.num_ranks, offload=offload,
            update=offload.updates[rank] if offload and offload.updates else None,
            returned_bytes=offload.returned_bytes[rank] if offload and offload.returned_bytes else 0.0, sent=sent,
        )  # fmt: skip

    def _dispatched(self, rank: int) -> bool:
        """Whether the rank may wait for its host."""
        return any(
            host_can_bind(own.cost, self.kinds)
            for stage in self.parts.order.stages_of_rank[rank]
            for own in self._variants(stage)
        )

    def _variants(self, stage: int) -> tuple[StageVariant, ...]:
        """How micro-batches meet a stage."""
        usual = StageVariant(cost=self.parts.costs[stage], communication=self.parts.communication[stage])
        return (usual, *(self.parts.exceptions.variants[stage] if self.parts.exceptions else ()))

    def _variant_of_block(self) -> NDArray[np.int64]:
        if self.parts.exceptions is None:
            return np.zeros(len(self.blocks.stage), dtype=np.int64)
        return self.parts.exceptions.variant_of[self.blocks.stage, self.blocks.micro_batch]

    def _holding(self, rank: int, place: int, stage: int, own: StageVariant, *, dispatched: bool) -> Holding:
        parts, offload = self.parts, self.parts.offload
        update = offload.updates[rank] if offload and offload.updates else None
        return Holding(
            cost=own.cost, communication=own.communication, sync=parts.sync[stage],
            gradient_message_bytes=parts.communication[stage - 1].message_bytes if stage else 0.0,
            chunks=offload.chunks_of_stage[stage] if offload and offload.stages_passes else (),
            each_bytes=int(update.each_bytes[place]) if update and update.each_bytes else 0, down_bytes=update.down_bytes[place] if update else 0.0,
            dispatched=dispatched, stalls_s=self._stalls(rank, stage),
        )  # fmt: skip

    def _stalls(self, rank: int, stage: int) -> tuple[float, float]:
        """Before forward and backward passes of a stage on a rank: an exchange where the pass takes what another rank made, and what its layers wait for."""
        parts, order = self.parts, self.parts.order

        def exchange_s(other: int) -> float:
            apart = 0 <= other < order.num_stages and rank not in order.ranks_of_stage[other]
            return parts.stalls.exchange_s if parts.waits_for_messages and apart else 0.0

        runs, again = parts.attention_runs[stage] if parts.attention_runs else (0, 0)
        forward_s = parts.stalls.batch_s + exchange_s(stage - 1) + parts.stalls.attention_s * runs
        return forward_s, exchange_s(stage + 1) + parts.stalls.attention_s * again
