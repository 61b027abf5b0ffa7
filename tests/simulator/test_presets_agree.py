"""Generated workloads against eager runs of the same `transformers` models: FLOPs, parameters and what autograd saves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from simulator.presets.build import build_workload
from simulator.presets.config import Experts, LatentAttention, TransformerConfig
from simulator.workload import Workload


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What an eager run of a module amounts to."""

    parameters: int
    flops: int
    saved_bytes: int


class CountFlops(TorchDispatchMode):
    """2mnk per product; attention's two products forward and four backward."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in {"mm", "addmm"}:
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name == "bmm":
            self.flops += 2 * args[0].numel() * args[1].shape[2]
        elif name == "_grouped_mm":
            a, b = args[:2]
            self.flops += 2 * a.numel() * b.shape[-1]
        elif "scaled_dot_product" in name:
            backward = name.endswith("backward")
            q, k, v = args[1:4] if backward else args[:3]
            forward = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
            self.flops += 2 * forward if backward else forward
        return out


def measure(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Measured:
    """Each saved storage once; parameters, buffers and inputs left out."""
    module.train()
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), *inputs.values())}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            alive.append(storage)
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with CountFlops() as count:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = module(**inputs)
            loss = getattr(output, "loss", output)
        loss.backward()
    return Measured(parameters=sum(p.numel() for p in module.parameters()), flops=count.flops, saved_bytes=sum(saved.values()))


def saved_bytes(workload: Workload) -> int:
    """Bytes alive between forward and backward because of autograd: blocks' own, boundaries, rotary tables."""
    options = [block.options[0] for block in workload.blocks]
    total = sum(option.saved_internal_bytes for option in options)
    followers = [*options[1:], None]
    for block, option, follower in zip(workload.blocks, options, followers, strict=True):
        if option.keeps_output or (follower is not None and follower.keeps_input):
            total += block.output_bytes
    return total


def carried_tables_bytes(workload: Workload, mask_bytes: int) -> int:
    """Tables carried through the micro-batch; masks are carried too but not saved."""
    events = workload.blocks[0].options[0].forward.memory
    return sum(event.delta_bytes for event in events if event.buffer == "carried") - mask_bytes


def compare(config: TransformerConfig, module: torch.nn.Module, inputs: dict[str, torch.Tensor], *, flash: bool) -> None:
    batch, seq_len = inputs["input_ids"].shape
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    workload = build_workload(config, micro_batch=batch, seq_len=seq_len, dtype=dtype, flash_attention=flash, device="cpu")
    measured = measure(module, inputs)
    itemsize = next(module.parameters()).element_size()
    mask_bytes = 0 if flash or not config.causal else batch * seq_len**2 * itemsize
    assert workload.parameter_elements == measured.parameters
    assert (
        sorted(workload.optimizer_tensors) == sorted(p.numel() for p in module.parameters())
        or config.kv_heads
        or config.experts
    )
    assert workload.model_flops == measured.flops
    total = saved_bytes(workload) + carried_tables_bytes(workload, mask_bytes)
    assert total == measured.saved_bytes


def tokens(batch: int, seq_len: int, vocab: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocab, (batch, seq_len))
    return {"input_ids": ids, "labels": ids.clone()}


GPT2_SHAPES = [(2, 48, 4, 101, 3, 10), (1, 64, 2, 257, 1, 32), (3, 96, 6, 64, 2, 17)]
LLAMA_SHAPES = [(2, 48, 4, 2, 80, 101, 3, 10), (1, 64, 4, 4, 96, 257, 1, 32), (3, 96, 6, 1, 256, 64, 2, 17)]


@pytest.mark.parametrize("shape", GPT2_SHAPES, ids=str)
@pytest.mark.parametrize(("attention", "dropout", "dtype"), [
    ("sdpa", 0.0, torch.float32), ("eager", 0.0, torch.float32), ("eager", 0.1, torch.float32), ("sdpa", 0.0, torch.bfloat16)])  # fmt: skip
def test_gpt2(shape: tuple[int, ...], attention: str, dropout: float, dtype: torch.dtype) -> None:
    layers, hidden, heads, vocab, batch, seq_len = shape
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=heads, vocab_size=vocab, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, attn_implementation=attention,
    )  # fmt: skip
    ours = TransformerConfig(
        name="gpt2",
        source="test",
        layers=layers,
        hidden=hidden,
        heads=heads,
        ffn=4 * hidden,
        vocab=vocab,
        max_positions=64,
        dropout=dropout,
    )
    module = transformers.GPT2LMHeadModel(config).to(dtype)
    compare(ours, module, tokens(batch, seq_len, vocab), flash=attention == "sdpa")


