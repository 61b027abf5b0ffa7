"""The stages of a traced model under a plan: what each runs and holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from simulator.parallel.partition import PartitionProblem, best_partition
from simulator.parallel.recompute import stage_sequences
from simulator.parallel.stages import Stage
from simulator.parallel.traced_stage import Holding, TracedStage
from simulator.pipeline.action import Order, actions_of
from simulator.plan import FILE_PREFIX, Plan
from simulator.plan_sections import plan_refusal
from simulator.recompute import check_no_exceptions, operations_of, read_sequence
from simulator.sequence import Operation
from simulator.tracing.kernels_of import dtype_name
from simulator.tracing.stage_chain import StageLibrary, stage_traces
from simulator.tracing.trace import Traced
from simulator.workload import SplitBackward, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage to simulate and the trace to run it from."""

    first_block: int
    """Its number in the model."""
    traced: Traced
    stage: TracedStage


def plan_stages(
    whole: Traced, plan: Plan, order: Order, *, sequence: Sequence[Operation] | None = None, library: StageLibrary | None = None
) -> tuple[PlannedStage, ...]:
    """The plan's stages of a traced model, each a stretch of its chain of blocks.

    Args:
        whole: traced at the plan's micro-batch.
        plan: ``pipeline.partition`` counts blocks; without one the stage with the most FLOPs has as few as can be.
        order: of the plan's schedule.
        sequence: of the whole model, where the plan names a file (`sequence_of_file`) or the best one was solved for.
        library: of the model, where several plans are asked for.

    Raises:
        InputError: the partition does not fit, a stage cannot be cut out, or the plan recomputes what the order cannot.
    """
    partition, known = block_partition(plan, whole.workload), library or StageLibrary(whole=whole)
    traces = stage_traces(whole, partition, library=known)
    split = {action.stage for cells in order.ranks for action in actions_of(cells) if action.kind == "W"}
    ends = list(pairwise((0, *accumulate(partition))))
    planned = []
    for index, (traced, (first, end), operations) in enumerate(
        zip(traces, ends, _operations(plan, traces, sequence), strict=True)
    ):
        if index in split and any(operation.option == "selective" for operation in operations):
            rule = f"schedule {plan.pipeline.schedule} makes gradients in two passes, each of which would run the recomputed operators again"
            raise plan_refusal("memory.recompute", "selective", rule, 'take "none" or "full", or another pipeline.schedule')
        in_two = index in split and index > 0
        own = known.once((first, end, in_two), partial(_stage, traced, known.split(first, end) if in_two else ()))
        stage = replace(own, index=index, operations=operations, receives=index > 0, sends=index < len(partition) - 1)
        planned.append(PlannedStage(first_block=first, traced=traced, stage=stage))
    return tuple(planned)


def block_partition(plan: Plan, workload: Workload) -> tuple[int, ...]:
    """Blocks of each stage: the plan's, or the cut whose stage with the most FLOPs has as few as can be.

    Raises:
        InputError: the model has fewer blocks than the plan stages, or the plan's cut does not fit it.
    """
    num_blocks = len(workload.blocks)
    if plan.num_stages > num_blocks:
        rule = f"pp * virtual_stages <= blocks must hold, but got {plan.num_stages} > {num_blocks}"
        raise plan_refusal("parallel.pp", plan.parallel.pp, rule, "take fewer stages")
    flops = tuple(float(block.options[0].forward.flops + block.options[0].backward.flops) for block in workload.blocks)
    partition = plan.pipeline.partition or best_partition(
        PartitionProblem(layer_s=flops, front_s=0.0, back_s=0.0), plan.num_stages
    )
    if sum(partition) != num_blocks or min(partition) < 1:
        rule = f"every stage has a block and all have {num_blocks}, but got {list(partition)}"
        raise plan_refusal("pipeline.partition", list(partition), rule, "'schedlab trace' lists the blocks")
    return partition


def sequence_of_file(plan: Plan, folder: Path | None) -> tuple[Operation, ...] | None:
    """The sequence of a plan's ``file:SEQ``, blocks counted over the whole model; None where the plan names none.

    Raises:
        InputError: no such file, or no sequence.
    """
    named = plan.memory.recompute.startswith(FILE_PREFIX)
    return read_sequence(plan.memory.recompute, folder or Path()) if named else None


def _operations(plan: Plan, traces: Sequence[Traced], sequence: Sequence[Operation] | None) -> list[tuple[Operation, ...]]:
    """Of each stage."""
    last = len(traces) - 1
    if sequence is None:
        return [operations_of(plan, traced.workload, stage=index, ends=index == last) for index, traced in enumerate(traces)]
    check_no_exceptions(plan)
    stages, first = [], 0
    for index, traced in enumerate(traces):
        stages.append(Stage(index=index, first=first, workload=traced.workload, receives=index > 0, sends=index < last))
        first += len(traced.workload.blocks)
    return stage_sequences(sequence, stages, source=plan.memory.recompute)


def _stage(traced: Traced, split: tuple[SplitBackward, ...]) -> TracedStage:
    """A stretch as the only stage of a pipeline; its place and its operations are the plan's."""
    captured = traced.chain.capture
    return TracedStage(
        index=0, workload=traced.workload, operations=(), split=split, receives=False, sends=False,
        parameters={
            name: Holding(
                size_bytes=_num_bytes(value), elements=value.numel(), trained=name in captured.trained, dtype=dtype_name(value.dtype)
            )
            for name, value in captured.parameters.items()
        },
        buffers={name: _num_bytes(value) for name, value in captured.buffers.items()},
        inputs={name: _num_bytes(value) for name, value in captured.inputs.items()},
        parameters_of_block=tuple(frozenset(block.names("p")) - traced.shared for block in traced.chain.blocks),
    )  # fmt: skip


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
