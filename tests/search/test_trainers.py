"""Limits of trainers: each is broken once, with its source in the message; one-directional consistency of the table."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.errors import InputError, UnknownNameError
from search.trainers import TRAINERS, check_trainer, trainer_of, violations
from simulator.plan import Batch, Memory, MemoryBlock, Parallel, Pipeline, Plan, Precision, Runtime

TABLE = ("schedules", "zero_stages", "zero_stages_pipelined", "cp_methods", "expert_parallel", "even_stages", "recomputes", "offloads", "orders", "computes", "grads", "optimizers")  # fmt: skip


def plan_of(*, global_batch: int = 64, schedule: str = "1f1b", **sections: Any) -> Plan:
    """A legal plan everywhere (ZeRO 1, bf16, two pipeline stages), with other values of some sections' keys."""
    parallel = {"pp": 2, "dp": 2} | sections.get("parallel", {})
    memory = {"zero_stage": 1} | sections.get("memory", {})
    return Plan(
        parallel=Parallel(**parallel),
        batch=Batch(global_batch=global_batch, micro_batch=1),
        pipeline=Pipeline(**({"schedule": schedule} | sections.get("pipeline", {}))),
        memory=Memory(**memory),
        precision=Precision(**({"compute": "bf16"} | sections.get("precision", {}))),
        runtime=Runtime(**sections.get("runtime", {})),
    )


BROKEN: list[tuple[str, Plan, str, str]] = [
    ("megatron", plan_of(schedule="zb-h1"), "pipeline.schedule", "schedules: 1f1b, interleaved"),
    ("megatron", plan_of(memory={"zero_stage": 3}), "memory.zero_stage", "zero stages pipelined: 0, 1"),
    ("megatron", plan_of(memory={"activation_offload": 0.5}), "memory.activation_offload", "by whole layers or modules"),
    ("megatron", plan_of(memory={"zero_stage": 0, "optimizer_offload": 0.5}), "memory.optimizer_offload", "distributed optimizer"),
    ("megatron", plan_of(memory={"block": (MemoryBlock(activation_offload=0.5),)}), "memory.block[0].activation_offload", "offloads: optimizer_offload"),
    ("megatron", plan_of(parallel={"order": "pp-tp-cp-ep-dp"}), "parallel.order", "--use-tp-pp-dp-mapping"),
    ("megatron", plan_of(parallel={"tp": 2}, runtime={"overlap_tp": True}), "runtime.overlap_tp", "sequence parallelism"),
    ("megatron", plan_of(global_batch=6, schedule="interleaved", parallel={"pp": 4, "virtual_stages": 2}), "batch.micro_batch", "3 < 4"),
    ("megatron", plan_of(parallel={"cp": 2, "dp": 4, "dp_shard": 1}), "parallel.dp_shard", "1"),
    ("torchtitan", plan_of(schedule="dualpipe", parallel={"pp": 2}), "pipeline.schedule", "pipeline_parallel_schedule_csv"),
    ("torchtitan", plan_of(memory={"zero_stage": 3}), "memory.zero_stage", "until a stage's last micro-batch"),
    ("torchtitan", plan_of(parallel={"pp": 1}), "memory.zero_stage", "zero stages: 0, 2, 3"),
    ("torchtitan", plan_of(memory={"recompute": "selective"}), "memory.recompute", "SelectiveAC"),
    ("torchtitan", plan_of(precision={"grads": "bf16"}), "precision.grads", "float32 only"),
    ("torchtitan", plan_of(parallel={"cp": 2}), "parallel.cp_method", "gathered whole"),
    ("torchtitan", plan_of(parallel={"tp": 2}, runtime={"overlap_tp": True}), "runtime.overlap_tp", "compiled layers"),
    ("pytorch", plan_of(parallel={"tp": 2}), "parallel.tp", "only their own code"),
    ("torchtitan", plan_of(parallel={"tp": 2, "ep": 2}), "parallel.ep", "tp = 2"),
    ("torchtitan", plan_of(parallel={"dp": 4, "dp_shard": 2, "ep": 4}), "parallel.ep", "2 % 4 = 2"),
    ("torchtitan", plan_of(memory={"optimizer_offload": 1.0}), "memory.weight_offload", "CPUOffloadPolicy"),
    ("torchtitan", plan_of(memory=dict.fromkeys(("weight_offload", "grad_offload", "optimizer_offload"), 0.5)), "memory.weight_offload", "all or nothing"),
    ("deepspeed", plan_of(schedule="gpipe"), "pipeline.schedule", "schedules: 1f1b"),
    ("deepspeed", plan_of(memory={"zero_stage": 2}), "memory.zero_stage", "asserts a stage below 2"),
    ("deepspeed", plan_of(pipeline={"partition": (3, 5)}), "pipeline.partition", "(3, 5)"),
    ("deepspeed", plan_of(parallel={"cp": 2, "cp_method": "all-to-all"}), "parallel.cp", "pp = 2"),
    ("deepspeed", plan_of(parallel={"pp": 1, "cp": 2, "ep": 4}), "parallel.ep", "2 % 4 = 2"),
    ("deepspeed", plan_of(parallel={"tp": 2, "sequence_parallel": True}), "parallel.sequence_parallel", "whole sequences"),
    ("deepspeed", plan_of(parallel={"dp": 4, "dp_shard": 2}), "parallel.dp_shard", "all cp * dp = 4 ranks"),
    ("deepspeed", plan_of(memory={"weight_offload": 1.0}), "memory.weight_offload", "stage 3 only"),
    ("deepspeed", plan_of(memory={"zero_stage": 0, "optimizer_offload": 1.0, "grad_offload": 1.0}, precision={"grads": "bf16"}), "memory.optimizer_offload", "stages 1 to 3"),
    ("deepspeed", plan_of(memory={"optimizer_offload": 1.0}), "memory.grad_offload", "with the optimizer states"),
    ("deepspeed", plan_of(memory={"zero_stage": 0}), "precision.grads", "accumulates gradients in bf16"),
    ("deepspeed", plan_of(precision={"optimizer": "adamw8bit"}), "precision.optimizer", "adamw, sgd"),
]  # fmt: skip