def llama(shape: tuple[int, ...], **changes: Any) -> TransformerConfig:
    layers, hidden, heads, kv_heads, ffn, vocab, _, _ = shape
    config = TransformerConfig(
        name="llama", source="test", layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab,
        max_positions=2048, norm="rms_norm", activation="swiglu", positions="rotary", bias=False, tied=False, fused_qkv=False,
        softmax_float32=True,
    )  # fmt: skip
    return replace(config, **changes)


@pytest.mark.parametrize("shape", LLAMA_SHAPES, ids=str)
@pytest.mark.parametrize(("attention", "dtype"), [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16), ("eager", torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_llama(shape: tuple[int, ...], attention: str, dtype: torch.dtype, tied: bool) -> None:
    layers, hidden, heads, kv_heads, ffn, vocab, batch, seq_len = shape
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn,
        vocab_size=vocab, use_cache=False, attn_implementation=attention, tie_word_embeddings=tied,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).to(dtype)
    compare(llama(shape, tied=tied), module, tokens(batch, seq_len, vocab), flash=attention == "sdpa")


@pytest.mark.parametrize("shape", LLAMA_SHAPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral(shape: tuple[int, ...], num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    layers, hidden, heads, kv_heads, ffn, vocab, batch, seq_len = shape
    config = transformers.MixtralConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn,
        vocab_size=vocab, use_cache=False, attn_implementation="sdpa", num_local_experts=num_experts, num_experts_per_tok=top_k,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    ours = llama(shape, experts=Experts(num_experts=num_experts, top_k=top_k, ffn=ffn))
    module = transformers.MixtralForCausalLM(config).to(dtype)
    compare(ours, module, tokens(batch, seq_len, vocab), flash=True)


@pytest.mark.parametrize("shape", GPT2_SHAPES, ids=str)
@pytest.mark.parametrize(("attention", "dropout"), [("sdpa", 0.0), ("eager", 0.1)])
def test_bert(shape: tuple[int, ...], attention: str, dropout: float) -> None:
    layers, hidden, heads, vocab, batch, seq_len = shape
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, vocab_size=vocab,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, attn_implementation=attention,
    )  # fmt: skip
    ours = TransformerConfig(
        name="bert", source="test", layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocab=vocab, max_positions=64, dropout=dropout,
        activation="gelu", post_norm=True, token_types=2, head="masked_lm", fused_qkv=False,
    )  # fmt: skip
    module = transformers.BertForMaskedLM(config)
    compare(ours, module, tokens(batch, seq_len, vocab), flash=attention == "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepseek_v3_has_the_same_parameters_and_products(dtype: torch.dtype) -> None:
    batch, seq_len, vocab = 2, 12, 64
    config = transformers.DeepseekV3Config(
        num_hidden_layers=3, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1,
        vocab_size=vocab, use_cache=False, attn_implementation="sdpa", experts_implementation="grouped_mm",
    )  # fmt: skip
    ours = TransformerConfig(
        name="deepseek", source="test", layers=3, hidden=64, heads=4, ffn=96, vocab=vocab, max_positions=4096, norm="rms_norm",
        activation="swiglu", positions="rotary", bias=False, tied=False, fused_qkv=False, softmax_float32=True,
        experts=Experts(num_experts=8, top_k=2, ffn=32, num_shared=1, dense_first_layers=1, router="sigmoid"),
        latent=LatentAttention(query_rank=24, kv_rank=16, nope_dim=16, rope_dim=8, value_dim=16),
    )  # fmt: skip
    workload = build_workload(ours, micro_batch=batch, seq_len=seq_len, dtype=str(dtype).removeprefix("torch."), device="cpu")
    measured = measure(transformers.DeepseekV3ForCausalLM(config).to(dtype), tokens(batch, seq_len, vocab))
    assert workload.parameter_elements == measured.parameters
    assert workload.model_flops == measured.flops


def test_vit_agrees_with_the_plain_module() -> None:
    from simulator.models.losses import image_inputs
    from simulator.models.vit import VisionTransformer

    batch, size = 3, 64
    ours = TransformerConfig(
        name="vit", source="test", layers=2, hidden=48, heads=4, ffn=192, vocab=0, max_positions=17, activation="gelu",
        positions="none", tied=False, head="image", patch=16, num_classes=10,
    )  # fmt: skip
    module = VisionTransformer(size=size, hidden=48, layers=2, heads=4, num_classes=10)
    measured = measure(module, image_inputs(batch=batch, size=size, num_classes=10))
    workload = build_workload(ours, micro_batch=batch, seq_len=17, dtype="float32", device="cpu")
    convolutions = 2 * 2 * batch * 16 * 48 * 3 * 16**2
    assert workload.parameter_elements == measured.parameters
    assert workload.model_flops == measured.flops + convolutions
    assert saved_bytes(workload) == measured.saved_bytes
