"""torchtitan's configuration: golden text, stages and order, and its own parser where it is installed."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from hardware_models.errors import InputError
from search.export import export_plan
from search.export_torchtitan import REGISTRY, module_names
from simulator.pipeline.order_text import order_texts, parse_order
from simulator.plan import MemoryBlock
from tests.search.export_cases import case_of
from tests.search.stand_ins import stand_ins
from tests.search.test_export import constant

SMALL = '''\
"""torchtitan 0.3 configuration of a schedlab plan: 8 GPUs = tp 2 x cp 1 x dp 4 x pp 1; global batch 64 = 2 x 8 micro-batches x dp 4."""

from dataclasses import replace

from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.llama3.config_registry import llama3_8b
from torchtitan.trainer import Trainer

TRAINING = {
    "local_batch_size": 2,
    "global_batch_size": 64,
    "seq_len": 4096,
    "mixed_precision_param": "bfloat16",
    "enable_cpu_offload": False,
    "disable_cuda_graphs": True,
}
PARALLELISM = {
    "data_parallel_replicate_degree": 2,
    "data_parallel_shard_degree": 2,
    "fsdp_reshard_after_forward": "always",
    "tensor_parallel_degree": 2,
    "enable_sequence_parallel": True,
    "context_parallel_degree": 1,
    "expert_parallel_degree": 1,
    "pipeline_parallel_degree": 1,
}
COMPILE = {
    "enable": True,
    "components": ["model", "loss"],
    "enable_async_tensor_parallel": True,
}


def configure(config: Trainer.Config) -> Trainer.Config:
    """A model's configuration under the plan."""
    return replace(
        config,
        training=replace(config.training, **TRAINING),
        parallelism=replace(config.parallelism, **PARALLELISM),
        compile=replace(config.compile, **COMPILE),
        activation_checkpoint=FullAC.Config(),
    )


def plan() -> Trainer.Config:
    """llama3_8b under the plan."""
    config = llama3_8b()
    return configure(config)
