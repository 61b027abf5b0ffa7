"""Bounds of one plan of a traced model: its own stages and order in time, what its replicas exchange behind them, and bytes that a rank holds at least.

**Model**: passes take what the simulator's instructions take, each rank runs its own in order and a message takes its latency and the least boundary's bytes (`simulator.pipeline.play_kernels`).
With whole parameters a rank then sums what is final last, updates, and (ZeRO 1) gathers; with split ones passes also lay out what was gathered and pack gradients, and all of a rank's
collectives follow one another.

**Memory**: what lives through the step, and the activations of micro-batches in flight with the rise of the running pass (`search.stage_recompute.Moments`), as if a pass for the input's
gradient released all.

A rank that is never idle is later by what exchanges beside its compute cost it: both slow each other.

**Not counted**: slow-down by messages, messages that wait for one another or are kept until they are waited for, gradients in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.rank_moments import moments_of
from search.traced.plans import stages_of
from simulator.lower import PassPrices, optimizer_elements_pass
from simulator.parallel.stages import stage_cost
from simulator.parallel.traced_replicas import Bucket, packing_pass, trained_in_order
from simulator.parallel.traced_shards import flat_buffers
from simulator.parallel.traced_stage import TracedStage
from simulator.parallel.traced_step import TracedStep, parameters_of, resident_bytes
from simulator.pipeline.order_arrays import KIND_CODES, OrderArrays, order_arrays
from simulator.pipeline.play_kernels import play_cells
from simulator.program import Stream
from simulator.tracing.simulate_stages import StagesCase
from simulator.tracing.stage_chain import StageLibrary

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBound:
    """What a plan needs at least."""

    seconds: float
    needed_bytes: int
    """On its fullest rank."""


def step_bound(case: StagesCase, library: StageLibrary) -> StepBound:
    """The bound of a plan.

    Args:
        case: of the plan.
        library: of its blocks.
    """
    return StepBound(seconds=least_seconds(case), needed_bytes=least_bytes(case, library))


def least_seconds(case: StagesCase) -> float:
    """Seconds that the plan's step is not below."""
    step, order = case.step, case.order
    times = np.array([_pass_seconds(case, stage) for stage in step.stages])
    passes = _passes(order_arrays(order), times, whole=[not stage.split for stage in step.stages])
    boundaries = [stage.workload.blocks[-1].output_bytes for stage in step.stages if stage.sends]
    message_s = step.link.latency_s + min(boundaries, default=0) / step.link.bytes_per_s
    start, end, _ = play_cells(*passes, message_s)
    found_s = 0.0
    for rank, (first, last) in enumerate(pairwise(passes.first_cell.tolist())):
        busy_s = float(start[first]) + float(passes.duration[first:last].sum())
        found_s = max(found_s, _rank_end_s(case, rank, float(end[last - 1]), busy_s))
    return found_s


class _Passes(NamedTuple):
    """An order as `play_cells` takes it, a cell for each pass."""

    first_cell: Ints
    first_part: Ints
    stage: Ints
    kind: Ints
    micro_batch: Ints
    rank_of: Ints
    duration: Floats


def _passes(arrays: OrderArrays, times_s: Floats, *, whole: Sequence[bool]) -> _Passes:
    """Passes with their durations; those that an order overlaps run one after the other.

    A stage whose backward pass is ``whole`` does nothing in the pass for its input's gradient, and all in the one for its weights.

    Args:
        arrays: of the order.
        times_s: of each stage and kind of pass.
        whole: of each stage.
    """
    undivided = np.array(whole)[arrays.stage]
    kept = ~(undivided & (arrays.kind == KIND_CODES["B"]))
    first = np.concatenate(([0], np.cumsum(kept)))[arrays.first_part[arrays.first_cell]]
    kind = np.where(undivided & (arrays.kind == KIND_CODES["W"]), KIND_CODES["BW"], arrays.kind)[kept]
    stage, duration = arrays.stage[kept], times_s[arrays.stage, arrays.kind][kept]
    return _Passes(first, np.arange(len(stage) + 1), stage, kind, arrays.micro_batch[kept], arrays.rank_of, duration)


