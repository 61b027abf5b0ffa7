"""ZeRO 3 and FSDP: parameters come together unit by unit just ahead of use. What a pass waits for, and what it keeps gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hardware_models.profile import DeviceProfile
from simulator.lower import PassPrices
from simulator.parallel.host_dispatch import dispatch_of
from simulator.parallel.host_python import BARE_OPERATOR_S, OLDER_HOSTS
from simulator.parallel.stages import LAYER_ENDS, Stage
from simulator.plan_sections import Runtime
from simulator.sequence import Operation
from simulator.workload import Block

DEEPSPEED = ("deepspeed@2021", "deepspeed")
"""``@2021``: 0.3.11 to 0.5, before parameters were gathered together (microsoft/DeepSpeed#1453)."""
PREFETCH_UNITS = 1
"""Units gathered ahead unless the plan says: while one computes, FSDP2 gathers the next (torchtitan docs/fsdp.md; pytorch torch/distributed/fsdp/_fully_shard)."""
DEEPSPEED_PREFETCH_ELEMENTS = 50_000_000
"""Parameters that DeepSpeed's ZeRO 3 gathers ahead unless the plan says: ``stage3_prefetch_bucket_size`` (deepspeed/runtime/zero/config.py)."""
LIVE_ELEMENTS = 1_000_000_000
"""While more parameters than these are there, DeepSpeed gathers none ahead: ``stage3_max_live_parameters`` (as above)."""
PERSISTENT_ELEMENTS = 100_000
"""Smaller tensors stay gathered: ``stage3_param_persistence_threshold`` (as above)."""
ONE_BY_ONE = ("deepspeed@2021",)
"""Frameworks that gather and scatter tensor by tensor, through lists of as many pieces as there are ranks (`list_seconds`)."""
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
    tensors: tuple[int, ...] = ()
    """Elements of what is gathered on its own, in the order of use; empty: all together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathers:
    """What a pass gathers: seconds that it waits for before it computes, and seconds beside its compute."""

    first_s: float = 0.0
    rest_s: float = 0.0


def units_of(stage: Stage, framework: str) -> tuple[Unit, ...]:
    """The units of a stage: layers, and what precedes and follows them; under DeepSpeed, which gathers by submodule, halves of layers.

    Versions of `ONE_BY_ONE` gather each tensor of a unit on its own, those that stay apart.
    """
    if not stage.blocks:
        return ()
    ends: list[int] = []
    for index, block in enumerate(stage.blocks):
        following = stage.blocks[index + 1].name if index + 1 < len(stage.blocks) else ""
        if framework in DEEPSPEED or block.name in LAYER_ENDS or block.name != _ATTENTION or following not in LAYER_ENDS:
            ends.append(index + 1)
    starts = [0, *ends[:-1]]
    elements = [
        sum(block.parameter_elements for block in stage.blocks[first:end]) for first, end in zip(starts, ends, strict=True)
    ]
    if stage.shared_elements:
        elements[0 if not stage.receives else -1] += stage.shared_elements
    outermost, listed = framework in FLAT_BUFFERS, framework in ONE_BY_ONE
    tensors = [
        _tensors(stage.blocks[first:end], own) if listed else () for first, end, own in zip(starts, ends, elements, strict=True)
    ]
    return tuple(
        Unit(first=first, end=end, elements=own, root=outermost and stage.blocks[end - 1].name not in LAYER_ENDS, tensors=parts)
        for first, end, own, parts in zip(starts, ends, elements, tensors, strict=True)
        if (parts if listed else own)
    )


def _tensors(blocks: Sequence[Block], elements: int) -> tuple[int, ...]:
    """Elements of the tensors of some blocks that do not stay gathered; what no block names is a table that blocks share."""
    own = [parameter.elements for block in blocks for parameter in block.parameters]
    shared = elements - sum(own)
    return tuple(one for one in (*own, shared) if one > PERSISTENT_ELEMENTS)


def prefetched_units(units: Sequence[Unit], runtime: Runtime) -> int:
    """Units gathered ahead of the one that computes: the plan's, or the framework's."""
    if runtime.prefetch_blocks is not None:
        return runtime.prefetch_blocks
    if runtime.framework not in DEEPSPEED or not units:
        return PREFETCH_UNITS
    return max(PREFETCH_UNITS, DEEPSPEED_PREFETCH_ELEMENTS // max(1, min(unit.elements for unit in units)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one gather brings together."""

    elements: int
    compute_s: float
    """That waits for it."""
    prefetch: int
    """Pieces ahead of it that may still be computing when its gather begins."""


def pieces_of(units: Sequence[Unit], compute_s: Sequence[float], prefetch: int) -> list[Piece]:
    """What a pass gathers, in its order: units, or each of their tensors with its part of the unit's compute, by elements.

    **Model**: tensors that go one by one are gathered one ahead, and none while more than `LIVE_ELEMENTS` are in use.

    **Source**: ``PartitionedParameterCoordinator.prefetch_next_sub_modules``: nothing while a gather is in flight, then tensors until ``prefetch_bucket_size`` is passed, so
    at least one (microsoft/DeepSpeed v0.3.13 deepspeed/runtime/zero/stage3.py).

    **Not modelled**: tensors that are kept because they are used again within ``max_reuse_distance``.

    Args:
        units: in the order of the pass.
        compute_s: of each.
        prefetch: units gathered ahead (`prefetched_units`); 0: none.
    """
    made: list[Piece] = []
    for unit, seconds in zip(units, compute_s, strict=True):
        if not unit.tensors:
            made.append(Piece(elements=unit.elements, compute_s=seconds, prefetch=prefetch))
            continue
        whole = sum(unit.tensors)
        for elements in unit.tensors:
            crowded = bool(made) and made[-1].elements > LIVE_ELEMENTS
            ahead = 0 if crowded else min(prefetch, PREFETCH_UNITS)
            made.append(Piece(elements=elements, compute_s=seconds * elements / whole, prefetch=ahead))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class ListSeconds:
    """The host's time for each rank in the list of a collective over one tensor."""

    gathered_s: float = 0.0
    scattered_s: float = 0.0


def list_seconds(framework: str, device: DeviceProfile) -> ListSeconds:
    """What a collective over a list of pieces costs the host, for each piece.

    **Model**: to gather, Python takes a view of the result for each rank, and the library copies what came for each rank into it (a kernel each, behind the collective); to
    scatter, Python flattens and takes a view, and the library copies each into one buffer. The device waits, since the host synchronises with it before it begins.

    **Source**: ``_allgather_param`` with its ``torch.cuda.synchronize()`` and ``_reduce_scatter_gradient`` (microsoft/DeepSpeed v0.3.13 deepspeed/runtime/zero/partition_parameters.py);
    ``ProcessGroupNCCL::allgather`` and ``reduce_scatter``, ``flatten_for_scatter_gather`` (pytorch v1.8 torch/lib/c10d/ProcessGroupNCCL.cpp); a view as a bare operator
    (`host_python.BARE_OPERATOR_S`), a copy as the profile's host dispatches it from C++.
    """
    if framework not in ONE_BY_ONE:
        return ListSeconds()
    view_s = BARE_OPERATOR_S * OLDER_HOSTS.get(device.architecture, 1.0)
    copy_s = dispatch_of(device).autograd_backward_s
    return ListSeconds(gathered_s=view_s + copy_s, scattered_s=2.0 * view_s + copy_s)


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
    compute_s: Sequence[float], gather_s: Sequence[float], prefetch: int | Sequence[int], *, copy_s: Sequence[float] = ()
) -> Gathers:
    """What a pass over units waits for and hides.

    **Model**: gathers follow one another on one stream; that of unit k begins when unit k - 1 - ``prefetch`` has computed, unit k computes when it is there. Of the
    time T that this takes alone, T less the compute is waited for; the rest of the gathers is beside compute. For equal units that compute longer than they are
    gathered, one gather is waited for; without prefetch all of them are.

    Args:
        compute_s: of each unit, in the order of the pass.
        gather_s: of each unit.
        prefetch: units gathered ahead of the one that computes; of each unit, or one number for all.
        copy_s: of each unit, what the compute stream takes to lay gathered parameters out before it uses them; empty: nothing.

    Not modelled: a limit in bytes on what is gathered at once.
    """
    computed: list[float] = []
    gathered = 0.0
    laid_out = copy_s or (0.0,) * len(compute_s)
    ahead = [prefetch] * len(compute_s) if isinstance(prefetch, int) else prefetch
    for place, (compute, gather, copied) in enumerate(zip(compute_s, gather_s, laid_out, strict=True)):
        freed = place - 1 - ahead[place]
        gathered = max(gathered, computed[freed] if freed >= 0 else 0.0) + gather
        computed.append(max(gathered, computed[-1] if computed else 0.0) + copied + compute)
    if not computed:
        return Gathers()
    waited = computed[-1] - sum(compute_s)
    return Gathers(first_s=waited, rest_s=max(0.0, sum(gather_s) - waited))
