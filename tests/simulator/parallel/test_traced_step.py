"""Steps of traced models over pipeline ranks: one rank is the step on one device, memory comes back, bytes are those of a hand count."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_traced import TracedSimulation, simulate_traced
from simulator.parallel.traced_replicas import Rings, replicas_of
from simulator.parallel.traced_step import Link, TracedStep
from simulator.plan import Batch, Memory, MemoryBlock, Parallel, Pipeline, Plan
from simulator.program import MemoryClass
from simulator.recompute import operations_of
from simulator.simulate import StepSetting, simulate
from simulator.tracing.plan_stages import PlannedStage, plan_stages
from tests.small_models import traced

SPLIT = 3
LINK = Link(latency_s=1e-6, bytes_per_s=1e9)
NOTHING = Memory()
DEVICE = load_hardware("h100-sxm")
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("looped-bfs", 2), ("zb-h1", 1), ("zb-v", 2)]


def plan_of(schedule: str = "1f1b", chunks: int = 1, *, pp: int = 2, memory: Memory = NOTHING) -> Plan:
    return Plan(
        parallel=Parallel(pp=pp, virtual_stages=chunks), batch=Batch(global_batch=2 * SPLIT, micro_batch=2),
        pipeline=Pipeline(schedule=schedule), memory=memory,
    )  # fmt: skip


@cache
def planned(name: str, plan: Plan) -> tuple[PlannedStage, ...]:
    return plan_stages(traced(name, SPLIT), plan, order_of(plan))


def simulated(
    plan: Plan, name: str = "residual-mlp", *, link: Link = LINK, tied_s: float = 0.0,
    slowdown: float = 1.0,
) -> TracedSimulation:  # fmt: skip
    order = order_of(plan)
    stages = [one.stage for one in planned(name, plan)]
    step = TracedStep(
        order=order,
        stages=stages,
        link=link,
        tied_s=tied_s,
        replicas=replicas_of(plan, stages, order.stages_of_rank),
        collective_s=Rings(latency_s=link.latency_s, bytes_per_s=link.bytes_per_s),
        optimizer="adamw",
    )  # fmt: skip
    return simulate_traced(step, plan, DEVICE, tokens=1, slowdown=slowdown)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", ["residual-mlp", "transformer", "convolution-net"])
def test_one_rank_is_one_device(name: str, recompute: str) -> None:
    plan = plan_of(pp=1, memory=Memory(recompute=recompute))
    workload = traced(name, SPLIT).workload
    alone = simulate(workload, operations_of(plan, workload), DEVICE, StepSetting(num_microbatches=SPLIT))
    found = simulated(plan, name)
    assert found.step_time_s == pytest.approx(alone.step_time_s, rel=1e-9)
    assert found.peak_memory_bytes == alone.peak_memory_bytes


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
@pytest.mark.parametrize(("name", "recompute"), [("residual-mlp", "none"), ("residual-mlp", "full"), ("transformer", "full")])
def test_memory_comes_back(name: str, recompute: str, schedule: str, chunks: int) -> None:
    found = simulated(plan_of(schedule, chunks, memory=Memory(recompute=recompute)), name)
    for profile in found.profiles:
        assert (profile.alive_bytes[-1] == profile.alive_bytes[0]).all()


def test_a_table_that_two_stages_of_a_rank_share_has_one_gradient() -> None:
    """ZB-V puts the first stage (embedding) and the last one (head) on rank 0."""
    plan = plan_of("zb-v", 2)
    first, *_, last = (one.stage for one in planned("transformer", plan))
    assert "embedding.weight" in first.parameters.keys() & last.parameters.keys()
    names = first.parameters | last.parameters
    gradients = simulated(plan, "transformer").profiles[0].alive_bytes[:, MemoryClass.GRADIENTS]
    assert names["embedding.weight"].size_bytes <= gradients.max() <= sum(one.size_bytes for one in names.values()) * 1.01


def test_bytes_of_a_stage_by_hand() -> None:
    """GPipe's first rank: parameters and moments, the batch, three micro-batches' saved bytes, what it sent and one it works on."""
    plan = plan_of("gpipe")
    first = planned("residual-mlp", plan)[0].stage
    saved = sum(block.options[0].saved_internal_bytes for block in first.workload.blocks)
    inner = [block.output_bytes for block in first.workload.blocks[:-1] if block is not first.workload.blocks[0]]
    resident = 3 * first.workload.parameter_bytes + 4 * len(first.parameters) + SPLIT * first.workload.batch_bytes
    least = resident + SPLIT * (saved + first.workload.blocks[-1].output_bytes)
    assert (
        least
        <= simulated(plan).peak_memory_bytes[0]
        <= least + SPLIT * sum(inner) + 6 * first.workload.blocks[-1].output_bytes + first.workload.gradient_bytes + 2 * saved
    )


def test_tied_tables_are_waited_for() -> None:
    base = simulated(plan_of()).step_time_s
    tied = simulated(plan_of(), "transformer").step_time_s
    assert simulated(plan_of(), "transformer", tied_s=0.25).step_time_s == pytest.approx(tied + 0.25, rel=1e-3)
    assert simulated(plan_of(), tied_s=0.25).step_time_s == pytest.approx(base, rel=1e-9)  # nothing is tied


def test_a_link_without_latency_and_end_costs_nothing() -> None:
    ideal = simulated(plan_of("gpipe"), link=Link(latency_s=0.0, bytes_per_s=float("inf")))
    busiest = max(sum(span.duration_s for span in ideal.timeline.spans if span.device == rank) for rank in range(2))
    assert busiest <= ideal.step_time_s <= sum(span.duration_s for span in ideal.timeline.spans)


@given(latency_s=st.floats(0, 1e-3), more_s=st.floats(0, 1e-3), slowdown=st.floats(1, 4))
def test_slower_links_and_shared_cores_never_help(latency_s: float, more_s: float, slowdown: float) -> None:
    plan = plan_of("1f1b")
    fast = simulated(plan, link=Link(latency_s=latency_s, bytes_per_s=1e9)).step_time_s
    slow = simulated(plan, link=Link(latency_s=latency_s + more_s, bytes_per_s=1e9), slowdown=slowdown).step_time_s
    assert slow >= fast * (1 - 1e-12)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zb-h1", 1), ("gpipe", 1)])
def test_messages_leave_in_the_senders_order(schedule: str, chunks: int) -> None:
    """With four ranks the inner ones send both ways; in another order they would wait for each other."""
    assert len(simulated(plan_of(schedule, chunks, pp=4)).profiles) == 4


def test_one_stage_may_recompute_alone() -> None:
    none, first = plan_of("gpipe"), plan_of("gpipe", memory=Memory(block=(MemoryBlock(stage=0, recompute="full"),)))
    before, after = simulated(none).peak_memory_bytes, simulated(first).peak_memory_bytes
    assert after[0] < before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of("zb-h1", memory=Memory(recompute="selective")), "makes gradients in two passes"),
        (plan_of(memory=Memory(recompute="optimal")), "stands for what the search finds"),
        (plan_of(pp=6), r"pp \* virtual_stages <= blocks must hold, but got 6 > 5"),
        (
            Plan(parallel=Parallel(pp=2), batch=Batch(global_batch=6, micro_batch=2), pipeline=Pipeline(partition=(5, 0))),
            "every stage has a block",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_stages(traced("residual-mlp", SPLIT), plan, order_of(plan))