def _pass_seconds(case: StagesCase, stage: TracedStage) -> list[float]:
    """Of a micro-batch's passes through a stage, by `KIND_CODES`."""
    prices, blocks = case.prices, stage.workload.blocks
    options = {one.block: one.option for one in stage.operations if one.kind == "F_all"}
    forward_s = again_s = full_s = 0.0
    for place, (kind, index, name) in enumerate(stage.operations):
        block = blocks[index]
        if kind == "B":
            option = block.option(options[index])
            full_s += min(prices.seconds(option.backward), prices.seconds(option.backward_accumulate))
        else:
            seconds = prices.seconds(block.option(name).forward if kind == "F_all" else block.discard)
            forward_s, again_s = (forward_s + seconds, again_s) if place < stage.turn else (forward_s, again_s + seconds)
    laid_out_s, packed_s, first_s = _sharded_seconds(case, stage)
    input_s, weight_s = 0.0, again_s + full_s
    if stage.split:
        input_s = again_s + sum(prices.seconds(half.inputs) for half in stage.split)
        weight_s = sum(min(prices.seconds(half.weights), prices.seconds(half.weights_accumulate)) for half in stage.split)
    found = dict.fromkeys(KIND_CODES, 0.0)
    found["F"] = forward_s + laid_out_s + first_s[0]
    found["B"] = input_s + (laid_out_s if stage.split else 0.0)
    found["W"] = weight_s + packed_s + (0.0 if stage.split else laid_out_s)
    found["BW"] = again_s + full_s + laid_out_s + packed_s + first_s[1]
    return [found[kind] for kind in KIND_CODES]


def _sharded_seconds(case: StagesCase, stage: TracedStage) -> tuple[float, float, tuple[float, float]]:
    """Seconds that ZeRO 2 and 3 add to a pass through a stage: laying parameters out, packing gradients, and the first gather of a forward and a backward pass.

    A rank of several may have its first parameters before the message arrives, and sends its result before it packs the last gradients: these are left out there.
    """
    shards = case.step.shards
    if shards is None:
        return 0.0, 0.0, (0.0, 0.0)
    units = [
        flat_buffers({name: stage.parameters[name] for name in sorted(names)}) for names in stage.parameters_of_block if names
    ]
    trained = [
        flat_buffers({name: stage.parameters[name] for name in sorted(names) if stage.parameters[name].trained})
        for names in stage.parameters_of_block
    ]
    packed_s, laid_out_s = ([_copied_s(unit, case.prices) for unit in own] for own in (trained, units))
    alone = case.order.num_ranks == 1
    packing_s = sum(packed_s if alone else packed_s[1:])
    if shards.keeps or not units:
        return 0.0, packing_s, (0.0, 0.0)
    if not alone:
        return sum(laid_out_s) - max(laid_out_s[0], laid_out_s[-1]), packing_s, (0.0, 0.0)
    ends = ((units[0], stage.parameters_of_block[0]), (units[-1], stage.parameters_of_block[-1]))
    # behind a block without parameters the first ones are gathered beside its compute
    there, back = (_collectives_s(case, "all_gather", unit) if names else 0.0 for unit, names in ends)
    first_s = (there, back)
    return sum(laid_out_s), packing_s, first_s


def _copied_s(buckets: Iterable[Bucket], prices: PassPrices) -> float:
    return sum(prices.seconds(packing_pass(bucket)) for bucket in buckets)


def _collectives_s(case: StagesCase, name: str, buckets: Iterable[Bucket]) -> float:
    return sum(case.step.collective_s(name, float(bucket.size_bytes), case.plan.parallel.dp) for bucket in buckets)


