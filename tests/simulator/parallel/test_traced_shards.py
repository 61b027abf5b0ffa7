"""ZeRO 2 and 3 of traced models: what is gathered and when, what a rank holds, and that memory comes back."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_traced import TracedSimulation, simulate_traced
from simulator.parallel.traced_replicas import Rings
from simulator.parallel.traced_stage import TracedStage
from simulator.parallel.traced_step import Link, step_of
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Runtime
from simulator.program import Kind, MemoryClass
from simulator.tracing.plan_stages import plan_stages
from tests.small_models import traced

SPLIT = 3
DEVICE = load_hardware("h100-sxm")
LINK = Link(latency_s=1e-6, bytes_per_s=1e9)
PARAMETERS = slice(MemoryClass.PARAMETERS, MemoryClass.PARAMETERS + 1)


def plan_of(
    zero: int, *, schedule: str = "1f1b", chunks: int = 1, pp: int = 1, dp: int = 2, recompute: str = "none", ahead: bool = True
) -> Plan:
    return Plan(
        parallel=Parallel(pp=pp, dp=dp, virtual_stages=chunks), batch=Batch(global_batch=2 * SPLIT * dp, micro_batch=2), pipeline=Pipeline(schedule=schedule),
        memory=Memory(zero_stage=zero, recompute=recompute), runtime=Runtime(overlap_param_gather=ahead, overlap_grad_reduce=ahead),  # type: ignore[arg-type]
    )  # fmt: skip


@cache
def stages_of(plan: Plan, name: str) -> tuple[TracedStage, ...]:
    alone = replace(plan, memory=replace(plan.memory, zero_stage=0))
    return tuple(one.stage for one in plan_stages(traced(name, SPLIT), alone, order_of(plan)))


def simulated(plan: Plan, name: str = "residual-mlp", *, latency_s: float = 1e-6) -> TracedSimulation:
    rings = Rings(latency_s=latency_s, bytes_per_s=1e9)
    step = step_of(plan, order_of(plan), stages_of(plan, name), LINK, collective_s=rings, tied_s=rings)
    return simulate_traced(step, plan, DEVICE, tokens=1)


def count(found: TracedSimulation, label: str) -> int:
    return sum(name == label for name in found.program.option)


@pytest.mark.parametrize(("zero", "recompute", "passes"), [(3, "none", 2), (3, "full", 2), (2, "none", 1), (2, "full", 1)])
def test_blocks_are_gathered_for_each_pass_and_scattered_once_a_micro_batch(zero: int, recompute: str, passes: int) -> None:
    plan = plan_of(zero, recompute=recompute)
    found, (stage,) = simulated(plan), stages_of(plan, "residual-mlp")
    holding = sum(bool(names) for names in stage.parameters_of_block)
    assert count(found, "gather") == count(found, "lay out") == passes * SPLIT * holding
    assert count(found, "reduce") == count(found, "pack") == SPLIT * holding


def test_a_rank_holds_parts_between_steps_and_whole_blocks_only_while_it_computes() -> None:
    plain, parted = simulated(plan_of(0)), simulated(plan_of(3))
    (stage,) = stages_of(plan_of(3), "residual-mlp")
    whole = sum(held.size_bytes for held in stage.parameters.values())
    resident = parted.profiles[0].alive_bytes[0]
    assert resident[MemoryClass.PARAMETERS] == sum(-(-held.size_bytes // 2) for held in stage.parameters.values())
    assert resident[MemoryClass.OPTIMIZER_STATES] < 0.51 * plain.profiles[0].alive_bytes[0][MemoryClass.OPTIMIZER_STATES]
    gathered = parted.profiles[0].alive_bytes[:, MemoryClass.PARAMETERS].max() - resident[MemoryClass.PARAMETERS]
    largest = max(sum(stage.parameters[name].size_bytes for name in names) for names in stage.parameters_of_block)
    assert largest <= gathered <= 3 * largest < whole  # one block, its buffer or the next one's


def test_stage_two_keeps_what_it_gathered_until_the_backward_pass() -> None:
    (stage,) = stages_of(plan_of(2), "residual-mlp")
    whole = sum(held.size_bytes for held in stage.parameters.values())
    held = simulated(plan_of(2)).profiles[0].alive_bytes[:, MemoryClass.PARAMETERS]
    assert held.max() >= held[0] + whole
    assert simulated(plan_of(3)).profiles[0].alive_bytes[:, MemoryClass.PARAMETERS].max() < held.max()


@pytest.mark.parametrize(("schedule", "pp"), [("1f1b", 1), pytest.param("zb-h1", 2, marks=pytest.mark.slow)])
def test_memory_comes_back(schedule: str, pp: int) -> None:
    for zero, ahead in ((2, True), (3, True), (3, False)):
        for profile in simulated(plan_of(zero, schedule=schedule, pp=pp, ahead=ahead)).profiles:
            assert (profile.alive_bytes[-1] == profile.alive_bytes[0]).all()
            assert (profile.alive_bytes >= 0).all()


def test_gathering_ahead_hides_behind_compute() -> None:
    """Without it every gather and every sum is waited for, one after the other."""
    behind, ahead = (simulated(plan_of(3, ahead=ahead), latency_s=1e-4) for ahead in (False, True))
    program = behind.program
    dp = program.duration_s[np.isin(program.kind, [Kind.TRANSFER])].sum()
    compute = program.duration_s[~np.isin(program.kind, [Kind.TRANSFER])].sum()
    assert behind.step_time_s == pytest.approx(dp + compute, rel=1e-9)
    assert ahead.step_time_s < behind.step_time_s
    assert ahead.step_time_s >= max(dp, compute)


def test_parameters_that_blocks_share_or_that_are_complex_are_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"memory\.zero_stage = 3: a parameter belongs to one unit of FSDP2, but blocks share embedding\.weight",
    ):
        simulated(plan_of(3), "transformer")
    with pytest.raises(InputError, match=r"FSDP2 averages real gradients only, but parameter .* is complex"):
        simulated(plan_of(2), "spectral")
