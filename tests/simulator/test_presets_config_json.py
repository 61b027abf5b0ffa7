"""Hugging Face configurations: files written by `transformers` give the same parameters; bad files say file, key and rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hardware_models.errors import InputError, UnknownNameError
from simulator.presets import build_workload, load_config

SMALL: dict[str, dict[str, Any]] = {
    "GPT2": {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 101, "n_positions": 32, "n_inner": 80},
    "Llama": {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
              "vocab_size": 101, "max_position_embeddings": 64, "tie_word_embeddings": True, "head_dim": 16},
    "Mistral": {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
                "vocab_size": 101},
    "Mixtral": {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
                "vocab_size": 101, "num_local_experts": 4},
    "Bert": {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 101},
}  # fmt: skip
HEADS = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}


@pytest.mark.parametrize("family", SMALL)
def test_a_written_configuration_gives_the_same_parameters(family: str, tmp_path: Path) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**SMALL[family])
    config.save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    workload = build_workload(ours, micro_batch=1, seq_len=16)
    with torch.device("meta"):
        module = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config)
    assert workload.parameter_elements == sum(parameter.numel() for parameter in module.parameters())
    assert ours.name == tmp_path.name


def write(tmp_path: Path, **values: Any) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, model_type="t5")
    with pytest.raises(UnknownNameError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"{path}: model_type = 't5': unknown name; known are gpt2, llama, mistral, mixtral, bert; "
        "trace the model instead: package.module:function"
    )


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, model_type="gpt2", n_embd=48)
    with pytest.raises(InputError, match=r"config\.json: n_layer: this key is required; add n_layer"):
        load_config(path)


@pytest.mark.parametrize(("change", "message"), [
    ({"n_layer": "two"}, "n_layer = 'two': must be a whole number of at least 0"),
    ({"n_head": 5}, r"heads = 5: hidden % heads == 0 must hold, but got 48 % 5 = 3"),
    ({"resid_pdrop": "low"}, "resid_pdrop = 'low': must be a number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
    ({"activation_function": "relu"}, "activation_function = 'relu': unknown name; known are gelu_new, gelu"),
])  # fmt: skip
def test_a_bad_value_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, model_type="gpt2", **{**SMALL["GPT2"], **change})
    with pytest.raises(InputError, match=message):
        load_config(path)


def test_what_the_family_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attention_dropout = 0\.1: attention_dropout == 0 must hold"):
        load_config(write(tmp_path, model_type="llama", attention_dropout=0.1, **SMALL["Llama"]))
    with pytest.raises(InputError, match=r"mlp_bias = True: mlp_bias == attention_bias = False must hold"):
        load_config(write(tmp_path, model_type="llama", mlp_bias=True, **SMALL["Llama"]))


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file; give the path of a config"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json: is not JSON"):
        load_config(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json: must hold one JSON object"):
        load_config(path)
