"""Pipeline stages: which blocks of the chain each one runs, and what its passes take in time and memory on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from hardware_models.kernel import Kernel
from simulator.builder import Builder
from simulator.lower import MicroBatchLowering, PassPrices
from simulator.lower_sums import NOTHING, lowered_sums
from simulator.parallel.partition import even_partition
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal
from simulator.program import Kind, MemoryClass
from simulator.sequence import Operation, runs_twice
from simulator.workload import Block, Pass, Workload

LAYER_ENDS = frozenset({"network", "experts"})
"""Names of the blocks that end a layer."""
WEIGHT_CLASSES = frozenset({"gemm", "batched_gemm", "reduction", "embedding"})
"""Kernels that make a parameter's gradient and nothing else; normalisations make theirs along with the input's."""
_LATER = 1
"""Any micro-batch but the first: it adds to gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stretch of the chain."""

    index: int
    first: int
    """Index of its first block in the model."""
    workload: Workload
    """The model's, with this stage's blocks only."""
    receives: bool
    sends: bool

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its blocks."""
        return self.workload.blocks

    @property
    def parameter_elements(self) -> int:
        """Trainable elements on this rank; a tied table counts where it is used."""
        return sum(block.parameter_elements for block in self.blocks) + self.shared_elements

    @property
    def shared_elements(self) -> int:
        """Elements of the table that embedding and head share."""
        whole = self.workload.parameter_elements
        own = whole if not whole else self.workload.shared_gradient_bytes * whole // max(1, self.workload.parameter_bytes)
        return own if not (self.receives and self.sends) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """One pass of one micro-batch through a stage on one rank, without communication."""

    seconds: tuple[tuple[Kind, float], ...]
    """Compute time by kind, in order."""
    rise_bytes: int
    """Most bytes above those at its start."""
    net_bytes: int
    """Bytes at its end above those at its start."""
    host_s: float = 0.0
    """The host's time to dispatch its kernels."""

    @property
    def total_s(self) -> float:
        """Compute time."""
        return sum(seconds for _, seconds in self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Passes of a stage. The backward pass splits into the input's gradient and the weights' one."""

    forward: PassCost
    backward: PassCost
    """In full, recompute included."""
    weight_s: float
    """Of the backward pass, what only makes parameters' gradients."""
    recomputed: tuple[int, ...]
    """Blocks (of the stage) that run forward again in the backward pass."""
    recomputed_flops: int
    """Of these runs, and of what options run again inside the backward pass."""
    weight_host_s: float = 0.0
    """Of the backward pass's dispatch, the kernels of ``weight_s``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCost:
    """A stretch of a stage's blocks that a pass runs without a break, forward and backward."""

    forward: PassCost
    backward: PassCost
    parameter_elements: int
    """Of its blocks, without a table that stages share."""


def layers_of(workload: Workload) -> list[tuple[int, int]]:
    """First and last + 1 block of each layer; what precedes the first layer belongs to it, what follows the last one to that."""
    ends = [index + 1 for index, block in enumerate(workload.blocks) if block.name in LAYER_ENDS]
    if not ends:
        return [(index, index + 1) for index in range(len(workload.blocks))]
    starts = [0, *ends[:-1]]
    ends[-1] = len(workload.blocks)
    return list(zip(starts, ends, strict=True))


def stages_of(workload: Workload, plan: Plan, partition: Sequence[int] | None = None) -> tuple[Stage, ...]:
    """The plan's stages; arguments and errors as for `stage_edges`."""
    edges = stage_edges(workload, plan, partition)
    return tuple(stage_between(workload, edges, index) for index in range(len(edges) - 1))


def stage_between(workload: Workload, edges: Sequence[int], index: int) -> Stage:
    """One of the stages that edges cut a workload into."""
    return Stage(
        index=index, first=edges[index], workload=replace(workload, blocks=workload.blocks[edges[index] : edges[index + 1]]), receives=index > 0,
        sends=index < len(edges) - 2,
    )  # fmt: skip


def stage_edges(workload: Workload, plan: Plan, partition: Sequence[int] | None = None) -> list[int]:
    """The first block of each of the plan's stages, and the number of blocks.

    **Model**: the embedding is on the first stage and the head on the last, with or without layers (``k pp - 2`` layers, one less at either end: Qi et al. 2024,
    arXiv 2401.10241, section 4.1, with chunks of one layer); a stage in the middle that has no layers hands on what it receives.

    Args:
        workload: of the model.
        plan: its ``pipeline.partition`` counts, where it has one.
        partition: layers of each stage where the plan has none; None: as even as can be.

    Raises:
        InputError: the partition has other layers than the model, or the first or the last stage has no block at all.
    """
    layers, num_stages = layers_of(workload), plan.num_stages
    counts = plan.pipeline.partition or partition or even_partition(len(layers), num_stages)
    if sum(counts) != len(layers):
        rule = f"the sum must be the model's layers, but got {sum(counts)} != {len(layers)}"
        raise plan_refusal("pipeline.partition", list(counts), rule)
    front, back = _ends(workload)
    inner = [front if done == 0 else back if done == len(layers) else layers[done][0] for done in accumulate(counts[:-1])]
    edges = [0, *inner, len(workload.blocks)]
    if num_stages > 1 and (edges[1] == 0 or edges[-2] == edges[-1]):
        rule = f"the first and the last stage have a layer, or the embedding and the head, but got {list(counts)}"
        raise plan_refusal("pipeline.partition", list(counts), rule, "give both at least one layer")
    return edges


def _ends(workload: Workload) -> tuple[int, int]:
    """Block that begins the first layer, and the one behind the last layer."""
    names = [block.name for block in workload.blocks]
    front = next((index for index, name in enumerate(names) if name != "embedding"), 0)
    ends = [index + 1 for index, name in enumerate(names) if name in LAYER_ENDS]
    return (front, ends[-1]) if ends else (0, len(names))


def stage_cost(stage: Stage, operations: Sequence[Operation], prices: PassPrices) -> StageCost:
    """What a micro-batch costs on a stage.

    **Model**: the stage's passes as `lower` issues them on one device. Gradients live in buffers of their own: only activations count here. Memory within
    a pass is kept as its greatest rise, so that peaks are exact while their moment is not.

    Args:
        stage: of the model.
        operations: order in which the stage runs its blocks, indices counted from its first.
        prices: of passes on the device.
    """
    turn, halves = 0, (NOTHING, NOTHING)
    if operations:
        turn = backward_start(operations)
        halves = lowered_sums(stage.workload, operations, prices, turn=turn, receives=stage.receives, sends=stage.sends)
    forward, backward = (
        PassCost(seconds=half.seconds, rise_bytes=half.rise_bytes, net_bytes=half.net_bytes) for half in halves
    )
    recomputed = tuple(operation.block for operation in operations[turn:] if operation.kind != "B")
    return StageCost(
        forward=forward, backward=backward, weight_s=sum(_weight_seconds(block, prices) for block in stage.blocks), recomputed=recomputed,
        recomputed_flops=_recomputed_flops(stage, operations, recomputed, prices),
    )  # fmt: skip


def _lowered(stage: Stage, operations: Sequence[Operation], prices: PassPrices) -> tuple[Builder, int]:
    """Instructions of one micro-batch, and which one begins its backward pass."""
    builder = Builder()
    lowering = MicroBatchLowering(
        stage.workload, prices, builder, _LATER, runs_twice(operations), receives=stage.receives, sends=stage.sends
    )
    if not operations:
        return builder, 0
    lowering.run(operations)
    return builder, backward_start(operations)


def pass_changes(
    stage: Stage, operations: Sequence[Operation], prices: PassPrices
) -> tuple[tuple[tuple[MemoryClass, int], ...], tuple[tuple[MemoryClass, int], ...]]:
    """Bytes that come (positive) and go in a micro-batch's forward and backward pass through a stage, in order; arguments and gradients as in `stage_cost`."""
    builder, turn = _lowered(stage, operations, prices)
    changes = [
        tuple(
            (memory_class, delta_bytes)
            for own in builder.memory[first:end]
            for _, delta_bytes, memory_class in own
            if memory_class is not MemoryClass.GRADIENTS
        )
        for first, end in ((0, turn), (turn, len(builder.memory)))
    ]
    return changes[0], changes[1]


def chunk_costs(stage: Stage, operations: Sequence[Operation], prices: PassPrices, *, most: int) -> tuple[ChunkCost, ...]:
    """The stage's passes in at most ``most`` chunks, in forward order: their costs add up to those of `stage_cost`.

    **Model**: a pass may be cut between two blocks if it runs all blocks on one side before those on the other, forward as backward (recompute keeps the
    blocks of a layer together); where there are more such places than needed, evenly spread ones are taken.

    Args:
        stage: of the model.
        operations: order in which the stage runs its blocks, indices counted from its first.
        prices: of passes on the device.
        most: chunks.
    """
    builder, turn = _lowered(stage, operations, prices)
    if not operations:
        empty = _pass_cost(builder, 0, 0)
        return (ChunkCost(forward=empty, backward=empty, parameter_elements=0),)
    ahead, back = builder.blocks[:turn], [max(0, block) for block in builder.blocks[turn:]]
    last = len(stage.blocks) - 1
    cuts = _cuts(ahead, back, last)
    if len(cuts) >= most:
        cuts = [cuts[place * (len(cuts) + 1) // most - 1] for place in range(1, most)]
    edges = [0, *cuts, last + 1]
    starts = [*(ahead.index(cut) for cut in edges[:-1]), turn]
    ends = [*(turn + min(n for n, block in enumerate(back) if block < cut) for cut in edges[1:-1]), turn]
    ends = [len(builder.blocks), *ends]  # ends[k]: where the backward pass is over with chunk k; ends[-1]: where it begins
    return tuple(
        ChunkCost(
            forward=_pass_cost(builder, starts[k], starts[k + 1]), backward=_pass_cost(builder, ends[k + 1], ends[k]),
            parameter_elements=sum(block.parameter_elements for block in stage.blocks[edges[k] : edges[k + 1]]),
        )
        for k in range(len(edges) - 1)
    )  # fmt: skip


def _cuts(ahead: Sequence[int], back: Sequence[int], last: int) -> list[int]:
    """Blocks before which both passes may be cut."""

    def ordered(blocks: Sequence[int]) -> set[int]:
        """Blocks c such that all runs of blocks before c precede those of c and later ones."""
        highest = list(accumulate(blocks, max))
        lowest = list(accumulate(reversed(blocks), min))[::-1]
        return {cut for above, cut in zip(highest, lowest[1:], strict=False) if above < cut}

    mirrored = {last + 1 - cut for cut in ordered([last - block for block in back])}
    return sorted(ordered(ahead) & mirrored)


def _recomputed_flops(stage: Stage, operations: Sequence[Operation], recomputed: Sequence[int], prices: PassPrices) -> int:
    def flops(run: Pass) -> int:
        return prices.once(("flops", id(run)), lambda: (run, run.flops))[1]

    names = {operation.block: operation.option for operation in operations if operation.kind == "F_all"}
    blocks = stage.blocks
    whole = sum(
        flops(blocks[block].option(names[block]).forward if block in names else blocks[block].discard) for block in recomputed
    )
    more = (
        flops(blocks[block].option(name).backward) - flops(blocks[block].options[0].backward)
        for kind, block, name in operations
        if kind == "F_all"
    )
    return whole + sum(more)


def backward_start(operations: Sequence[Operation]) -> int:
    """The first operation of the backward half: the loss's own last forward runs belong to it where they repeat."""
    turn = next(place for place, operation in enumerate(operations) if operation.kind == "B")
    seen = {operation.block for operation in operations[:turn]}
    ran: set[int] = set()
    for place, operation in enumerate(operations[:turn]):
        if operation.block in ran and len(ran) == len(seen):
            return place
        ran.add(operation.block)
    return turn


def _pass_cost(builder: Builder, first: int, end: int) -> PassCost:
    seconds: list[tuple[Kind, float]] = []
    alive = rise = 0
    for place in range(first, end):
        kind = Kind(builder.kinds[place])
        if seconds and seconds[-1][0] is kind:
            seconds[-1] = (kind, seconds[-1][1] + builder.durations[place])
        else:
            seconds.append((kind, builder.durations[place]))
        for _, delta_bytes, memory_class in builder.memory[place]:
            if memory_class is not MemoryClass.GRADIENTS:
                alive += delta_bytes
                rise = max(rise, alive)
    return PassCost(seconds=_by_kind(seconds), rise_bytes=rise, net_bytes=alive)


def _by_kind(seconds: Sequence[tuple[Kind, float]]) -> tuple[tuple[Kind, float], ...]:
    """One entry a kind, in order of first use."""
    total: dict[Kind, float] = {}
    for kind, duration_s in seconds:
        total[kind] = total.get(kind, 0.0) + duration_s
    return tuple(total.items())


def _weight_seconds(block: Block, prices: PassPrices) -> float:
    """Seconds of a block's backward pass that only make parameters' gradients."""
    return prices.once(("weight seconds", id(block)), lambda: (block, _weight_seconds_of(block, prices)))[1]


def _weight_seconds_of(block: Block, prices: PassPrices) -> float:
    option = block.options[0]
    first, later = option.backward, option.backward_accumulate
    offsets = prices.offsets(first)
    made = {event.kernel for event in first.memory if event.buffer in {"gradient", "shared_gradient"} and event.delta_bytes > 0}
    own = sum(float(offsets[n + 1] - offsets[n]) for n in made if _only_weights(first, n))
    return own + max(0.0, prices.seconds(later) - prices.seconds(first))


def _only_weights(run: Pass, n: int) -> bool:
    kernel: Kernel | None = run.kernels[n] if n < len(run.kernels) else None
    return kernel is not None and kernel.kernel_class in WEIGHT_CLASSES
