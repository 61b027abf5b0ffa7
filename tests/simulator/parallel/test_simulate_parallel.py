"""Whole plans of a small model: what must hold whatever the prices are, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hardware_models.errors import InputError
from hardware_models.network.cluster_file import load_cluster
from simulator import engine_compiled, engine_simpy
from simulator.exposed_time import exposed_times
from simulator.model_source import ModelSource
from simulator.parallel.messages import waits_for_messages
from simulator.parallel.orders import order_of
from simulator.parallel.rank_times import TIMED_SCHEDULES
from simulator.parallel.simulate_source import simulate_source
from simulator.parallel.simulation import ParallelSimulation
from simulator.pipeline.action import actions_of
from simulator.pipeline.order_text import order_csv
from simulator.plan import Memory, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.plan_sections import SCHEDULES, SCHEDULES_ONE_CHUNK, SCHEDULES_TWO_CHUNKS
from simulator.presets import preset
from simulator.program import MemoryClass, Stream
from tests.simulator.parallel.step_cases import SEQ_LEN, plan_of, simulated, small_config

STREAM = SEQ_LEN * 1024 * 2

PLANS = {
    "one device": plan_of(num_microbatches=2),
    "tensor": plan_of(tp=4, num_microbatches=2),
    "sequence": plan_of(tp=4, num_microbatches=2, sequence_parallel=True, recompute="selective", flash=False),
    "data": plan_of(dp=8, num_microbatches=2),
    "zero 1": plan_of(dp=8, num_microbatches=2, zero_stage=1),
    "zero 3": plan_of(dp=8, num_microbatches=2, zero_stage=3),
    "context": plan_of(cp=4, num_microbatches=2),
    "ulysses": plan_of(cp=4, num_microbatches=2, cp_method="all-to-all"),
    "gpipe": plan_of(pp=4, schedule="gpipe"),
    "1f1b": plan_of(pp=4, dp=2, recompute="full"),
    "1f1b of 2021": plan_of(tp=2, pp=4, framework="megatron-lm@2021", recompute="full", flash=False, overlap=False),
    "uneven": plan_of(pp=4, partition=(1, 3, 3, 1)),
    "interleaved": plan_of(tp=2, pp=4, dp=2, schedule="interleaved", virtual_stages=2, zero_stage=1),
    "looped-bfs": plan_of(pp=2, dp=2, schedule="looped-bfs", virtual_stages=2),
    "zb-h1": plan_of(pp=4, dp=2, schedule="zb-h1"),
    "zb-h2": plan_of(pp=4, schedule="zb-h2"),
    "zb-v": plan_of(pp=2, schedule="zb-v", virtual_stages=2),
    "zb-1p": plan_of(pp=4, schedule="zb-1p", dp=2),
    "v-min": plan_of(pp=4, schedule="v-min", virtual_stages=2),
    "chimera": plan_of(pp=4, schedule="chimera"),
    "dualpipe": plan_of(pp=4, schedule="dualpipe", num_microbatches=16),
}


@cache
def simulated_plan(name: str) -> ParallelSimulation:
    return simulated(PLANS[name])


@pytest.fixture(params=PLANS)
def result(request: pytest.FixtureRequest) -> ParallelSimulation:
    return simulated_plan(request.param)


def test_engines_agree(result: ParallelSimulation) -> None:
    reference, compiled = engine_simpy.record(result.program), engine_compiled.record(result.program)
    np.testing.assert_allclose(compiled.start_s, reference.start_s, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(compiled.end_s, reference.end_s, rtol=1e-9, atol=1e-15)


def test_memory_returns_to_what_lives_through_the_step(result: ParallelSimulation) -> None:
    for profile, resident in zip(result.profiles, result.program.resident_bytes, strict=True):
        assert profile.alive_bytes[0].tolist() == profile.alive_bytes[-1].tolist() == list(resident)
        assert profile.peak_bytes > sum(resident)


def test_exposed_times_sum_to_the_step(result: ParallelSimulation) -> None:
    times = exposed_times(result.program, result.record)
    assert sum(times.values()) == pytest.approx(result.step_time_s, rel=1e-9)
    assert min(times.values()) >= 0.0


def test_the_step_is_no_shorter_than_any_rank_computes(result: ParallelSimulation) -> None:
    compute = result.program.stream == Stream.COMPUTE
    busy = [
        result.program.duration_s[compute & (result.program.device == rank)].sum() for rank in range(result.program.num_devices)
    ]
    assert result.step_time_s >= max(busy) * (1 - 1e-12)


def test_bytes_sent_are_boundaries_times_messages(result: ParallelSimulation) -> None:
    """Each micro-batch passes each border between ranks once forward and once back."""
    plan, order = result.plan, result.order
    ranks = {
        (action.stage, action.micro_batch): rank for rank, cells in enumerate(order.ranks) for action in actions_of(cells) if action.kind == "F"
    }  # fmt: skip
    crossed = sum(rank != ranks.get((stage + 1, batch), rank) for (stage, batch), rank in ranks.items())
    split = plan.parallel.tp if plan.parallel.sequence_parallel or plan.runtime.framework == "megatron-lm@2021" else 1
    assert result.program.transfers.size_bytes.sum() == 2 * crossed * STREAM / split


def test_the_report_is_consistent(result: ParallelSimulation) -> None:
    shown = result.to_json()
    assert 0 < float(str(shown["mfu"])) <= float(str(shown["hfu"])) < 1
    assert len(result.peak_memory_bytes) == result.plan.parallel.pp
    assert sum(result.profiles[0].peak_breakdown_bytes.values()) == result.peak_memory_bytes[0]


def compute_s(result: ParallelSimulation) -> float:
    chosen = result.program.stream == Stream.COMPUTE
    optimizer = np.array([result.program.label(n).startswith("step") for n in range(result.program.num_instructions)])
    return float(result.program.duration_s[chosen & ~optimizer].sum())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_more_replicas_change_no_compute(zero_stage: int) -> None:
    alone = simulated(plan_of(num_microbatches=2))
    for dp in (2, 8, 16):
        many = simulated(plan_of(dp=dp, num_microbatches=2, zero_stage=zero_stage))
        assert compute_s(many) == pytest.approx(compute_s(alone), rel=1e-12)
        assert many.step_time_s > 0
        assert many.tokens == dp * alone.tokens


def test_replicas_without_sharding_cost_time_only() -> None:
    alone, many = simulated(plan_of(num_microbatches=2)), simulated(plan_of(dp=8, num_microbatches=2))
    assert many.step_time_s > alone.step_time_s
    assert many.peak_memory_bytes == alone.peak_memory_bytes


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("degrees", [{"dp": 8}, {"dp": 2, "pp": 4}, {"dp": 16, "tp": 2}])
def test_overlapped_gradients_are_no_slower(zero_stage: int, degrees: dict[str, int]) -> None:
    times = [simulated(plan_of(zero_stage=zero_stage, overlap=overlap, **degrees)).step_time_s for overlap in (True, False)]  # type: ignore[arg-type]
    assert times[0] <= times[1] * (1 + 1e-12)


def test_each_zero_stage_takes_less_memory() -> None:
    peaks = [simulated(plan_of(dp=8, num_microbatches=2, zero_stage=stage)).peak_memory_bytes[0] for stage in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_each_recompute_takes_less_memory_and_more_time() -> None:
    results = [simulated(plan_of(pp=4, recompute=recompute, flash=False)) for recompute in ("none", "selective", "full")]
    assert [result.peak_memory_bytes[0] for result in results] == sorted(
        (result.peak_memory_bytes[0] for result in results), reverse=True
    )
    assert [result.step_time_s for result in results] == sorted(result.step_time_s for result in results)
    assert [result.hardware_flops for result in results] == sorted(result.hardware_flops for result in results)
    assert len({result.model_flops for result in results}) == 1


def test_sequence_parallelism_leaves_model_states_alone() -> None:
    plain, split = (simulated(plan_of(tp=4, sequence_parallel=on, num_microbatches=2)) for on in (False, True))
    states = (MemoryClass.PARAMETERS, MemoryClass.GRADIENTS, MemoryClass.OPTIMIZER_STATES)
    assert [plain.program.resident_bytes[0][one] for one in states] == [split.program.resident_bytes[0][one] for one in states]
    assert split.peak_memory_bytes[0] < plain.peak_memory_bytes[0]
    assert split.model_flops == plain.model_flops


def test_flops_are_those_of_the_model_however_it_is_cut() -> None:
    """6 FLOPs per parameter of a product and token, and attention's 12 s h a layer and token, head included."""
    config = small_config()
    products = 12 * config.layers * config.hidden**2 + config.vocab * config.hidden
    tokens = 16 * SEQ_LEN
    expected = tokens * (6 * products + 12 * config.layers * SEQ_LEN * config.hidden)
    for degrees in ({}, {"tp": 4}, {"pp": 4}, {"cp": 4}):
        assert simulated(plan_of(num_microbatches=16, **degrees)).model_flops == expected  # type: ignore[arg-type]


