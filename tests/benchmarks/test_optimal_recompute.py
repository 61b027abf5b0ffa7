"""Rates of ``recompute = "optimal"`` over pipeline stages; run by `make bench`. Each group holds both sides of a ratio."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.compiled_allocator import replay_steps
from hardware_models.network.cluster import Cluster
from hardware_models.network.cluster_file import load_cluster
from hardware_models.profile import DeviceProfile
from search.stage_chain import StageTable
from search.stage_choices import StageChoices
from search.stage_recompute import best_operations, open_step, simulate_on_cluster
from search.stage_runs import StageRuns
from simulator.model_source import ModelSource
from simulator.parallel.simulate_source import parallel_case
from simulator.parallel.stages import stage_cost
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.presets import preset
from tests.chain_cases import layered_chain
from tests.hardware_models.test_compiled_allocator import MOST_STEPS, call_by_call, random_step

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark
OTHERS = 8.0
"""Micro-batches in flight beside the running one."""
PLANS = {
    "gpt3-175b": (("gpt3-175b", "selene", 2048), {"tp": 4, "pp": 16, "dp": 8}, 8),
    "megatron-530b": (("megatron-530b", "selene", 2048), {"tp": 8, "pp": 35, "dp": 8}, 4),
    "llama3-405b": (("llama3-405b", "hgx-h100", 8192), {"tp": 8, "pp": 18, "dp": 8}, 2),
}  # fmt: skip


@cache
def setting(name: str) -> tuple[ModelSource, Plan, Cluster, DeviceProfile]:
    """A plan whose first ranks must recompute."""
    (model, hardware, seq_len), degrees, micro_batch = PLANS[name]
    plan = Plan(
        parallel=Parallel(**degrees, sequence_parallel=True), batch=Batch(global_batch=8 * 64 * micro_batch, micro_batch=micro_batch, seq_len=seq_len),
        pipeline=Pipeline(schedule="1f1b"), memory=Memory(zero_stage=1, recompute="optimal"), precision=Precision(compute="bf16"),
        runtime=Runtime(framework="megatron-core"),
    )  # fmt: skip
    cluster = load_cluster(hardware).with_gpus(plan.num_gpus)
    return ModelSource(name=model, config=preset(model), seq_len=seq_len), plan, cluster, load_hardware(cluster.device)


@pytest.mark.benchmark(group="recompute of a stage of 96 layers")
@pytest.mark.parametrize("way", ["runs", "runs, made anew", "table"])
def test_stage(benchmark: BenchmarkFixture, way: str) -> None:
    problem, starts = layered_chain(3, layers=96)
    runs = StageRuns(problem, starts)
    least, most = runs.leanest(OTHERS), runs.fastest(1e18, OTHERS)
    assert most is not None
    limit = sum(OTHERS * one.kept_bytes + one.peak_bytes for one in (least, most)) // 2
    ways: dict[str, Callable[[], object]] = {
        "runs": lambda: runs.fastest(limit, OTHERS), "runs, made anew": lambda: StageRuns(problem, starts).fastest(limit, OTHERS),
        "table": lambda: list(StageTable(problem, int(limit)).sequences(OTHERS + 1)),
    }  # fmt: skip
    ways[way]()
    benchmark.pedantic(ways[way], rounds=5)


@pytest.mark.benchmark(group="optimal recompute of a plan")
@pytest.mark.parametrize("name", PLANS)
def test_plan(benchmark: BenchmarkFixture, name: str) -> None:
    """Goal: 10 ms in a warm process."""
    source, plan, cluster, device = setting(name)
    case = parallel_case(source, plan, cluster, device=device)
    step = open_step(case)
    static, budget = [sum(resident) for resident in step.resident_bytes], device.memory_bytes - device.context_bytes

    def solve() -> object:
        return best_operations(StageChoices(step, device), case.order, static, budget_bytes=budget)

    solve()
    benchmark.pedantic(solve, rounds=20)


@pytest.mark.benchmark(group="whole plan of GPT-3 with")
@pytest.mark.parametrize("recompute", ["full", "optimal"])
@pytest.mark.parametrize("reserved", [False, True], ids=["live bytes", "reserved bytes"])
def test_whole_plan(benchmark: BenchmarkFixture, recompute: str, *, reserved: bool) -> None:
    source, plan, cluster, device = setting("gpt3-175b")
    own = replace(plan, memory=replace(plan.memory, recompute=recompute))

    def run() -> object:
        return simulate_on_cluster(source, own, cluster, device=device, reserved=reserved)

    run()
    benchmark.pedantic(run, rounds=5)


@pytest.mark.benchmark(group="cost of a stage's sequence")
def test_stage_cost(benchmark: BenchmarkFixture) -> None:
    source, plan, cluster, device = setting("gpt3-175b")
    step = open_step(parallel_case(source, plan, cluster, device=device))
    choices, stage = StageChoices(step, device), step.stages[0]
    operations = choices.runs(stage).leanest(OTHERS).operations
    stage_cost(stage, operations, step.prices)
    benchmark.pedantic(stage_cost, args=(stage, operations, step.prices), rounds=20)


@pytest.mark.benchmark(group="replay of 20,000 calls of the allocator")
@pytest.mark.parametrize("way", ["compiled", "call by call"])
def test_allocator(benchmark: BenchmarkFixture, way: str) -> None:
    step = random_step(random.Random(5), 10_000)  # noqa: S311  # not for secrets
    compiled = partial(replay_steps, step, step, most_steps=MOST_STEPS)
    compiled()
    benchmark.pedantic(compiled if way == "compiled" else partial(call_by_call, step, step, "", None), rounds=3)
