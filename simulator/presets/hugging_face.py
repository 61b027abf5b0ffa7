"""A Hugging Face ``config.json`` on disk -> a `TransformerConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.text_files import json_of, text_of
from simulator.presets.config import Activation, Experts, TransformerConfig

_MISSING: Any = object()


class _Keys:
    """Reads a configuration's keys and says which file and key is wrong."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def integer(self, key: str, default: Any = _MISSING) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(source=str(self.path), key=key, value=value, rule="must be a whole number of at least 0")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(source=str(self.path), key=key, value=value, rule="must be a number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise InputError(source=str(self.path), key=key, value=value, rule="must be true or false")
        return value

    def activation(self, key: str, default: str, known: Mapping[str, Activation]) -> Activation:
        value = self._get(key, default)
        if value not in known:
            raise UnknownNameError(source=str(self.path), key=key, value=value, known=tuple(known))
        return known[value]

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is _MISSING:
            raise InputError(source=str(self.path), key=key, value=None, rule="this key is required", remedy=f"add {key}")
        return value


_GPT2_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"gelu_new": "gelu_new", "gelu": "gelu", "gelu_pytorch_tanh": "gelu"}
)
_GATED_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({"silu": "swiglu"})


def _gpt2(keys: _Keys, name: str) -> TransformerConfig:
    hidden = keys.integer("n_embd")
    return TransformerConfig(
        name=name, source=str(keys.path), layers=keys.integer("n_layer"), hidden=hidden, heads=keys.integer("n_head"),
        ffn=keys.integer("n_inner", 4 * hidden), vocab=keys.integer("vocab_size"), max_positions=keys.integer("n_positions"),
        activation=keys.activation("activation_function", "gelu_new", _GPT2_ACTIVATIONS), dropout=keys.number("resid_pdrop", 0.1),
        tied=keys.flag("tie_word_embeddings", default=True),
    )  # fmt: skip


def _llama(keys: _Keys, name: str) -> TransformerConfig:
    heads = keys.integer("num_attention_heads")
    return TransformerConfig(
        name=name, source=str(keys.path), layers=keys.integer("num_hidden_layers"), hidden=keys.integer("hidden_size"), heads=heads,
        kv_heads=keys.integer("num_key_value_heads", heads), head_dim=keys.integer("head_dim", 0), ffn=keys.integer("intermediate_size"),
        vocab=keys.integer("vocab_size"), max_positions=keys.integer("max_position_embeddings"), norm="rms_norm",
        activation=keys.activation("hidden_act", "silu", _GATED_ACTIVATIONS), positions="rotary", bias=_bias(keys),
        tied=keys.flag("tie_word_embeddings", default=False), fused_qkv=False, softmax_float32=True,
        dropout=_no_dropout(keys), experts=_experts(keys),
    )  # fmt: skip


def _bias(keys: _Keys) -> bool:
    attention, network = keys.flag("attention_bias", default=False), keys.flag("mlp_bias", default=False)
    if attention != network:
        raise InputError(
            source=str(keys.path), key="mlp_bias", value=network, rule=f"mlp_bias == attention_bias = {attention} must hold"
        )
    return attention


def _no_dropout(keys: _Keys) -> float:
    value = keys.number("attention_dropout", 0.0)
    if value:
        raise InputError(
            source=str(keys.path), key="attention_dropout", value=value, rule="attention_dropout == 0 must hold for this family"
        )
    return value


def _experts(keys: _Keys) -> Experts | None:
    if keys.values["model_type"] != "mixtral":
        return None
    return Experts(
        num_experts=keys.integer("num_local_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        ffn=keys.integer("intermediate_size"),
        imbalance=keys.number("moe_imbalance", 1.0),
        capacity_factor=keys.number("moe_capacity_factor", 0.0),
    )


def _bert(keys: _Keys, name: str) -> TransformerConfig:
    return TransformerConfig(
        name=name, source=str(keys.path), layers=keys.integer("num_hidden_layers"), hidden=keys.integer("hidden_size"),
        heads=keys.integer("num_attention_heads"), ffn=keys.integer("intermediate_size"), vocab=keys.integer("vocab_size"),
        max_positions=keys.integer("max_position_embeddings"), activation=keys.activation("hidden_act", "gelu", MappingProxyType({"gelu": "gelu"})),
        fused_qkv=False, dropout=keys.number("hidden_dropout_prob", 0.1), post_norm=True, token_types=keys.integer("type_vocab_size", 2),
        head="masked_lm",
    )  # fmt: skip


_READERS: Mapping[str, Callable[[_Keys, str], TransformerConfig]] = MappingProxyType(
    {"gpt2": _gpt2, "llama": _llama, "mistral": _llama, "mixtral": _llama, "bert": _bert}
)


def load_config(path: str | Path, *, name: str = "") -> TransformerConfig:
    """The configuration in a Hugging Face ``config.json``.

    Args:
        path: the file, or the folder that holds it.
        name: the model's name in reports; default: the folder's name.

    Raises:
        InputError: no such file, no JSON object, a missing key or one of the wrong type.
        UnknownNameError: a ``model_type`` or activation that is not generated; lists those that are.

    Keys of ours beside Hugging Face's, for mixtures of experts: ``moe_imbalance`` and ``moe_capacity_factor`` (`Experts`).

    Not modelled: sliding windows (attention is counted in full), scaled rotary positions (same work).
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    values = json_of(text_of(file, remedy="give the path of a config.json"), source=str(file))
    if not isinstance(values, dict):
        raise InputError(source=str(file), key="", value=None, rule="must hold one JSON object")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        remedy = "trace the model instead: package.module:function"
        raise UnknownNameError(source=str(file), key="model_type", value=kind, known=tuple(_READERS), remedy=remedy)
    return _READERS[kind](_Keys(values, file), name or file.resolve().parent.name)
