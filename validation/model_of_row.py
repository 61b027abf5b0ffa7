"""Transformer configurations of published runs: sizes from the row, the rest from the model's family."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hardware_models.errors import InputError
from simulator.presets import PRESETS, Experts, TransformerConfig
from simulator.presets.config import Activation, Norm, Positions
from validation.framework_facts import FrameworkFacts
from validation.published_row import PublishedRow

HEAD_WIDTH = 128
"""Width of a head where a row does not say how many there are: that of GPT-3 and of the Megatron papers' larger models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What models of one name have in common."""

    pattern: str
    source: str
    norm: Norm = "rms_norm"
    activation: Activation = "swiglu"
    positions: Positions = "rotary"
    bias: bool = False
    tied: bool = False
    dropout: bool = False
    """Trained with the framework's dropout."""
    head_dim: int = 0
    shared_experts: int = 0
    dense_first_layers: int = 0
    like: str = ""
    """Preset whose latent attention and router are the model's."""
    not_simulated: str = ""


_GPT = Family(
    pattern=r"(gpt|megatron|mt-nlg|turing|bloom|opt-|\bopt\b)", source="Radford et al. 2019; Narayanan et al. 2021", norm="layer_norm", activation="gelu", positions="learned", bias=True,
    tied=True, dropout=True,
)  # fmt: skip
FAMILIES: tuple[Family, ...] = (
    Family(pattern=r"(mamba|nemotron.*(nano|super|h\b)|jamba|hybrid)", source="NVIDIA 2025 (Nemotron 3)", not_simulated="layers of state-space models are not generated"),
    Family(pattern=r"(t5|ul2|bart)", source="Raffel et al. 2020", not_simulated="encoder-decoder models are not generated"),
    Family(pattern=r"(vit|swin|dit|unet|resnet|clip|diffusion)", source="", not_simulated="vision models of published tables are not expressed: the columns do not hold their shapes"),
    Family(pattern=r"bert", source="Devlin et al. 2019", not_simulated="masked language models of published tables are not expressed: the columns do not hold their heads"),
    Family(pattern=r"gpt.?oss", source="OpenAI 2025 (gpt-oss), model card", bias=True, head_dim=64),
    Family(pattern=r"deepseek.?v?3|deepseek.?r1", source="DeepSeek-AI 2024 (DeepSeek-V3)", shared_experts=1, dense_first_layers=3, like="deepseek-v3"),
    Family(pattern=r"deepseek.?v?2", source="DeepSeek-AI 2024 (DeepSeek-V2)", not_simulated="latent attention is known for DeepSeek-V3 only"),
    Family(pattern=r"qwen.?3", source="Qwen team 2025 (Qwen3), checkpoints' config.json", head_dim=128),
    Family(pattern=r"(llama|mistral|mixtral|qwen|yi-|deepseek|code.?llama|vicuna|baichuan|internlm)", source="Touvron et al. 2023 (Llama 2)"),
    Family(pattern=r"mpt", source="mosaicml/llm-foundry llmfoundry/models/mpt: learned positions, biases and a tied head in the benchmarks", norm="layer_norm", activation="gelu",
           positions="learned", bias=True, tied=True),
    Family(pattern=r"nemotron", source="NVIDIA 2024 (Nemotron-4 15B), section 2", norm="layer_norm", activation="gelu"),
    Family(pattern=r"falcon", source="Almazrouei et al. 2023", norm="layer_norm", activation="gelu", tied=True),
    _GPT,
)  # fmt: skip
"""In the order in which they are tried."""


def model_of(row: PublishedRow, facts: FrameworkFacts, *, layers: int | None, tp: int) -> TransformerConfig:
    """The configuration of a row's model.

    Args:
        row: as published.
        facts: of its framework.
        layers: where the row itself leaves them blank.
        tp: degree for which the vocabulary is padded.

    Raises:
        InputError: the family is unknown or not generated, a size is missing, or sizes break a rule.
    """
    family = family_of(row.text("model"))
    hidden = row.required("hidden")
    heads = row.count("n_heads") or facts.heads or _heads_for(hidden, tp)
    dense, expert = _widths(row, hidden)
    config = TransformerConfig(
        name=row.text("model"), source=family.source, layers=layers or row.required("n_layers"), hidden=hidden, heads=heads, kv_heads=row.count("n_kv_heads") or heads,
        ffn=dense, vocab=padded_vocab(row, facts, tp=tp), max_positions=row.required("seq_len"), head_dim=family.head_dim, norm=family.norm, activation=family.activation,
        positions=family.positions, bias=family.bias, tied=family.tied if facts.tied is None else facts.tied, dropout=facts.dropout if family.dropout else 0.0,
    )  # fmt: skip
    num_experts = row.count("moe_experts")
    if not num_experts:
        return config
    return _with_experts(config, row, family, num_experts=num_experts, width=expert)


def family_of(model: str) -> Family:
    """The family of a model's name.

    Raises:
        InputError: no family is known by that name, or it is not generated.
    """
    found = next((family for family in FAMILIES if re.search(family.pattern, model.lower())), None)
    if found is None:
        rule = "no family of models is known by this name, so norm, activation and positions are not known"
        raise InputError(
            source="row", key="model", value=model, rule=rule, remedy="name GPT, Llama, Mixtral, Qwen, DeepSeek-V3 or MPT"
        )
    if found.not_simulated:
        raise InputError(source="row", key="model", value=model, rule=found.not_simulated)
    return found


def padded_vocab(row: PublishedRow, facts: FrameworkFacts, *, tp: int) -> int:
    """Rows of the embedding's table: the stated vocabulary, or the framework's, padded as the framework does.

    Raises:
        InputError: neither states one.
    """
    vocab = row.count("vocab") or facts.vocab
    if not vocab:
        vocab = row.required("vocab")
    multiple = facts.vocab_multiple * tp if facts.vocab_multiple > 1 else 1
    return -(-vocab // multiple) * multiple


def _heads_for(hidden: int, tp: int) -> int:
    """Heads of a width next to `HEAD_WIDTH` that divide what they must."""
    fitting = [heads for heads in range(tp, hidden // 8 + 1, tp) if hidden % heads == 0]
    if not fitting:
        raise InputError(
            source="row", key="hidden", value=hidden, rule=f"no number of heads divides hidden and is divided by tp = {tp}"
        )
    return min(fitting, key=lambda heads: abs(hidden / heads - HEAD_WIDTH))


def _widths(row: PublishedRow, hidden: int) -> tuple[int, int]:
    """Width of the plain network, and of one expert; ``18432 dense / 2048 expert`` and ``moe 768`` are read as they stand."""
    text = row.text("ffn")
    numbers = [int(number) for number in re.findall(r"\d+", text.replace(".0", ""))]
    if not numbers:
        return 4 * hidden, 4 * hidden
    return numbers[0], numbers[-1]


def _with_experts(
    config: TransformerConfig, row: PublishedRow, family: Family, *, num_experts: int, width: int
) -> TransformerConfig:
    preset = PRESETS.get(family.like)
    stated = re.search(r"dense_layers\s*=\s*(\d+)", row.text("notes"))
    experts = Experts(
        num_experts=num_experts, top_k=row.required("moe_topk"), ffn=width, num_shared=family.shared_experts,
        dense_first_layers=int(stated[1]) if stated else family.dense_first_layers, router=preset.experts.router if preset and preset.experts else "softmax",
    )  # fmt: skip
    return replace(config, experts=experts, latent=preset.latent if preset else None)
