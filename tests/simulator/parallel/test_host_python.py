"""What a trainer's own Python takes, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.parallel.host_dispatch import DispatchSeconds, host_seconds
from simulator.parallel.host_python import NO_PYTHON, NO_STALLS, OLDER_HOSTS, PythonSeconds, python_seconds, stalls_of
from simulator.parallel.recompute import stage_operations
from simulator.parallel.stages import Stage, stages_of
from simulator.plan import Plan, Runtime
from simulator.presets import build_workload
from tests.simulator.parallel.step_cases import SEQ_LEN, plan_of, small_config
from tests.simulator.parallel.test_host_dispatch import DISPATCH

EAGER = Runtime()
PYTHON = PythonSeconds(forward_s=100.0, backward_s=70.0, checkpoint_s=30.0)


def stage_of(plan: Plan) -> Stage:
    return stages_of(build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16"), plan)[0]


def added(plan: Plan, runtime: Runtime = EAGER) -> DispatchSeconds:
    """What Python adds to the kernels' dispatch."""
    stage = stage_of(plan)
    operations = stage_operations(plan, stage)
    with_python, without = (host_seconds(stage, operations, DISPATCH, runtime, python) for python in (PYTHON, NO_PYTHON))
    return replace(
        with_python, forward_s=with_python.forward_s - without.forward_s, backward_s=with_python.backward_s - without.backward_s,
        weight_s=with_python.weight_s - without.weight_s,
    )  # fmt: skip


def test_each_run_of_a_block_takes_its_python() -> None:
    blocks = len(stage_of(plan_of()).blocks)
    found = added(plan_of())
    assert (found.forward_s, found.backward_s) == (pytest.approx(100.0 * blocks), pytest.approx(70.0 * blocks))


def test_a_checkpointed_layer_takes_it_again_and_more() -> None:
    stage = stage_of(plan_of())
    again = sum(block.name in {"attention", "network"} for block in stage.blocks)
    plain, checkpointed = added(plan_of()), added(plan_of(recompute="full"))
    assert checkpointed.backward_s - plain.backward_s == pytest.approx(130.0 * again)


def test_captured_and_compiled_passes_run_no_python_of_the_trainer() -> None:
    assert added(plan_of(), Runtime(cuda_graphs=True)).forward_s == 0.0


def test_older_hosts_take_longer_and_unmeasured_frameworks_nothing() -> None:
    old, new = python_seconds("megatron-core", "ampere"), python_seconds("megatron-core", "hopper")
    assert old.forward_s == pytest.approx(OLDER_HOSTS["ampere"] * new.forward_s)
    assert new.forward_s == pytest.approx(265e-6)
    assert python_seconds("pytorch", "ampere") == NO_PYTHON


def test_exchanges_stall_longer_on_older_hosts_and_batches_as_measured() -> None:
    old, new = stalls_of("megatron-lm@2021", "ampere"), stalls_of("megatron-lm@2021", "hopper")
    assert old.exchange_s == pytest.approx(OLDER_HOSTS["ampere"] * new.exchange_s)
    assert new.exchange_s == pytest.approx(17e-6)
    assert old.batch_s == new.batch_s == pytest.approx(0.51e-3)
    assert stalls_of("pytorch", "ampere") == NO_STALLS


def test_reading_back_is_a_copy_and_python() -> None:
    assert stalls_of("aa-scaling", "hopper").attention_s == pytest.approx(30e-6 + 24e-6)
    assert stalls_of("aa-scaling", "ampere").attention_s == pytest.approx(30e-6 + OLDER_HOSTS["ampere"] * 24e-6)
    assert stalls_of("megatron-core", "ampere").attention_s == 0.0