def first_rule(name: str, plan: Plan) -> InputError:
    with pytest.raises(InputError) as caught:
        check_trainer(plan, trainer_of(name))
    return caught.value


@pytest.mark.parametrize(("name", "plan", "key", "told"), BROKEN, ids=[f"{name}-{key}-{n}" for n, (name, _, key, _) in enumerate(BROKEN)])  # fmt: skip
def test_a_broken_limit_names_key_value_and_rule(name: str, plan: Plan, key: str, told: str) -> None:
    broken = [text for text in violations(plan, trainer_of(name)) if text.startswith(f"{name}: {key} = ")]
    assert broken
    assert any(told in text for text in broken), broken


def test_the_first_broken_rule_is_an_input_error_with_a_remedy() -> None:
    error = first_rule("deepspeed", plan_of(schedule="zb-h1"))
    assert error.key == "pipeline.schedule"
    assert "DeepSpeed 0.19.8: runtime/pipe/schedule.py" in error.rule
    assert error.remedy == "take 1f1b"


@pytest.mark.parametrize("name", TRAINERS)
def test_a_plain_plan_is_legal_everywhere(name: str) -> None:
    assert violations(plan_of(), trainer_of(name), layers=8) == ()


def test_equal_stages_are_asked_of_the_models_layers() -> None:
    (broken,) = violations(plan_of(), trainer_of("deepspeed"), layers=7)
    assert "layers % (pp * virtual_stages) == 0 must hold" in broken
    assert violations(plan_of(), trainer_of("megatron"), layers=7) == ()


def test_an_order_from_a_file_runs_where_a_schedule_file_is_read() -> None:
    plan = plan_of(schedule="file:order.csv")
    assert violations(plan, trainer_of("torchtitan")) == ()
    assert "file:" in violations(plan, trainer_of("megatron"))[0]


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "any"])
def test_every_limit_of_the_table_has_a_source(name: str) -> None:
    assert set(trainer_of(name).sources) == set(TABLE)
    assert set(TABLE) < {one.name for one in fields(trainer_of(name))}


def test_an_unknown_trainer_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match="megatron, torchtitan, pytorch, deepspeed"):
        trainer_of("nemo")


@given(
    name=st.sampled_from(sorted(TRAINERS)),
    stage=st.integers(0, 3),
    schedule=st.sampled_from(("1f1b", "zb-h1", "pipedream-2bw")),
)
def test_what_any_trainer_refuses_the_others_refuse(name: str, stage: int, schedule: str) -> None:
    plan = plan_of(schedule=schedule, memory={"zero_stage": stage})
    if violations(plan, trainer_of("any")):
        assert violations(plan, trainer_of(name))