def test_pipeline_ranks_hold_their_layers_and_the_tied_table_twice() -> None:
    """Parameters in two bytes; the table of 4096 x 1024 on both ends."""
    held = [resident[MemoryClass.PARAMETERS] for resident in simulated(plan_of(pp=4)).program.resident_bytes]
    (whole,) = [resident[MemoryClass.PARAMETERS] for resident in simulated(plan_of()).program.resident_bytes]
    assert sum(held) == whole + 2 * 4096 * 1024
    assert held[1] == held[2] < held[0]


def test_optimizer_time_and_states_shrink_with_the_shards() -> None:
    steps = []
    for zero_stage in (0, 1):
        result = simulated(plan_of(dp=8, num_microbatches=2, zero_stage=zero_stage))
        steps.append(exposed_times(result.program, result.record)["optimizer"])
    assert 0 < steps[1] < steps[0] / 4  # gradient buffers are zeroed whole


def chunks_of(schedule: str) -> int:
    return 1 if schedule in SCHEDULES_ONE_CHUNK else 2 if schedule in SCHEDULES_TWO_CHUNKS else 1


def source() -> ModelSource:
    return ModelSource(name="small", config=small_config(), seq_len=SEQ_LEN)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_runs_by_name(schedule: str) -> None:
    chunks = 2 if schedule in {"interleaved", "looped-bfs"} else chunks_of(schedule)
    plan = plan_of(pp=4, schedule=schedule, virtual_stages=chunks, num_microbatches=16)
    result = simulate_source(source(), plan, load_cluster("selene"), gpus=4)
    bare = simulated(plan).step_time_s  # its order is made for equal times
    assert result.step_time_s == bare if schedule not in TIMED_SCHEDULES else result.step_time_s <= bare * 1.02
    assert result.order.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": Memory(activation_offload="optimal")}, r"memory\.activation_offload.*optimal"),
        ({"memory": Memory(delayed_update=True)}, r"memory\.delayed_update"),
        ({"memory": Memory(recompute="optimal")}, r"memory\.recompute.*optimal.*what the search finds"),
        ({"precision": Precision(compute="fp4")}, r"precision\.compute.*fp4"),
        ({"runtime": Runtime(compile=True, framework="megatron-core")}, r"runtime\.compile"),
        ({"runtime": Runtime(overlap_tp=True)}, r"runtime\.overlap_tp"),
        ({"parallel": Parallel(tp=3)}, r"parallel\.tp.*16 % 3"),
        ({"parallel": Parallel(pp=16)}, r"parallel\.pp.*pp \* virtual_stages <= layers"),
    ],
)
def test_what_is_not_simulated_is_refused_by_name(change: dict[str, object], message: str) -> None:
    plan = replace(plan_of(), **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        simulate_source(source(), plan, load_cluster("selene"))


def test_a_model_that_is_not_generated_is_refused() -> None:
    with pytest.raises(InputError, match="generated from its configuration, not traced"):
        simulate_source(ModelSource(name="resnet50", config=None), plan_of(dp=2), load_cluster("selene"))


def test_the_wrong_number_of_gpus_is_refused() -> None:
    with pytest.raises(InputError, match=r"tp \* cp \* pp \* dp == gpus must hold, but got 2\*1\*4\*1 = 8 != 16"):
        simulate_source(source(), plan_of(tp=2, pp=4), load_cluster("selene"), gpus=16)


def test_an_order_of_other_stages_than_the_plans_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "order.csv"
    path.write_text(order_csv(order_of(plan_of(pp=2))), encoding="utf-8")
    plan = replace(plan_of(pp=4), pipeline=Pipeline(schedule=f"file:{path}"))
    with pytest.raises(InputError, match=r"pipeline|ranks|stages"):
        order_of(plan)


def test_an_order_from_a_file_is_that_order(tmp_path: Path) -> None:
    path = tmp_path / "order.csv"
    path.write_text(order_csv(order_of(plan_of(pp=4))), encoding="utf-8")
    plan = replace(plan_of(pp=4), pipeline=Pipeline(schedule=f"file:{path}"))
    assert simulated(plan).step_time_s == simulated(plan_of(pp=4)).step_time_s


def test_the_tied_table_of_a_v_is_on_one_rank() -> None:
    """Rank 0 holds the first and the last stage: one table, and no all-reduce for it."""
    result = simulated(plan_of(pp=4, schedule="zb-v", virtual_stages=2))
    held = [resident[MemoryClass.PARAMETERS] for resident in result.program.resident_bytes]
    (whole,) = [resident[MemoryClass.PARAMETERS] for resident in simulated(plan_of()).program.resident_bytes]
    assert sum(held) == whole
    assert "tied" not in result.program.option
    assert "tied" in simulated(plan_of(pp=4)).program.option


def test_two_directions_reduce_gradients_between_their_copies() -> None:
    """Chimera: every stage is on two ranks, so parameters are held twice and gradients reduced without data parallelism."""
    result = simulated(plan_of(pp=4, schedule="chimera"))
    held = [resident[MemoryClass.PARAMETERS] for resident in result.program.resident_bytes]
    (whole,) = [resident[MemoryClass.PARAMETERS] for resident in simulated(plan_of()).program.resident_bytes]
    assert sum(held) == 2 * whole
    labels = [(int(result.program.device[n]), label) for n, label in enumerate(result.program.option) if label == "reduce"]
    assert {rank for rank, _ in labels} == {0, 1, 2, 3}


def test_experts_run_over_expert_parallel_ranks() -> None:
    base = preset("mixtral-8x7b")
    assert base.experts is not None
    config = replace(
        base, layers=2, hidden=1024, heads=16, kv_heads=16, ffn=2048, vocab=4096, experts=replace(base.experts, ffn=2048)
    )
    spread, whole = (simulated(plan_of(dp=8, ep=ep, num_microbatches=1), config) for ep in (8, 1))
    times = exposed_times(spread.program, spread.record)
    assert times["ep"] > 0
    assert exposed_times(whole.program, whole.record)["ep"] == 0.0
    assert spread.peak_memory_bytes[0] < whole.peak_memory_bytes[0]


def plan_with(plan: Plan, **runtime: object) -> Plan:
    return replace(plan, runtime=replace(plan.runtime, **runtime))  # type: ignore[arg-type]


def test_parameters_gathered_ahead_are_no_slower() -> None:
    plan = plan_of(dp=8, num_microbatches=2, zero_stage=1)
    ahead, behind = (simulated(plan_with(plan, overlap_param_gather=overlap)).step_time_s for overlap in (True, False))
    assert ahead < behind


@pytest.mark.parametrize(
    ("framework", "schedule", "chunks", "waits"),
    [
        ("megatron-core", "1f1b", 1, True), ("megatron-core", "zb-1p", 1, False), ("megatron-core", "interleaved", 2, False), ("megatron-core@2023", "interleaved", 2, True),
        ("megatron-core@2023", "zb-v", 2, False), ("megatron-lm@2021", "interleaved", 2, True), ("aa-scaling", "1f1b", 1, True), ("torchtitan", "1f1b", 1, False),
    ],
)  # fmt: skip
def test_which_trainers_wait_for_their_messages(framework: str, schedule: str, chunks: int, waits: bool) -> None:
    assert waits_for_messages(plan_of(pp=4, schedule=schedule, virtual_stages=chunks, framework=framework)) is waits


def test_stalls_lengthen_every_micro_batch_of_megatron_of_2023() -> None:
    """Beside Megatron-core without its batches: half a millisecond for each forward pass of the bottleneck, no less and not twice as much."""
    old, new = (
        simulated(plan_of(num_microbatches=8, framework=name)).step_time_s for name in ("megatron-core@2023", "megatron-core")
    )
    assert 8 * 0.51e-3 < old - new < 8 * 2.0e-3
