"""A pipeline order and the stages of a traced model -> the Program of one training step: one device per pipeline rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simulator.lower import PassPrices, optimizer_elements_pass
from simulator.optimizer_states import OPTIMIZER_STATES, STEP_COUNT_BYTES
from simulator.parallel.traced_exchange import Exchange
from simulator.parallel.traced_replicas import Bucket, CollectiveSeconds, Replicas, replicas_of, trained_in_order
from simulator.parallel.traced_shards import ShardedRank, Shards, shards_of
from simulator.parallel.traced_stage import Holding, RankLedger, StageLowering, TracedStage
from simulator.parallel.traced_writer import ProgramWriter
from simulator.pipeline.action import Action, ActionKind, Order
from simulator.pipeline.messages import Message, Step, with_messages
from simulator.plan import Plan
from simulator.program import Kind, MemoryClass, Program, Stream, no_slowdown

_TIED_RANKS = 2
FLAG_BYTES = 4.0
"""Whether a rank's gradients overflowed."""
"""The first and the last of a pipeline hold a table that its ends share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Messages between two pipeline ranks."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """All that a step consists of."""

    order: Order
    stages: Sequence[TracedStage]
    link: Link
    tied_s: float
    """Sum of the gradients of tables that stages on several ranks share."""
    replicas: Replicas | None
    """None: there is one."""
    collective_s: CollectiveSeconds
    """Among replicas."""
    optimizer: str
    overflow_s: float = 0.0
    """After a scaled loss: until all ranks know whether any of them has a gradient that is not finite."""
    shards: Shards | None = None
    """ZeRO 2 and 3: what replicas split beside the optimizer's states; None: nothing."""
    slowdown: NDArray[np.float64] = field(default_factory=no_slowdown)
    """Of streams beside each other, as in `Program`."""


