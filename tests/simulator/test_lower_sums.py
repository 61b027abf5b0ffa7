"""Sums of a micro-batch's halves against its instructions."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hardware_models.catalogue import load_hardware
from simulator.builder import Builder
from simulator.lower import MicroBatchLowering, PassPrices
from simulator.lower_sums import lowered_sums
from simulator.parallel.stages import backward_start
from simulator.precision import price_in
from simulator.presets import build_workload
from simulator.program import Kind, MemoryClass
from simulator.sequence import Operation, checkpoint_blocks, keep_all, runs_twice
from simulator.workload import Workload
from tests.simulator.parallel.step_cases import SEQ_LEN, small_config


def issued(
    workload: Workload, operations: tuple[Operation, ...], prices: PassPrices, turn: int, ends: tuple[bool, bool]
) -> list[tuple[float, int, int]]:
    """Seconds, rise and net bytes of each half, from instructions."""
    builder = Builder()
    MicroBatchLowering(workload, prices, builder, 1, runs_twice(operations), receives=ends[0], sends=ends[1]).run(operations)
    found = []
    for first, end in ((0, turn), (turn, len(builder.kinds))):
        level = rise = 0
        for place in range(first, end):
            for _, delta, memory_class in builder.memory[place]:
                level += 0 if memory_class is MemoryClass.GRADIENTS else delta
                rise = max(rise, level)
        found.append((sum(builder.durations[first:end]), rise, level))
    return found


def sequences(workload: Workload, draw: random.Random) -> list[tuple[Operation, ...]]:
    """Nothing and everything run again, options mixed, runs of several blocks, and runs inside runs."""
    count = len(workload.blocks)
    options = [draw.choice([option.name for option in block.options]) for block in workload.blocks]
    some = [block for block in range(count) if draw.random() < 0.5]
    whole = [Operation("F_ck", 0), *(Operation("F_e", block) for block in range(1, count))]
    again = [
        Operation("F_ck", 0),
        *(Operation("F_ck", block) for block in range(1, count - 1)),
        Operation("F_all", count - 1, options[-1]),
    ]
    back = [Operation("B", count - 1)]
    for block in reversed(range(count - 1)):
        back += [Operation("F_all", block, options[block]), Operation("B", block)]
    return [
        keep_all(count),
        checkpoint_blocks(count, some, options),
        checkpoint_blocks(count, range(count), options),
        (*whole, *again, *back),
    ]


@pytest.mark.parametrize("ends", [(False, False), (True, True), (True, False), (False, True)])
def test_halves_are_what_their_instructions_add_up_to(ends: tuple[bool, bool]) -> None:
    draw = random.Random(sum(ends))  # noqa: S311  # not for secrets
    prices = PassPrices(price_in("bf16", load_hardware("a100-sxm-80gb")))
    for flash in (False, True):
        whole = build_workload(small_config(), micro_batch=2, seq_len=SEQ_LEN, tp=2, flash_attention=flash)
        first, end = 1 if ends[0] else 0, len(whole.blocks) - 1 if ends[1] else len(whole.blocks)
        workload = replace(whole, blocks=whole.blocks[first:end])
        for operations in sequences(workload, draw):
            turn = backward_start(operations)
            expected = issued(workload, operations, prices, turn, ends)
            found = lowered_sums(workload, operations, prices, turn=turn, receives=ends[0], sends=ends[1])
            for half, (seconds, rise, net) in zip(found, expected, strict=True):
                assert (half.rise_bytes, half.net_bytes) == (rise, net)
                assert sum(own for _, own in half.seconds) == pytest.approx(seconds, rel=1e-12)
                assert len({kind for kind, _ in half.seconds}) == len(half.seconds) <= len(Kind)
