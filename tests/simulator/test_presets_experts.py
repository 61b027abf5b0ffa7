"""Experts under imbalance and capacity: rows, FLOPs and bytes of the busiest rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from simulator.parallel.experts import expert_elements
from simulator.parallel.stages import stages_of
from simulator.plan import Parallel
from simulator.presets import TransformerConfig, build_workload, preset
from simulator.presets.hugging_face import load_config
from simulator.workload import Block
from tests.simulator.parallel.step_cases import plan_of, simulated

TOKENS = 256


def config(*, imbalance: float = 1.0, capacity_factor: float = 0.0) -> TransformerConfig:
    base = preset("mixtral-8x7b")
    assert base.experts is not None
    experts = replace(base.experts, ffn=512, imbalance=imbalance, capacity_factor=capacity_factor)
    return replace(base, layers=2, hidden=256, heads=4, kv_heads=4, ffn=512, vocab=1024, max_positions=512, experts=experts)


def experts_block(own: TransformerConfig, ep: int) -> Block:
    workload = build_workload(own, micro_batch=1, seq_len=TOKENS, dtype="bfloat16", ep=ep)
    return next(block for block in workload.blocks if block.name == "experts")


def grouped(own: TransformerConfig, ep: int) -> list[Kernel]:
    return [kernel for kernel in experts_block(own, ep).options[0].forward.kernels if kernel.op == "_grouped_mm"]


@pytest.mark.parametrize(
    ("ep", "changes", "load"),
    [
        (4, {}, 1.0),
        (4, {"imbalance": 1.5}, 1.5),
        (1, {"imbalance": 1.5}, 1.0),  # one rank has all experts
        (2, {"imbalance": 8.0}, 2.0),  # all tokens to one of two ranks
        (4, {"imbalance": 1.5, "capacity_factor": 1.25}, 1.25),
        (1, {"capacity_factor": 1.25}, 1.25),
    ],
)
def test_products_have_the_busiest_ranks_rows(ep: int, changes: dict[str, float], load: float) -> None:
    """2 * 256 choices: each row costs 2 * 256 * (1024 + 512) FLOPs forward."""
    assert sum(kernel.flops for kernel in grouped(config(**changes), ep)) == 2 * TOKENS * load * 2 * 256 * (1024 + 512)


@pytest.mark.parametrize("ep", [1, 4])
def test_more_rows_keep_more_bytes_and_all_come_back(ep: int) -> None:
    plain, padded = (experts_block(config(capacity_factor=factor), ep).options[0] for factor in (0.0, 1.25))
    assert padded.saved_internal_bytes > plain.saved_internal_bytes
    for option in (plain, padded):
        kept = sum(event.delta_bytes for event in option.forward.memory if event.buffer == "internal")
        freed = sum(event.delta_bytes for event in option.backward_accumulate.memory if event.buffer == "internal")
        assert kept == -freed


def test_model_flops_count_no_padding() -> None:
    plain, padded = (simulated(plan_of(dp=8, ep=8), config(capacity_factor=factor)) for factor in (0.0, 1.25))
    assert padded.model_flops == plain.model_flops
    assert padded.program.duration_s.sum() > plain.program.duration_s.sum()  # the step of so small a model waits for launches


def test_a_more_even_routing_is_never_slower() -> None:
    times = [simulated(plan_of(dp=8, ep=8), config(imbalance=imbalance)).step_time_s for imbalance in (1.0, 1.2, 2.0)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imbalance": 0.5}, r"1 <= imbalance <= num_experts must hold, but got 0\.5"),
        ({"imbalance": 9.0}, r"1 <= imbalance <= num_experts must hold, but got 9\.0"),
        ({"capacity_factor": 0.5}, r"capacity_factor is 0 \(none\) or at least 1, but got 0\.5"),
    ],
)
def test_impossible_loads_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_config_json_states_imbalance_and_capacity(tmp_path: Path) -> None:
    values = {
        "model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 101,
        "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_imbalance": 1.3, "moe_capacity_factor": 1.25,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    experts = load_config(tmp_path).experts
    assert experts is not None
    assert (experts.imbalance, experts.capacity_factor) == (1.3, 1.25)


def test_elements_of_routed_experts() -> None:
    """Two of eight experts on a rank, half of each: 2 * 3 * 256 * 256 a layer, two layers."""
    workload = build_workload(config(), micro_batch=1, seq_len=TOKENS, dtype="bfloat16", ep=4, tp=2)
    stage = stages_of(workload, plan_of())[0]
    assert expert_elements(stage, config(), Parallel(tp=2, ep=4, dp=4)) == 2 * 2 * 3 * 256 * 256
