"""The optimizer's step on the host: gradients down, update at the speed of host memory, parameters up; at once or one step late."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from hardware_models.errors import InputError
from simulator import engine_compiled, engine_simpy
from simulator.exposed_time import exposed_times
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.offload import HostUpdate
from simulator.parallel.offload_plan import host_update
from simulator.parallel.offload_step import DOWN, UP
from simulator.pipeline.one_way import interleaved, one_f_one_b
from simulator.plan import Plan, Precision
from simulator.plan_parallel import check_parallel
from simulator.precision import STORED_AS
from simulator.program import MemoryClass, Program
from tests.simulator.parallel.offload_cases import STAGE_S, offloading, path_of, program_of, run, with_memory
from tests.simulator.parallel.step_cases import plan_of

UPDATE = HostUpdate(down_bytes=(500.0,), moved_bytes=2000.0, up_bytes=500.0)
PLANS = {
    "one device": plan_of(num_microbatches=2),
    "1f1b": plan_of(pp=4, dp=2),
    "split backward": plan_of(pp=4, schedule="zb-h1"),
    "interleaved": plan_of(pp=2, dp=2, virtual_stages=2, schedule="interleaved", zero_stage=1),
    "zero 2 behind": plan_of(dp=8, zero_stage=2, num_microbatches=2, overlap=False),
    "zero 3": plan_of(dp=8, zero_stage=3, num_microbatches=2),
    "two directions": plan_of(pp=4, schedule="chimera"),
}


def moved(program: Program, label: str) -> float:
    rows = [row for row, n in enumerate(program.transfers.instruction) if program.option[n] == label]
    return float(program.transfers.size_bytes[rows].sum())


@pytest.mark.parametrize(("delayed", "expected_s"), [(False, 16.25), (True, 14.0)])
def test_one_step_by_hand(*, delayed: bool, expected_s: float) -> None:
    """Passes end at 12; two buckets of 250 B at 250 B/s have left at 9 and 13. The host moves 1000 B for each at 1000 B/s.

    At once: the first part until 14, the second beside the first one's parameters, which take 250 B/s of the memory for 1 s, so until 15.25; up by 16.25.
    Late: the host is done at 2, and parameters go up when the passes are over: until 14.
    """
    sync = [GradientSync(chunks=2, reduce_s=0.0, gather_s=0.0)]
    parts = offloading(
        one_f_one_b(1, 1), path_of(250.0, dram=1000.0), updates=[replace(UPDATE, delayed=delayed)], sync=sync, optimizer_s=0.5
    )
    program = program_of(parts)
    for engine in (engine_compiled, engine_simpy):
        assert engine.run(program)[0].makespan_s == pytest.approx(expected_s, rel=1e-12)
    times = exposed_times(program, engine_compiled.record(program))
    assert times["compute"] == pytest.approx(STAGE_S, rel=1e-12)
    assert times["optimizer"] == pytest.approx(0.5, rel=1e-12)
    host_s = 0.0 if delayed else 2.25
    assert times["host"] == pytest.approx(host_s, rel=1e-12)
    assert times["offload"] == pytest.approx(expected_s - STAGE_S - 0.5 - host_s, rel=1e-12)


def test_reduced_gradients_leave_behind_their_bucket() -> None:
    """Two buckets reduced in 1 s each, at 9 and 13: both have left 1 s later."""
    sync = [GradientSync(chunks=2, reduce_s=2.0, gather_s=0.0)]
    program = program_of(offloading(one_f_one_b(1, 1), path_of(250.0), updates=[UPDATE], sync=sync))
    record = engine_compiled.record(program)
    assert [float(record.end_s[n]) for n, label in enumerate(program.option) if label == DOWN] == pytest.approx([10.0, 14.0])


def test_each_stage_sends_its_own_gradients() -> None:
    order = interleaved(2, 4, virtual_stages=2)
    update = HostUpdate(down_bytes=(100.0, 300.0), moved_bytes=10.0, up_bytes=50.0)
    for overlaps in (True, False):
        sync = [GradientSync(chunks=2, reduce_s=0.5, gather_s=0.0, reduce_overlaps=overlaps)] * 4
        program = program_of(offloading(order, path_of(), updates=[update] * 2, sync=sync))
        assert moved(program, DOWN) == pytest.approx(2 * 400.0)
        assert moved(program, UP) == pytest.approx(2 * 50.0)


def test_an_infinitely_fast_host_costs_no_time() -> None:
    plain = engine_compiled.run(program_of(offloading(one_f_one_b(4, 6), path_of())))[0]
    update = engine_compiled.run(program_of(offloading(one_f_one_b(4, 6), path_of(), updates=[UPDATE] * 4)))[0]
    assert update.makespan_s == pytest.approx(plain.makespan_s, rel=1e-12)


def test_bytes_of_an_adam_step_by_hand() -> None:
    """bfloat16: 4 B of gradient down, 2 B up; the host reads 4 + 12 and writes 12 + 2, and holds 12 + 4, 12 + 8 where it is late. Shards divide all."""
    update = host_update(with_memory(plan_of(), optimizer_offload=0.5), [1000, 3000], width=2)
    assert update.down_bytes == (2000.0, 6000.0)
    assert (update.up_bytes, update.moved_bytes, update.resident_bytes) == (4000.0, 2000 * 30.0, 2000 * 16.0)
    late = host_update(with_memory(plan_of(), optimizer_offload=0.5, delayed_update=True), [4000], width=2)
    assert late.resident_bytes == 2000 * 20.0
    sharded = host_update(with_memory(plan_of(dp=4, zero_stage=2), optimizer_offload=1.0), [4000], width=2)
    assert sharded.down_bytes == (4000.0,)


def test_zero_offloads_own_volume() -> None:
    """Gradients in 16 bits: 4 B a parameter each step, 2 down and 2 up (Ren et al. 2021, section 4)."""
    plan = replace(with_memory(plan_of(), optimizer_offload=1.0), precision=Precision(compute="bf16", grads="bf16"))
    update = host_update(plan, [1000], width=2)
    assert sum(update.down_bytes) + update.up_bytes == 4 * 1000.0


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("delayed", [False, True])
def test_engines_agree_and_times_add_up(name: str, *, delayed: bool) -> None:
    result = run(PLANS[name], optimizer_offload=0.6, delayed_update=delayed)
    reference = engine_simpy.record(result.program)
    np.testing.assert_allclose(result.record.end_s, reference.end_s, rtol=1e-9, atol=1e-15)
    assert sum(exposed_times(result.program, result.record).values()) == pytest.approx(result.step_time_s, rel=1e-9)


@pytest.mark.parametrize("name", PLANS)
def test_offloaded_states_leave_the_device(name: str) -> None:
    results = [run(PLANS[name], optimizer_offload=part) for part in (0.0, 0.5, 1.0)]
    states = [result.program.resident_bytes[0][MemoryClass.OPTIMIZER_STATES] for result in results]
    assert states[1] == pytest.approx(states[0] / 2, abs=1)
    assert states[2] == 0
    for less, more in pairwise(results):
        assert all(b < a for a, b in zip(less.peak_memory_bytes, more.peak_memory_bytes, strict=True))
        assert more.peak_host_bytes > less.peak_host_bytes


@pytest.mark.parametrize("name", PLANS)
def test_a_late_update_is_no_slower_and_takes_more_of_the_host(name: str) -> None:
    now, late = (run(PLANS[name], optimizer_offload=1.0, delayed_update=delayed) for delayed in (False, True))
    assert late.step_time_s < now.step_time_s
    assert late.peak_host_bytes > now.peak_host_bytes
    assert late.peak_memory_bytes == now.peak_memory_bytes


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"delayed_update": True}, r"memory\.delayed_update.*optimizer_offload = 0"),
        ({"optimizer_offload": "optimal"}, r"memory\.optimizer_offload.*optimal"),
        (
            {"grad_offload": 0.5, "optimizer_offload": 0.25},
            r"memory\.grad_offload.*grad_offload <= optimizer_offload.*0\.5 > 0\.25",
        ),
    ],
)
def test_what_is_not_simulated_is_refused(memory: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_parallel(with_memory(plan_of(), **memory), compute=tuple(STORED_AS))


@pytest.mark.parametrize(
    "plan", [plan_of(dp=2), plan_of(dp=2, zero_stage=2), plan_of(pp=4, schedule="chimera"), plan_of(pp=4, schedule="dualpipe")]
)
def test_gradients_that_are_reduced_once_stay(plan: Plan) -> None:
    with pytest.raises(InputError, match=r"memory\.grad_offload.*reduce once a step"):
        check_parallel(with_memory(plan, grad_offload=0.5, optimizer_offload=0.5), compute=tuple(STORED_AS))


GRADIENTS = HostUpdate(down_bytes=(500.0,), each_bytes=(500.0,), moved_bytes=750.0, up_bytes=0.0)
GRADIENT_PLANS = {
    "one device": plan_of(num_microbatches=3),
    "1f1b": plan_of(pp=4),
    "split backward": plan_of(pp=4, schedule="zb-h1"),
    "interleaved": plan_of(pp=2, virtual_stages=2, schedule="interleaved"),
    "zero 3": plan_of(dp=8, zero_stage=3, num_microbatches=2),
}


@pytest.mark.parametrize(("rate", "expected_s"), [(250.0, 27.0), (25.0, 50.0)])
def test_gradients_of_each_micro_batch_by_hand(rate: float, expected_s: float) -> None:
    """Two micro-batches of 4 + 8 s, two buckets of 250 B each; the host moves 750 B/s: 1 s to add a bucket to the first micro-batch's, 1 s for its step.

    At 250 B/s buckets are made at 8, 12, 20, 24, the last one has left at 25 and is added at 26. At 25 B/s they leave one by one, 10 s each, from 8 to 48;
    the third is made from 18 on, when the first has left, the fourth from 28 on.
    """
    sync = [GradientSync(chunks=2, reduce_s=0.0, gather_s=0.0)]
    program = program_of(offloading(one_f_one_b(1, 2), path_of(rate, dram=750.0), updates=[GRADIENTS], sync=sync))
    for engine in (engine_compiled, engine_simpy):
        timeline, (profile,) = engine.run(program)
        assert timeline.makespan_s == pytest.approx(expected_s, rel=1e-12)
        assert profile.alive_bytes[:, MemoryClass.GRADIENTS].max() == 500
        assert profile.alive_bytes[-1].tolist() == profile.alive_bytes[0].tolist()
    assert moved(program, DOWN) == 1000.0


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT_PLANS)
@pytest.mark.parametrize("others", [{}, {"delayed_update": True}, {"activation_offload": 0.5}])
def test_offloaded_gradients_leave_the_device(name: str, others: dict[str, object]) -> None:
    """In buckets of 8 MB; passes of the weights' gradients are not cut: all of a stage's gradients are there at their end."""
    plan = GRADIENT_PLANS[name]
    plan = replace(plan, runtime=replace(plan.runtime, bucket_bytes=8_000_000))
    results = [run(plan, grad_offload=part, optimizer_offload=1.0, **others) for part in (0.0, 0.5, 1.0)]
    resident = [result.program.resident_bytes[0][MemoryClass.GRADIENTS] for result in results]
    assert resident[1] == pytest.approx(resident[0] / 2, abs=1)
    assert resident[2] == 0
    for less, more in pairwise(results):
        assert all(b <= a for a, b in zip(less.peak_memory_bytes, more.peak_memory_bytes, strict=True))
        reference = engine_simpy.record(more.program)
        np.testing.assert_allclose(more.record.end_s, reference.end_s, rtol=1e-9, atol=1e-15)
    if name != "split backward":
        assert max(results[2].peak_memory_bytes) < max(results[0].peak_memory_bytes)
    for profile in results[2].profiles:
        assert profile.alive_bytes[0].tolist() == profile.alive_bytes[-1].tolist()


def test_gradients_go_once_for_each_micro_batch() -> None:
    """Three micro-batches: three times what one sends."""
    sent = [
        moved(run(plan_of(num_microbatches=count), grad_offload=1.0, optimizer_offload=1.0).program, DOWN) for count in (1, 3)
    ]
    assert sent[1] == pytest.approx(3 * sent[0], rel=1e-6)
