"""The host's time for passes, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.light_kernels import LIGHT_CLASSES
from hardware_models.profile import DeviceProfile, HostDispatch
from simulator.parallel.compiled_kernels import compiled_workload
from simulator.parallel.host_dispatch import DispatchSeconds, dispatch_of, host_seconds
from simulator.parallel.orders import order_of
from simulator.parallel.recompute import stage_operations
from simulator.parallel.simulate_parallel import step_parts
from simulator.parallel.stages import Stage, stages_of
from simulator.plan import Plan, Runtime
from simulator.plan_parallel import check_parallel
from simulator.precision import price_in
from simulator.presets import build_workload
from tests.simulator.parallel.step_cases import SEQ_LEN, cluster_of, plan_of, simulated, small_config

DISPATCH = HostDispatch(
    eager_s=1.0, autograd_backward_s=0.5, compiled_s=2.0, compiled_call_s=10.0, cuda_graph_s=0.01, evidence="measured", source="a test", date="2026-01-01"
)  # fmt: skip
EAGER = Runtime()


def stage_of(plan: Plan, *, compiled: bool = False) -> Stage:
    workload = build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16")
    return stages_of(compiled_workload(workload) if compiled else workload, plan)[0]


def seconds(plan: Plan, runtime: Runtime = EAGER) -> DispatchSeconds:
    stage = stage_of(plan, compiled=runtime.compile)
    return host_seconds(stage, stage_operations(plan, stage), DISPATCH, runtime)


def counts(*, compiled: bool = False) -> tuple[int, int, int]:
    """Kernels of all blocks: forward, backward; blocks."""
    blocks = stage_of(plan_of(), compiled=compiled).blocks
    forward = sum(len(block.options[0].forward.kernels) for block in blocks)
    return forward, sum(len(block.options[0].backward_accumulate.kernels) for block in blocks), len(blocks)


def test_each_eager_kernel_takes_the_hosts_time() -> None:
    forward, backward, _ = counts()
    own = seconds(plan_of())
    assert (own.forward_s, own.backward_s) == (pytest.approx(forward), pytest.approx(0.5 * backward))
    assert 0 < own.weight_s < own.backward_s


def test_checkpointed_layers_are_dispatched_again_as_forward_kernels() -> None:
    plain, again = seconds(plan_of()), seconds(plan_of(recompute="full"))
    layers = sum(
        len(block.options[0].forward.kernels) for block in stage_of(plan_of()).blocks if block.name in {"attention", "network"}
    )
    assert again.backward_s - plain.backward_s == pytest.approx(layers)


def test_compiled_blocks_have_fewer_kernels_and_a_call_each() -> None:
    forward, backward, blocks = counts(compiled=True)
    own = seconds(plan_of(), Runtime(compile=True))
    assert own.forward_s == pytest.approx(10 * blocks + 2 * forward)
    assert own.backward_s == pytest.approx(10 * blocks + 2 * backward)
    assert forward < counts()[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_cost_the_host_next_to_nothing(compiled: bool) -> None:
    forward, backward, _ = counts(compiled=compiled)
    own = seconds(plan_of(), Runtime(compile=compiled, cuda_graphs=True))
    assert (own.forward_s, own.backward_s) == (pytest.approx(0.01 * forward), pytest.approx(0.01 * backward))


def test_a_profile_without_dispatch_is_refused() -> None:
    device: DeviceProfile = load_hardware("h100-sxm")  # type: ignore[assignment]
    assert dispatch_of(device) is device.host_dispatch
    with pytest.raises(InputError, match="needs the host's time per kernel"):
        dispatch_of(replace(device, host_dispatch=None))


def test_passes_carry_the_hosts_time() -> None:
    plan = plan_of(pp=2)
    cluster = cluster_of(plan)
    device = load_hardware(cluster.device)
    parts = step_parts(small_config(), plan, cluster, device, order_of(plan), seq_len=SEQ_LEN)
    for cost in parts.costs:
        assert min(cost.forward.host_s, cost.backward.host_s) > 0
        assert 0 < cost.weight_host_s < cost.backward.host_s


def graphs(plan: Plan) -> Plan:
    return replace(plan, runtime=replace(plan.runtime, cuda_graphs=True))


@pytest.mark.parametrize("framework", ["megatron-core", "pytorch"])
def test_a_captured_step_leaves_no_gaps_between_kernels(framework: str) -> None:
    """Memory-bound kernels begin at once; products and attention, priced as they were timed, are the same."""
    plan = plan_of(pp=2, framework=framework)
    assert simulated(graphs(plan)).step_time_s < simulated(plan).step_time_s
    cluster = cluster_of(plan)
    device = load_hardware(cluster.device)
    kernels = [kernel for block in stage_of(plan).blocks for kernel in block.options[0].forward.kernels]
    gap_s = price_in("bf16", device)(kernels) - price_in("bf16", device, launch="graph")(kernels)
    light = [kernel.kernel_class in LIGHT_CLASSES for kernel in kernels]
    assert (gap_s[light] > 0).all()
    assert not gap_s[[not one for one in light]].any()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(framework="deepspeed"), "deepspeed captures no training step"),
        (plan_of(framework="megatron-lm@2021"), "megatron-lm@2021 captures no training step"),
        (replace(plan_of(), memory=replace(plan_of().memory, activation_offload=0.5)), "is not captured"),
    ],
)
def test_graphs_that_cannot_be_captured_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_parallel(graphs(plan), compute=("bf16",))


def test_results_say_what_launches_rest_on() -> None:
    result = simulated(plan_of(pp=2))
    dispatch = result.device.host_dispatch
    assert dispatch is not None
    known = replace(result, device=replace(result.device, host_dispatch=replace(dispatch, evidence="measured")))
    assert known.to_json()["evidence"] == ["measured", *[kind for kind in result.evidence if kind != "measured"]]
