"""Rows become models, clusters and plans, or a reason."""

from __future__ import annotations

import pytest

from hardware_models.errors import InputError
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from tests.published_rows import row_of
from validation.express import express
from validation.framework_facts import FRAMEWORKS_KNOWN, facts_of
from validation.model_of_row import family_of


def test_a_row_becomes_the_plan_that_it_states() -> None:
    found = express(row_of())
    assert found.plan == Plan(
        parallel=Parallel(tp=8, sequence_parallel=True), batch=Batch(global_batch=4, micro_batch=4, seq_len=2048), pipeline=Pipeline(), memory=Memory(recompute="selective"),
        precision=Precision(compute="fp16", grads="bf16"),
        runtime=Runtime(framework="megatron-lm@2021", flash_attention=False, overlap_grad_reduce=False, overlap_param_gather=False),
    )  # fmt: skip
    config = found.config
    assert (config.layers, config.hidden, config.heads, config.vocab, config.norm, config.activation, config.tied) == (
        48,
        6144,
        64,
        51200,
        "layer_norm",
        "gelu",
        True,
    )
    assert (found.cluster.name, found.cluster.num_gpus, found.assumed) == ("selene", 8, ())


def test_layers_that_leave_one_out_at_either_end() -> None:
    changes = {"framework": "Megatron-LM fork (sail-sg)", "model": "GPT-1.5B", "n_layers": "22", "hidden": "2304", "n_heads": "24", "n_kv_heads": "24", "ffn": "9216", "seq_len": "1024",
               "tp": "1", "pp": "8", "micro_batch": "6", "global_batch": "144", "recompute": "none", "precision": "bf16", "vocab": "", "seq_parallel": "no"}  # fmt: skip
    plain = express(row_of(**changes, pipeline_schedule="zb-2p"))
    assert plain.plan.pipeline.partition == (2, 3, 3, 3, 3, 3, 3, 2)
    assert plain.config.vocab == 32000
    assert "vocab = 32000" in plain.assumed[0]
    chunked = express(row_of(**changes, pipeline_schedule="interleaved", virtual_pp="max (1 layer per chunk)"))
    assert chunked.plan.parallel.virtual_stages == 3
    assert chunked.plan.pipeline.partition == (0, *[1] * 22, 0)


@pytest.mark.parametrize(
    ("framework", "method"), [("Megatron-LM 0.14 (commit 23e00ed)", "all-to-all"), ("Megatron-LM 0.13", "ring")]
)
def test_context_parallelism_exchanges_as_the_framework_was_run(framework: str, method: str) -> None:
    found = express(row_of(framework=framework, n_gpus="16", cp="2"))
    assert (found.plan.parallel.cp, found.plan.parallel.cp_method) == (2, method)


def test_what_one_row_leaves_blank_other_rows_of_the_model_state() -> None:
    blank, stated = row_of(n_layers=""), row_of(row_id="t:2")
    found = express(blank, [blank, stated])
    assert (found.config.layers, found.assumed) == (48, ("n_layers = 48: as other rows of this model",))
    with pytest.raises(InputError, match=r"n_layers: the source does not state it"):
        express(blank, [blank, stated, row_of(n_layers="24")])


def test_interleaved_orders_without_stated_chunks_have_at_most_three() -> None:
    found = express(
        row_of(n_gpus="64", pp="8", virtual_pp="", pipeline_schedule="interleaved", global_batch="64", micro_batch="1")
    )
    assert (found.plan.parallel.virtual_stages, found.assumed) == (3, ("virtual_pp = 3",))


def test_heads_that_nobody_states_are_128_wide() -> None:
    found = express(row_of(n_heads="", n_kv_heads=""))
    assert (found.config.heads, found.assumed) == (48, ("n_heads = 48",))


