"""Activation bytes of Megatron's layers against Korthikanti et al. 2022, table 2; how stages share layers; what runs again."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.pricing import price
from simulator.lower import PassPrices
from simulator.parallel.orders import order_of
from simulator.parallel.recompute import fit_framework, stage_operations
from simulator.parallel.simulate_parallel import step_parts
from simulator.parallel.stages import Stage, StageCost, layers_of, stage_cost, stages_of
from simulator.plan import Plan
from simulator.presets import build_workload, preset
from simulator.sequence import check_sequence
from tests.simulator.parallel.step_cases import cluster_of, plan_of, small_config

SEQ, BATCH, HIDDEN, HEADS, TP = 2048, 4, 6144, 64, 8
SBH = SEQ * BATCH * HIDDEN
SCORES = 5 * HEADS * SEQ / HIDDEN
PRICES = PassPrices(lambda kernels: price(kernels, load_hardware("a100-sxm-80gb")))


def middle_layer(plan: Plan) -> tuple[Stage, StageCost]:
    """The second of four stages of one layer each, shaped as the 22B model's."""
    config = replace(preset("megatron-22b"), layers=4)
    plan = replace(plan, batch=replace(plan.batch, seq_len=SEQ))
    workload = build_workload(
        config, micro_batch=BATCH, seq_len=SEQ, dtype="bfloat16", tp=plan.parallel.tp, sequence_parallel=plan.parallel.sequence_parallel,
        flash_attention=plan.runtime.flash_attention,
    )  # fmt: skip
    stage = stages_of(fit_framework(workload, plan, config, dtype="bfloat16", seq_len=SEQ), plan)[1]
    return stage, stage_cost(stage, stage_operations(plan, stage), PRICES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SBH * (34 + SCORES)),
        ({"tp": TP}, SBH * (10 + 24 / TP + SCORES / TP)),
        ({"tp": TP, "sequence_parallel": True}, SBH / TP * (34 + SCORES)),
        ({"tp": TP, "recompute": "selective"}, SBH * (10 + 24 / TP)),
        ({"tp": TP, "sequence_parallel": True, "recompute": "selective"}, SBH / TP * 34),
        ({"tp": TP, "sequence_parallel": True, "flash": True}, SBH / TP * 34),
        ({"tp": TP, "sequence_parallel": True, "flash": True, "recompute": "selective"}, SBH / TP * 34),
        ({"tp": TP, "recompute": "full"}, 2 * SBH),
        ({"tp": TP, "sequence_parallel": True, "recompute": "full"}, 2 * SBH / TP),
    ],
)
def test_a_layer_keeps_what_the_paper_says(options: dict[str, object], expected: float) -> None:
    """To 0.2%: row statistics of norms and of attention are not in the formulas."""
    plan = plan_of(pp=4, micro_batch=BATCH, **({"flash": False} | options))  # type: ignore[arg-type]
    _, cost = middle_layer(plan)
    assert cost.forward.net_bytes == pytest.approx(expected, rel=2e-3)
    assert cost.backward.net_bytes == -cost.forward.net_bytes


