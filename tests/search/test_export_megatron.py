"""Megatron-LM's arguments: golden text, each flag's rule, and megatron-core's own configuration classes where they are installed."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.errors import InputError
from search.export import export_plan
from search.export_megatron import layout_text
from simulator.plan import MemoryBlock
from tests.search.export_cases import case_of

GPT3 = """\
# 512 GPUs = tp 8 x cp 1 x dp 8 x pp 8; global batch 512 = 1 x 64 micro-batches x dp 8
--tensor-model-parallel-size 8
--pipeline-model-parallel-size 8
--context-parallel-size 1
--sequence-parallel
--micro-batch-size 1
--global-batch-size 512
--seq-length 4096
--num-layers-per-virtual-pipeline-stage 4
--use-distributed-optimizer
--overlap-grad-reduce
--overlap-param-gather
--ddp-bucket-size 40000000
--recompute-granularity selective
--recompute-modules core_attn
--bf16
--accumulate-allreduce-grads-in-fp32
--optimizer adam
--attention-backend flash
"""


def arguments(**given_values: Any) -> str:
    return export_plan(case_of(**given_values), "megatron").files[0][1]


def refusal(**given_values: Any) -> str:
    with pytest.raises(InputError) as caught:
        arguments(**given_values)
    return str(caught.value)


def test_gpt3_on_512_gpus() -> None:
    found = arguments(
        layers=96, tp=8, pp=8, dp=8, virtual_stages=3, sequence_parallel=True, schedule="interleaved", global_batch=512,
        memory={"zero_stage": 1, "recompute": "selective"},
    )  # fmt: skip
    assert found == GPT3


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"cp": 2, "cp_method": "all-to-all"}, ["--cp-comm-type a2a"]),
        ({"cp": 2}, ["--cp-comm-type p2p"]),
        ({"dp": 4, "ep": 4, "tp": 2}, ["--expert-model-parallel-size 4", "--expert-tensor-parallel-size 2"]),
        ({"dp": 4, "dp_shard": 2, "memory": {"zero_stage": 1}}, ["--num-distributed-optimizer-instances 2"]),
        ({"dp": 4, "memory": {"zero_stage": 3}}, ["--use-megatron-fsdp", "--data-parallel-sharding-strategy optim_grads_params"]),
        ({"dp": 4, "memory": {"zero_stage": 2}}, ["--data-parallel-sharding-strategy optim_grads", "--ckpt-format fsdp_dtensor"]),
        ({"pp": 4, "layers": 30}, ["--pipeline-model-parallel-layout E,t*7|t*8|t*8|t*7,L"]),
        ({"pp": 2, "virtual_stages": 2, "schedule": "interleaved", "layers": None}, ["--num-virtual-stages-per-pipeline-rank 2"]),
        ({"pp": 4, "virtual_stages": 2, "schedule": "interleaved", "global_batch": 10}, ["--microbatch-group-size-per-virtual-pipeline-stage 5"]),
        ({"memory": {"recompute": "full"}}, ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]),
        (
            {"pp": 2, "memory": {"block": tuple(MemoryBlock(stage=stage, blocks="0-4", recompute="full") for stage in range(2))}},
            ["--recompute-method block", "--recompute-num-layers 5"],
        ),
        (
            {"dp": 2, "memory": {"zero_stage": 1, "optimizer_offload": 0.5}},
            ["--optimizer-cpu-offload", "--optimizer-offload-fraction 0.5", "--use-precision-aware-optimizer"],
        ),
        ({"precision": {"compute": "fp8", "grads": "bf16"}}, ["--bf16", "--fp8-format hybrid", "--grad-reduce-in-bf16"]),
        ({"precision": {"compute": "fp16", "optimizer": "sgd"}}, ["--fp16", "--accumulate-allreduce-grads-in-fp32", "--optimizer sgd"]),
        ({"tp": 2, "sequence_parallel": True, "runtime": {"overlap_tp": True}}, ["--tp-comm-overlap"]),
        ({"order": "tp-cp-ep-pp-dp"}, ["--use-tp-pp-dp-mapping"]),
        ({"dp": 2, "precision": {"grads": "bf16"}, "runtime": {"bucket_bytes": 1000}}, ["--ddp-bucket-size 500"]),
        ({"runtime": {"flash_attention": False, "cuda_graphs": True}}, ["--attention-backend unfused", "--cuda-graph-impl local"]),
    ],
)  # fmt: skip
def test_each_key_has_its_flag(values: dict[str, Any], flags: list[str]) -> None:
    assert set(flags) <= set(arguments(**values).splitlines())


def test_nothing_is_said_of_what_is_off() -> None:
    found = arguments(runtime={"overlap_grad_reduce": False, "overlap_param_gather": False})
    for word in ("overlap", "recompute", "offload", "distributed-optimizer", "fp8", "layout", "virtual", "cp-comm"):
        assert word not in found


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"runtime": {"compile": True}}, "runtime.compile = True: megatron: compiles no layers"),
        ({"dp": 2, "memory": {"zero_stage": 3}, "runtime": {"prefetch_blocks": 2}}, "gathers ahead by size"),
        ({"precision": {"compute": "fp32", "grads": "bf16"}}, "--grad-reduce-in-bf16 goes with --bf16"),
        ({"dp": 2, "memory": {"zero_stage": 1}, "runtime": {"overlap_grad_reduce": False}}, "must come with --overlap-grad-reduce"),
        ({"memory": {"recompute": "full"}, "runtime": {"cuda_graphs": True}}, "CUDA graphs exclude full recompute"),
        ({"memory": {"block": (MemoryBlock(blocks="1-4", recompute="full"),)}}, "same number of first layers on every stage"),
        ({"pp": 2, "memory": {"block": (MemoryBlock(blocks="0-4", recompute="full"),)}}, "same number of first layers on every stage"),
        ({"memory": {"recompute": "full", "block": (MemoryBlock(blocks="0", recompute="full"),)}}, 'take recompute = "none"'),
    ],
)  # fmt: skip
def test_what_has_no_argument_is_refused(values: dict[str, Any], told: str) -> None:
    assert told in refusal(**values)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8))
def test_a_layout_holds_the_stages_layers_in_order(lengths: list[int]) -> None:
    stages = layout_text(tuple(lengths)).split("|")
    assert [int(found[1] or 1) if (found := re.search(r"t\*?(\d*)", one)) else 0 for one in stages] == lengths
    assert stages[0].startswith("E")
    assert stages[-1].endswith("L")


@pytest.mark.slow
def test_megatron_core_reads_the_layout() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(
            "megatron.core.transformer.pipeline_parallel_layer_layout",
            reason="megatron-core is not installed: tests/trainers.txt",
        )
        read = module.PipelineParallelLayerLayout(layout_text((3, 0, 4, 2)), 2)
        read.validate_layer_layout(num_layers=9, mtp_num_layers=None)
    layers = [[sum(one.name == "decoder" for one in stage) for stage in rank] for rank in read.layout]
    assert layers == [[3, 4], [0, 2]]


@pytest.mark.slow
def test_megatron_core_has_the_fields_of_the_flags() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer = pytest.importorskip(
            "megatron.core.transformer", reason="megatron-core is not installed: tests/trainers.txt"
        )
        made = transformer.TransformerConfig(
            num_layers=32, hidden_size=64, num_attention_heads=8, tensor_model_parallel_size=4, sequence_parallel=True, context_parallel_size=2, cp_comm_type="a2a",
            recompute_granularity="full", recompute_method="block", recompute_num_layers=5, expert_model_parallel_size=1, expert_tensor_parallel_size=4,
        )  # fmt: skip
    assert made.recompute_num_layers == 5
