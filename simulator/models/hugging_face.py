"""``transformers`` models built from their published configurations: nothing is downloaded, weights are random.

Source: the configurations of the checkpoints ``openai-community/gpt2*`` and ``google-bert/bert-*`` (sizes as in Radford et al. 2019,
table 2, and Devlin et al. 2019, section 3).
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from hardware_models.errors import InputError
from simulator.models.losses import token_inputs

GPT2_SHAPES = MappingProxyType(
    {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}
)
"""Layers, hidden size, heads."""
BERT_SHAPES = MappingProxyType({"bert-base": (12, 768, 12), "bert-large": (24, 1024, 16)})
"""Layers, hidden size, heads."""
BERT_MLP_RATIO = 4


def gpt2(*, checkpoint: str, batch: int, seq_len: int, dropout: float | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """``GPT2LMHeadModel`` of a published size, in training mode, with tokens and labels."""
    transformers: Any = importlib.import_module("transformers")
    layers, hidden, heads = GPT2_SHAPES[checkpoint]
    config = transformers.GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads, use_cache=False)
    if dropout is not None:
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    return _language_model(transformers.GPT2LMHeadModel, config, name=checkpoint, batch=batch, seq_len=seq_len)


def bert(*, checkpoint: str, batch: int, seq_len: int, dropout: float | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """``BertForMaskedLM`` of a published size, in training mode, with tokens and labels."""
    transformers: Any = importlib.import_module("transformers")
    layers, hidden, heads = BERT_SHAPES[checkpoint]
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=BERT_MLP_RATIO * hidden
    )
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return _language_model(transformers.BertForMaskedLM, config, name=checkpoint, batch=batch, seq_len=seq_len)


def _language_model(
    model_class: Any, config: Any, *, name: str, batch: int, seq_len: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    longest = int(config.max_position_embeddings)
    if seq_len > longest:
        raise InputError(
            source=f"model {name}", key="seq_len", value=seq_len, rule=f"seq_len <= {longest} learned positions must hold",
            remedy=f"use {longest} or less",
        )  # fmt: skip
    module: nn.Module = model_class(config).train()
    return module, token_inputs(batch=batch, seq_len=seq_len, vocab=int(config.vocab_size))
