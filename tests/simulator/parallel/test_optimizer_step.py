"""The end of a step: bytes of each kernel by hand, who waits for whom, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from hardware_models.network.cluster import CommGroup
from hardware_models.network.collectives import collective_seconds
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from simulator.parallel.batch_copy import copy_seconds
from simulator.parallel.mesh import mesh_of
from simulator.parallel.optimizer_step import GradientCheck, gradient_check, optimizer_seconds
from simulator.parallel.orders import order_of
from simulator.pipeline.one_way import one_f_one_b
from simulator.plan import Plan
from simulator.plan_parallel import check_parallel
from simulator.program import Stream
from tests.simulator.parallel.step_cases import BACKWARD_S, FORWARD_S, cluster_of, parts_of, plan_of, ran, simulated

ELEMENTS = 80_000_000


def device() -> DeviceProfile:
    return load_hardware(cluster_of(plan_of()).device)


def check(plan: Plan) -> GradientCheck | None:
    return gradient_check(plan, mesh_of(plan, cluster_of(plan)), device(), [float(ELEMENTS)] * plan.parallel.pp)


def seconds(elements: int, read_bytes: int, written_bytes: int) -> float:
    kernel = Kernel(
        kernel_class="pointwise", op="gradient_norm", shape=(elements,), dtype="float32", flops=0, read_bytes=elements * read_bytes,
        written_bytes=elements * written_bytes,
    )  # fmt: skip
    return float(price([kernel], device())[0])


@pytest.mark.parametrize(
    ("framework", "compute", "read_bytes", "written_bytes"),
    [
        ("megatron-core", "bf16", 4, 0),
        ("megatron-core", "fp16", 8, 4),
        ("torchtitan", "bf16", 8, 4),
        ("deepspeed", "fp16", 12, 8),
        ("pytorch", "fp16", 4, 4),
    ],
)
def test_gradients_are_read_for_norm_and_scale(framework: str, compute: str, read_bytes: int, written_bytes: int) -> None:
    plan = plan_of(framework=framework)
    own = check(replace(plan, precision=replace(plan.precision, compute=compute)))  # type: ignore[arg-type]
    assert own is not None
    assert own.read_s == (pytest.approx(seconds(ELEMENTS, read_bytes, written_bytes)),)
    assert own.agree_s == 0.0


def test_a_bare_module_does_not_look_at_gradients() -> None:
    assert check(plan_of(framework="pytorch")) is None


@pytest.mark.parametrize(("zero_stage", "ranks", "parts"), [(0, 16, 1), (1, 64, 4)])
def test_ranks_of_different_gradients_agree(zero_stage: int, ranks: int, parts: int) -> None:
    """Of 64 GPUs, tp 8, pp 2 and dp 4: the 16 of a replica, or all of them where each holds a quarter."""
    plan = plan_of(tp=8, pp=2, dp=4, zero_stage=zero_stage)
    own = check(plan)
    assert own is not None
    assert own.agree_s == collective_seconds("all_reduce", 4.0, CommGroup(num_ranks=ranks, ranks_per_node=8), cluster_of(plan))
    assert own.read_s[0] == pytest.approx(seconds(ELEMENTS // parts, 4, 0))


def test_fp16_agrees_on_overflow_too() -> None:
    plan = plan_of(tp=8)
    half = replace(plan, precision=replace(plan.precision, compute="fp16"))
    one, both = check(plan), check(half)
    assert one is not None
    assert both is not None
    assert both.agree_s == pytest.approx(2 * one.agree_s)


def test_the_optimizer_waits_for_the_last_rank_or_does_not() -> None:
    """Two stages, one micro-batch: rank 1 ends its passes a backward pass before rank 0 does; looking takes 2 s, agreeing 1 s, the step 5 s."""
    order = one_f_one_b(2, 1)
    passes_s = 2 * (FORWARD_S + BACKWARD_S)
    for waits, end_of_last in ((True, passes_s + 2 + 1 + 5), (False, passes_s - BACKWARD_S + 2 + 5)):
        parts = replace(parts_of(order, optimizer_s=5.0), check=GradientCheck(read_s=(2.0, 2.0), agree_s=1.0, waits=waits))
        timeline, _ = ran(parts)
        ends = [span.end_s for span in timeline.spans if span.device == 1 and span.stream is Stream.COMPUTE]
        assert max(ends) == pytest.approx(end_of_last)
        assert timeline.makespan_s == pytest.approx(passes_s + 2 + 5 + (1 if waits else 0))


def post_validated(plan: Plan) -> Plan:
    return replace(plan, runtime=replace(plan.runtime, optimizer_sync="post-validation"))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2"])
def test_steps_that_validate_afterwards_follow_each_other_closer(schedule: str) -> None:
    """The time of a step is that of its longest rank, and the breakdown sums to it."""
    plan = plan_of(pp=4, schedule=schedule)
    before, after = simulated(plan), simulated(post_validated(plan))
    assert after.step_time_s < before.step_time_s
    assert sum(after.breakdown_s.values()) == pytest.approx(after.step_time_s, rel=1e-9)
    assert sum(before.breakdown_s.values()) == pytest.approx(before.step_time_s, rel=1e-9)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(pp=2, framework="torchtitan"), "torchtitan cannot roll a step back"),
        (plan_of(), "but pp = 1"),
        (
            replace(plan_of(pp=2), memory=replace(plan_of().memory, optimizer_offload=1.0)),
            "a step on the host is not rolled back",
        ),
    ],
)
def test_validation_afterwards_is_refused_where_it_means_nothing(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_parallel(post_validated(plan), compute=("bf16",))


def test_the_first_micro_batch_comes_to_both_ends() -> None:
    plan = plan_of(pp=4)
    cluster = cluster_of(plan)
    rate = cluster.fabric.host_link.achieved_bytes_per_s.value
    own = copy_seconds(order_of(plan), cluster, 10**8)
    assert own == (pytest.approx(1e8 / rate + 1e-5), 0.0, 0.0, pytest.approx(1e8 / rate + 1e-5))


def test_the_first_pass_waits_for_its_batch() -> None:
    parts = replace(parts_of(one_f_one_b(2, 3)), load_s=(4.0, 4.0))
    plain, _ = ran(parts_of(one_f_one_b(2, 3)))
    loaded, _ = ran(parts)
    assert loaded.makespan_s == pytest.approx(plain.makespan_s + 4.0)


def test_the_optimizer_moves_each_byte_once() -> None:
    """AdamW on bfloat16 parameters under Megatron: 4 + 4 + 8 and again 4 read; 4 + 8 + 2 and 4 of zeros written."""
    kernel = Kernel(
        kernel_class="optimizer", op="adamw", shape=(ELEMENTS,), dtype="float32", flops=0, read_bytes=20 * ELEMENTS, written_bytes=18 * ELEMENTS
    )  # fmt: skip
    expected = float(price([kernel], device())[0])
    assert optimizer_seconds(plan_of(), device(), elements=ELEMENTS, dtype="bfloat16") == pytest.approx(expected)
