"""Which sequence a plan's ``memory.recompute`` means on a workload. ``optimal`` is the search's to decide, and refused here."""

from __future__ import annotations

from pathlib import Path

from hardware_models.text_files import text_of
from simulator.plan import FILE_PREFIX, Plan, expand_ranges
from simulator.plan_sections import plan_refusal
from simulator.sequence import Operation, check_sequence, checkpoint_blocks, parse_sequence
from simulator.workload import Workload


def operations_of(
    plan: Plan, workload: Workload, *, folder: Path | None = None, stage: int = 0, ends: bool = True
) -> tuple[Operation, ...]:
    """The order in which each micro-batch runs the workload's blocks under a plan on one device.

    ``none`` keeps what autograd keeps, ``selective`` keeps the results of products in every block that can, ``full`` keeps each
    block's input only, save in the last block, whose backward follows at once. ``[[memory.block]]`` sections change single blocks.

    Args:
        folder: where a relative ``file:SEQ`` begins.
        stage: of a pipeline, whose blocks the workload has; ``[[memory.block]]`` sections of other stages do not concern it.
        ends: whether its last block is the model's.

    Raises:
        InputError: ``optimal`` (to be resolved by the search), a file that is not there or no legal sequence, a block number too
            large, a section for some micro-batches only, a section beside a file.
    """
    memory = plan.memory
    if memory.recompute.startswith(FILE_PREFIX):
        check_no_exceptions(plan)
        return _from_file(memory.recompute, workload, folder or Path())
    if memory.recompute == "optimal":
        raise plan_refusal(
            "memory.recompute", "optimal", "stands for what the search finds", "resolve it with search.optimal_recompute"
        )
    choices = [memory.recompute] * len(workload.blocks)
    if memory.recompute == "full" and ends:
        choices[-1] = "none"
    for position, exception in enumerate(memory.block):
        if exception.stage != stage:
            continue
        key = f"memory.block[{position}]"
        if exception.microbatches != "all":
            rule = "recompute per micro-batch is not simulated yet on a single device"
            raise plan_refusal(f"{key}.microbatches", exception.microbatches, rule, 'leave it at "all"')
        if exception.recompute is not None:
            for block in expand_ranges(exception.blocks, len(choices), key=f"{key}.blocks"):
                choices[block] = exception.recompute
    return _from_choices(choices, workload)


def check_no_exceptions(plan: Plan) -> None:
    """Refuses sections beside a sequence of their own, which says of every block how it is run.

    Raises:
        InputError: a ``[[memory.block]]`` section has a ``recompute``.
    """
    for position, exception in enumerate(plan.memory.block):
        if exception.recompute is not None:
            rule = f'memory.recompute = "{plan.memory.recompute}" says of every block how it is run'
            raise plan_refusal(f"memory.block[{position}].recompute", exception.recompute, rule, "leave the section out")


def _from_choices(choices: list[str], workload: Workload) -> tuple[Operation, ...]:
    names = [
        block.options[-1].name if choice == "selective" else block.options[0].name
        for block, choice in zip(workload.blocks, choices, strict=True)
    ]
    checkpointed = [index for index, choice in enumerate(choices) if choice == "full"]
    return checkpoint_blocks(len(names), checkpointed, names)


def read_sequence(value: str, folder: Path) -> tuple[Operation, ...]:
    """The operations of a ``file:SEQ``.

    Raises:
        InputError: no such file, or a line that is none of the four forms.
    """
    path = folder / value.removeprefix(FILE_PREFIX)
    text = text_of(path, remedy=f"memory.recompute = {value!r} names it; write one operation a line: F_ck 0, F_all 1:all, B 1")
    return parse_sequence(text, source=str(path))


def _from_file(value: str, workload: Workload, folder: Path) -> tuple[Operation, ...]:
    path = folder / value.removeprefix(FILE_PREFIX)
    operations = read_sequence(value, folder)
    check_sequence(operations, len(workload.blocks), source=str(path))
    for number, operation in enumerate(operations, start=1):
        known = [option.name for option in workload.blocks[operation.block].options]
        if operation.kind == "F_all" and operation.option not in known:
            raise plan_refusal(
                "memory.recompute",
                f"{path}: operation {number}: {operation}",
                f"block {operation.block} has the options {', '.join(known)}",
            )
    return operations