def test_experts_are_read_as_sources_write_them() -> None:
    changes = {"framework": "Megatron-LM 0.14", "seq_parallel": "no", "tp": "1", "dp": "8", "ep": "8", "micro_batch": "1", "global_batch": "8", "precision": "bf16", "flash_attention": "yes",
               "recompute": "none", "notes": "DeepSeek rows: TP=1, dense_layers=1"}  # fmt: skip
    found = express(
        row_of(
            **changes,
            model="DeepSeek-V3 (truncated)",
            n_layers="4",
            hidden="7168",
            n_heads="128",
            n_kv_heads="128",
            ffn="18432 dense / 2048 expert",
            moe_experts="256",
            moe_topk="8",
        )
    )
    assert found.config.experts is not None
    assert found.config.latent is not None
    assert (
        found.config.ffn,
        found.config.experts.ffn,
        found.config.experts.dense_first_layers,
        found.config.experts.num_shared,
    ) == (18432, 2048, 1, 1)
    qwen = express(
        row_of(
            **changes,
            model="Qwen3_30B_a3B",
            n_layers="4",
            hidden="2048",
            n_heads="32",
            n_kv_heads="4",
            ffn="moe 768",
            moe_experts="128",
            moe_topk="8",
        )
    )
    assert (qwen.config.experts and qwen.config.experts.ffn, qwen.config.head_dim) == (768, 128)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"framework": "MegaScale"}, "attention and network in parallel"),
        ({"framework": "Alpa"}, "no facts of this framework are known"),
        ({"model": "Nemotron_3_Nano"}, "state-space"),
        ({"model": "AlphaFold"}, "no family of models"),
        ({"gpu": "MI300X"}, "unknown name"),
        ({"n_gpus": "16"}, r"tp \* cp \* pp \* dp == n_gpus must hold, but got 8 != 16"),
        ({"recompute": "block"}, "one of none, selective, full"),
        ({"precision": "posit16"}, "known formats"),
        ({"pipeline_schedule": "hanayo"}, "known schedules"),
        ({"offload": "some"}, "words that name what is offloaded"),
        ({"global_batch": "5"}, r"global_batch % \(dp \* micro_batch\) == 0"),
        ({"table_id": "LoRA Performance"}, "low-rank adapters"),
        ({"hidden": ""}, "the source does not state it"),
        ({"hidden": "wide"}, "a number"),
    ],
)
def test_what_cannot_be_expressed_is_named(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        express(row_of(**changes))


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("Megatron-LM 2021", "Megatron-LM of 2021 and 2022"), ("Megatron-LM 2021 + DeepSpeed ZeRO-3", "Megatron-LM with DeepSpeed ZeRO-3, 2021"), ("Megatron-LM 0.14 (commit 23e00ed)", "Megatron-core of SimuMax"),
        ("Megatron-DeepSpeed (BigScience, BLOOM 176B tuning)", "Megatron-DeepSpeed of BigScience"), ("AA-Scaling (Aleph Alpha, Megatron-style)", "AA-Scaling"), ("Composer/llm-foundry (PyTorch FSDP)", "llm-foundry"),
        ("PyTorch FSDP + torch.compile (IBM fms-fsdp)", "FMS-FSDP"), ("PyTorch FSDP", "PyTorch FSDP"), ("Megatron-LM 285068c8", "Megatron-LM of 2023"), ("torchtitan (PyTorch FSDP2/DTensor)", "torchtitan"), ("Megatron-LM fork (sail-sg)", "Megatron-LM fork of Zero Bubble"),
        ("Megatron-Bridge (Megatron-Core), container 26.06", "Megatron-Bridge"), ("DeepSpeed ZeRO-Infinity", "DeepSpeed"),
    ],
)  # fmt: skip
def test_frameworks_by_the_words_of_tables(framework: str, name: str) -> None:
    assert facts_of(framework).name == name


CORE = {
    "framework": "Megatron-Bridge (Megatron-Core)",
    "recompute": "",
    "precision": "fp8",
    "flash_attention": "yes",
    "seq_parallel": "",
}


