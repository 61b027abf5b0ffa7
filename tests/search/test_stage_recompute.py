"""What ``recompute = "optimal"`` means on a cluster: within the budget, no slower than what experts would set, more of it where more is in flight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.network.cluster_file import load_cluster
from search.rank_moments import moments_of
from search.stage_recompute import optimal_sequence, simulate_on_cluster
from simulator.model_source import ModelSource
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_source import parallel_case, simulate_source
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from tests.simulator.parallel.step_cases import SEQ_LEN, plan_of, small_config

CLUSTER = load_cluster("selene")


def source() -> ModelSource:
    return ModelSource(name="small", config=small_config(), seq_len=SEQ_LEN)


def within(plan: Plan, budget_bytes: int | None, recompute: str = "optimal") -> Plan:
    return replace(plan, memory=replace(plan.memory, recompute=recompute, budget_bytes=budget_bytes))


def run(plan: Plan, budget_bytes: int | None, recompute: str = "optimal") -> ParallelSimulation:
    return simulate_on_cluster(source(), within(plan, budget_bytes, recompute), CLUSTER, reserved=False)


PLANS = {
    "1f1b": plan_of(pp=4, num_microbatches=8), "gpipe": plan_of(pp=2, schedule="gpipe", framework="pytorch"),
    "interleaved": plan_of(pp=2, schedule="interleaved", virtual_stages=2), "zb-h1": plan_of(pp=4, schedule="zb-h1"),
    "empty stage": plan_of(pp=4, partition=(4, 0, 4, 0)),
    "one": plan_of(num_microbatches=2, dp=2, zero_stage=1), "chimera": plan_of(pp=4, schedule="chimera"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["zb-h1", *(pytest.param(name, marks=pytest.mark.slow) for name in PLANS if name != "zb-h1")])
def test_it_keeps_the_budget_and_loses_to_no_expert(name: str) -> None:
    plan = PLANS[name]
    none, full = run(plan, None, "none"), run(plan, None, "full")
    least, most = max(full.peak_memory_bytes), max(none.peak_memory_bytes)
    previous_s = np.inf
    for part in (0.25, 0.6, 1.0):
        budget = int(least + part * (most - least))
        found = run(plan, budget)
        assert max(found.peak_memory_bytes) <= budget
        assert found.step_time_s <= full.step_time_s * (1 + 1e-9)
        assert found.step_time_s <= previous_s * (1 + 1e-9)
        previous_s = found.step_time_s
    assert previous_s == pytest.approx(none.step_time_s, rel=1e-9)


def test_earlier_stages_recompute_more() -> None:
    """1F1B holds p - rank micro-batches."""
    plan = plan_of(pp=4, num_microbatches=8, framework="pytorch")
    none, full = run(plan, None, "none"), run(plan, None, "full")
    budget = (none.peak_memory_bytes[0] + 2 * full.peak_memory_bytes[0]) // 3
    found = optimal_sequence(parallel_case(source(), within(plan, budget), CLUSTER))
    again = [
        sum(one.kind in {"F_ck", "F_e"} for one in found if first <= one.block < end)
        for first, end in ((0, 5), (5, 9), (9, 13))
    ]
    assert again == sorted(again, reverse=True)
    assert again[0] > again[2]
    assert max(run(plan, budget).peak_memory_bytes) <= budget


def test_without_a_budget_it_fits_by_what_the_allocator_reserves() -> None:
    plan = plan_of(pp=2, num_microbatches=8)
    none = simulate_on_cluster(source(), within(plan, None, "none"), CLUSTER)
    device = replace(none.device, memory_bytes=int(max(none.peak_reserved_bytes) * 0.98) + none.device.context_bytes)
    found = simulate_on_cluster(source(), within(plan, None), CLUSTER, device=device)
    assert found.fits
    assert not simulate_on_cluster(source(), within(plan, None, "none"), CLUSTER, device=device).fits


def test_a_budget_that_nothing_fits_says_what_would() -> None:
    plan = plan_of(pp=4)
    with pytest.raises(InfeasibleError, match=r"pipeline rank 0 holds no schedule.*live through the step") as caught:
        run(plan, 10**6)
    needed = caught.value.needed_bytes
    assert max(run(plan, needed).peak_memory_bytes[:1]) <= needed


def test_offloaded_activations_beside_it_are_refused() -> None:
    plan = within(plan_of(pp=2), None)
    with pytest.raises(InputError, match=r"memory\.activation_offload.*0\.5.*optimal"):
        simulate_on_cluster(source(), replace(plan, memory=replace(plan.memory, activation_offload=0.5)), CLUSTER)


def test_other_plans_are_simulated_as_they_are() -> None:
    plan = plan_of(pp=2)
    assert simulate_on_cluster(source(), plan, CLUSTER).step_time_s == simulate_source(source(), plan, CLUSTER).step_time_s


def test_moments_of_1f1b_are_the_micro_batches_in_flight() -> None:
    for rank in range(4):
        moments = moments_of(order_of(plan_of(pp=4, num_microbatches=16)), rank, weight_share=0.5)
        assert moments.held.max() == 4 - rank
        one = np.ones((1, 1))
        assert moments.peak_bytes(10 * one, 12 * one, 3 * one)[0] == 10 * (3 - rank) + max(12, 13)