class _Assembly:
    def __init__(self, step: TracedStep, prices: PassPrices) -> None:
        self.step, self.prices = step, prices
        self.steps = with_messages(step.order)
        self.home = [ranks[0] for ranks in step.order.ranks_of_stage]
        self.ledgers = [RankLedger(scatters=step.shards is not None) for _ in self.steps]
        self.batches: dict[tuple[int, int], StageLowering] = {}
        self.spans: dict[Action, tuple[int, int]] = {}
        """First and last + 1 instruction of each pass, in its rank's builder."""
        self.began: set[int] = set()
        """Stages whose gradients have begun."""

    def program(self) -> Program:
        for rank, own in enumerate(self.steps):
            for one in own:
                self._issue(rank, one)
        return self._merged()

    def _issue(self, rank: int, one: Step) -> None:
        if not isinstance(one, Message):
            for action in one.parts:
                self._run(rank, action)
            return
        if one.kind == "RECV_F":
            self._batch(rank, one.stage, one.micro_batch).receive_boundary()
        elif one.kind == "RECV_B":
            self._batch(rank, one.stage, one.micro_batch).receive_gradient()

    def _run(self, rank: int, action: Action) -> None:
        batch, ledger = self._batch(rank, action.stage, action.micro_batch), self.ledgers[rank]
        first = len(ledger.builder.kinds)
        if action.kind == "F":
            batch.forward()
        elif action.kind == "B":
            batch.backward_inputs()
        else:
            begins = action.stage not in self.began
            self.began.add(action.stage)
            (batch.backward if action.kind == "BW" else batch.backward_weights)(first=begins)
        self.spans[action] = (first, len(ledger.builder.kinds))

    def _batch(self, rank: int, stage: int, micro_batch: int) -> StageLowering:
        key = (stage, micro_batch)
        if key not in self.batches:
            made = self.batches[key] = StageLowering(self.step.stages[stage], self.ledgers[rank], self.prices, micro_batch)
            if stage and self.home[stage - 1] == rank:
                made.before = self._batch(rank, stage - 1, micro_batch)
                made.before.after = made
            if stage + 1 < len(self.home) and self.home[stage + 1] == rank:
                self._batch(rank, stage + 1, micro_batch)
        return self.batches[key]

    def _merged(self) -> Program:
        """The ranks' instructions with messages and dependencies between them, then the tied tables' sum and the optimizer."""
        ranks = len(self.steps)
        writer = ProgramWriter([self.step.link.bytes_per_s] * (2 * ranks))
        exchanges = [self._exchange(writer, rank) for rank in range(ranks)]
        index = [self._copied(writer, rank, exchanges[rank]) for rank in range(ranks)]
        for rank, own in enumerate(self.steps):
            for one in own:
                if isinstance(one, Message) and one.kind.startswith("SEND"):
                    self._send(writer, index, rank, one)
        last = [own[-1] for own in index]
        after: list[tuple[int, ...]] = [(one,) for one in last]
        if self.step.tied_s > 0.0:
            for rank in self._tied_ranks():
                tied = writer.issue(
                    Kind.TRANSFER,
                    rank,
                    Stream.DP,
                    self.step.tied_s,
                    after=[last[other] for other in self._tied_ranks()],
                    label="tied",
                )
                after[rank] = (tied,)
        ready = [after[rank] if exchange is None else exchange.rest(after[rank]) for rank, exchange in enumerate(exchanges)]
        if self.step.overflow_s > 0.0:
            every = sorted({one for own in ready for one in own})
            told = [
                writer.issue(Kind.TRANSFER, rank, Stream.DP, self.step.overflow_s, after=every, label="overflow")
                for rank in range(ranks)
            ]
            ready = [(*own, one) for own, one in zip(ready, told, strict=True)]
        for rank, exchange in enumerate(exchanges):
            self._optimizer(writer, rank, ready[rank], exchange)
        return writer.program(resident_bytes(self.step), self.step.slowdown)

    def _exchange(self, writer: ProgramWriter, rank: int) -> Exchange | ShardedRank | None:
        step = self.step
        if step.shards is not None:
            own = set(step.order.stages_of_rank[rank])
            spans = {action: span for action, span in self.spans.items() if action.stage in own}
            return ShardedRank(
                step.shards, step.stages, self.ledgers[rank].builder, spans, writer, self.prices, rank, step.collective_s
            )
        return None if step.replicas is None else Exchange(step.replicas, writer, self.prices, rank, step.collective_s)

    def _copied(self, writer: ProgramWriter, rank: int, exchange: Exchange | ShardedRank | None) -> list[int]:
        """A rank's instructions, each followed by the buckets whose gradients are final with it; what it sent goes after them."""
        if isinstance(exchange, ShardedRank):
            index = exchange.write(lambda n: self._copy(writer, rank, n))
            writer.change_at_end(index[-1], -self.ledgers[rank].sent_bytes, MemoryClass.ACTIVATIONS)
            return index
        due: dict[int, list[Bucket]] = {}
        if exchange is not None and exchange.replicas.overlaps:
            final = self._final(rank)
            for bucket in exchange.replicas.buckets[rank]:
                if all(name in final for name in bucket.names):
                    due.setdefault(max(final[name] for name in bucket.names), []).append(bucket)
        index, end = [], -1
        for n in range(len(self.ledgers[rank].builder.kinds)):
            end = self._copy(writer, rank, n)
            index.append(end)
            for bucket in due.get(n, ()):
                assert exchange is not None
                end = exchange.send(bucket)[0]
        writer.change_at_end(end, -self.ledgers[rank].sent_bytes, MemoryClass.ACTIVATIONS)
        return index

    def _final(self, rank: int) -> Mapping[str, int]:
        """By parameter whose gradients one block alone makes: the rank's instruction after which its gradient is final."""
        builder, found = self.ledgers[rank].builder, dict[str, int]()
        own = self.step.order.stages_of_rank[rank]
        early, _ = trained_in_order(self.step.stages, own)
        for stage in own:
            first, end = max(
                span for action, span in self.spans.items() if action.stage == stage and action.kind in {"BW", "W"}
            )
            for n in range(first, end):
                if builder.kinds[n] == Kind.BACKWARD:
                    names = self.step.stages[stage].parameters_of_block[builder.blocks[n]]
                    found |= {name: n for name in names if name in early}
        return found

    def _copy(self, writer: ProgramWriter, rank: int, n: int) -> int:
        builder = self.ledgers[rank].builder
        return writer.issue(
            Kind(builder.kinds[n]), rank, Stream.COMPUTE, builder.durations[n], micro_batch=builder.micro_batches[n], stage=builder.blocks[n],
            label=builder.options[n], memory=builder.memory[n],
        )  # fmt: skip

    def _send(self, writer: ProgramWriter, index: Sequence[Sequence[int]], rank: int, message: Message) -> None:
        """A message, for which the pass that needs it waits; a rank's messages leave in its own order."""
        forward = message.kind == "SEND_F"
        target = message.stage + 1 if forward else message.stage - 1
        boundary = message.stage if forward else target
        source = self._spans_of(message.stage, message.micro_batch, forward=forward)[0][1] - 1
        sent = writer.issue(
            Kind.TRANSFER, rank, Stream.SEND, self.step.link.latency_s, after=(index[rank][source],), micro_batch=message.micro_batch,
            stage=message.stage, label="send" if forward else "send grad",
        )  # fmt: skip
        size, receiver = self.step.stages[boundary].workload.blocks[-1].output_bytes, self.home[target]
        writer.route(sent, float(size), self.step.link.bytes_per_s, (2 * rank, 2 * receiver + 1))
        needing = next(first for first, end in self._spans_of(target, message.micro_batch, forward=forward) if first < end)
        writer.wait(index[receiver][needing], sent)

    def _spans_of(self, stage: int, micro_batch: int, *, forward: bool) -> list[tuple[int, int]]:
        """Instructions of a forward pass, or of the backward ones in their order."""
        kinds: tuple[ActionKind, ...] = ("F",) if forward else ("BW", "B", "W")
        found = (self.spans.get(Action(stage, kind, micro_batch)) for kind in kinds)
        return [span for span in found if span is not None]

    def parameters(self, rank: int) -> Mapping[str, Holding]:
        """Of a rank, a shared table once."""
        return parameters_of(self.step, rank)

    def _tied_ranks(self) -> list[int]:
        names = [set(self.parameters(rank)) for rank in range(len(self.steps))]
        return [rank for rank, own in enumerate(names) if any(own & other for n, other in enumerate(names) if n != rank)]

    def _optimizer(
        self, writer: ProgramWriter, rank: int, after: Sequence[int], exchange: Exchange | ShardedRank | None
    ) -> None:
        trained = [(held.elements, held.size_bytes) for held in self.parameters(rank).values() if held.trained]
        updated = trained if exchange is None else exchange.updated(trained)
        scaled = self.step.stages[0].workload.loss_scaled
        seconds = self.prices.seconds(optimizer_elements_pass(updated, optimizer=self.step.optimizer, loss_scaled=scaled))
        changes = [] if exchange is None else exchange.waited()
        gradient_bytes = self._gradient_bytes(rank) + (0 if exchange is None else exchange.gradient_bytes)
        changes.append((seconds, -gradient_bytes, MemoryClass.GRADIENTS))
        if self.step.order.num_stages - 1 in self.step.order.stages_of_rank[rank]:
            changes.append((seconds, -self.step.stages[-1].workload.blocks[-1].output_bytes, MemoryClass.ACTIVATIONS))
        done = writer.issue(Kind.OPTIMIZER, rank, Stream.COMPUTE, seconds, after=after, memory=changes)
        if isinstance(exchange, Exchange):
            exchange.gather(done)

    def _gradient_bytes(self, rank: int) -> int:
        """Bytes of gradients after a rank's passes: less than its parameters' where two gradients are views of one tensor."""
        changes = [change for own in self.ledgers[rank].builder.memory for change in own]
        return sum(delta_bytes for _, delta_bytes, memory_class in changes if memory_class is MemoryClass.GRADIENTS)


