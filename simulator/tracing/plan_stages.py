"""The stages of a traced model under a plan: what each runs and holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from simulator.tracing.stage_chain import split_passes, stage_traces
from simulator.tracing.trace import Traced
from simulator.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage to simulate and the trace to run it from."""

    first_block: int
    """Its number in the model."""
    traced: Traced
    stage: TracedStage


def plan_stages(
    whole: Traced, plan: Plan, order: Order, *, sequence: Sequence[Operation] | None = None
) -> tuple[PlannedStage, ...]:
    """The plan's stages of a traced model, each a stretch of its chain of blocks.

    Args:
        whole: traced at the plan's micro-batch.
        plan: ``pipeline.partition`` counts blocks; without one the stage with the most FLOPs has as few as can be.
        order: of the plan's schedule.
        sequence: of the whole model, where the plan names a file (`sequence_of_file`).

    Raises:
        InputError: the partition does not fit, a stage cannot be cut out, or the plan recomputes what the order cannot.
    """
    partition = _partition(plan, whole.workload)
    traces = stage_traces(whole, partition)
    split = {action.stage for cells in order.ranks for action in actions_of(cells) if action.kind == "W"}
    planned, first = [], 0
    for index, (traced, count, operations) in enumerate(
        zip(traces, partition, _operations(plan, traces, sequence), strict=True)
    ):
        if index in split and any(operation.option == "selective" for operation in operations):
            rule = f"schedule {plan.pipeline.schedule} makes gradients in two passes, each of which would run the recomputed operators again"
            raise plan_refusal("memory.recompute", "selective", rule, 'take "none" or "full", or another pipeline.schedule')
        stage = _stage(traced, index, operations, num_stages=len(partition), split=index in split and index > 0)
        planned.append(PlannedStage(first_block=first, traced=traced, stage=stage))
        first += count
    return tuple(planned)


def _partition(plan: Plan, workload: Workload) -> tuple[int, ...]:
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


def _stage(traced: Traced, index: int, operations: tuple[Operation, ...], *, num_stages: int, split: bool) -> TracedStage:
    captured = traced.chain.capture
    return TracedStage(
        index=index, workload=traced.workload, operations=operations, split=split_passes(traced) if split else (),
        receives=index > 0, sends=index < num_stages - 1,
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
