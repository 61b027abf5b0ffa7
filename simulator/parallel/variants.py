"""What ``[[memory.block]]`` changes: a stage's blocks recompute otherwise for some micro-batches, so that its passes come in variants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.parallel.recompute import layer_runs, stage_operations
from simulator.parallel.stages import Stage
from simulator.plan import Plan, expand_ranges
from simulator.sequence import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class StageVariants:
    """The distinct ways in which micro-batches run a stage."""

    operations: tuple[tuple[Operation, ...], ...]
    variant_of: NDArray[np.int64]
    """Of each micro-batch."""


def stage_variants(plan: Plan, stage: Stage) -> StageVariants:
    """How each micro-batch runs a stage's blocks.

    **Model**: of the sections that name a block and a micro-batch, the last one that says ``recompute`` counts, else ``memory.recompute``. Neighbouring blocks of a layer that
    recompute ``full`` keep the input of the first of them, other blocks what their option saves; embedding and head run once (`stage_operations`).

    **Source**: Megatron-LM's ``recompute_method=block`` for whole layers; per stage and micro-batch: ELF (see `search`).

    Raises:
        InputError: a block or a micro-batch that is not there.
    """
    num = plan.num_microbatches
    choices = np.full((num, len(stage.blocks)), plan.memory.recompute, dtype=object)
    changed = False
    for position, exception in enumerate(plan.memory.block):
        if exception.stage == stage.index and exception.recompute is not None:
            key = f"memory.block[{position}]"
            blocks = expand_ranges(exception.blocks, len(stage.blocks), key=f"{key}.blocks")
            batches = expand_ranges(exception.microbatches, num, key=f"{key}.microbatches")
            choices[np.ix_(batches, blocks)] = exception.recompute
            changed = True
    if not changed:
        plain = replace(plan, memory=replace(plan.memory, block=()))
        return StageVariants(operations=(stage_operations(plain, stage),), variant_of=np.zeros(num, dtype=np.int64))
    numbered: dict[tuple[str, ...], int] = {}
    variant_of = np.array([numbered.setdefault(tuple(own), len(numbered)) for own in choices], dtype=np.int64)
    return StageVariants(operations=tuple(mixed_operations(stage, own) for own in numbered), variant_of=variant_of)


def mixed_operations(stage: Stage, choices: tuple[str, ...]) -> tuple[Operation, ...]:
    """The order in which a micro-batch runs a stage's blocks, each with a recompute of its own; one of `plan_sections.BLOCK_RECOMPUTES` a block."""
    forward: list[Operation] = []
    backward: list[Operation] = []
    for first, end, again in _segments(stage, choices):
        taped = [Operation("F_all", block, _option(stage, block, choices[block])) for block in range(first, end)]
        back = [Operation("B", block) for block in reversed(range(first, end))]
        if again:
            forward += [Operation("F_ck" if block == first else "F_e", block) for block in range(first, end)]
            backward = [*taped, *back, *backward]
        else:
            forward += taped
            backward = [*back, *backward]
    return (*forward, *backward)


def _option(stage: Stage, block: int, choice: str) -> str:
    options = stage.blocks[block].options
    return options[-1 if choice == "selective" else 0].name


def _segments(stage: Stage, choices: tuple[str, ...]) -> list[tuple[int, int, bool]]:
    """First and last + 1 block of what runs again together, and of each other block, and whether it runs again."""
    found: list[tuple[int, int, bool]] = []
    for first, end, layer in layer_runs(stage.blocks):
        for block in range(first, end):
            again = layer and choices[block] == "full"
            if again and block > first and found[-1][2]:
                found[-1] = (found[-1][0], block + 1, True)
            else:
                found.append((block, block + 1, again))
    return found
