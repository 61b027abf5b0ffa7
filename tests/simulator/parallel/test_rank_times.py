"""Orders made for the times of a plan's own stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.errors import InfeasibleError
from simulator.model_source import ModelSource
from simulator.parallel.communication import Exposed
from simulator.parallel.orders import order_of
from simulator.parallel.rank_times import rank_times, relative_times
from simulator.parallel.simulate_source import parallel_case, simulate_source
from simulator.pipeline.one_way import one_f_one_b
from simulator.pipeline.play_order import RankTimes
from simulator.plan import Plan
from tests.simulator.parallel.step_cases import (
    BACKWARD_S,
    FORWARD_S,
    NOTHING,
    SEQ_LEN,
    WEIGHT_S,
    cluster_of,
    parts_of,
    plan_of,
    small_config,
)


def test_times_are_of_passes_with_their_collectives() -> None:
    """Rank 1 waits half a second forward and one backward; a message of 4 bytes at 8 bytes/s behind 0.25 s."""
    waits = replace(NOTHING, forward=Exposed(tp_s=0.5), backward=Exposed(tp_s=0.75, ep_s=0.25), message_bytes=4.0)
    parts = parts_of(one_f_one_b(2, 4), communication=[NOTHING, waits], rate=8.0, latency_s=0.25)
    own = rank_times(parts)
    assert own.forward_s == (FORWARD_S, FORWARD_S + 0.5)
    assert own.input_gradient_s == (BACKWARD_S - WEIGHT_S, BACKWARD_S - WEIGHT_S + 1.0)
    assert own.weight_gradient_s == (WEIGHT_S, WEIGHT_S)
    assert own.comm_s == pytest.approx(0.25 + 0.5)


def test_a_pass_takes_at_least_what_its_launch_does() -> None:
    plain = parts_of(one_f_one_b(2, 4))
    cost = plain.costs[0]
    slow = replace(
        cost, forward=replace(cost.forward, host_s=4.0), backward=replace(cost.backward, host_s=10.0), weight_host_s=2.5
    )
    own = rank_times(replace(plain, costs=[slow, cost]))
    assert own.forward_s == (4.0, FORWARD_S)
    assert own.input_gradient_s == (7.5, BACKWARD_S - WEIGHT_S)
    assert own.weight_gradient_s == (2.5, WEIGHT_S)


def test_one_rank_sends_nothing() -> None:
    assert rank_times(parts_of(one_f_one_b(1, 4), rate=8.0, latency_s=0.25)).comm_s == 0.0


def test_only_ratios_count() -> None:
    times = RankTimes(forward_s=(0.2, 0.4), input_gradient_s=(0.3,), weight_gradient_s=(0.1,), comm_s=0.0401)
    twice = RankTimes(forward_s=(0.4, 0.8), input_gradient_s=(0.6,), weight_gradient_s=(0.2,), comm_s=0.0802)
    assert relative_times(times) == relative_times(twice)
    assert relative_times(times).forward_s == pytest.approx((0.5, 1.0))
    assert relative_times(times).comm_s == pytest.approx(0.1)


def source() -> ModelSource:
    return ModelSource(name="small", config=small_config(), seq_len=SEQ_LEN)


def zero_bubble(*, limit: float | None = None, schedule: str = "zb-1p", num_microbatches: int = 8) -> Plan:
    plan = plan_of(pp=4, schedule=schedule, num_microbatches=num_microbatches)
    runtime = replace(plan.runtime, cuda_graphs=True)  # else the host, not the order, bounds so small a model
    return replace(plan, pipeline=replace(plan.pipeline, memory_limit=limit), runtime=runtime)


def test_an_order_for_the_stages_own_times_is_no_slower() -> None:
    """Against that of equal times, on a model whose last stage also has the head."""
    plan = zero_bubble(num_microbatches=12)
    own = parallel_case(source(), plan, cluster_of(plan))
    assert own.order != order_of(plan)
    assert own.order is parallel_case(source(), plan, cluster_of(plan)).order
    run = simulate_source(source(), plan, cluster_of(plan), reserved=False)
    plain = simulate_source(source(), zero_bubble(schedule="1f1b", num_microbatches=12), cluster_of(plan), reserved=False)
    assert run.step_time_s < plain.step_time_s


def test_a_limit_of_memory_holds() -> None:
    low, high = (
        simulate_source(source(), zero_bubble(limit=limit), cluster_of(zero_bubble()), reserved=False) for limit in (2.0, 8.0)
    )
    assert max(low.peak_memory_bytes) < max(high.peak_memory_bytes)
    assert high.step_time_s <= low.step_time_s
    with pytest.raises(InfeasibleError, match="memory_limit >= 1 would do"):
        simulate_source(source(), zero_bubble(limit=0.5), cluster_of(zero_bubble()), reserved=False)
