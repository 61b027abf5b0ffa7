"""Generated workloads against the tracer's of the same model: the same cuts, and the same bytes and kernels in every block."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from simulator.presets import Experts, TransformerConfig, build_workload
from simulator.tracing.trace import trace
from simulator.workload import Pass

BATCH, SEQ_LEN, VOCAB = 3, 10, 101

COPIES = {"clone", "_to_copy", "transposed_copy"}
"""A generated workload has no strides, by which a trace tells copies apart."""


def operators(run: Pass) -> Counter[str]:
    return Counter("copy" if kernel.op in COPIES else kernel.op for kernel in run.kernels)


def models(name: str) -> tuple[TransformerConfig, Any]:
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=48, n_head=4, vocab_size=VOCAB, n_positions=64, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        ours = TransformerConfig(name=name, source="test", layers=2, hidden=48, heads=4, ffn=192, vocab=VOCAB, max_positions=64)
        return ours, transformers.GPT2LMHeadModel(config)
    if name == "bert":
        config = transformers.BertConfig(
            num_hidden_layers=2, hidden_size=48, num_attention_heads=4, intermediate_size=80, vocab_size=VOCAB,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        ours = TransformerConfig(
            name=name, source="test", layers=2, hidden=48, heads=4, ffn=80, vocab=VOCAB, max_positions=64, activation="gelu",
            post_norm=True, token_types=2, head="masked_lm", fused_qkv=False,
        )  # fmt: skip
        return ours, transformers.BertForMaskedLM(config)
    sizes = {
        "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
        "vocab_size": VOCAB, "use_cache": False,
    }  # fmt: skip
    ours = TransformerConfig(
        name=name, source="test", layers=2, hidden=48, heads=4, kv_heads=2, ffn=80, vocab=VOCAB, max_positions=2048, norm="rms_norm",
        activation="swiglu", positions="rotary", bias=False, tied=False, fused_qkv=False, softmax_float32=True,
    )  # fmt: skip
    if name == "llama":
        return ours, transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    config = transformers.MixtralConfig(
        **sizes, num_local_experts=4, num_experts_per_tok=2, experts_implementation="grouped_mm"
    )
    module = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    module.model.rotary_emb.to(torch.float32)
    return replace(ours, experts=Experts(num_experts=4, top_k=2, ffn=80)), module


def peak_bytes(run: Pass) -> int:
    alive = highest = 0
    for event in run.memory:
        alive += event.delta_bytes
        highest = max(highest, alive)
    return highest


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "mixtral"])
def test_blocks_agree_with_the_trace(name: str) -> None:
    ours, module = models(name)
    dtype = "bfloat16" if name == "mixtral" else "float32"  # grouped products have shapes under fake tensors in bfloat16 only
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN))
    traced = trace(module.train(), {"input_ids": tokens, "labels": tokens.clone()}, name=name).workload
    generated = build_workload(ours, micro_batch=BATCH, seq_len=SEQ_LEN, dtype=dtype, device="cpu")
    assert generated.model_flops == traced.model_flops
    assert sorted(generated.optimizer_tensors) == sorted(traced.optimizer_tensors)
    for key in ("tokens", "parameter_bytes", "buffer_bytes", "gradient_bytes", "shared_gradient_bytes", "batch_bytes"):
        assert getattr(generated, key) == getattr(traced, key), key
    assert len(generated.blocks) == len(traced.blocks)
    for index, (mine, theirs) in enumerate(zip(generated.blocks, traced.blocks, strict=True)):
        for key in ("input_bytes", "output_bytes", "parameter_elements", "gradient_bytes"):
            assert getattr(mine, key) == getattr(theirs, key), (index, key)
        for option, expected in zip(mine.options, theirs.options, strict=True):
            assert option.saved_internal_bytes == expected.saved_internal_bytes
            assert (option.keeps_input, option.keeps_output) == (expected.keeps_input, expected.keeps_output)
        one, other = mine.options[0], theirs.options[0]
        assert operators(one.backward) == operators(other.backward)
        assert peak_bytes(one.backward) == peak_bytes(other.backward)
        if index > 1:  # before: masks and tables, which the two make in different blocks
            theirs_without_tables = [kernel for kernel in other.forward.kernels if kernel.op != "arange"]
            assert operators(one.forward) == operators(replace(other.forward, kernels=tuple(theirs_without_tables)))
            assert peak_bytes(one.forward) == peak_bytes(other.forward)
