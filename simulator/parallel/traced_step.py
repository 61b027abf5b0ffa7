"""A pipeline order and the stages of a traced model -> the Program of one training step: one device per pipeline rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulator.lower import PassPrices, optimizer_elements_pass
from simulator.optimizer_states import OPTIMIZER_STATES, STEP_COUNT_BYTES
from simulator.parallel.traced_stage import Holding, RankLedger, StageLowering, TracedStage
from simulator.parallel.traced_writer import ProgramWriter
from simulator.pipeline.action import Action, ActionKind, Order
from simulator.pipeline.messages import Message, Step, with_messages
from simulator.program import Kind, MemoryClass, Program, Stream, no_slowdown


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
    replicas_s: Sequence[float]
    """Per rank, the sum of its gradients over data parallel replicas, after the last pass."""
    optimizer: str


class _Assembly:
    def __init__(self, step: TracedStep, prices: PassPrices) -> None:
        self.step, self.prices = step, prices
        self.steps = with_messages(step.order)
        self.home = [ranks[0] for ranks in step.order.ranks_of_stage]
        self.ledgers = [RankLedger() for _ in self.steps]
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
        for ledger in self.ledgers:
            ledger.builder.change(ledger.builder.last_duration_s, -ledger.sent_bytes, MemoryClass.ACTIVATIONS)
        index = [[self._copy(writer, rank, n) for n in range(len(self.ledgers[rank].builder.kinds))] for rank in range(ranks)]
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
        for rank, seconds in enumerate(self.step.replicas_s):
            if seconds > 0.0:
                after[rank] = (writer.issue(Kind.TRANSFER, rank, Stream.DP, seconds, after=after[rank], label="reduce"),)
        for rank in range(ranks):
            self._optimizer(writer, rank, after[rank])
        return writer.program([self._resident(rank) for rank in range(ranks)], no_slowdown())

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

    def _held(self, rank: int) -> list[TracedStage]:
        return [self.step.stages[stage] for stage in self.step.order.stages_of_rank[rank]]

    def parameters(self, rank: int) -> Mapping[str, Holding]:
        """Of a rank, a shared table once."""
        return {name: held for stage in self._held(rank) for name, held in stage.parameters.items()}

    def _tied_ranks(self) -> list[int]:
        names = [set(self.parameters(rank)) for rank in range(len(self.steps))]
        return [rank for rank, own in enumerate(names) if any(own & other for n, other in enumerate(names) if n != rank)]

    def _optimizer(self, writer: ProgramWriter, rank: int, after: Sequence[int]) -> None:
        trained = [held for held in self.parameters(rank).values() if held.trained]
        seconds = self.prices.seconds(
            optimizer_elements_pass([(held.elements, held.size_bytes) for held in trained], optimizer=self.step.optimizer)
        )
        changes = [(seconds, -self._gradient_bytes(rank), MemoryClass.GRADIENTS)]
        if self.step.order.num_stages - 1 in self.step.order.stages_of_rank[rank]:
            changes.append((seconds, -self.step.stages[-1].workload.blocks[-1].output_bytes, MemoryClass.ACTIVATIONS))
        writer.issue(Kind.OPTIMIZER, rank, Stream.COMPUTE, seconds, after=after, memory=changes)

    def _gradient_bytes(self, rank: int) -> int:
        """Bytes of gradients after a rank's passes: less than its parameters' where two gradients are views of one tensor."""
        changes = [change for own in self.ledgers[rank].builder.memory for change in own]
        return sum(delta_bytes for _, delta_bytes, memory_class in changes if memory_class is MemoryClass.GRADIENTS)

    def _resident(self, rank: int) -> tuple[int, ...]:
        """Bytes alive before the step: parameters, buffers, optimizer states and the parts of the batch that the rank's stages read."""
        sizes = [0] * len(MemoryClass)
        parameters = self.parameters(rank).values()
        buffers = {name: size for stage in self._held(rank) for name, size in stage.buffers.items()}
        inputs = {name: size for stage in self._held(rank) for name, size in stage.inputs.items()}
        trained = [held for held in parameters if held.trained]
        sizes[MemoryClass.PARAMETERS] = sum(held.size_bytes for held in parameters) + sum(buffers.values())
        sizes[MemoryClass.OPTIMIZER_STATES] = OPTIMIZER_STATES[self.step.optimizer] * sum(
            held.size_bytes for held in trained
        ) + STEP_COUNT_BYTES[self.step.optimizer] * len(trained)
        sizes[MemoryClass.BATCH] = self.step.order.num_microbatches * sum(inputs.values())
        return tuple(sizes)


def lower_traced_step(step: TracedStep, prices: PassPrices) -> Program:
    """The program of one training step of a traced model over the ranks of a pipeline.

    **Model**: per pass and block one instruction with the memory events of its recording, as on one device (`simulator.lower`); a message to a neighbour as a transfer over
    the links out of one rank and into the other, beside the compute; the sum of tied tables' gradients when all passes are over; the optimizer's fused step.

    **Not modelled**: that the host posts messages; what they cost the sender's cores.
    """
    return _Assembly(step, prices).program()
