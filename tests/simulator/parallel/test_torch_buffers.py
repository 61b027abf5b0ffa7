"""Buffers of torch's runtimes, counted by hand for a small model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from simulator.parallel.orders import order_of
from simulator.parallel.parameter_gathers import Unit
from simulator.parallel.simulate_parallel import simulate_parallel
from simulator.parallel.stages import Stage, stages_of
from simulator.parallel.torch_buffers import pipeline_bytes, stream_pool_bytes
from simulator.plan import Plan
from simulator.presets import build_workload
from tests.simulator.parallel.step_cases import SEQ_LEN, cluster_of, plan_of, small_config

UNITS = (Unit(first=0, end=1, elements=500, root=True), *(Unit(first=n, end=n + 1, elements=1000) for n in (1, 2, 3)))
BOUNDARY = SEQ_LEN * 1024 * 2
"""Bytes of the small model's stream for one sample."""


def pool(**changes: object) -> int:
    return stream_pool_bytes(UNITS, plan_of(dp=8, **{"framework": "torchtitan", "zero_stage": 3, **changes}), dtype="bfloat16")  # type: ignore[arg-type]


def stages(plan: Plan) -> tuple[Stage, ...]:
    return stages_of(build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16"), plan)


def kept(plan: Plan, rank: int) -> int:
    order = order_of(plan)
    own = [stages(plan)[stage] for stage in order.stages_of_rank[rank]]
    return pipeline_bytes(order, rank, own, plan, dtype="bfloat16")


def test_gathers_reserve_two_units_on_their_stream() -> None:
    """Two layers of 1000 parameters are more than one and 500 of the model's own."""
    assert pool() == 2 * 2000
    large = (replace(UNITS[0], elements=5000), *UNITS[1:])
    assert stream_pool_bytes(large, plan_of(dp=8, framework="pytorch", zero_stage=3), dtype="bfloat16") == 2 * 6000


def test_gradients_reduced_once_a_step_have_shards_of_their_own() -> None:
    """3500 parameters over 8 ranks in float32."""
    assert pool(zero_stage=1) - pool() == 3500 // 8 * 4 + 2


@pytest.mark.parametrize("changes", [{"framework": "megatron-core"}, {"framework": "deepspeed"}, {"zero_stage": 0}])
def test_nothing_is_reserved_by_what_does_not_gather_so(changes: dict[str, object]) -> None:
    assert pool(**changes) == 0


def test_one_shard_is_not_gathered() -> None:
    assert stream_pool_bytes(UNITS, plan_of(framework="torchtitan", zero_stage=3), dtype="bfloat16") == 0


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 1000))
def test_larger_units_never_reserve_less(sizes: list[int], more: int) -> None:
    plan = plan_of(dp=8, framework="torchtitan", zero_stage=3)
    units = [Unit(first=n, end=n + 1, elements=size) for n, size in enumerate(sizes)]
    grown = [replace(units[0], elements=sizes[0] + more), *units[1:]]
    assert stream_pool_bytes(units, plan, dtype="bfloat16") <= stream_pool_bytes(grown, plan, dtype="bfloat16")


def test_messages_and_results_of_a_pipeline() -> None:
    """1F1B over 4 stages, 8 micro-batches: 4, 3, 2 and 1 in flight.

    First: 8 gradients less the one that a pass counts, 4 results. Second: 5 inputs beside those in flight, 7 gradients, 3 results. Last: 7 inputs, the logits of one.
    """
    plan = plan_of(pp=4, num_microbatches=8, framework="torchtitan")
    logits = SEQ_LEN * small_config().vocab * 2
    assert [kept(plan, rank) for rank in range(4)] == [11 * BOUNDARY, 15 * BOUNDARY, 15 * BOUNDARY, 7 * BOUNDARY + logits]


def test_other_runtimes_and_single_stages_keep_none() -> None:
    assert kept(plan_of(pp=4, framework="megatron-core"), 1) == 0
    assert kept(plan_of(framework="torchtitan"), 0) == 0


@given(st.integers(4, 16))
def test_more_micro_batches_keep_more(count: int) -> None:
    fewer, more = (plan_of(pp=4, num_microbatches=own, framework="torchtitan") for own in (count, count + 1))
    assert all(kept(more, rank) > kept(fewer, rank) for rank in range(3))


def test_pools_are_reserved_and_not_alive() -> None:
    plan = plan_of(dp=8, zero_stage=3, framework="torchtitan")
    cluster = cluster_of(plan)
    result = simulate_parallel(
        small_config(), plan, cluster, load_hardware(cluster.device), order_of(plan), seq_len=SEQ_LEN, reserved=True
    )
    own = result.allocators[0]
    assert own.peak_allocated_bytes == pytest.approx(result.peak_memory_bytes[0], rel=0.02)
    assert own.peak_reserved_bytes >= own.peak_allocated_bytes + 4 * 12 * 1024**2


def test_a_trainer_that_overwrites_results_keeps_the_logits_before() -> None:
    """Two buffers for the last stage's results: beside the logits under way there are those of the micro-batch before, whole on each tensor parallel rank."""
    logits = SEQ_LEN * small_config().vocab * 2
    assert [kept(plan_of(pp=4, framework="aa-scaling"), rank) for rank in range(4)] == [0, 0, 0, logits]
    assert kept(plan_of(framework="aa-scaling"), 0) == logits
    assert kept(plan_of(framework="aa-scaling", num_microbatches=1), 0) == 0
