"""Recompute of single blocks and micro-batches over several devices."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hardware_models.errors import InputError
from simulator.parallel.simulate_parallel import ParallelSimulation
from simulator.plan import MemoryBlock, Plan
from simulator.plan_parallel import check_parallel
from tests.simulator.parallel.step_cases import plan_of, simulated


def with_blocks(plan: Plan, *blocks: MemoryBlock, **memory: object) -> Plan:
    return replace(plan, memory=replace(plan.memory, block=blocks, **memory))  # type: ignore[arg-type]


def run(
    *blocks: MemoryBlock, recompute: str = "none", schedule: str = "1f1b", framework: str = "pytorch"
) -> ParallelSimulation:
    plan = plan_of(pp=2, num_microbatches=4, schedule=schedule, recompute=recompute, framework=framework)
    return simulated(with_blocks(plan, *blocks))


def everywhere(recompute: str, microbatches: str = "all") -> tuple[MemoryBlock, ...]:
    return tuple(MemoryBlock(stage=stage, recompute=recompute, microbatches=microbatches) for stage in (0, 1))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
@pytest.mark.parametrize("framework", ["pytorch", "megatron-core"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_exceptions_for_all_blocks_are_the_plans_own_recompute(recompute: str, schedule: str, framework: str) -> None:
    found = run(*everywhere(recompute), schedule=schedule, framework=framework)
    whole = run(recompute=recompute, schedule=schedule, framework=framework)
    assert found.step_time_s == pytest.approx(whole.step_time_s, rel=1e-12)
    assert found.peak_memory_bytes == whole.peak_memory_bytes
    assert found.hardware_flops == whole.hardware_flops


def test_more_micro_batches_that_recompute_take_more_time_and_less_memory() -> None:
    results = [run(), *(run(*everywhere("full", text)) for text in ("0", "0-1", "0-2", "all"))]
    flops = [one.hardware_flops for one in results]
    assert flops[1:] == pytest.approx([flops[0] + (flops[-1] - flops[0]) * part / 4 for part in (1, 2, 3, 4)], rel=1e-9)
    assert sorted(one.step_time_s for one in results) == [one.step_time_s for one in results]
    peaks = [one.peak_memory_bytes[0] for one in results]
    assert sorted(peaks, reverse=True) == peaks
    assert peaks[-1] < peaks[0]


def test_the_micro_batch_that_recomputes_has_the_recomputing_pass() -> None:
    program = run(MemoryBlock(stage=1, blocks="1", microbatches="2", recompute="full")).program
    labels = [program.label(n) for n in range(program.num_instructions)]
    assert [label for label in labels if label.startswith("R")] == ["R1 mb2"]


def test_the_last_exception_counts() -> None:
    both = run(*everywhere("full"), *everywhere("none"))
    assert both.step_time_s == run().step_time_s


@pytest.mark.parametrize(
    ("block", "memory", "message"),
    [
        (MemoryBlock(activation_offload=0.5), {}, "memory.block[0].activation_offload = 0.5: offload of single blocks is not simulated yet on several devices"),
        (MemoryBlock(weight_offload=0.5), {}, "memory.block[0].weight_offload = 0.5: offload of single blocks is not simulated yet"),
        (MemoryBlock(recompute="full"), {"activation_offload": 0.5}, "memory.block[0].recompute = 'full': recompute of single blocks beside offloaded"),
        (MemoryBlock(recompute="full"), {"recompute": "optimal"}, "memory.block[0].recompute = 'full': exceptions are from a memory.recompute of none"),
    ],
)  # fmt: skip
def test_what_is_refused(block: MemoryBlock, memory: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_parallel(with_blocks(plan_of(pp=2), block, **memory), compute=("bf16",))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (MemoryBlock(blocks="99", recompute="full"), "memory.block[0].blocks = '99': index < "),
        (MemoryBlock(microbatches="4", recompute="full"), "memory.block[0].microbatches = '4': index < 4 must hold, but got 4"),
    ],
)
def test_what_is_not_there_is_named(block: MemoryBlock, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        run(block)
