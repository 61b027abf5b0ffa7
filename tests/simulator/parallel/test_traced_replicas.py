"""Replicas of a traced model: what shares a bucket, what a ring takes, what ZeRO 1 leaves, and that exchanges hide behind passes."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_traced import TracedSimulation, simulate_traced
from simulator.parallel.traced_replicas import ALIGNED_ELEMENTS, Rings, buckets_of, replicas_of, trained_in_order
from simulator.parallel.traced_stage import Holding
from simulator.parallel.traced_step import Link, step_of
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Runtime
from simulator.program import Kind, MemoryClass, Stream
from simulator.tracing.plan_stages import PlannedStage, plan_stages
from tests.small_models import traced

SPLIT = 3
DEVICE = load_hardware("h100-sxm")
SMALL_BUCKET = 30_000


def plan_of(
    schedule: str = "1f1b", chunks: int = 1, *, pp: int = 1, dp: int = 2, zero: int = 0, overlap: bool = True, bucket: int | None = SMALL_BUCKET
) -> Plan:  # fmt: skip
    return Plan(
        parallel=Parallel(pp=pp, dp=dp, virtual_stages=chunks), batch=Batch(global_batch=2 * SPLIT * dp, micro_batch=2),
        pipeline=Pipeline(schedule=schedule), memory=Memory(zero_stage=zero), runtime=Runtime(overlap_grad_reduce=overlap, bucket_bytes=bucket),
    )  # fmt: skip


@cache
def _planned(name: str, schedule: str, chunks: int, pp: int) -> tuple[PlannedStage, ...]:
    plan = plan_of(schedule, chunks, pp=pp, dp=1)
    return plan_stages(traced(name, SPLIT), plan, order_of(plan))


def planned(name: str, plan: Plan) -> tuple[PlannedStage, ...]:
    """Stages are the same whatever replicas do."""
    return _planned(name, plan.pipeline.schedule, plan.parallel.virtual_stages, plan.parallel.pp)


def simulated(plan: Plan, name: str = "residual-mlp", *, latency_s: float = 1e-6) -> TracedSimulation:
    order, stages = order_of(plan), [one.stage for one in planned(name, plan)]
    rings = Rings(latency_s=latency_s, bytes_per_s=1e9)
    step = step_of(plan, order, stages, Link(latency_s=latency_s, bytes_per_s=1e9), collective_s=rings, tied_s=rings)
    return simulate_traced(step, plan, DEVICE, tokens=1)


def holding(elements: int, dtype: str = "float32", width: int = 4) -> Holding:
    return Holding(size_bytes=elements * width, elements=elements, trained=True, dtype=dtype)


def test_a_bucket_closes_when_it_is_full_and_holds_one_dtype() -> None:
    held = {"a": holding(10), "z": holding(4, "complex64", 8), "b": holding(30), "c": holding(5)}
    first, complex_one, last = sorted(buckets_of(held, limit_bytes=160, multiple=1), key=lambda bucket: bucket.names)[:1] + [
        next(bucket for bucket in buckets_of(held, limit_bytes=160, multiple=1) if bucket.names == names)
        for names in (("z",), ("c",))
    ]
    assert (first.names, first.offsets, first.elements, first.size_bytes) == (("a", "b"), (0, 10), 40, 160)
    assert (complex_one.dtype, complex_one.size_bytes) == ("complex64", 32)
    assert last.sizes == (20,)


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=12), ranks=st.integers(2, 5), limit=st.integers(1, 3000))
def test_split_buckets_hold_every_parameter_aligned_and_divide(sizes: list[int], ranks: int, limit: int) -> None:
    held = {str(number): holding(size) for number, size in enumerate(sizes)}
    buckets = buckets_of(held, limit_bytes=limit, multiple=ranks * ALIGNED_ELEMENTS)
    assert [name for bucket in buckets for name in bucket.names] == list(held)
    for bucket in buckets:
        assert bucket.elements % ranks == 0
        ends = [*bucket.offsets[1:], bucket.elements]
        for name, offset, end in zip(bucket.names, bucket.offsets, ends, strict=True):
            assert offset % ALIGNED_ELEMENTS == 0
            assert offset + held[name].elements <= end


def test_a_ring_by_hand() -> None:
    rings = Rings(latency_s=1e-3, bytes_per_s=1e6)
    for zero, rounds in ((0, 2), (1, 1)):
        plan = plan_of(dp=3, zero=zero, bucket=None)
        replicas = replicas_of(plan, [one.stage for one in planned("residual-mlp", plan)], [[0]])
        assert replicas is not None
        (bucket,) = replicas.buckets[0]
        share_s = bucket.size_bytes / 3 / 1e6
        assert replicas.reduce_s(bucket, rings) == pytest.approx(rounds * 2 * (1e-3 + share_s))
        assert replicas.gather_s(bucket, rings) == pytest.approx(2 * (1e-3 + share_s))


def test_one_replica_exchanges_nothing() -> None:
    plan = plan_of(dp=1)
    assert replicas_of(plan, [one.stage for one in planned("residual-mlp", plan)], [[0]]) is None


@pytest.mark.slow
def test_tables_that_stages_share_come_last() -> None:
    plan = plan_of("1f1b", pp=2)
    stages = [one.stage for one in planned("transformer", plan)]
    for rank in range(2):
        early, late = trained_in_order(stages, [rank])
        assert set(late) == {"embedding.weight"}
        assert early
        assert not set(early) & set(late)
        assert set(early) | set(late) == {name for name, one in stages[rank].parameters.items() if one.trained}


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(("schedule", "chunks", "pp"), [("1f1b", 1, 1), pytest.param("zb-v", 2, 2, marks=pytest.mark.slow)])
def test_memory_comes_back(schedule: str, chunks: int, pp: int, zero: int) -> None:
    for overlap in (True, False):
        found = simulated(
            plan_of(schedule, chunks, pp=pp, zero=zero, overlap=overlap), "residual-mlp" if pp == 1 else "transformer"
        )
        for profile in found.profiles:
            assert (profile.alive_bytes[-1] == profile.alive_bytes[0]).all()
            assert (profile.alive_bytes >= 0).all()


def test_zero_1_leaves_each_rank_its_share_of_the_states() -> None:
    whole, split = simulated(plan_of(dp=4)), simulated(plan_of(dp=4, zero=1))
    states = [found.profiles[0].alive_bytes[0, MemoryClass.OPTIMIZER_STATES] for found in (whole, split)]
    assert states[0] / 4 * 0.98 < states[1] < states[0] / 4 * 1.05
    parameters = [found.profiles[0].alive_bytes[0, MemoryClass.PARAMETERS] for found in (whole, split)]
    assert parameters[0] <= parameters[1] < parameters[0] * 1.05
    labels = [split.program.label(n) for n in range(split.program.num_instructions)]
    gathers = sum("gather" in label for label in labels)
    assert gathers > 1
    assert int((split.program.stream == Stream.DP).sum()) == 2 * gathers


@pytest.mark.parametrize("zero", [0, 1])
def test_exchanges_hide_behind_the_last_backward_pass(zero: int) -> None:
    behind, after = (simulated(plan_of(zero=zero, overlap=overlap), latency_s=1e-9) for overlap in (True, False))
    assert behind.step_time_s < after.step_time_s
    program = behind.program
    rings = (program.stream == Stream.DP) & (program.kind == Kind.TRANSFER)
    passes = behind.record.end_s[program.kind == Kind.BACKWARD].max()
    assert behind.record.start_s[rings].min() < passes
    late = after.program
    assert after.record.start_s[late.stream == Stream.DP].min() >= after.record.end_s[late.kind == Kind.BACKWARD].max()


@settings(max_examples=20)
@given(latency_s=st.floats(0, 1e-3), more_s=st.floats(0, 1e-3))
def test_a_slower_link_never_helps(latency_s: float, more_s: float) -> None:
    fast, slow = (simulated(plan_of(), latency_s=one).step_time_s for one in (latency_s, latency_s + more_s))
    assert slow >= fast * (1 - 1e-12)