def _rank_end_s(case: StagesCase, rank: int, computed_s: float, busy_s: float) -> float:
    """When a rank has updated its parameters, at least.

    Args:
        case: of the plan.
        rank: of the pipeline.
        computed_s: when its passes are over.
        busy_s: the same if it were never idle between them.
    """
    step, replicas, prices = case.step, case.step.replicas, case.prices
    trained = [(held.elements, held.size_bytes) for held in parameters_of(step, rank).values() if held.trained]
    if step.shards is not None:
        part, traffic_s = step.shards.part, _sharded_traffic_s(case, rank)
        trained = [(part(elements), part(size)) for elements, size in trained]
        alone = (_sharded_seconds(case, step.stages[stage])[2] for stage in step.order.stages_of_rank[rank])
        waited_s = step.order.num_microbatches * sum(map(sum, alone))  # gathers that passes begin with
        return max(computed_s, traffic_s, busy_s + _beside(step) * (traffic_s - waited_s)) + _update_s(case, trained)
    if replicas is None:
        return computed_s + _update_s(case, trained)
    buckets = replicas.buckets[rank]
    summed = [replicas.reduce_s(bucket, step.collective_s) for bucket in buckets]
    _, late = trained_in_order(step.stages, step.order.stages_of_rank[rank])
    behind = [
        seconds
        for bucket, seconds in zip(buckets, summed, strict=True)
        if not replicas.overlaps or any(name in late for name in bucket.names)
    ]
    if replicas.splits:
        trained = [(replicas.part_elements(bucket), replicas.part_bytes(bucket)) for bucket in buckets]
    gathered_s = sum(replicas.gather_s(bucket, step.collective_s) for bucket in buckets) if replicas.splits else 0.0
    packed_s = _copied_s(buckets, prices) if len(step.order.stages_of_rank[rank]) == 1 else 0.0
    ends_s = max(computed_s + packed_s + sum(behind), busy_s + packed_s + _beside(step) * sum(summed))
    return ends_s + _update_s(case, trained) + gathered_s


def _beside(step: TracedStep) -> float:
    """Seconds by which a rank that is never idle is later for each second of its replicas' exchanges: they run beside its compute, which both slow, or alone."""
    compute, exchange = step.slowdown[Stream.COMPUTE, Stream.DP], step.slowdown[Stream.DP, Stream.COMPUTE]
    return float(min(1.0, exchange * (1.0 - 1.0 / compute)))


def _sharded_traffic_s(case: StagesCase, rank: int) -> float:
    """All collectives of a rank's replicas: gradients for each micro-batch, parameters for each pass, or once where they are kept."""
    assert case.step.shards is not None
    batches, total_s = case.order.num_microbatches, 0.0
    for stage in case.step.order.stages_of_rank[rank]:
        own = case.step.stages[stage]
        for names in own.parameters_of_block:
            held = {name: own.parameters[name] for name in sorted(names)}
            trained = {name: one for name, one in held.items() if one.trained}
            gathers = 1 if case.step.shards.keeps else 2 * batches
            total_s += gathers * _collectives_s(case, "all_gather", flat_buffers(held))
            total_s += batches * _collectives_s(case, "reduce_scatter", flat_buffers(trained))
    return total_s


def _update_s(case: StagesCase, trained: list[tuple[int, int]]) -> float:
    return case.prices.seconds(optimizer_elements_pass(trained, optimizer=case.step.optimizer))


def least_bytes(case: StagesCase, library: StageLibrary) -> int:
    """Bytes of live tensors that the plan's fullest rank is not below."""
    order, needed = case.order, 0
    stages = stages_of(case, library)
    operations = [stage.operations for stage in case.step.stages]
    costs = [
        case.prices.once(
            ("cost", *map(id, stage.blocks), stage.receives, stage.sends, own),
            lambda stage=stage, own=own: stage_cost(stage, own, case.prices),  # type: ignore[misc]
        )
        for stage, own in zip(stages, operations, strict=True)
    ]
    for rank, resident in enumerate(resident_bytes(case.step)):
        own = order.stages_of_rank[rank]
        moments = moments_of(order, rank, weight_share=0.0)
        sizes = np.array([
            [float(getattr(part, name)) for part in (costs[stage].forward, costs[stage].backward)]
            for stage in own for name in ("net_bytes", "rise_bytes")
        ]).reshape(len(own), 2, 2)  # fmt: skip
        peak = moments.peak_bytes(sizes[None, :, 0, 0], sizes[None, :, 1, 0], sizes[None, :, 1, 1])
        needed = max(needed, sum(resident) + int(peak[0]))
    return needed
