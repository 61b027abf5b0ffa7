"""Parameters that replicas split among each other (ZeRO 2 and 3, as FSDP2 runs them): gathered block by block ahead of use, gradients scattered behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from simulator.builder import Builder
from simulator.lower import PassPrices
from simulator.parallel.traced_replicas import Bucket, CollectiveSeconds, buckets_of, packing_pass
from simulator.parallel.traced_stage import Holding, TracedStage
from simulator.parallel.traced_writer import Change, ProgramWriter
from simulator.pipeline.action import Action
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal
from simulator.program import Kind, MemoryClass, Stream

PARAMETERS_SPLIT = 2
"""ZeRO's stage from which FSDP2 splits parameters: stage 2 gathers them once for both passes, stage 3 for each."""
_WHOLE = 1 << 62
_COMPUTED = frozenset({Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD})
Block = tuple[int, int]
"""A stage, and a block of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How a step's replicas split parameters, gradients and optimizer states."""

    ranks: int
    """That hold the same stages."""
    keeps: bool
    """ZeRO 2: a block's gathered parameters stay from its forward pass to the end of its next backward pass; else each pass gathers them."""
    ahead: bool
    """A block's parameters are gathered while the one before it in the pass computes."""
    overlaps: bool
    """Gradients are scattered while the pass goes on; else it waits."""

    def part(self, size: int) -> int:
        """A rank's part of so many bytes or elements."""
        return -(-size // self.ranks)


def shards_of(plan: Plan, stages: Sequence[TracedStage]) -> Shards | None:
    """The plan's; None where every rank holds whole parameters.

    **Source**: torch 2.13, torch/distributed/fsdp/_fully_shard (``reshard_after_forward``): units are modules with parameters of their own, whose gradients are averaged as real numbers.

    Raises:
        InputError: blocks share a parameter, or one is complex.
    """
    if plan.memory.zero_stage < PARAMETERS_SPLIT:
        return None
    alone = [set().union(*stage.parameters_of_block) for stage in stages]
    for index, (stage, own) in enumerate(zip(stages, alone, strict=True)):
        others = {name for n, other in enumerate(stages) if n != index for name in other.parameters}
        for name, held in stage.parameters.items():
            rule = ""
            if name not in own or name in others:
                rule = f"a parameter belongs to one unit of FSDP2, but blocks share {name}"
            elif held.dtype.startswith("complex"):
                rule = f"FSDP2 averages real gradients only, but parameter {name} is complex"
            if rule:
                raise plan_refusal("memory.zero_stage", plan.memory.zero_stage, rule, "take memory.zero_stage <= 1")
    runtime = plan.runtime
    return Shards(
        ranks=plan.parallel.dp, keeps=plan.memory.zero_stage == PARAMETERS_SPLIT, ahead=runtime.overlap_param_gather, overlaps=runtime.overlap_grad_reduce
    )  # fmt: skip


def flat_buffers(held: Mapping[str, Holding]) -> tuple[Bucket, ...]:
    """Parameters of a block, as they travel: in one tensor of each dtype."""
    return buckets_of(held, limit_bytes=_WHOLE, multiple=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """A block whose parameters travel together."""

    whole: tuple[Bucket, ...]
    trained: tuple[Bucket, ...]

    @property
    def size_bytes(self) -> int:
        """Of all of its parameters."""
        return sum(one.size_bytes for one in self.whole)


class ShardedRank:
    """Writes one rank's passes with what they gather and scatter.

    **Model**: a block's parameters come in one buffer, from which a kernel on the compute stream lays them out; in a pass they are gathered while the block before
    computes, one block ahead and no sooner than the one before that has computed; the first of a pass begins when the rank does. Under ZeRO 3 they go when the pass leaves the block (a block that runs again and
    then backward keeps them in between), under ZeRO 2 when it has gone backward. Each backward pass makes whole gradients, a kernel packs them, and a rank keeps the
    sum of its part; parts of later micro-batches are added to it. Both go when the next block packs its own, which waits for the exchange.

    **Source**: Zhao et al. 2023 (arXiv 2304.11277), section 3; torch 2.13, torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py (``split_with_sizes_copy``, ``chunk_cat``) and
    _fsdp_param_group.py (when a unit waits, gathers and reshards); a backend's collectives of one group run one after the other.

    **Not modelled**: parts padded to equal rows; the kernel that adds a part to the sum.

    Args:
        shards: of the step.
        stages: of the model.
        builder: the rank's computed instructions.
        spans: of each pass, first and last + 1 of them.
        writer: gets the instructions.
        prices: of copies.
        rank: of the pipeline.
        seconds: of collectives among replicas.
    """

    def __init__(
        self, shards: Shards, stages: Sequence[TracedStage], builder: Builder, spans: Mapping[Action, tuple[int, int]], writer: ProgramWriter, prices: PassPrices, rank: int,
        seconds: CollectiveSeconds,
    ) -> None:  # fmt: skip
        self.shards, self._stages, self._builder, self._writer, self._prices, self._rank = (
            shards,
            stages,
            builder,
            writer,
            prices,
            rank,
        )
        self._seconds = seconds
        self._passes = sorted((first, end, action) for action, (first, end) in spans.items() if first < end)
        self._units: dict[Block, _Unit] = {}
        self._coming: dict[Block, list[int]] = {}
        """Gathers on their way."""
        self._here: set[Block] = set()
        self._summed: set[Block] = set()
        """Of which the rank keeps a part of the gradients already."""
        self._last = -1
        """The compute instruction issued last."""
        self._before: tuple[int, ...] = ()
        """What computed last but for copies."""
        self._rings: list[int] = []
        self._sent: list[tuple[int, int]] = []
        """Exchanges of the block that was scattered last, each with the bytes that go when it has been waited for: what it sends, and a part that is added to an earlier one."""
        self.gradient_bytes = 0
        """What packing and scattering add to the gradients that the passes made."""

    def write(self, copy: Callable[[int], int]) -> list[int]:
        """The index of each computed instruction, in the order of the builder.

        Args:
            copy: writes the n-th computed instruction.
        """
        index: dict[int, int] = {}
        for first, end, action in self._passes:
            blocks = [self._block_at(n, action) for n in range(first, end)]
            for place, block in enumerate(blocks):
                following = next((one for one in blocks[place + 1 :] if one is not None and one != block), None)
                if block is not None:
                    self._use(block)
                if following is not None and self.shards.ahead:
                    self._gather(following, self._before)
                index[first + place] = self._last = copy(first + place)
                self._before = (self._last,)
                self._after(first + place, action, block, follows=place + 1 < len(blocks) and blocks[place + 1] == block)
        return [index[n] for n in sorted(index)]

    def rest(self, after: Iterable[int]) -> tuple[int, ...]:
        """What the optimizer waits for."""
        return (*after, *self._rings)

    def updated(self, trained: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Elements and bytes of the part of each tensor that the optimizer updates here."""
        return [(self.shards.part(elements), self.shards.part(size)) for elements, size in trained]

    def _block_at(self, n: int, action: Action) -> Block | None:
        """The block whose parameters a computed instruction reads; None where it reads none."""
        block = self._builder.blocks[n]
        if block < 0 or self._builder.kinds[n] not in _COMPUTED or self._builder.options[n] == "W":
            return None
        return (action.stage, block) if self._unit((action.stage, block)).whole else None

    def _unit(self, block: Block) -> _Unit:
        if block not in self._units:
            stage = self._stages[block[0]]
            held = {name: stage.parameters[name] for name in sorted(stage.parameters_of_block[block[1]])}
            trained = {name: one for name, one in held.items() if one.trained}
            self._units[block] = _Unit(whole=flat_buffers(held), trained=flat_buffers(trained))
        return self._units[block]

    def _gather(self, block: Block, after: Iterable[int]) -> None:
        if block in self._here or block in self._coming:
            return
        self._coming[block] = [
            self._writer.issue(
                Kind.TRANSFER, self._rank, Stream.DP, self._seconds("all_gather", float(one.size_bytes), self.shards.ranks), after=after, label="gather",
                memory=((0.0, one.size_bytes, MemoryClass.PARAMETERS),),
            )
            for one in self._unit(block).whole
        ]  # fmt: skip

    def _use(self, block: Block) -> None:
        """Parameters are there, laid out, when the next instruction begins."""
        if block in self._here:
            return
        self._gather(block, () if self._last < 0 else (self._last,))
        for one, ring in zip(self._unit(block).whole, self._coming.pop(block), strict=True):
            seconds = self._prices.seconds(packing_pass(one))
            changes = ((0.0, one.size_bytes, MemoryClass.PARAMETERS), (seconds, -one.size_bytes, MemoryClass.PARAMETERS))
            self._last = self._writer.issue(
                Kind.REDUCE, self._rank, Stream.COMPUTE, seconds, after=(ring,), label="lay out", memory=changes
            )
        self._here.add(block)

    def _after(self, n: int, action: Action, block: Block | None, *, follows: bool) -> None:
        """What ends with a computed instruction: gradients leave, and parameters go."""
        kind, own = self._builder.kinds[n], self._builder.blocks[n]
        index = self._last
        if kind == Kind.BACKWARD and own >= 0:
            self._scatter((action.stage, own), n)
        done = kind == Kind.BACKWARD if self.shards.keeps else not follows
        if block in self._here and done:
            self._here.remove(block)
            self._writer.change_at_end(index, -self._unit(block).size_bytes, MemoryClass.PARAMETERS)

    def _scatter(self, block: Block, n: int) -> None:
        made = sum(size for _, size, memory_class in self._builder.memory[n] if memory_class is MemoryClass.GRADIENTS)
        if not made:
            return
        first = block not in self._summed
        self._summed.add(block)
        unpacked = made
        sent: list[tuple[int, int]] = []
        for one in self._unit(block).trained:
            seconds, part = self._prices.seconds(packing_pass(one)), self.shards.part(one.size_bytes)
            after, gone = self._let_go()
            packed: list[Change] = [
                *gone,
                (0.0, one.size_bytes, MemoryClass.GRADIENTS),
                (seconds, -unpacked, MemoryClass.GRADIENTS),
            ]
            self._last = self._writer.issue(
                Kind.REDUCE, self._rank, Stream.COMPUTE, seconds, after=after, label="pack", memory=packed
            )
            took = self._seconds("reduce_scatter", float(one.size_bytes), self.shards.ranks)
            ring = self._writer.issue(
                Kind.TRANSFER, self._rank, Stream.DP, took, after=(self._last,), label="reduce", memory=((0.0, part, MemoryClass.GRADIENTS),)
            )  # fmt: skip
            self._rings.append(ring)
            sent.append((ring, one.size_bytes + (0 if first else part)))
            self.gradient_bytes += (part if first else 0) - unpacked
            unpacked = 0
        self._sent = sent
        if not self.shards.overlaps:
            after, gone = self._let_go()
            self._last = self._writer.issue(
                Kind.REDUCE, self._rank, Stream.COMPUTE, 0.0, after=after, label="reduced", memory=gone
            )

    def waited(self) -> list[Change]:
        """What goes when the optimizer has waited for the last gradients."""
        return list(self._let_go()[1])

    def _let_go(self) -> tuple[tuple[int, ...], tuple[Change, ...]]:
        """The exchanges of the block before, which are waited for, and what goes then."""
        sent, self._sent = self._sent, []
        return tuple(ring for ring, _ in sent), tuple((0.0, -size, MemoryClass.GRADIENTS) for _, size in sent)