'''
NOT_PARSED = {"triton": "torchtitan.distributed.minimal_async_ep.kernels", "datasets": "datasets", "tensorboard": "tensorboard"}
"""Package -> the module that is not there without it."""
SMALL_CASE: dict[str, Any] = {
    "tp": 2, "dp": 4, "dp_shard": 2, "sequence_parallel": True, "micro_batch": 2, "memory": {"zero_stage": 3, "recompute": "full"},
    "runtime": {"compile": True, "overlap_tp": True},
}  # fmt: skip
PIPELINES = [
    ("1f1b", 1, "1F1B", False), ("gpipe", 1, "GPipe", False), ("zb-h1", 1, "1F1B", True), ("interleaved", 2, "Interleaved1F1B", True),
    ("looped-bfs", 4, "Interleaved1F1B", True), ("zb-v", 2, "ZBVZeroBubble", True), ("v-half", 2, "ZBVZeroBubble", True), ("dualpipe-v", 2, "ZBVZeroBubble", True),
]  # fmt: skip


def files(**values: Any) -> dict[str, str]:
    return dict(export_plan(case_of(**values), "torchtitan").files)


def pipelined(schedule: str, chunks: int, **values: Any) -> dict[str, str]:
    return files(pp=4, dp=2, virtual_stages=chunks, schedule=schedule, memory={"zero_stage": 1}, **values)


def test_llama_on_eight_gpus() -> None:
    assert files(**SMALL_CASE) == {"schedlab_plan.py": SMALL}


@pytest.mark.parametrize(("schedule", "chunks", "name", "cells"), PIPELINES)
def test_orders_go_by_name_or_cell_by_cell(schedule: str, chunks: int, name: str, cells: bool) -> None:
    case = case_of(pp=4, dp=2, virtual_stages=chunks, schedule=schedule, memory={"zero_stage": 1})
    found = pipelined(schedule, chunks)
    split = constant(found["schedlab_plan.py"].replace("PARALLELISM[", "ignored["), "PARALLELISM")
    assert split["pipeline_parallel_schedule"] == name
    assert ("pipeline_order.csv" in found) == ("pipeline_parallel_schedule_csv" in found["schedlab_plan.py"]) == cells
    assert len(split["module_fqns_per_model_part"]) == 4 * chunks
    assert case.order is not None
    if cells:
        assert order_texts(parse_order(found["pipeline_order.csv"])) == order_texts(case.order)
    training = constant(found["schedlab_plan.py"].replace("PARALLELISM[", "ignored["), "TRAINING")
    assert training["local_batch_size"] == 32


def test_stages_hold_the_plans_layers_and_the_ends() -> None:
    assert module_names((1, 0, 2)) == [["tok_embeddings", "layers.0"], [], ["layers.1", "layers.2", "norm", "lm_head"]]
    found = files(pp=2, partition=(20, 12), memory={"zero_stage": 1})["schedlab_plan.py"]
    assert [len(stage) for stage in constant(found, "PARALLELISM")["module_fqns_per_model_part"]] == [21, 14]


def test_replicas_states_on_the_host_and_float8() -> None:
    found = files(dp=4)["schedlab_plan.py"]
    assert constant(found, "PARALLELISM")["data_parallel_replicate_degree"] == 4
    assert "activation_checkpoint=None" in found
    offloaded = files(dp=4, memory={"zero_stage": 2, "weight_offload": 1.0, "grad_offload": 1.0, "optimizer_offload": 1.0})
    assert constant(offloaded["schedlab_plan.py"], "TRAINING")["enable_cpu_offload"] is True
    assert constant(offloaded["schedlab_plan.py"], "PARALLELISM")["fsdp_reshard_after_forward"] == "never"
    eight = files(precision={"compute": "fp8"}, runtime={"compile": True})["schedlab_plan.py"]
    assert 'model_registry("8B", converters=[Float8LinearConverter.Config(model_compile_enabled=True)])' in eight


def test_a_bf16_plan_takes_the_float8_of_a_registered_model_back() -> None:
    assert 'config.model_spec = model_registry("405B")' in files(model="llama3-405b", layers=126)["schedlab_plan.py"]


def test_a_model_that_torchtitan_does_not_know_brings_its_own_configuration() -> None:
    made = export_plan(case_of(model="gpt2", layers=12), "torchtitan")
    assert "def plan()" not in made.files[0][1]
    assert "return configure(yours)" in made.notes[0]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"memory": {"block": (MemoryBlock(recompute="full"),)}}, "holds for all layers alike"),
        ({"runtime": {"overlap_grad_reduce": False}}, "always overlaps"),
        ({"runtime": {"overlap_param_gather": False}}, "always gathers ahead"),
        ({"runtime": {"bucket_bytes": 1000}}, "block by block"),
        ({"memory": {"zero_stage": 3}, "runtime": {"prefetch_blocks": 2}}, "one block ahead"),
        ({"runtime": {"flash_attention": False}}, "attention is fused"),
        ({"pp": 2, "runtime": {"cuda_graphs": True}}, "CUDA graphs exclude pipelines"),
        ({"precision": {"compute": "fp8"}, "model": "gpt2"}, "converter of a registered model, but got --model gpt2"),
    ],
)
def test_what_has_no_place_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        files(**values)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [model for model in REGISTRY if model != "llama3-405b"]
)  # whose registry needs torchao and a GPU
@pytest.mark.parametrize(
    "values", [SMALL_CASE, {"pp": 4, "dp": 2, "virtual_stages": 2, "schedule": "zb-v", "memory": {"zero_stage": 1}}]
)
def test_torchtitans_parser_takes_it(
    model: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings(), stand_ins(NOT_PARSED):
        warnings.simplefilter("ignore")
        config = pytest.importorskip("torchtitan.config", reason="torchtitan is not installed: tests/trainers.txt")
        for name, text in files(model=model, **values).items():
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "schedlab_plan", raising=False)
        found = config.ConfigManager().parse_args(["--module", "schedlab_plan", "--config", "plan"])
        monkeypatch.delitem(sys.modules, "schedlab_plan")
    assert found.training.global_batch_size == 64
    assert found.parallelism.pipeline_parallel_degree == values.get("pp", 1)
    if "pp" in values:
        assert Path(found.parallelism.pipeline_parallel_schedule_csv).is_file()
