"""What holds of every answer, in cases that are made to break it: odd devices, batches and heads, budgets at the edge of what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.errors import InfeasibleError
from search.joint.joint_search import JointResult, joint_search
from search.joint.space import JointRequest
from search.trainers import violations
from simulator.parallel.simulate_source import simulate_source
from simulator.plan import check_gpus
from tests.search.joint.joint_cases import device_of, small_request, source_of


def checked(request: JointRequest) -> JointResult:
    """The answer, after all that must hold of it."""
    found = joint_search(request, source_of(request), device_of(request))
    plan, simulation, device = found.plan, found.simulation, device_of(request)
    check_gpus(plan, request.cluster.num_gpus)
    assert plan.batch.global_batch == request.global_batch
    assert violations(plan, request.trainer, layers=request.config.layers) == ()
    assert simulation.fits
    assert max(simulation.peak_memory_bytes) <= (request.budget_bytes or device.memory_bytes)
    assert max(simulation.peak_reserved_bytes) + device.context_bytes <= device.memory_bytes
    assert found.certified
    assert found.lower_bound_s <= simulation.step_time_s
    for one in found.baselines:
        check_gpus(one.plan, request.cluster.num_gpus)
        assert violations(one.plan, request.trainer, layers=request.config.layers) == ()
        assert not one.fits or simulation.step_time_s <= one.step_time_s
    if plan.memory.recompute != "optimal":  # and anyone who simulates the plan alone sees the same
        again = simulate_source(source_of(request), plan, request.cluster, device=device)
        assert again.step_time_s == simulation.step_time_s
    return found


def test_a_batch_that_the_devices_do_not_divide_splits_the_model() -> None:
    found = checked(small_request(layers=2, gpus=4, batch=2, trainer="deepspeed"))
    assert found.plan.parallel.dp < 4


def test_a_prime_number_of_devices() -> None:
    """Five devices and twelve heads: no tensor parallelism, so stages or replicas."""
    found = checked(small_request(layers=5, gpus=5, batch=5, trainer="deepspeed"))
    assert found.plan.parallel.tp == 1


def test_heads_that_nothing_divides() -> None:
    """25 heads on 4 devices."""
    found = checked(small_request(model="gpt2-xl", layers=2, gpus=4, batch=4, trainer="pytorch"))
    assert found.plan.parallel.tp == 1


@pytest.mark.parametrize(("gpus", "layers", "batch"), [(7, 3, 6), (5, 4, 4)])
def test_devices_that_nothing_divides_are_refused_not_left_unused(gpus: int, layers: int, batch: int) -> None:
    request = small_request(layers=layers, gpus=gpus, batch=batch, trainer="torchtitan")
    with pytest.raises(InfeasibleError, match=f"no tp \\* cp \\* pp \\* dp == {gpus} divides"):
        joint_search(request, source_of(request), device_of(request))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "gpus", "layers", "batch"),
    [("any", 3, 3, 3), ("megatron", 6, 3, 6), ("torchtitan", 6, 3, 6), ("deepspeed", 8, 3, 12), ("pytorch", 8, 3, 12)],
)
def test_odd_sizes_for_every_trainer(trainer: str, gpus: int, layers: int, batch: int) -> None:
    checked(small_request(layers=layers, gpus=gpus, batch=batch, trainer=trainer))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["torchtitan", "deepspeed"])
def test_the_least_budget_that_an_error_names_fits_and_a_byte_less_does_not(trainer: str) -> None:
    request = small_request(layers=2, gpus=2, batch=2, trainer=trainer, budget_bytes=1000)
    with pytest.raises(InfeasibleError) as raised:
        joint_search(request, source_of(request), device_of(request))
    least = raised.value.needed_bytes
    found = checked(replace(request, budget_bytes=least))
    assert max(found.simulation.peak_memory_bytes) == least
    with pytest.raises(InfeasibleError) as again:
        joint_search(replace(request, budget_bytes=least - 1), source_of(request), device_of(request))
    assert again.value.needed_bytes == least
