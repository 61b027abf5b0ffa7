"""Reserved memory of pipeline ranks: calls of the allocator by hand, and what must hold for every schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from hardware_models.compiled_allocator import StepCalls
from hardware_models.units import MIB
from simulator.parallel.allocations import RankCalls, StageTensors, rank_peaks, rank_resident
from simulator.parallel.orders import order_of
from simulator.parallel.parameter_gathers import units_of
from simulator.parallel.simulate_parallel import simulate_parallel
from simulator.parallel.simulation import ParallelSimulation
from simulator.parallel.stages import stages_of
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.presets import build_workload
from simulator.program import MemoryClass
from simulator.reserved_memory import ResidentTensors
from tests.simulator.parallel.offload_cases import with_memory
from tests.simulator.parallel.step_cases import SEQ_LEN, cluster_of, plan_of, small_config

LARGE = 24 * MIB
TENSORS = StageTensors(forward=((0, LARGE), (1, 2 * LARGE), (2, LARGE), (2, 0)), backward=((3, LARGE), (1, 0), (0, 0), (3, 0)))
"""Keeps 3 of 4 that it allocates; its backward pass needs one more."""
NOTHING = ResidentTensors(parameters=(), batch=(), optimizer_states=())


def order(schedule: str, ranks: int, batches: int) -> Order:
    return order_of(plan_of(pp=ranks, num_microbatches=batches, schedule=schedule))


def peaks(schedule: str, ranks: int, batches: int) -> list[int]:
    made = order(schedule, ranks, batches)
    return [
        one.peak_reserved_bytes // LARGE for one in rank_peaks(made, lambda _: TENSORS, [NOTHING] * ranks, weight_share=0.5)
    ]


def test_one_micro_batch_at_a_time_reserves_what_it_allocates() -> None:
    assert peaks("1f1b", 1, 4) == [4]


def test_each_micro_batch_in_flight_adds_what_it_keeps() -> None:
    """1F1B: p - rank in flight, each keeps 3; one more for the running pass."""
    assert peaks("1f1b", 4, 8) == [3 * 4 + 1, 3 * 3 + 1, 3 * 2 + 1, 3 + 1]


def test_gpipe_keeps_all() -> None:
    assert peaks("gpipe", 2, 6) == [3 * 6 + 1] * 2


@given(ranks=st.integers(1, 5), extra=st.integers(0, 40), schedule=st.sampled_from(["1f1b", "zb-h1"]))
@settings(max_examples=20)
def test_left_out_micro_batches_change_nothing(ranks: int, extra: int, schedule: str) -> None:
    assert peaks(schedule, ranks, 3 * ranks + 2) == peaks(schedule, ranks, 3 * ranks + 2 + extra)


def calls(schedule: str, ranks: int, batches: int, rank: int) -> StepCalls:
    return RankCalls(order(schedule, ranks, batches), lambda _: TENSORS, weight_share=0.5).of(rank)


def test_calls_of_long_steps_are_those_of_short_ones() -> None:
    short, long = (calls("1f1b", 4, batches, 0) for batches in (16, 64))
    assert (short.names == long.names).all()
    assert (short.size_bytes == long.size_bytes).all()


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "gpipe"])
def test_all_that_comes_goes(schedule: str) -> None:
    found = calls(schedule, 4, 8, 1)
    comes = found.size_bytes > 0
    assert sorted(found.names[comes]) == sorted(found.names[~comes])
    assert len(set(found.names[comes])) == comes.sum()


def test_a_weight_pass_frees_its_share() -> None:
    """Half of 3 units: the tensor of 1 (the one of 2 is more) waits for W."""
    found = calls("zb-h1", 2, 4, 0)
    first = found.names[(found.size_bytes == 0) & (found.names < 4)]
    assert first.tolist() == [2, 1, 3, 0]


def test_parts_of_micro_batches_take_their_part() -> None:
    made = replace(order("1f1b", 2, 4), microbatch_parts=2)
    found = RankCalls(made, lambda _: TENSORS, weight_share=0.5).of(0)
    assert found.size_bytes.max() == LARGE


def run(plan: Plan) -> ParallelSimulation:
    cluster = cluster_of(plan)
    device = load_hardware(cluster.device)
    return simulate_parallel(small_config(), plan, cluster, device, order_of(plan), seq_len=SEQ_LEN, reserved=True)


PLANS = {
    "1f1b": plan_of(pp=4), "full": plan_of(pp=4, recompute="full"), "zb-h1": plan_of(pp=4, schedule="zb-h1"),
    "zb-v": plan_of(pp=2, schedule="zb-v", virtual_stages=2), "interleaved": plan_of(pp=4, schedule="interleaved", virtual_stages=2),
    "chimera": plan_of(pp=4, schedule="chimera"), "dualpipe": plan_of(pp=4, schedule="dualpipe", num_microbatches=16),
    "zero": plan_of(dp=8, zero_stage=3, framework="pytorch"), "offload": with_memory(plan_of(pp=2), activation_offload=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_reserved_covers_live_bytes_and_is_near_them(name: str) -> None:
    result = run(PLANS[name])
    for live, reserved, own in zip(result.peak_memory_bytes, result.peak_reserved_bytes, result.allocators, strict=True):
        assert live <= reserved < 1.35 * live
        assert own.out_of_memory_at is None
    assert result.to_json()["peak_reserved_bytes"] == list(result.peak_reserved_bytes)


@pytest.mark.parametrize("name", ["1f1b", "full", "interleaved", "zero"])
def test_allocated_bytes_are_the_live_ones_but_for_rounding(name: str) -> None:
    """And but for rests of up to 1 MiB that large blocks keep."""
    result = run(PLANS[name])
    for live, own in zip(result.peak_memory_bytes, result.allocators, strict=True):
        assert own.peak_allocated_bytes == pytest.approx(live, rel=0.02)


def test_reserved_bytes_decide_whether_it_fits() -> None:
    result = run(PLANS["1f1b"])
    reserved = max(result.peak_reserved_bytes)
    for room, fits in ((reserved, True), (reserved - 1, False)):
        device = replace(result.device, memory_bytes=room + result.device.context_bytes)
        assert replace(result, device=device).fits is fits


def test_megatrons_states_are_a_contiguous_part_of_its_buffer() -> None:
    """Two shards: masters and both moments of the first half of the parameters, each parameter copied out of a tensor of its own."""
    plan = plan_of(dp=2, zero_stage=1)
    workload = build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16")
    middle = replace(workload, blocks=workload.blocks[1:3])
    stage = replace(stages_of(workload, plan)[0], workload=middle, receives=True, sends=True)
    elements = sum(block.parameter_elements for block in stage.blocks)
    sizes = [0] * len(MemoryClass)
    sizes[MemoryClass.PARAMETERS], sizes[MemoryClass.GRADIENTS], sizes[MemoryClass.OPTIMIZER_STATES] = (
        2 * elements,
        4 * elements,
        6 * elements,
    )
    found = rank_resident([stage], sizes, plan, dtype="bfloat16")
    assert found.parameters == (2 * elements, 4 * elements)
    assert sum(found.moved) == 2 * elements
    assert sum(found.masters) == 2 * elements
    assert sum(found.optimizer_states) == 4 * elements
    assert len(found.optimizer_states) == 2 * len(found.masters) < 2 * len(found.moved)
    assert rank_resident([stage], sizes, plan_of(framework="pytorch"), dtype="bfloat16").moved == ()


def test_megatrons_fsdp_makes_one_unit_at_a_time() -> None:
    """The largest unit's tensors, and, where parameters are sharded, the buffer that it is gathered into: never the whole model."""
    (stage,) = stages_of(build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16"), plan_of(dp=4))
    units = units_of(stage, "megatron-core")
    largest = max(unit.elements for unit in units)
    assert len(units) > 3

    def moved(zero_stage: int) -> int:
        plan = plan_of(dp=4, zero_stage=zero_stage, framework="megatron-core")
        return sum(rank_resident([stage], [0] * len(MemoryClass), plan, dtype="bfloat16").moved)

    assert moved(1) == 2 * sum(unit.elements for unit in units)
    assert (moved(2), moved(3)) == (2 * largest, 4 * largest)
