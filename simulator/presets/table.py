"""Named transformer configurations, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from hardware_models.errors import UnknownNameError
from simulator.presets.config import Experts, LatentAttention, TransformerConfig

PATCH_16 = 16
VIT_POSITIONS = 224 // PATCH_16 * (224 // PATCH_16) + 1
"""Patches of a 224 x 224 image and the class token."""
IMAGENET_CLASSES = 1000

_RADFORD = "Radford et al. 2019, table 2; checkpoint openai-community/gpt2*"
_BROWN = "Brown et al. 2020, table 2.1"
_KORTHIKANTI = "Korthikanti et al. 2022, table 3"
_LLAMA2 = "Touvron et al. 2023 (Llama 2), table 1 and appendix A.2; checkpoint meta-llama/Llama-2-*-hf"
_LLAMA3 = "Grattafiori et al. 2024 (Llama 3), table 3; checkpoint meta-llama/Meta-Llama-3*"
_MISTRAL = "Jiang et al. 2023 (Mistral 7B), table 1; checkpoint mistralai/Mistral-7B-v0.1"
_MIXTRAL = "Jiang et al. 2024 (Mixtral of Experts), table 1; checkpoint mistralai/Mixtral-8x7B-v0.1"
_MIXTRAL_22B = "checkpoint mistralai/Mixtral-8x22B-v0.1, config.json"
_DEEPSEEK = "DeepSeek-AI 2024 (DeepSeek-V3), section 4.2; checkpoint deepseek-ai/DeepSeek-V3"
_DEVLIN = "Devlin et al. 2019, section 3; checkpoint google-bert/bert-*-uncased"
_DOSOVITSKIY = "Dosovitskiy et al. 2021, table 1"
_TOUVRON_DEIT = "Touvron et al. 2021 (DeiT), table 1"


def _gpt(
    name: str, layers: int, hidden: int, heads: int, *, vocab: int, max_positions: int, source: str, written_out: bool = False,
    dropout: float = 0.1,
) -> TransformerConfig:  # fmt: skip
    return TransformerConfig(
        name=name, source=source, layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocab=vocab, max_positions=max_positions,
        activation="gelu_new" if written_out else "gelu", dropout=dropout,
    )  # fmt: skip


def _gpt2(name: str, layers: int, hidden: int, heads: int) -> TransformerConfig:
    return _gpt(name, layers, hidden, heads, vocab=50257, max_positions=1024, source=_RADFORD, written_out=True)


def _megatron(name: str, layers: int, hidden: int, heads: int) -> TransformerConfig:
    return _gpt(name, layers, hidden, heads, vocab=51200, max_positions=2048, source=_KORTHIKANTI)


def _llama(
    name: str, layers: int, hidden: int, heads: int, ffn: int, *, vocab: int, max_positions: int, source: str, kv_heads: int = 0
) -> TransformerConfig:  # fmt: skip
    return TransformerConfig(
        name=name, source=source, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab,
        max_positions=max_positions, norm="rms_norm", activation="swiglu", positions="rotary", bias=False, tied=False, fused_qkv=False,
        softmax_float32=True,
    )  # fmt: skip


def _mixtral(config: TransformerConfig, *, num_experts: int, top_k: int) -> TransformerConfig:
    return replace(config, experts=Experts(num_experts=num_experts, top_k=top_k, ffn=config.ffn))


def _deepseek_v3() -> TransformerConfig:
    base = _llama("deepseek-v3", 61, 7168, 128, 18432, vocab=129280, max_positions=163840, source=_DEEPSEEK)
    return replace(
        base,
        experts=Experts(num_experts=256, top_k=8, ffn=2048, num_shared=1, dense_first_layers=3, router="sigmoid"),
        latent=LatentAttention(query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    )


def _bert(name: str, layers: int, hidden: int, heads: int) -> TransformerConfig:
    return TransformerConfig(
        name=name, source=_DEVLIN, layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocab=30522, max_positions=512,
        activation="gelu", fused_qkv=False, dropout=0.1, post_norm=True, token_types=2, head="masked_lm",
    )  # fmt: skip


def _vit(name: str, layers: int, hidden: int, heads: int, source: str) -> TransformerConfig:
    return TransformerConfig(
        name=name, source=source, layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocab=0, max_positions=VIT_POSITIONS,
        activation="gelu", positions="none", tied=False, head="image", patch=PATCH_16, num_classes=IMAGENET_CLASSES,
    )  # fmt: skip


PRESETS: Mapping[str, TransformerConfig] = MappingProxyType({
    config.name: config
    for config in (
        _gpt2("gpt2", 12, 768, 12),
        _gpt2("gpt2-medium", 24, 1024, 16),
        _gpt2("gpt2-large", 36, 1280, 20),
        _gpt2("gpt2-xl", 48, 1600, 25),
        _gpt("gpt3-175b", 96, 12288, 96, vocab=50257, max_positions=2048, source=_BROWN, dropout=0.0),
        _megatron("megatron-22b", 48, 6144, 64),
        _megatron("megatron-175b", 96, 12288, 96),
        _megatron("megatron-530b", 105, 20480, 128),
        _megatron("megatron-1t", 128, 25600, 160),
        _llama("llama2-7b", 32, 4096, 32, 11008, vocab=32000, max_positions=4096, source=_LLAMA2),
        _llama("llama2-13b", 40, 5120, 40, 13824, vocab=32000, max_positions=4096, source=_LLAMA2),
        _llama("llama2-70b", 80, 8192, 64, 28672, kv_heads=8, vocab=32000, max_positions=4096, source=_LLAMA2),
        _llama("llama3-8b", 32, 4096, 32, 14336, kv_heads=8, vocab=128256, max_positions=8192, source=_LLAMA3),
        _llama("llama3-70b", 80, 8192, 64, 28672, kv_heads=8, vocab=128256, max_positions=8192, source=_LLAMA3),
        _llama("llama3-405b", 126, 16384, 128, 53248, kv_heads=8, vocab=128256, max_positions=131072, source=_LLAMA3),
        _llama("mistral-7b", 32, 4096, 32, 14336, kv_heads=8, vocab=32000, max_positions=32768, source=_MISTRAL),
        _mixtral(_llama("mixtral-8x7b", 32, 4096, 32, 14336, kv_heads=8, vocab=32000, max_positions=32768, source=_MIXTRAL), num_experts=8, top_k=2),
        _mixtral(_llama("mixtral-8x22b", 56, 6144, 48, 16384, kv_heads=8, vocab=32000, max_positions=65536, source=_MIXTRAL_22B), num_experts=8, top_k=2),
        _deepseek_v3(),
        _bert("bert-base", 12, 768, 12),
        _bert("bert-large", 24, 1024, 16),
        _vit("vit-s16", 12, 384, 6, _TOUVRON_DEIT),
        _vit("vit-b16", 12, 768, 12, _DOSOVITSKIY),
        _vit("vit-l16", 24, 1024, 16, _DOSOVITSKIY),
    )
})  # fmt: skip
"""Every named configuration."""


def preset(name: str) -> TransformerConfig:
    """The configuration of a name.

    Raises:
        UnknownNameError: no such preset; lists the known ones.
    """
    if name not in PRESETS:
        raise UnknownNameError(source="presets", key="name", value=name, known=tuple(PRESETS))
    return PRESETS[name]
