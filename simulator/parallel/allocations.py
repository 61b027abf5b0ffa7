"""Reserved memory of each pipeline rank: its passes, tensor by tensor, through the model of CUDA's caching allocator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from hardware_models.caching_allocator import DEFAULT_SETTINGS, AllocatorPeaks, AllocatorSettings
from hardware_models.compiled_allocator import StepCalls
from hardware_models.units import DTYPE_BYTES
from simulator.lower import PassPrices
from simulator.parallel.framework import PRODUCTS
from simulator.parallel.gradient_sync import GRADIENTS_SHARDED, PARAMETERS_SHARDED
from simulator.parallel.memory import MASTER_BYTES, STATE_BYTES
from simulator.parallel.parameter_gathers import units_of
from simulator.parallel.recompute import MEGATRON
from simulator.parallel.stages import Stage, pass_changes
from simulator.pipeline.action import Action, Order, actions_of
from simulator.plan import Plan
from simulator.program import MemoryClass
from simulator.reserved_memory import ResidentTensors, TensorReader, repeated_peaks
from simulator.sequence import Operation
from simulator.workload import Block

SETTLED = 2
"""Micro-batches beyond those in flight at once after which a pipeline's allocations repeat."""
GEMM_SIZES = 3
"""Sizes of a product; a grouped one has its groups before them."""
_STATIC = (MemoryClass.FRAMEWORK, MemoryClass.PARAMETERS, MemoryClass.GRADIENTS)

Call = tuple[int, int]
"""A tensor's number within its micro-batch and its bytes; 0 bytes: it goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTensors:
    """What a micro-batch allocates and frees on a stage."""

    forward: tuple[Call, ...]
    backward: tuple[Call, ...]
    """Frees all that is left."""


def stage_tensors(stage: Stage, operations: Sequence[Operation], prices: PassPrices) -> StageTensors:
    """The tensors behind the bytes of a stage's passes; arguments as in `stage_cost`.

    **Model**: rises and falls read as tensors by the rule of `simulator.reserved_memory`. Like stages of plans with the same prices share them.
    """
    key = ("tensors", *map(id, stage.blocks), stage.receives, stage.sends, tuple(operations))
    return prices.once(key, lambda: _stage_tensors(stage, operations, prices))


def _stage_tensors(stage: Stage, operations: Sequence[Operation], prices: PassPrices) -> StageTensors:
    forward, backward = pass_changes(stage, operations, prices)
    reader = TensorReader()
    for change in forward:
        reader.change(*change)
    turn = len(reader.calls)
    for change in backward:
        reader.change(*change)
    for memory_class in list(reader.alive):
        reader.free_all(memory_class)
    return StageTensors(forward=tuple(reader.calls[:turn]), backward=tuple(reader.calls[turn:]))


class _Arrays:
    """Calls of a stage's passes as arrays: names and sizes, shape (calls, 2)."""

    def __init__(self, tensors: StageTensors, weight_share: float) -> None:
        left = np.array(_left_for_weights(tensors, weight_share), np.int64)
        forward, backward = (np.array(own, np.int64).reshape(-1, 2) for own in (tensors.forward, tensors.backward))
        waits = np.isin(backward[:, 0], left) & (backward[:, 1] == 0)
        freed = np.stack((left, np.zeros(len(left), np.int64)), axis=1)
        self.of_kind = {"F": forward, "BW": backward, "B": backward[~waits], "W": freed}
        self.width = 1 + int(max(forward[:, 0].max(initial=-1), backward[:, 0].max(initial=-1)))


