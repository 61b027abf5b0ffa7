"""What frameworks keep for themselves, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.catalogue import load_hardware
from simulator.parallel.framework import allocator_of, kept_bytes, operators_of, with_spare_gradient
from simulator.parallel.orders import order_of
from simulator.parallel.parameter_gathers import units_of
from simulator.parallel.recompute import fit_framework
from simulator.parallel.simulate_parallel import simulate_parallel, step_parts
from simulator.parallel.stages import stages_of
from simulator.parallel.torch_buffers import stream_pool_bytes
from simulator.presets import build_workload, preset
from simulator.presets.operators import EAGER
from simulator.workload import Workload
from tests.simulator.parallel.step_cases import SEQ_LEN, cluster_of, plan_of, small_config

MIB = 2**20


def workload_of(framework: str, name: str = "llama3-70b", **changes: object) -> Workload:
    plan = plan_of(framework=framework)
    config = replace(preset(name), layers=2, **changes)  # type: ignore[arg-type]
    made = build_workload(config, micro_batch=1, seq_len=512, dtype="bfloat16", operators=operators_of(plan))
    return fit_framework(made, plan, config, dtype="bfloat16", seq_len=512)


def test_transformer_engine_keeps_a_gradient_for_each_shape_of_a_matrix() -> None:
    """Llama 3 70B: 10240, 8192, 57344 x 8192 and 8192 x 28672 in two bytes, however many layers; two workspaces of 32 MiB on Hopper."""
    shapes = 8192 * (10240 + 8192 + 57344 + 28672) * 2
    blocks = workload_of("megatron-core").blocks
    plan = plan_of(framework="megatron-core")
    assert kept_bytes(blocks, plan, load_hardware("h100-sxm"), dtype="bfloat16") == shapes + 64 * MIB
    assert kept_bytes(blocks[:3], plan, load_hardware("h100-sxm"), dtype="bfloat16") == shapes + 64 * MIB
    assert kept_bytes(blocks, plan, load_hardware("a100-sxm-80gb"), dtype="bfloat16") == shapes + 4 * MIB + 8_519_680


def test_only_transformer_engine_keeps_inputs_in_eight_bits() -> None:
    def packs(framework: str, compute: str) -> bool:
        plan = plan_of(framework=framework)
        return operators_of(replace(plan, precision=replace(plan.precision, compute=compute))).eight_bit_inputs  # type: ignore[arg-type]

    assert packs("megatron-core", "fp8")
    assert not packs("megatron-core", "bf16")
    assert not packs("torchtitan", "fp8")


def test_experts_of_one_shape_share_a_stand_in() -> None:
    blocks = [block for block in workload_of("megatron-core", "mixtral-8x7b").blocks if block.name == "experts"]
    shapes = (2 * 14336 * 4096 + 14336 * 4096 + 8 * 4096) * 2
    assert (
        kept_bytes(blocks, plan_of(framework="megatron-core"), load_hardware("h100-sxm"), dtype="bfloat16") == shapes + 64 * MIB
    )


@pytest.mark.parametrize("framework", ["pytorch", "torchtitan", "deepspeed", "megatron-lm@2021"])
def test_other_frameworks_keep_a_workspace_only(framework: str) -> None:
    blocks = workload_of(framework).blocks
    assert kept_bytes(blocks, plan_of(framework=framework), load_hardware("h100-sxm"), dtype="bfloat16") == 32 * MIB
    assert (
        kept_bytes(blocks, plan_of(framework=framework), replace(load_hardware("h100-sxm"), kind="cpu"), dtype="bfloat16") == 0
    )


def test_the_heads_matrix_gets_a_gradient_that_nobody_reads() -> None:
    (head,) = [block for block in workload_of("megatron-core").blocks if block.name == "head"]
    size_bytes = 128256 * 8192 * 2
    changes = [event.delta_bytes for event in head.options[0].backward_accumulate.memory if event.buffer == "transient"]
    assert changes.count(size_bytes) == changes.count(-size_bytes) == 1


def test_a_block_without_such_a_gradient_is_left_alone() -> None:
    block = workload_of("pytorch").blocks[1]
    assert with_spare_gradient(block.options[0], size_bytes=3) == block.options[0]


def test_unknown_kernels_are_torchs_own() -> None:
    assert operators_of(plan_of(framework="pytorch")) == EAGER
    assert operators_of(plan_of(framework="megatron-core")) != EAGER


def test_torchtitan_starts_with_expandable_segments() -> None:
    """So that what it reserves is near what it allocates, beside the buffers of gathers on their stream."""
    assert allocator_of(plan_of(framework="torchtitan")).expandable_segments
    assert not allocator_of(plan_of(framework="megatron-core")).expandable_segments
    plan = plan_of(dp=8, zero_stage=3, framework="torchtitan")
    cluster = cluster_of(plan)
    device = load_hardware(cluster.device)
    result = simulate_parallel(small_config(), plan, cluster, device, order_of(plan), seq_len=SEQ_LEN, reserved=True)
    stage = stages_of(build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16"), plan)[0]
    pool = stream_pool_bytes(units_of(stage, "torchtitan"), plan, dtype="bfloat16")
    assert result.peak_reserved_bytes[0] - pool <= 1.06 * result.peak_memory_bytes[0]


def test_the_core_of_attention_leaves_a_copy_in_eight_bits() -> None:
    """Llama 3 70B, ``selective``, bytes a token over h = 8192: input 2, normed 1 in eight bits, query 2, key and value 1/2; mixed values only as the next product reads them, 1."""
    plan = plan_of(framework="megatron-core", recompute="selective", micro_batch=1)
    own = replace(plan, precision=replace(plan.precision, compute="fp8"))
    config = replace(preset("llama3-70b"), layers=1)
    made = build_workload(config, micro_batch=1, seq_len=512, dtype="bfloat16", operators=operators_of(own))
    fitted = fit_framework(made, own, config, dtype="bfloat16", seq_len=512)
    attention = next(block for block in fitted.blocks if block.name == "attention").options[-1]
    assert sum(one.size_bytes for one in attention.saved) == 512 * (8192 * 13 // 2 + 4)  # and a root of the norm


@pytest.mark.parametrize(
    ("framework", "units"),
    [
        # two norms: float32 copy 2, normed 1, weighted 1; query, key, value, attention's result; gate, its activation, up, their product
        ("pytorch", 2 * (2 + 1 + 1) + (1 + 2 / 16 + 1) + 4 * 3.25),
        # two norms: input 1, weighted 1; the same of attention; gate and up in one, activated
        ("megatron-core", 2 * (1 + 1) + (1 + 2 / 16 + 1) + 3 * 3.25),
    ],
)
def test_a_layer_of_llama_3_405b_keeps_what_a_count_by_hand_says(framework: str, units: float) -> None:
    """In units of 2 s h / tp bytes: 8,192 tokens, 8 ranks with sequence parallelism, 128 heads of which 8 hold keys and values, a network of 3.25 h."""
    config, tokens = replace(preset("llama3-405b"), layers=4), 8192
    plan = plan_of(tp=8, pp=4, sequence_parallel=True, framework=framework)
    plan = replace(plan, batch=replace(plan.batch, seq_len=tokens))
    cluster = cluster_of(plan, "hgx-h100")
    parts = step_parts(config, plan, cluster, load_hardware(cluster.device), order_of(plan), seq_len=tokens)
    assert parts.costs[1].forward.net_bytes / (2 * tokens * config.hidden / 8) == pytest.approx(units, rel=1e-3)
