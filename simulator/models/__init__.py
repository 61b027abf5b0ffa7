"""Models by name: modules in plain torch, ``transformers`` and ``neuraloperator`` that are traced and replayed.

Importing this package imports no torch; `build` imports the one module that it needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from hardware_models.errors import InputError, UnknownNameError

SizeKey = Literal["seq_len", "size"]

_INSTALL = MappingProxyType({"transformers": "demo", "neuralop": "demo"})
"""Importable name of an optional dependency -> extra of this project that brings it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One named model: where its factory is, and what it is built with unless told otherwise."""

    name: str
    target: str
    """``module:function``; the function returns ``(nn.Module, example inputs)``."""
    batch: int
    size_key: SizeKey
    """``seq_len`` (tokens) or ``size`` (points along each spatial axis)."""
    size: int
    summary: str
    needs: str = ""
    """Importable name of the optional dependency that the factory uses."""
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Keyword arguments that tell this model from the others of its factory."""

    @property
    def options(self) -> tuple[str, ...]:
        """Keywords that `build` takes for this model."""
        return (
            ("batch", self.size_key, "dropout")
            if self.target.startswith("simulator.models.hugging_face")
            else ("batch", self.size_key)
        )


def _image(name: str, target: str, summary: str, *, batch: int = 8, size: int = 224, **arguments: Any) -> ModelEntry:
    return ModelEntry(
        name=name, target=f"simulator.models.{target}", batch=batch, size_key="size", size=size, summary=summary,
        arguments=MappingProxyType(arguments),
    )  # fmt: skip


def _language(
    name: str, target: str, summary: str, *, seq_len: int = 1024, batch: int = 4, needs: str = "", **arguments: Any
) -> ModelEntry:
    return ModelEntry(
        name=name, target=f"simulator.models.{target}", batch=batch, size_key="seq_len", size=seq_len, summary=summary,
        needs=needs, arguments=MappingProxyType(arguments),
    )  # fmt: skip


def _gpt2(name: str, summary: str) -> ModelEntry:
    return _language(name, "hugging_face:gpt2", summary, needs="transformers", checkpoint=name)


def _bert(name: str, summary: str) -> ModelEntry:
    return _language(name, "hugging_face:bert", summary, needs="transformers", seq_len=512, checkpoint=name)


def _operator(name: str, function: str, summary: str, *, size: int, batch: int = 4, needs: str = "neuralop") -> ModelEntry:
    return ModelEntry(
        name=name, target=f"simulator.models.{function}", batch=batch, size_key="size", size=size, summary=summary, needs=needs
    )


