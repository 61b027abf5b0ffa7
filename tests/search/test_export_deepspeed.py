"""DeepSpeed's configuration: golden JSON, each key's rule, and its own parser where it is installed."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from hardware_models.errors import InputError
from search.export import export_plan
from simulator.plan import MemoryBlock
from tests.search.export_cases import case_of

STAGE_3 = {
    "train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8, "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"}, "optimizer": {"type": "AdamW"},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "reduce_bucket_size": 250_000, "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
}  # fmt: skip
OFFLOADED = {"zero_stage": 3, "recompute": "full", "weight_offload": 1.0, "grad_offload": 1.0, "optimizer_offload": 1.0}


def configuration(**values: Any) -> Any:
    return json.loads(export_plan(case_of(**values), "deepspeed").files[0][1])


def notes(**values: Any) -> str:
    return "\n".join(export_plan(case_of(**values), "deepspeed").notes)


def test_stage_3_with_everything_on_the_host() -> None:
    assert configuration(dp=4, micro_batch=2, memory=OFFLOADED, runtime={"bucket_bytes": 1_000_000}) == STAGE_3


def test_drives_need_a_path() -> None:
    found = configuration(dp=4, memory=OFFLOADED | {"offload_target": "nvme"})["zero_optimization"]
    assert found["offload_param"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/local_nvme"}
    assert "change it to where your drives are mounted" in notes(dp=4, memory=OFFLOADED | {"offload_target": "nvme"})


def test_layers_are_split_by_sections_of_their_own() -> None:
    found = configuration(
        tp=2, dp=4, cp=2, ep=4, cp_method="all-to-all", memory={"zero_stage": 2}, runtime={"overlap_tp": True, "compile": True}
    )
    assert found["tensor_parallel"] == {"autotp_size": 2, "tp_overlap_comm": True}
    assert found["sequence_parallel_size"] == 2
    assert found["expert_parallel"] == {"enabled": True, "autoep_size": 4, "expert_tensor_parallel_size": 2}
    told = notes(tp=2, dp=4, cp=2, ep=4, cp_method="all-to-all", memory={"zero_stage": 2}, runtime={"compile": True})
    assert "DistributedAttention" in told
    assert "engine.compile()" in told


def test_a_pipeline_is_the_modules_own() -> None:
    values: dict[str, Any] = {"pp": 4, "tp": 2, "dp": 2, "memory": {"zero_stage": 1, "recompute": "full"}}
    assert configuration(**values)["pipeline"] == {"activation_checkpoint_interval": 1}
    assert "tensor_parallel" not in configuration(**values)
    told = notes(**values)
    assert "PipelineModule(num_stages=4, partition_method='type:<your layer class>'): 8 layers a stage" in told
    assert "num_pp=4, num_mp=2, num_dp=2" in told
    assert "after the last backward pass" in told


def test_without_zero_gradients_have_the_format_of_parameters() -> None:
    found = configuration(dp=2, precision={"grads": "bf16"})
    assert found["data_types"] == {"grad_accum_dtype": "bf16"}
    assert found["zero_optimization"] == {"stage": 0}
    assert "bf16" not in configuration(dp=2, precision={"compute": "fp32"})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"memory": {"zero_stage": 3, "block": (MemoryBlock(recompute="full"),)}},
            "one rule of checkpointing holds for all layers",
        ),
        ({"memory": {"zero_stage": 3}, "runtime": {"cuda_graphs": True}}, "captures no training step"),
        ({"memory": {"zero_stage": 3}, "runtime": {"prefetch_blocks": 2}}, "counts elements, not blocks"),
        ({"memory": {"zero_stage": 3}, "runtime": {"overlap_param_gather": False}}, "set it as overlap_grad_reduce"),
        ({"memory": {"zero_stage": 3}, "precision": {"compute": "fp16", "grads": "bf16"}}, "but got compute = fp16"),
    ],
)
def test_what_has_no_place_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        configuration(dp=2, **values)


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"dp": 4, "micro_batch": 2, "memory": OFFLOADED},
        {"dp": 4, "pp": 2, "memory": {"zero_stage": 1, "recompute": "full"}},
        {"dp": 4, "tp": 2, "ep": 2, "memory": {"zero_stage": 2}},
        {"dp": 4, "precision": {"compute": "fp16", "optimizer": "sgd"}, "memory": {"zero_stage": 1}},
    ],
)
def test_deepspeeds_parser_takes_it(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = pytest.importorskip("deepspeed.runtime.config", reason="deepspeed is not installed: tests/trainers.txt")
        monkeypatch.setattr(config.dist, "get_rank", lambda: 0)
        found = configuration(**values)
        parsed = config.DeepSpeedConfig(found, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: 4))
    assert parsed.train_batch_size == 64
    assert parsed.zero_optimization_stage == found["zero_optimization"]["stage"]
    assert parsed.gradient_accumulation_steps * parsed.train_micro_batch_size_per_gpu * 4 == 64
