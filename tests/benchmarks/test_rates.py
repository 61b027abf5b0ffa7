"""Rates of what a search does millions of times; run by `make bench`, which prints them. Ratios of two numbers of one run are what to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster import Cluster, CommGroup
from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.collectives import price_collectives
from hardware_models.profile import DeviceProfile
from simulator import engine_compiled, engine_simpy
from simulator.parallel.interference import overlap_of, slowdown_of
from simulator.parallel.lower_step import lower_step
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_parallel import simulate_parallel, step_parts
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.presets import preset
from simulator.program import MemoryClass, Program, no_slowdown, no_transfers
from simulator.run_record import RunRecord, profiles_of

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark
NUM_SHAPES = 1_000_000


@cache
def selene(num_gpus: int) -> tuple[Cluster, DeviceProfile]:
    """A cluster of A100s and its devices."""
    cluster = load_cluster("selene").with_gpus(num_gpus)
    return cluster, load_hardware(cluster.device)


def gpt3_plan(num_microbatches: int, recompute: str = "selective") -> Plan:
    """GPT-3 175B on 512 A100: tp 8, pp 16, dp 4."""
    return Plan(
        parallel=Parallel(tp=8, pp=16, dp=4, sequence_parallel=True), batch=Batch(global_batch=4 * num_microbatches, micro_batch=1, seq_len=2048),
        pipeline=Pipeline(schedule="1f1b"), memory=Memory(zero_stage=1, recompute=recompute), precision=Precision(compute="bf16"),
        runtime=Runtime(framework="megatron-core", flash_attention=False),
    )  # fmt: skip


def gpt3(num_microbatches: int, recompute: str = "selective") -> ParallelSimulation:
    plan = gpt3_plan(num_microbatches, recompute)
    return simulate_parallel(preset("gpt3-175b"), plan, *selene(plan.num_gpus), order_of(plan), seq_len=2048)


def llama3(num_microbatches: int) -> ParallelSimulation:
    """Llama 3 405B on 16,384 H100: tp 8, pp 16, dp 128."""
    plan = Plan(
        parallel=Parallel(tp=8, pp=16, dp=128, sequence_parallel=True), batch=Batch(global_batch=128 * num_microbatches, micro_batch=1, seq_len=8192),
        pipeline=Pipeline(schedule="1f1b"), memory=Memory(zero_stage=1, recompute="none"), precision=Precision(compute="bf16"), runtime=Runtime(framework="megatron-core"),
    )  # fmt: skip
    cluster, device = hopper(plan.num_gpus)
    return simulate_parallel(preset("llama3-405b"), plan, cluster, device, order_of(plan), seq_len=8192)


@cache
def hopper(num_gpus: int) -> tuple[Cluster, DeviceProfile]:
    """A cluster of H100s and its devices."""
    cluster = load_cluster("hgx-h100").with_gpus(num_gpus)
    return cluster, load_hardware(cluster.device)


@pytest.fixture(scope="module")
def program() -> Program:
    """1F1B of 16 ranks and 256 micro-batches, with shared links and slow-down."""
    return gpt3(256).program


@pytest.fixture(scope="module")
def free(program: Program) -> Program:
    """The same where nothing shares links or slows anything."""
    return replace(program, transfers=no_transfers(), slowdown=no_slowdown())


@pytest.mark.benchmark(group="engine, contended")
@pytest.mark.parametrize("engine", [engine_compiled.record, engine_simpy.record], ids=["compiled", "simpy"])
def test_contended(benchmark: BenchmarkFixture, program: Program, engine: Callable[[Program], RunRecord]) -> None:
    engine(program)
    benchmark.pedantic(engine, args=(program,), rounds=20 if engine is engine_compiled.record else 2)
    benchmark.extra_info["instructions"] = program.num_instructions


@pytest.mark.benchmark(group="engine, free")
@pytest.mark.parametrize(
    "engine", [engine_compiled.times, engine_compiled.record, engine_simpy.record], ids=["times", "compiled", "simpy"]
)
def test_free(benchmark: BenchmarkFixture, free: Program, engine: Callable[[Program], RunRecord]) -> None:
    engine(free)
    benchmark.pedantic(engine, args=(free,), rounds=2 if engine is engine_simpy.record else 20)
    benchmark.extra_info["instructions"] = free.num_instructions


@pytest.mark.benchmark(group="cost is linear in instructions")
@pytest.mark.parametrize("num_microbatches", [64, 256, 1024])
def test_linear(benchmark: BenchmarkFixture, num_microbatches: int) -> None:
    program = gpt3(num_microbatches).program
    benchmark.pedantic(engine_compiled.record, args=(program,), rounds=10)
    benchmark.extra_info["instructions"] = program.num_instructions


@pytest.mark.benchmark(group="lowered and simulated")
@pytest.mark.parametrize("num_microbatches", [32, 256])
def test_step_lowered_and_simulated(benchmark: BenchmarkFixture, num_microbatches: int) -> None:
    plan = gpt3_plan(num_microbatches, "full")
    cluster, device = selene(plan.num_gpus)
    parts = step_parts(preset("gpt3-175b"), plan, cluster, device, order_of(plan), seq_len=2048)
    resident, slowdown = [(1 << 40,) * len(MemoryClass)] * 16, slowdown_of(overlap_of(device, cluster))

    def run() -> None:
        program = lower_step(parts, resident, slowdown)
        profiles_of(program, engine_compiled.record(program))

    run()
    benchmark.pedantic(run, rounds=20)


@pytest.mark.benchmark(group="whole plan")
@pytest.mark.parametrize(("make", "num_microbatches"), [(gpt3, 32), (gpt3, 128), (llama3, 16)])
def test_whole_plan(benchmark: BenchmarkFixture, make: Callable[[int], ParallelSimulation], num_microbatches: int) -> None:
    make(num_microbatches)
    benchmark.pedantic(make, args=(num_microbatches,), rounds=5)


@pytest.mark.benchmark(group="price")
def test_million_products(benchmark: BenchmarkFixture) -> None:
    grid = next(grid for grid in load_hardware("h100-sxm").grids if grid.group == "mm")
    shapes = np.exp2(np.random.default_rng(0).uniform(0, 16, (NUM_SHAPES, 3))).astype(np.int64)
    benchmark.pedantic(grid.seconds, args=(shapes,), rounds=5)


@pytest.mark.benchmark(group="price")
def test_hundred_thousand_collectives(benchmark: BenchmarkFixture) -> None:
    cluster, sizes = load_cluster("hgx-h100"), np.geomspace(1e2, 1e10, 100_000)
    group = CommGroup(num_ranks=8, ranks_per_node=8)
    benchmark.pedantic(price_collectives, args=("all_reduce", sizes, group, cluster), rounds=5)