class RankCalls:
    """Steps of ranks as calls of the allocator.

    **Model**: passes one after the other. Once as many micro-batches as are in flight at once, and `SETTLED` more, have come and gone, what a step allocates
    repeats: later micro-batches are left out. Where the weights' gradient is a pass of its own, it frees the tensors that the input's gradient leaves to it.

    **Not modelled**: buffers of communication; tensors that wait for other streams.

    Args:
        order: of the pipeline.
        tensors_of: of a pass's stage and micro-batch.
        weight_share: part of what the forward pass kept that only weights' gradients need.
    """

    def __init__(self, order: Order, tensors_of: Callable[[Action], StageTensors], *, weight_share: float) -> None:
        self.order, self.tensors_of, self.weight_share = order, tensors_of, weight_share
        self._arrays: dict[int, tuple[StageTensors, _Arrays]] = {}

    def of(self, rank: int) -> StepCalls:
        """The calls of a rank; a tensor's name is its number within its micro-batch, after the names of the stages' micro-batches that began before."""
        actions = tuple(actions_of(self.order.ranks[rank]))
        replayed = self.order.once(f"replayed on rank {rank}", lambda: _first_micro_batches(actions))
        names, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        begins: dict[tuple[int, int], int] = {}
        following = 0
        for action in actions:
            if action.micro_batch not in replayed:
                continue
            arrays, key = self._of_tensors(self.tensors_of(action)), (action.stage, action.micro_batch)
            if key not in begins:
                begins[key], following = following, following + arrays.width
            calls = arrays.of_kind[action.kind]
            names.append(calls[:, 0] + begins[key])
            sizes.append(calls[:, 1])
        whole = np.concatenate(sizes)
        return StepCalls(np.concatenate(names), np.where(whole > 0, np.maximum(1, whole // self.order.microbatch_parts), 0))

    def _of_tensors(self, tensors: StageTensors) -> _Arrays:
        if id(tensors) not in self._arrays:
            self._arrays[id(tensors)] = tensors, _Arrays(tensors, self.weight_share)
        return self._arrays[id(tensors)][1]


def _first_micro_batches(actions: Sequence[Action]) -> frozenset[int]:
    """Micro-batches that a rank begins first, as many as settle its memory."""
    begun: dict[int, None] = {}
    alive: set[tuple[int, int]] = set()
    most = 0
    for action in actions:
        if action.kind == "F":
            begun.setdefault(action.micro_batch)
            alive.add((action.stage, action.micro_batch))
        elif action.kind in {"BW", "W"}:
            alive.discard((action.stage, action.micro_batch))
        most = max(most, len({micro_batch for _, micro_batch in alive}))
    return frozenset(list(begun)[: most + SETTLED])


def _left_for_weights(tensors: StageTensors, share: float) -> tuple[int, ...]:
    """Tensors of the forward pass, last freed first, that make up the share of what it keeps."""
    kept = dict(tensors.forward)
    for name, size in tensors.forward:
        if not size:
            kept.pop(name)
    room, found = share * sum(kept.values()), []
    for name, size in reversed(tensors.backward):
        if not size and 0 < kept.get(name, 0) <= room:
            room -= kept[name]
            found.append(name)
    return tuple(found)


def rank_peaks(
    order: Order,
    tensors_of: Callable[[Action], StageTensors],
    resident: Sequence[ResidentTensors],
    *,
    weight_share: float,
    settings: AllocatorSettings = DEFAULT_SETTINGS,
    known: dict[Hashable, AllocatorPeaks] | None = None,
) -> tuple[AllocatorPeaks, ...]:
    """What the allocator reserves on each rank over a run of steps.

    Args:
        order: of the pipeline.
        tensors_of: of a pass's stage and micro-batch.
        resident: per rank, what lives through the step.
        weight_share: as in `RankCalls`.
        settings: the allocator's.
        known: replays of the same settings, by their calls; those made here are added. None: none.
    """
    calls, replays = RankCalls(order, tensors_of, weight_share=weight_share), {} if known is None else known
    found = []
    for rank, own in enumerate(resident):
        step = calls.of(rank)
        key = (own, *(blake2b(part.tobytes()).digest() for part in step))
        if key not in replays:
            replays[key] = repeated_peaks(step, len(step.names), own, settings=settings)
        found.append(replays[key])
    return tuple(found)


def rank_resident(stages: Sequence[Stage], resident_bytes: Sequence[int], plan: Plan, *, dtype: str) -> ResidentTensors:
    """The tensors behind the bytes that live on a rank through a step.

    **Model**: gradients and parameters are one buffer each, states one tensor a parameter. Megatron makes parameters one by one and moves them into their buffer, which
    leaves their memory in the cache (`_moved`); its master copies and moments are those of a contiguous part of that buffer.

    **Source**: ``DistributedOptimizer`` (megatron/core/optimizer/distrib_optimizer.py, 0.14).

    Args:
        stages: of the rank.
        resident_bytes: by `MemoryClass`.
        plan: its framework and optimizer.
        dtype: of parameters.
    """
    table = max(stage.shared_elements for stage in stages)
    elements, width = (
        (*([table] if table else ()), *_weights([block for stage in stages for block in stage.blocks])),
        DTYPE_BYTES[dtype],
    )
    state_bytes = resident_bytes[MemoryClass.OPTIMIZER_STATES]
    moments = STATE_BYTES[plan.precision.optimizer]
    master = MASTER_BYTES if width < MASTER_BYTES else 0
    shard = _first(elements, state_bytes // max(1, master + moments))
    fixed = tuple(resident_bytes[one] for one in _STATIC if resident_bytes[one])
    masters = tuple(master * one for one in shard if master)
    halves = tuple(moments * one // 2 for one in shard for _ in range(2) if moments)
    return ResidentTensors(
        parameters=fixed, batch=tuple(size for size in (resident_bytes[MemoryClass.BATCH],) if size), optimizer_states=halves, masters=masters,
        moved=tuple(width * one for one in _moved(stages, elements, plan)),
    )  # fmt: skip


def _moved(stages: Sequence[Stage], elements: Sequence[int], plan: Plan) -> Sequence[int]:
    """Elements of what a trainer makes of the parameters before they are where they stay.

    **Model**: Megatron's buffer of parameters comes when all of them are there. Its FSDP (ZeRO 2 and 3), given ``--init-model-with-meta-device``, makes parameters unit by unit, a layer
    at most: the unit's tensors, and, where parameters are sharded, the buffer into which they are gathered. Both go before the next unit's come, into the same memory.

    **Source**: ``_ParamAndGradBuffer`` (megatron/core/distributed/param_and_grad_buffer.py, 0.14); ``_init_each_parameter_group_buffers``
    (megatron/core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py, 0.16.1); the argument: docs/discussions/megatron-fsdp-user-guide of Megatron-LM.

    **Not modelled**: the cache being emptied where half of the device is in use by then (as above).
    """
    if plan.runtime.framework not in MEGATRON:
        return ()
    if plan.memory.zero_stage < GRADIENTS_SHARDED:
        return elements
    units = [(stage, unit) for stage in stages for unit in units_of(stage, plan.runtime.framework)]
    stage, unit = max(units, key=lambda one: one[1].elements)
    own = _weights(stage.blocks[unit.first : unit.end])
    table = unit.elements - sum(own)
    largest = (*own, table) if table else own
    return (sum(largest), *largest) if plan.memory.zero_stage >= PARAMETERS_SHARDED else largest


def _weights(blocks: Sequence[Block]) -> tuple[int, ...]:
    """Elements of each matrix of some blocks, and of what else a block has, in order."""
    found: list[int] = []
    for block in blocks:
        products = [
            kernel for kernel in block.options[0].forward.kernels if kernel.kernel_class in PRODUCTS and kernel.op != "bmm"
        ]
        own = [
            rows * columns
            for kernel in products
            for rows, columns in [kernel.shape[-2:]] * (kernel.shape[0] if len(kernel.shape) > GEMM_SIZES else 1)
        ]
        rest = block.parameter_elements - sum(own)
        found += [*own, rest] if rest > 0 else own if rest == 0 else [block.parameter_elements]
    return tuple(one for one in found if one)


def _first(elements: Sequence[int], total: int) -> tuple[int, ...]:
    """The tensors, the last one cut, that make up so many elements."""
    found: list[int] = []
    for one in elements:
        if total <= 0:
            break
        found.append(min(one, total))
        total -= one
    return (*found, total) if total > 0 else tuple(found)