def lower_traced_step(step: TracedStep, prices: PassPrices) -> Program:
    """The program of one training step of a traced model over the ranks of a pipeline.

    **Model**: per pass and block one instruction with the memory events of its recording, as on one device (`simulator.lower`); a message to a neighbour as a transfer over
    the links out of one rank and into the other, beside the compute; the sum of tied tables' gradients when all passes are over; the sums over replicas (`simulator.parallel.traced_exchange`), or gathered parameters and scattered
    gradients (`simulator.parallel.traced_shards`); the optimizer's fused step.

    **Not modelled**: that the host posts messages; what they cost the sender's cores.
    """
    return _Assembly(step, prices).program()


def parameters_of(step: TracedStep, rank: int) -> Mapping[str, Holding]:
    """Of a pipeline rank, a shared table once."""
    return {name: held for stage in _held(step, rank) for name, held in stage.parameters.items()}


def _held(step: TracedStep, rank: int) -> list[TracedStage]:
    return [step.stages[stage] for stage in step.order.stages_of_rank[rank]]


def resident_bytes(step: TracedStep) -> list[tuple[int, ...]]:
    """Per pipeline rank and `MemoryClass`, bytes alive before the step: parameters, buffers, optimizer states and the parts of the batch that its stages read."""
    return [_resident_bytes(step, rank) for rank in range(step.order.num_ranks)]


