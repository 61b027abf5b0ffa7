"""Layers that run again no further than their backward pass reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.parallel.early_stop import STOPPED, option_again, stops_early, with_early_stop
from simulator.parallel.recompute import stage_operations
from simulator.parallel.stages import stages_of
from simulator.plan import Plan
from simulator.plan_sections import MemoryBlock
from simulator.presets import build_workload
from tests.simulator.parallel.step_cases import SEQ_LEN, plan_of, simulated, small_config


def of(plan: Plan, framework: str, *, recompute: str = "full", compiled: bool = False) -> Plan:
    return replace(
        plan, memory=replace(plan.memory, recompute=recompute), runtime=replace(plan.runtime, framework=framework, compile=compiled)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("framework", "compiled", "stops"),
    [("torchtitan", False, True), ("pytorch", True, True), ("pytorch", False, False), ("megatron-core", False, False), ("deepspeed", False, False)],
)  # fmt: skip
def test_who_stops(framework: str, compiled: bool, stops: bool) -> None:
    plan = of(plan_of(), framework, compiled=compiled)
    assert stops_early(plan) is stops
    assert not stops_early(of(plan, framework, recompute="none", compiled=compiled))
    exception = MemoryBlock(stage=0, blocks="0", recompute="none")
    assert not stops_early(replace(plan, memory=replace(plan.memory, block=(exception,))))


def test_the_last_product_and_what_follows_do_not_run_again() -> None:
    plain = build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16")
    network = next(block for block in with_early_stop(plain).blocks if block.name == "network")
    whole, stopped = network.options[0].forward, network.option(STOPPED).forward
    products = [n for n, kernel in enumerate(whole.kernels) if kernel.kernel_class == "gemm"]
    assert len(products) == 2
    assert stopped.kernels == whole.kernels[: products[-1]]
    assert sum(event.delta_bytes for event in stopped.memory) == sum(event.delta_bytes for event in whole.memory)
    assert max(event.kernel for event in stopped.memory) <= len(stopped.kernels)
    assert network.option(STOPPED).backward == network.options[0].backward


def test_layers_run_again_under_that_option_and_ends_do_not() -> None:
    plan = of(plan_of(), "torchtitan")
    workload = with_early_stop(build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16"))
    stage = stages_of(workload, plan)[0]
    taped = {stage.blocks[one.block].name: one.option for one in stage_operations(plan, stage) if one.kind == "F_all"}
    assert taped["network"] == STOPPED
    assert all(option_again(block) != STOPPED for block in stage.blocks if block.name != "network")
    assert taped["head"] != STOPPED


def test_a_step_is_shorter_by_the_products_that_do_not_run_again() -> None:
    """On one device, without clipping or buffers of FSDP's, all else equal: whole layers cost at least their last products more."""
    plan = plan_of()
    early, whole = (
        simulated(of(plan, "pytorch", compiled=True)),
        simulated(of(plan, "pytorch", recompute="none", compiled=True)),
    )
    again = early.hardware_flops - early.model_flops
    forward = sum(
        block.discard.flops
        for block in with_early_stop(build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16")).blocks
        if block.name in {"attention", "network"}
    )
    down = 8 * 2 * SEQ_LEN * 4096 * 1024
    assert again == (forward - down) * plan.num_microbatches
    assert early.step_time_s > whole.step_time_s
