"""Cuts of layers into stages: against all cuts there are, by frameworks' own rules, and whole plans with empty stages."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from simulator.parallel.default_cut import in_flight
from simulator.parallel.orders import order_of
from simulator.parallel.partition import PartitionProblem, best_partition, ends_as_layers, even_partition
from simulator.parallel.simulate_parallel import step_parts
from simulator.plan import Plan
from tests.simulator.parallel.step_cases import SEQ_LEN, cluster_of, plan_of, simulated, small_config


@pytest.mark.parametrize(("layers", "stages"), [(8, 4), (9, 4), (126, 16), (105, 35), (7, 3), (5, 5)])
def test_even_cuts_have_the_longer_stages_inside(layers: int, stages: int) -> None:
    partition = even_partition(layers, stages)
    assert sum(partition) == layers
    assert max(partition) - min(partition) == (1 if layers % stages else 0)
    if layers % stages and stages > 2:
        assert partition[0] == min(partition) or partition[-1] == min(partition)


def test_torchtitan_counts_the_ends_as_layers() -> None:
    assert ends_as_layers(126, 16) == (7, *(8,) * 14, 7)
    assert ends_as_layers(32, 4) == (8, 9, 8, 7)
    assert ends_as_layers(32, 1) == (32,)


def cuts(layers: int, stages: int) -> list[tuple[int, ...]]:
    return [tuple(b - a for a, b in pairwise((0, *inner, layers))) for inner in combinations(range(1, layers), stages - 1)]


def times_and_excess(problem: PartitionProblem, counts: tuple[int, ...]) -> tuple[list[float], float]:
    times, excess, first = [], 0.0, 0
    for stage, count in enumerate(counts):
        own = slice(first, first + count)
        first += count
        edge_s = (problem.front_s if stage == 0 else 0.0) + (problem.back_s if stage == len(counts) - 1 else 0.0)
        times.append(sum(problem.layer_s[own]) + edge_s)
        if problem.layer_bytes:
            used = sum(problem.layer_bytes[own]) + problem.in_flight[stage] * sum(problem.kept_bytes[own])
            used += (problem.front_bytes if stage == 0 else 0) + (problem.back_bytes if stage == len(counts) - 1 else 0)
            excess = max(excess, used - problem.room_bytes)
    return times, excess


@st.composite
def problems(draw: st.DrawFn) -> tuple[PartitionProblem, int]:
    layers = draw(st.integers(2, 8))
    stages = draw(st.integers(2, layers))
    size = st.integers(0, 9)

    def several(length: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(size, min_size=length, max_size=length)))

    return PartitionProblem(
        layer_s=tuple(float(one + 1) for one in several(layers)), front_s=float(draw(size)), back_s=float(draw(size)), layer_bytes=several(layers),
        kept_bytes=several(layers), front_bytes=draw(size), back_bytes=draw(size), in_flight=tuple(float(one) for one in several(stages)),
        room_bytes=draw(st.integers(0, 120)),
    ), stages  # fmt: skip


@given(case=problems())
@settings(max_examples=150, deadline=None)
def test_equals_all_cuts(case: tuple[PartitionProblem, int]) -> None:
    problem, stages = case

    def rank(counts: tuple[int, ...]) -> tuple[float, float, float]:
        times, excess = times_and_excess(problem, counts)
        return excess, max(times), sum(one**2 for one in times)

    found = best_partition(problem, stages)
    assert sum(found) == len(problem.layer_s)
    assert rank(found) == pytest.approx(min(rank(counts) for counts in cuts(len(problem.layer_s), stages)), rel=1e-9)


def test_a_heavy_head_takes_layers_away() -> None:
    """Ten equal layers on two stages, the head as long as four of them: 7 and 3."""
    problem = PartitionProblem(layer_s=(1.0,) * 10, front_s=0.0, back_s=4.0)
    assert best_partition(problem, 2) == (7, 3)
    assert best_partition(replace(problem, back_s=0.0), 2) == (5, 5)


def test_memory_moves_layers_to_later_stages() -> None:
    """1F1B on two stages: the first keeps two micro-batches. Six layers of one byte fixed and one kept: 3 * (1 + 2) = 9 is too much for 8."""
    problem = PartitionProblem(
        layer_s=(1.0,) * 6,
        front_s=0.0,
        back_s=0.0,
        layer_bytes=(1,) * 6,
        kept_bytes=(1,) * 6,
        in_flight=(2.0, 1.0),
        room_bytes=8,
    )
    assert best_partition(problem, 2) == (2, 4)
    assert best_partition(replace(problem, room_bytes=9), 2) == (3, 3)
    assert best_partition(replace(problem, room_bytes=0), 2) == (2, 4), "the least excess where nothing fits"


def test_micro_batches_in_flight_are_the_schedules() -> None:
    assert in_flight(order_of(plan_of(pp=4, num_microbatches=8))) == (4.0, 3.0, 2.0, 1.0)
    assert in_flight(order_of(plan_of(pp=2, num_microbatches=8, schedule="gpipe"))) == (8.0, 8.0)


def layers_per_stage(plan: Plan) -> list[int]:
    cluster = cluster_of(plan)
    config = small_config(vocab=131072, layers=16)
    parts = step_parts(config, plan, cluster, load_hardware(cluster.device), order_of(plan), seq_len=SEQ_LEN)
    longest = max(cost.forward.total_s + cost.backward.total_s for cost in parts.costs)
    return [round(1e9 * (cost.forward.total_s + cost.backward.total_s) / longest) for cost in parts.costs]


def test_the_framework_decides_how_layers_are_cut() -> None:
    """A vocabulary as large as this makes the head as long as layers: torch's stages are evened out, Megatron's are not."""
    even, solved = (layers_per_stage(plan_of(pp=4, framework=framework)) for framework in ("megatron-core", "pytorch"))
    assert min(solved) > min(even)
    explicit = simulated(plan_of(pp=4, framework="pytorch", partition=(2, 2, 2, 2)))
    assert simulated(plan_of(pp=4, framework="pytorch")).step_time_s <= explicit.step_time_s * (1 + 1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
@pytest.mark.parametrize("partition", [(0, 4, 4, 0), (3, 0, 3, 2), (8, 0, 0, 0)])
def test_stages_without_layers_run(schedule: str, partition: tuple[int, ...]) -> None:
    plan = plan_of(pp=4, schedule=schedule, partition=partition, num_microbatches=6, dp=2, zero_stage=1)
    result = simulated(plan)
    assert result.step_time_s > 0
    assert result.model_flops == simulated(plan_of(num_microbatches=6, dp=2)).model_flops
    assert all(profile.alive_bytes[0].tolist() == profile.alive_bytes[-1].tolist() for profile in result.profiles)
    for rank, count in enumerate(partition):
        if count == 0 and 0 < rank < 3:
            assert sum(result.program.resident_bytes[rank][:3]) == 0


@pytest.mark.parametrize(
    "changes", [{"recompute": "full"}, {"zero_stage": 3, "framework": "pytorch"}, {"tp": 2, "sequence_parallel": True}]
)
def test_stages_without_layers_run_with_other_techniques(changes: dict[str, object]) -> None:
    result = simulated(plan_of(pp=4, dp=2, partition=(4, 0, 4, 0), **changes))  # type: ignore[arg-type]
    assert result.step_time_s > 0


def test_norm_and_head_may_count_as_layers_too() -> None:
    """40 layers are 43 pieces, 22 and 21 of two stages and 11, 11, 11 and 10 of four; where an end would have no layer there is no such cut."""
    assert ends_as_layers(40, 2, back=2) == (21, 19)
    assert ends_as_layers(40, 4, back=2) == (10, 11, 11, 8)
    assert ends_as_layers(4, 3, back=2) is None