def _resident_bytes(step: TracedStep, rank: int) -> tuple[int, ...]:
    sizes = [0] * len(MemoryClass)
    parameters = parameters_of(step, rank).values()
    buffers = {name: size for stage in _held(step, rank) for name, size in stage.buffers.items()}
    inputs = {name: size for stage in _held(step, rank) for name, size in stage.inputs.items()}
    updated = trained = [held.size_bytes for held in parameters if held.trained]
    held_bytes = sum(held.size_bytes for held in parameters)
    if step.shards is not None:
        updated = [step.shards.part(size) for size in trained]
        held_bytes = sum(step.shards.part(held.size_bytes) for held in parameters)
    elif step.replicas is not None and step.replicas.splits:
        buckets = step.replicas.buckets[rank]
        updated = [step.replicas.part_bytes(bucket) for bucket in buckets]
        held_bytes += sum(bucket.size_bytes for bucket in buckets) - sum(trained)
    sizes[MemoryClass.PARAMETERS] = held_bytes + sum(buffers.values())
    sizes[MemoryClass.OPTIMIZER_STATES] = OPTIMIZER_STATES[step.optimizer] * sum(updated) + STEP_COUNT_BYTES[
        step.optimizer
    ] * len(updated)
    sizes[MemoryClass.BATCH] = step.order.num_microbatches * sum(inputs.values())
    return tuple(sizes)


def step_of(
    plan: Plan, order: Order, stages: Sequence[TracedStage], link: Link, *, collective_s: CollectiveSeconds, tied_s: CollectiveSeconds,
    slowdown: NDArray[np.float64] | None = None,
) -> TracedStep:  # fmt: skip
    """The step of a plan's stages.

    Args:
        plan: with its batch resolved.
        order: of each pipeline.
        stages: of the model.
        link: between pipeline ranks.
        collective_s: among replicas.
        tied_s: among the pipeline ranks that share tables.
        slowdown: of streams beside each other; None: they do not disturb each other.

    Raises:
        InputError: parameters that ZeRO 2 and 3 cannot split.
    """
    shared = stages[0].parameters.keys() & stages[-1].parameters.keys()
    apart = order.ranks_of_stage[0] != order.ranks_of_stage[-1]
    tied_bytes = sum(stages[0].parameters[name].size_bytes for name in shared) if apart else 0
    shards, ranks = shards_of(plan, stages), plan.parallel.pp * plan.parallel.dp
    return TracedStep(
        order=order, stages=stages, link=link, tied_s=tied_s("all_reduce", float(tied_bytes), _TIED_RANKS) if tied_bytes else 0.0,
        replicas=None if shards else replicas_of(plan, stages, order.stages_of_rank), collective_s=collective_s, optimizer=plan.precision.optimizer, shards=shards,
        overflow_s=tied_s("all_reduce", FLAG_BYTES, ranks) if stages[0].workload.loss_scaled and ranks > 1 else 0.0,
        slowdown=no_slowdown() if slowdown is None else slowdown,
    )  # fmt: skip
