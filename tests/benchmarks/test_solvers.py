"""Times of the inner solvers; run by `make bench`, group ``solvers``. Compare ratios within one run; `extra_info` holds sizes and proofs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from search.chain_schedules import evaluate, store_all
from search.chain_solver import minimum_limit_bytes, solve_chain
from search.solvers.graph_problem import GraphProblem, TimedOperation
from search.solvers.graph_solver import graph_options
from search.solvers.microbatch_problem import MicrobatchProblem, PassOption
from search.solvers.microbatch_recompute import solve_microbatch_recompute
from search.solvers.offload_problem import HostLink, OffloadProblem
from search.solvers.offload_solver import solve_offload
from search.solvers.order_solver import solve_order
from search.solvers.proof import Proof
from search.solvers.stage_knapsack import StageOption, solve_stage_recompute
from search.solvers.stage_partition import PartitionProblem, solve_partition
from search.solvers.weight_offload import solve_weight_offload
from search.solvers.weight_problem import WeightProblem
from simulator.pipeline.catalogue import OrderRequest, make_order
from simulator.pipeline.play_order import RankTimes
from tests.chain_cases import long_chain

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = [pytest.mark.benchmark, pytest.mark.benchmark(group="solvers")]
LAYER = (
    StageOption(name="none", forward_s=1.0, backward_s=2.0, saved_bytes=340, transient_bytes=10),
    StageOption(name="selective", forward_s=1.0, backward_s=2.1, saved_bytes=200, transient_bytes=150),
    StageOption(name="full", forward_s=1.0, backward_s=3.0, saved_bytes=20, transient_bytes=340),
)


def measure(benchmark: BenchmarkFixture, solve: Callable[[], object], **sizes: object) -> None:
    """Compiles first, then measures five rounds."""
    proof = getattr(solve(), "proof", None)
    benchmark.pedantic(solve, rounds=5)
    benchmark.extra_info.update(sizes)
    if isinstance(proof, Proof):
        benchmark.extra_info.update(status=proof.status, gap=proof.gap)


@pytest.mark.parametrize("percent", [2, 10, 50])
@pytest.mark.parametrize("blocks", [100, 200])
def test_chain(benchmark: BenchmarkFixture, blocks: int, percent: int) -> None:
    """Goal: 100 blocks in 0.07 s, 200 in 0.5 s, 500 slots, 2 options, one core."""
    chain = long_chain(blocks, 2, 1)
    least, most = minimum_limit_bytes(chain), evaluate(chain, store_all(chain))[1]
    limit = least + (most - least) * percent // 100
    measure(benchmark, lambda: solve_chain(chain, limit, 500), blocks=blocks, slots=500, options=2)


@pytest.mark.parametrize("blocks", [8, 20, 50])
def test_chain_with_offload(benchmark: BenchmarkFixture, blocks: int) -> None:
    chain = long_chain(blocks, 2, 1)
    limit = minimum_limit_bytes(chain) * 5 // 4
    problem = OffloadProblem(chain=chain, link=HostLink(out_bytes_per_s=2e7, in_bytes_per_s=2e7))
    alone = solve_chain(chain, limit).time_s
    found = solve_offload(problem, limit).time_s
    measure(benchmark, lambda: solve_offload(problem, limit), blocks=blocks, time_over_recompute_alone=found / alone)


def test_options_of_a_block(benchmark: BenchmarkFixture) -> None:
    operations = tuple(
        TimedOperation(name=f"op{n}", time_s=1.0 + n * 7 % 5, reads=tuple({n, max(0, n - 3)}), writes=(n + 1,))
        for n in range(40)
    )
    problem = GraphProblem(
        operations=operations,
        size_bytes=tuple(1 + n * 11 % 7 for n in range(41)),
        needed=frozenset(range(1, 41, 2)),
        boundaries=frozenset({0}),
    )
    measure(benchmark, lambda: graph_options(problem, most=10), operators=40)


def test_weights(benchmark: BenchmarkFixture) -> None:
    problem = WeightProblem(
        forward_s=(1.0,) * 48, backward_s=(2.0,) * 48, weight_bytes=(3,) * 48, gradient_bytes=(3,) * 48, room_bytes=(60,) * 96,
        link=HostLink(out_bytes_per_s=2.0, in_bytes_per_s=2.0),
    )  # fmt: skip
    measure(benchmark, lambda: solve_weight_offload(problem, time_limit_s=0), blocks=48)


@pytest.mark.parametrize("remembered", [False, True])
def test_recompute_of_a_stage(benchmark: BenchmarkFixture, remembered: bool) -> None:
    budgets = iter(range(20_000, 1_000_000))

    def solve() -> object:
        return solve_stage_recompute((LAYER,) * 12, in_flight=8, budget_bytes=20_000 if remembered else next(budgets))

    solve()
    benchmark.pedantic(solve, rounds=200)
    benchmark.extra_info.update(blocks=12)


@pytest.mark.parametrize("microbatches", [32, 512])
def test_partition(benchmark: BenchmarkFixture, microbatches: int) -> None:
    problem = PartitionProblem(
        blocks=(LAYER,) * 96, static_bytes=(200,) * 96, in_flight=tuple(16 - s for s in range(16)), budget_bytes=(12_000,) * 16,
        num_microbatches=microbatches,
    )  # fmt: skip
    measure(benchmark, lambda: solve_partition(problem), blocks=96, stages=16)


@pytest.mark.parametrize("limit_s", [0.0, 20.0])
def test_recompute_of_micro_batches(benchmark: BenchmarkFixture, limit_s: float) -> None:
    keep = PassOption(name="none", forward_s=1, input_gradient_s=1, weight_gradient_s=1, saved_bytes=10, forward_peak_bytes=10)
    again = PassOption(
        name="full",
        forward_s=1,
        input_gradient_s=2,
        weight_gradient_s=1,
        saved_bytes=1,
        forward_peak_bytes=10,
        input_gradient_peak_bytes=9,
    )
    order = make_order(OrderRequest(schedule="1f1b", num_ranks=8, num_microbatches=32))
    problem = MicrobatchProblem(order=order, options=((keep, again),) * 8, budget_bytes=(45,) * 8)
    measure(benchmark, lambda: solve_microbatch_recompute(problem, time_limit_s=limit_s), ranks=8, microbatches=32)


@pytest.mark.parametrize("memory_limit", [4.0, 8.0, 16.0])
def test_order(benchmark: BenchmarkFixture, memory_limit: float) -> None:
    times = RankTimes(forward_s=(18.5,), input_gradient_s=(18.1,), weight_gradient_s=(9.3,), comm_s=0.6)
    measure(benchmark, lambda: solve_order(8, 24, times=times, memory_limit=memory_limit), ranks=8, microbatches=24)