MODELS: Mapping[str, ModelEntry] = MappingProxyType({
    entry.name: entry
    for entry in (
        _image("resnet18", "resnet:resnet18", "ResNet-18, 1000 classes (He et al. 2015)"),
        _image("resnet50", "resnet:resnet50", "ResNet-50 v1.5, 1000 classes (He et al. 2015)"),
        _image("vit-s16", "vit:vit_s16", "ViT-S/16, 1000 classes (Touvron et al. 2021)"),
        _image("vit-b16", "vit:vit_b16", "ViT-B/16, 1000 classes (Dosovitskiy et al. 2021)"),
        _image("unet2d", "unet:unet2d", "U-Net, 3 channels to 2 classes (Ronneberger et al. 2015)", batch=2, size=256),
        _operator("fno1d-plain", "fno:fno1d", "FNO 1-D in plain torch (Li et al. 2021)", size=1024, needs=""),
        _operator("fno2d-plain", "fno:fno2d", "FNO 2-D in plain torch (Li et al. 2021)", size=64, needs=""),
        _operator("fno3d-plain", "fno:fno3d", "FNO 3-D in plain torch (Li et al. 2021)", size=32, batch=1, needs=""),
        _operator("fno2d", "neural_operators:fno2d", "neuraloperator FNO 2-D, 32 x 32 modes, 64 channels, 4 layers", size=64),
        _operator("fno3d-256", "fno:fno3d", "FNO 3-D in plain torch on 256 x 256 x 256 points: one sample is beyond most devices", size=256, batch=1, needs=""),
        _operator("tfno2d", "neural_operators:tfno2d", "neuraloperator TFNO 2-D, Tucker weights of rank 0.1", size=64),
        _language("gpt-small", "gpt:gpt_small", "GPT-2 small's shape in plain torch, tied head, no dropout"),
        _language("llama-small", "gpt:llama_small", "a 12-layer Llama shape in plain torch: RMSNorm, SwiGLU, rotary, 4 key-value heads"),
        _language("gpt-xl", "gpt:gpt_xl", "GPT-2 XL's shape in plain torch, tied head, no dropout"),
        _language("llama-1b", "gpt:llama_1b", "Llama 3.2 1B's shape in plain torch, its head not tied", seq_len=2048, batch=1),
        _language("llama-8b", "gpt:llama_8b", "Llama 3 8B's shape in plain torch: traced where the preset llama3-8b is generated", seq_len=2048, batch=1),
        _gpt2("gpt2", "transformers GPT-2 small, 124M (Radford et al. 2019)"),
        _gpt2("gpt2-medium", "transformers GPT-2 medium, 355M (Radford et al. 2019)"),
        _gpt2("gpt2-large", "transformers GPT-2 large, 774M (Radford et al. 2019)"),
        _gpt2("gpt2-xl", "transformers GPT-2 XL, 1.56B (Radford et al. 2019)"),
        _bert("bert-base", "transformers BERT base, masked language model (Devlin et al. 2019)"),
        _bert("bert-large", "transformers BERT large, masked language model (Devlin et al. 2019)"),
    )
})  # fmt: skip
"""Every named model."""


def model_entry(name: str) -> ModelEntry:
    """The entry of a named model.

    Raises:
        UnknownNameError: no such model; lists the known ones.
    """
    if name not in MODELS:
        raise UnknownNameError(source="models", key="name", value=name, known=tuple(MODELS))
    return MODELS[name]


def build(
    name: str, *, batch: int | None = None, seq_len: int | None = None, size: int | None = None, dropout: float | None = None
) -> tuple[Any, dict[str, Any]]:
    """A named model and inputs for it: ``(nn.Module in training mode, keyword arguments of its forward pass)``.

    Weights are drawn from torch's current generator; build under a fake tensor mode to spend no memory on them.

    Args:
        name: a key of `MODELS`.
        batch: samples in the inputs.
        seq_len: tokens per sample, for models of sequences.
        size: points along each spatial axis, for models of images and fields.
        dropout: probability of every dropout of a ``transformers`` model; default: its published configuration's.

    Raises:
        InputError: a keyword that the model does not take, a size below 1, or a missing optional dependency.
    """
    entry = model_entry(name)
    given = {"batch": batch, "seq_len": seq_len, "size": size, "dropout": dropout}
    chosen: dict[str, Any] = {"batch": entry.batch, entry.size_key: entry.size}
    for key, value in given.items():
        if value is None:
            continue
        if key not in entry.options:
            raise InputError(
                source=f"model {name}", key=key, value=value, rule=f"{name} takes only " + ", ".join(entry.options),
                remedy="leave it out",
            )  # fmt: skip
        if key != "dropout" and value < 1:
            raise InputError(source=f"model {name}", key=key, value=value, rule="must be at least 1")
        if key == "dropout" and not 0 <= value < 1:
            raise InputError(source=f"model {name}", key=key, value=value, rule="must lie in [0, 1)")
        chosen[key] = value
    module_name, function = entry.target.split(":")
    if entry.needs:
        _require(entry.needs, name)
    factory = getattr(importlib.import_module(module_name), function)
    module, inputs = factory(**entry.arguments, **chosen)
    return module, inputs


def _require(package: str, model: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(
            source=f"model {model}", key="package", value=package, rule="this model is built by a package that is not installed",
            remedy=f"pip install 'schedlab[{_INSTALL[package]}]'",
        ) from error  # fmt: skip