def test_recipes_say_what_rows_leave_open() -> None:
    found = express(row_of(**CORE))
    assert (found.plan.memory.recompute, found.plan.runtime.overlap_tp, found.plan.precision.grads) == ("none", True, "bf16")
    assert found.recompute_stated
    assert "recompute = none: the framework's own recipes" in found.assumed
    assert express(row_of(**{**CORE, "recompute": "full"})).plan.memory.recompute == "full"
    assert not express(row_of(**CORE, tp="1", dp="8", micro_batch="1", global_batch="8")).plan.runtime.overlap_tp


def test_selective_is_what_the_framework_calls_so() -> None:
    changes = {"flash_attention": "yes", "seq_parallel": "no", "tp": "1", "dp": "8", "micro_batch": "1", "global_batch": "8"}
    found = [
        express(row_of(framework=name, **changes)).plan.memory.recompute
        for name in ("PyTorch FSDP (IBM fms-fsdp)", "torchtitan")
    ]
    assert found == ["full", "selective"]


@pytest.mark.parametrize(("notes", "overlaps"), [("AsyncTP; local batch 8", True), ("Async TP", True), ("vanilla TP", False)])
def test_asynchronous_tensor_parallelism_is_read_from_the_row(notes: str, overlaps: bool) -> None:
    assert express(row_of(framework="torchtitan", notes=notes)).plan.runtime.overlap_tp is overlaps


@pytest.mark.parametrize(
    ("precision", "notes", "comm"),
    [("fp8", "precision: float8 rowwise", "bf16"), ("fp8", "float8 tensorwise", "same"), ("bf16", "rowwise", "same")],
)
def test_scales_by_rows_do_not_travel(precision: str, notes: str, comm: str) -> None:
    found = express(row_of(framework="torchtitan", precision=precision, notes=notes))
    assert found.plan.precision.comm == comm
    assert any(text.startswith("precision.comm") for text in found.assumed) is (comm != "same")


def test_every_fact_has_a_source() -> None:
    assert all(len(facts.source) > 20 for facts in FRAMEWORKS_KNOWN)


def test_families_by_name() -> None:
    assert family_of("Llama3.1-405B").norm == "rms_norm"
    assert family_of("GPT OSS 120B").head_dim == 64
    assert family_of("GPT 0.35B").tied
    assert family_of("MPT-7b").dropout is False


def test_a_row_that_names_its_norm_kernel_runs_it() -> None:
    changes = {
        "framework": "AA-Scaling (Aleph Alpha, Megatron-style)",
        "model": "LLaMA-13B",
        "precision": "bf16",
        "vocab": "128000",
    }
    fused = express(row_of(**changes, notes="flash_attention: flash_attention2 + RMS kernel"))
    plain = express(row_of(**changes, notes="flash_attention: flash_attention2"))
    assert [found.plan.runtime.framework for found in (fused, plain)] == ["aa-scaling@fused-norm", "aa-scaling"]


def test_a_precision_that_the_source_leaves_open_is_the_frameworks() -> None:
    changes = {
        "framework": "Megatron-LM fork (sail-sg)",
        "model": "GPT-1.5B",
        "precision": "bf16",
        "tp": "1",
        "pp": "8",
        "vocab": "",
        "pipeline_schedule": "zb-1p",
    }
    assumed = express(row_of(**changes, notes="precision: fp16/bf16 mixed (not stated)"))
    assert assumed.plan.precision == Precision(compute="fp16", grads="bf16")
    assert any(text.startswith("precision = fp16") for text in assumed.assumed)
    stated = express(row_of(**changes))
    assert stated.plan.precision == Precision(compute="bf16", grads="fp32")
    assert stated.plan.runtime.optimizer_sync == "post-validation"
    assert express(row_of(**{**changes, "pipeline_schedule": "1f1b"})).plan.runtime.optimizer_sync == "pre"
