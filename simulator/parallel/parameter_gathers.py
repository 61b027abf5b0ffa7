"""ZeRO 3 and FSDP: parameters come together unit by unit just ahead of use. What a pass waits for, and what it keeps gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.lower import PassPrices
from simulator.parallel.stages import LAYER_ENDS, Stage
from simulator.plan_sections import Runtime
from simulator.sequence import Operation

PREFETCH_UNITS = 1
"""Units gathered ahead unless the plan says: while one computes, FSDP2 gathers the next (torchtitan docs/fsdp.md; pytorch torch/distributed/fsdp/_fully_shard)."""
DEEPSPEED_PREFETCH_ELEMENTS = 50_000_000
"""Parameters that DeepSpeed's ZeRO 3 gathers ahead unless the plan says: ``stage3_prefetch_bucket_size`` (deepspeed/runtime/zero/config.py)."""
FLAT_BUFFERS = ("pytorch", "torchtitan")
"""Frameworks that gather a unit into one buffer and copy its parameters out of it on the compute stream, and copy gradients into one before they are scattered: FSDP2
(``split_with_sizes_copy`` and ``chunk_cat``, pytorch torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py)."""
_ATTENTION = "attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Blocks whose parameters are gathered, and whose gradients are scattered, together."""

    first: int
    end: int
    """Last block + 1."""
    elements: int
    """Parameters on this rank before sharding."""
    root: bool = False
    """FSDP's own unit, all that no layer has: gathered as one, and until the step's end (FSDP2 leaves its outermost unit gathered: pytorch
    torch/distributed/fsdp/_fully_shard/_fsdp_state.py; torchtitan of 12/2024 gives embedding, last norm and head to it: ``apply_fsdp``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathers:
    """What a pass gathers: seconds that it waits for before it computes, and seconds beside its compute."""

    first_s: float = 0.0
    rest_s: float = 0.0


def units_of(stage: Stage, framework: str) -> tuple[Unit, ...]:
    """The units of a stage: layers, and what precedes and follows them; under DeepSpeed, which gathers by submodule, halves of layers."""
    if not stage.blocks:
        return ()
    ends: list[int] = []
    for index, block in enumerate(stage.blocks):
        following = stage.blocks[index + 1].name if index + 1 < len(stage.blocks) else ""
        if framework == "deepspeed" or block.name in LAYER_ENDS or block.name != _ATTENTION or following not in LAYER_ENDS:
            ends.append(index + 1)
    starts = [0, *ends[:-1]]
    elements = [
        sum(block.parameter_elements for block in stage.blocks[first:end]) for first, end in zip(starts, ends, strict=True)
    ]
    if stage.shared_elements:
        elements[0 if not stage.receives else -1] += stage.shared_elements
    outermost = framework in FLAT_BUFFERS
    return tuple(
        Unit(first=first, end=end, elements=own, root=outermost and stage.blocks[end - 1].name not in LAYER_ENDS)
        for first, end, own in zip(starts, ends, elements, strict=True)
        if own
    )


def prefetched_units(units: Sequence[Unit], runtime: Runtime) -> int:
    """Units gathered ahead of the one that computes: the plan's, or the framework's."""
    if runtime.prefetch_blocks is not None:
        return runtime.prefetch_blocks
    if runtime.framework != "deepspeed" or not units:
        return PREFETCH_UNITS
    return DEEPSPEED_PREFETCH_ELEMENTS // max(1, min(unit.elements for unit in units))


def gathered_elements(units: Sequence[Unit], prefetch: int) -> int:
    """Most parameters that are gathered at once: those of the unit that computes and of the ones fetched ahead of it, and those of the model's own unit."""
    own = sum(unit.elements for unit in units if unit.root)
    inner = [unit for unit in units if not unit.root]
    return own + max(
        (sum(unit.elements for unit in inner[place : place + prefetch + 1]) for place in range(len(inner))), default=0
    )


def unit_seconds(
    stage: Stage, operations: Sequence[Operation], prices: PassPrices, units: Sequence[Unit]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute seconds of each unit, forward and backward (with what runs again there), in the order of the chain."""
    place_of = {block: place for place, unit in enumerate(units) for block in range(unit.first, unit.end)}
    forward, backward = [0.0] * len(units), [0.0] * len(units)
    options: dict[int, str] = {}
    ran: set[int] = set()
    for operation in operations:
        index, block = operation.block, stage.blocks[operation.block]
        if operation.kind == "B":
            run = block.option(options[index]).backward_accumulate
        elif operation.kind == "F_all":
            options[index] = operation.option
            run = block.option(operation.option).forward
        else:
            run = block.discard
        own = backward if operation.kind == "B" or index in ran else forward
        ran.add(index)
        if index in place_of:
            own[place_of[index]] += prices.seconds(run)
    return tuple(forward), tuple(backward)


def gathers_of(
    compute_s: Sequence[float], gather_s: Sequence[float], prefetch: int, *, copy_s: Sequence[float] = ()
) -> Gathers:
    """What a pass over units waits for and hides.

    **Model**: gathers follow one another on one stream; that of unit k begins when unit k - 1 - ``prefetch`` has computed, unit k computes when it is there. Of the
    time T that this takes alone, T less the compute is waited for; the rest of the gathers is beside compute. For equal units that compute longer than they are
    gathered, one gather is waited for; without prefetch all of them are.

    Args:
        compute_s: of each unit, in the order of the pass.
        gather_s: of each unit.
        prefetch: units gathered ahead of the one that computes.
        copy_s: of each unit, what the compute stream takes to lay gathered parameters out before it uses them; empty: nothing.

    Not modelled: a limit in bytes on what is gathered at once.
    """
    computed: list[float] = []
    gathered = 0.0
    laid_out = copy_s or (0.0,) * len(compute_s)
    for place, (compute, gather, copied) in enumerate(zip(compute_s, gather_s, laid_out, strict=True)):
        freed = place - 1 - prefetch
        gathered = max(gathered, computed[freed] if freed >= 0 else 0.0) + gather
        computed.append(max(gathered, computed[-1] if computed else 0.0) + copied + compute)
    if not computed:
        return Gathers()
    waited = computed[-1] - sum(compute_s)
    return Gathers(first_s=waited, rest_s=max(0.0, sum(gather_s) - waited))
