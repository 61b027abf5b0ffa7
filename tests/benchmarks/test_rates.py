"""Rates of what a search does millions of times; run by `make bench`, which prints them. Ratios of two numbers of one run are what to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster import CommGroup
from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.collectives import price_collectives
from simulator import engine_compiled, engine_simpy
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_parallel import simulate_parallel
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.presets import preset
from simulator.program import Program

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark
NUM_SHAPES = 1_000_000


def gpt3(num_microbatches: int) -> ParallelSimulation:
    """GPT-3 175B on 512 A100: tp 8, pp 16, dp 4."""
    plan = Plan(
        parallel=Parallel(tp=8, pp=16, dp=4, sequence_parallel=True), batch=Batch(global_batch=4 * num_microbatches, micro_batch=1, seq_len=2048),
        pipeline=Pipeline(schedule="1f1b"), memory=Memory(zero_stage=1, recompute="selective"), precision=Precision(compute="bf16"),
        runtime=Runtime(framework="megatron-core", flash_attention=False),
    )  # fmt: skip
    cluster = load_cluster("selene").with_gpus(plan.num_gpus)
    return simulate_parallel(preset("gpt3-175b"), plan, cluster, load_hardware(cluster.device), order_of(plan), seq_len=2048)


@pytest.fixture(scope="module")
def program() -> Program:
    return gpt3(64).program


@pytest.mark.benchmark(group="engine")
def test_compiled_engine(benchmark: BenchmarkFixture, program: Program) -> None:
    engine_compiled.record(program)
    benchmark(engine_compiled.record, program)
    benchmark.extra_info["instructions"] = program.num_instructions


@pytest.mark.benchmark(group="engine")
def test_reference_engine(benchmark: BenchmarkFixture, program: Program) -> None:
    benchmark.pedantic(engine_simpy.record, args=(program,), rounds=3)
    benchmark.extra_info["instructions"] = program.num_instructions


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("num_microbatches", [32, 128])
def test_plan_lowered_and_simulated(benchmark: BenchmarkFixture, num_microbatches: int) -> None:
    gpt3(num_microbatches)
    benchmark.pedantic(gpt3, args=(num_microbatches,), rounds=5)


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