def test_selective_recompute_runs_the_scores_again_and_nothing_else_with_flops() -> None:
    _, cost = middle_layer(plan_of(tp=TP, pp=4, micro_batch=BATCH, recompute="selective", flash=False))
    assert cost.recomputed == ()
    assert cost.recomputed_flops == 2 * BATCH * (HEADS // TP) * SEQ * SEQ * (HIDDEN // HEADS)


def test_full_recompute_runs_each_layer_of_every_stage_again() -> None:
    """Twice the forward pass's FLOPs; the last layer of a stage too, since other micro-batches run before its backward pass."""
    plan = plan_of(tp=TP, pp=4, micro_batch=BATCH, recompute="full", flash=False)
    stage, cost = middle_layer(plan)
    assert cost.recomputed == (0, 1)
    assert cost.recomputed_flops == sum(block.discard.flops for block in stage.blocks)
    plain = middle_layer(plan_of(tp=TP, pp=4, micro_batch=BATCH, flash=False))[1]
    again_s = sum(seconds for kind, seconds in cost.backward.seconds if kind.name == "RECOMPUTE")
    assert again_s == pytest.approx(plain.forward.total_s, rel=1e-9)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_stage_operations_are_legal_and_spare_the_ends(recompute: str) -> None:
    plan = plan_of(pp=2, recompute=recompute)
    workload = build_workload(small_config(), micro_batch=1, seq_len=512, dtype="bfloat16")
    for stage in stages_of(workload, plan):
        operations = stage_operations(plan, stage)
        check_sequence(operations, len(stage.blocks))
        twice = stage_cost(stage, operations, PRICES).recomputed
        expected = [n for n, block in enumerate(stage.blocks) if block.name in {"attention", "network"} and recompute == "full"]
        assert sorted(twice) == expected


def test_products_that_add_to_gradients_cost_half_of_the_traffic_that_kernels_of_their_own_cost() -> None:
    """Six bytes a parameter (two reads and a write in bfloat16) in Megatron-LM of 2021; half of six in Megatron-core."""
    seconds = {
        framework: stage_cost(stage, stage_operations(plan, stage), PRICES).backward.total_s
        for framework in ("megatron-core", "megatron-lm@2021")
        for plan in [plan_of(pp=4, micro_batch=BATCH, framework=framework)]
        for stage in [middle_layer(plan)[0]]
    }
    half_s = 3 * 12 * HIDDEN * HIDDEN / load_hardware("a100-sxm-80gb").memory_bandwidth_bytes_per_s
    assert half_s < seconds["megatron-lm@2021"] - seconds["megatron-core"] < 1.5 * half_s


@pytest.mark.parametrize(
    ("options", "forward_ms", "backward_ms"),
    [
        ({}, 7.7, 11.9),
        ({"sequence_parallel": True}, 7.2, 11.8),
        ({"recompute": "full"}, 7.7, 19.5),
        ({"recompute": "selective"}, 7.7, 13.2),
        ({"recompute": "selective", "sequence_parallel": True}, 7.2, 13.1),
    ],
)
def test_a_layers_time_is_the_measured_one(options: dict[str, object], forward_ms: float, backward_ms: float) -> None:
    """Within 8%: one layer of the 22B model on eight A100s, Korthikanti et al. 2022 (arXiv 2205.05198), table 4."""
    plan = plan_of(tp=TP, pp=4, micro_batch=BATCH, flash=False, **options)  # type: ignore[arg-type]
    plan = replace(plan, batch=replace(plan.batch, seq_len=SEQ))
    config = replace(preset("megatron-22b"), layers=4)
    cluster = cluster_of(plan)
    parts = step_parts(config, plan, cluster, load_hardware(cluster.device), order_of(plan), seq_len=SEQ)
    cost, sent = parts.costs[1], parts.communication[1]
    assert (cost.forward.total_s + sent.forward.total_s) * 1e3 == pytest.approx(forward_ms, rel=0.08)
    assert (cost.backward.total_s + sent.backward.total_s) * 1e3 == pytest.approx(backward_ms, rel=0.08)


def test_layers_include_the_ends() -> None:
    workload = build_workload(small_config(), micro_batch=1, seq_len=512, dtype="bfloat16")
    layers = layers_of(workload)
    assert len(layers) == 8
    assert layers[0] == (0, 3)
    assert layers[-1][1] == len(workload.blocks)
    assert all(before[1] == after[0] for before, after in pairwise(layers))


def test_stages_cover_the_model_and_its_parameters() -> None:
    """A tied table is on both ends, all else once."""
    workload = build_workload(small_config(), micro_batch=1, seq_len=512, dtype="bfloat16")
    stages = stages_of(workload, plan_of(pp=4, partition=(1, 3, 2, 2)))
    assert [block for stage in stages for block in stage.blocks] == list(workload.blocks)
    table = 4096 * 1024
    assert [stage.shared_elements for stage in stages] == [table, 0, 0, table]
    assert sum(stage.parameter_elements for stage in stages) == workload.parameter_elements + table
    (whole,) = stages_of(workload, plan_of())
    assert whole.parameter_elements == workload.parameter_elements


def test_an_end_without_layers_holds_the_embedding_or_the_head() -> None:
    workload = build_workload(small_config(), micro_batch=1, seq_len=512, dtype="bfloat16")
    stages = stages_of(workload, plan_of(pp=4, partition=(0, 4, 4, 0)))
    assert [[block.name for block in stage.blocks] for stage in (stages[0], stages[-1])] == [["embedding"], ["head"]]
    assert [block for stage in stages for block in stage.blocks] == list(workload.blocks)
    assert [stage.first for stage in stages] == [0, 1, 9, 17]


def test_a_model_without_a_front_of_its_own_fills_its_first_stage() -> None:
    workload = build_workload(small_config(), micro_batch=1, seq_len=512, dtype="bfloat16")
    bare = replace(workload, blocks=workload.blocks[1:])
    with pytest.raises(InputError, match=r"first and the last stage have a layer"):
        stages_of(bare, plan_of(pp=4, partition=(0, 4, 2, 2)))


@pytest.mark.parametrize("partition", [(4, 0, 2, 2), (0, 4, 2, 2), (0, 0, 8, 0), (8, 0, 0, 0), (0, 4, 4, 0)])
def test_empty_stages_hold_the_ends_or_nothing(partition: tuple[int, ...]) -> None:
    """The embedding is on the first stage and the head on the last, with or without layers."""
    workload = build_workload(small_config(), micro_batch=1, seq_len=512, dtype="bfloat16")
    stages = stages_of(workload, plan_of(pp=4, partition=partition))
    assert [block for stage in stages for block in stage.blocks] == list(workload.blocks)
    for stage, count in zip(stages, partition, strict=True):
        names = [block.name for block in stage.blocks]
        assert names.count("attention") == count
        assert ("embedding" in names, "head" in names) == (stage.index == 0, stage.index == 3)


def test_a_partition_of_other_layers_is_refused() -> None:
    workload = build_workload(small_config(), micro_batch=1, seq_len=512, dtype="bfloat16")
    with pytest.raises(InputError, match=r"pipeline\.partition.*7 != 8"):
        stages_of(workload, plan_of(pp=2, partition=(4, 3)))


def test_a_traced_chains_end_needs_a_block() -> None:
    workload = build_workload(small_config(), micro_batch=1, seq_len=512, dtype="bfloat16")
    unnamed = replace(workload, blocks=tuple(replace(block, name="part") for block in workload.blocks))
    with pytest.raises(InputError, match=r"pipeline\.partition.*first and the last stage have a layer"):
        stages_of(unnamed, plan_of(pp=2, partition=(18, 0)))
