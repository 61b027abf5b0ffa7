"""Stage partition and recompute inside stages against all cuts and all options."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InfeasibleError, InputError
from search.solvers.stage_knapsack import StageOption, least_stage_bytes, solve_stage_recompute
from search.solvers.stage_partition import PartitionProblem, in_flight_of, solve_partition
from simulator.pipeline.catalogue import OrderRequest, make_order

Blocks = tuple[tuple[StageOption, ...], ...]


@st.composite
def block_lists(draw: st.DrawFn, most: int = 6) -> Blocks:
    seconds, sizes = st.integers(0, 6).map(float), st.integers(0, 6)
    return tuple(
        tuple(
            StageOption(name="abc"[o], forward_s=draw(seconds), backward_s=draw(seconds), saved_bytes=draw(sizes), transient_bytes=draw(sizes))
            for o in range(draw(st.integers(1, 2)))
        )
        for _ in range(draw(st.integers(1, most)))
    )  # fmt: skip


def every_choice(blocks: Blocks, in_flight: int) -> list[tuple[float, int]]:
    """Time and peak of all choices of options."""
    return [
        (sum(o.forward_s + o.backward_s for o in chosen), in_flight * sum(o.saved_bytes for o in chosen) + max(o.transient_bytes for o in chosen))
        for chosen in product(*blocks)
    ]  # fmt: skip


@given(block_lists(), st.integers(1, 4), st.integers(0, 80))
def test_stage_equals_brute_force(blocks: Blocks, in_flight: int, budget: int) -> None:
    listed = every_choice(blocks, in_flight)
    assert least_stage_bytes(blocks, in_flight=in_flight) == min(peak for _, peak in listed)
    fitting = [time for time, peak in listed if peak <= budget]
    if not fitting:
        with pytest.raises(InfeasibleError):
            solve_stage_recompute(blocks, in_flight=in_flight, budget_bytes=budget)
        return
    solution = solve_stage_recompute(blocks, in_flight=in_flight, budget_bytes=budget)
    chosen = [row[option] for row, option in zip(blocks, solution.options, strict=True)]
    assert solution.is_exact
    assert solution.time_s == min(fitting) == sum(option.time_s for option in chosen)
    assert solution.peak_bytes <= budget
    assert (solution.time_s, solution.peak_bytes) in listed


@settings(max_examples=40)
@given(block_lists(most=5), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1), st.data())
def test_partition_equals_brute_force(
    blocks: Blocks, stages: int, batches: int, least_blocks: int, data: st.DataObject
) -> None:
    sizes = st.integers(0, 5)
    problem = PartitionProblem(
        blocks=blocks, static_bytes=tuple(data.draw(sizes) for _ in blocks),
        in_flight=tuple(data.draw(st.integers(1, 3)) for _ in range(stages)),
        budget_bytes=tuple(data.draw(st.integers(0, 50)) for _ in range(stages)),
        stage_static_bytes=tuple(data.draw(sizes) for _ in range(stages)), num_microbatches=batches, comm_s=0.5, least_blocks=least_blocks,
    )  # fmt: skip
    best, least_more = float("inf"), 10**9
    for inner in combinations_with_replacement(range(len(blocks) + 1), stages - 1):
        ends = [0, *inner, len(blocks)]
        if any(b - a < least_blocks for a, b in pairwise(ends)):
            continue
        times, lack = [], 0
        for s, (a, b) in enumerate(pairwise(ends)):
            room = problem.budget_bytes[s] - problem.stage_static_bytes[s] - sum(problem.static_bytes[a:b])
            listed = every_choice(blocks[a:b], problem.in_flight[s]) if b > a else [(0.0, 0)]
            times.append(min([time for time, peak in listed if peak <= room], default=float("inf")))
            lack = max(lack, min(peak for _, peak in listed) - room)
        best = min(best, sum(times) + (batches - 1) * max(times) + 2 * (stages - 1) * 0.5)
        least_more = min(least_more, lack)
    if best == float("inf"):
        with pytest.raises(InfeasibleError) as caught:
            solve_partition(problem)
        if least_more < 10**9:
            assert caught.value.smallest_change == f"{least_more} bytes more on every stage would do"
        return
    solution = solve_partition(problem)
    assert solution.proof.objective_s == pytest.approx(best, rel=1e-12)
    assert solution.proof.is_exact
    assert sum(solution.partition) == len(blocks)
    times = [stage.time_s for stage in solution.stages if stage is not None]
    assert sum(times) + (batches - 1) * solution.largest_s + (stages - 1) == pytest.approx(best, rel=1e-12)


LAYER = (
    StageOption(name="none", forward_s=1.0, backward_s=2.0, saved_bytes=10, transient_bytes=1),
    StageOption(name="full", forward_s=1.0, backward_s=3.0, saved_bytes=1, transient_bytes=10),
)


def test_equal_layers_recompute_as_few_as_must() -> None:
    """12 layers, 4 in flight, 10 - 1 bytes spared each: of 480 bytes 188 are too many, so ceil(188 / 36) = 6 recompute."""
    solution = solve_stage_recompute((LAYER,) * 12, in_flight=4, budget_bytes=292 + 10)
    assert solution.options.count(1) == 6
    assert solution.time_s == 12 * 3 + 6
    assert solve_stage_recompute((LAYER,) * 12, in_flight=4, budget_bytes=481).time_s == 36
    assert solve_stage_recompute((LAYER,) * 12, in_flight=1, budget_bytes=300).time_s == 36


def test_stages_that_hold_more_micro_batches_get_fewer_blocks_or_recompute_more() -> None:
    in_flight = in_flight_of(make_order(OrderRequest(schedule="1f1b", num_ranks=4, num_microbatches=16)))
    assert in_flight == (4, 3, 2, 1)
    roomy = PartitionProblem(
        blocks=(LAYER,) * 16, static_bytes=(0,) * 16, in_flight=in_flight, budget_bytes=(1000,) * 4, num_microbatches=16
    )
    assert solve_partition(roomy).partition == (4, 4, 4, 4)
    assert solve_partition(roomy).proof.objective_s == 48 + 15 * 12
    tight = PartitionProblem(
        blocks=(LAYER,) * 16, static_bytes=(0,) * 16, in_flight=in_flight, budget_bytes=(100,) * 4, num_microbatches=16
    )
    solution = solve_partition(tight)
    assert solution.partition[0] <= solution.partition[-1]
    assert next(stage.options.count(1) for stage in solution.stages if stage is not None) > 0
    assert solution.proof.objective_s > 48 + 15 * 12


def test_more_memory_never_costs_time() -> None:
    in_flight = (4, 3, 2, 1)
    times = [
        solve_partition(
            PartitionProblem(
                blocks=(LAYER,) * 12,
                static_bytes=(2,) * 12,
                in_flight=in_flight,
                budget_bytes=(budget,) * 4,
                num_microbatches=8,
            )
        ).proof.objective_s
        for budget in (40, 60, 80, 100, 150, 300)
    ]
    assert times == sorted(times, reverse=True)


def test_micro_batches_in_flight_of_other_orders() -> None:
    assert in_flight_of(make_order(OrderRequest(schedule="gpipe", num_ranks=3, num_microbatches=5))) == (5, 5, 5)
    assert in_flight_of(make_order(OrderRequest(schedule="zb-h2", num_ranks=2, num_microbatches=6)))[0] >= 3


def test_messages_of_wrong_arguments() -> None:
    with pytest.raises(InfeasibleError, match="2 blocks do not fill 3 stages of least_blocks = 1; 2 stages or fewer would do"):
        solve_partition(
            PartitionProblem(
                blocks=(LAYER,) * 2, static_bytes=(0, 0), in_flight=(1, 1, 1), budget_bytes=(99,) * 3, num_microbatches=1
            )
        )
    with pytest.raises(InputError, match="static_bytes: 1 entries must be given, but got 2"):
        PartitionProblem(blocks=(LAYER,), static_bytes=(0, 0), in_flight=(1,), budget_bytes=(9,), num_microbatches=1)
    with pytest.raises(
        InfeasibleError,
        match="a stage of 2 blocks with 3 micro-batches in flight does not fit into 15 bytes; the least that fits is 16 bytes",
    ):
        solve_stage_recompute((LAYER,) * 2, in_flight=3, budget_bytes=15)
    with pytest.raises(InputError, match="in_flight = 0"):
        solve_stage_recompute((LAYER,), in_flight=0, budget_bytes=15)
