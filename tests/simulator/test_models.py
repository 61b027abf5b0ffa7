"""Models by name: sizes as published, a scalar loss with gradients, errors that say what would do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hardware_models.errors import InputError, UnknownNameError
from simulator.models import MODELS, build, model_entry
from simulator.models.gpt import Decoder

PUBLISHED_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vit-s16": 22_050_664,
    "vit-b16": 86_567_656,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_514_298,
    "gpt-small": 124_439_808,
    "llama-8b": 8_030_261_248,
}
SMALL = {"resnet18": 32, "fno1d-plain": 32, "fno2d-plain": 24, "fno3d-plain": 16, "fno2d": 16}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small_decoder(*, llama: bool) -> Decoder:
    return Decoder(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=50, max_positions=16, llama=llama)


@pytest.mark.parametrize(("name", "expected"), PUBLISHED_PARAMETERS.items())
def test_parameters_are_the_published_ones(name: str, expected: int) -> None:
    with FakeTensorMode():
        module, _ = build(name, batch=1)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


LARGE = frozenset({"gpt2-medium", "gpt2-large", "gpt2-xl", "bert-large", "llama-8b"})
"""Deeper than others of their family, not different."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in MODELS])
def test_every_model_gives_a_scalar_loss_under_fake_tensors(name: str) -> None:
    with FakeTensorMode():
        module, inputs = build(name, batch=2)
        output = module(**inputs)
        loss = getattr(output, "loss", output)
        loss.backward()
    assert loss.ndim == 0
    assert module.training
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(("name", "size"), SMALL.items())
def test_a_small_model_runs_for_real(name: str, size: int) -> None:
    module, inputs = build(name, batch=2, **{MODELS[name].size_key: size})
    output = module(**inputs)
    loss = getattr(output, "loss", output)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_spectral_convolution_keeps_a_low_mode_and_drops_a_high_one() -> None:
    from simulator.models.fno import SpectralConvolution

    layer = SpectralConvolution(1, (4, 4))
    with torch.no_grad():
        layer.weight.fill_(1.0)
    points = torch.arange(32) * (2 * torch.pi / 32)
    low = torch.cos(2 * points)[None, None, :, None] * torch.cos(3 * points)
    high = torch.cos(2 * points)[None, None, :, None] * torch.cos(9 * points)
    torch.testing.assert_close(layer(low), low, atol=1e-5, rtol=0)
    torch.testing.assert_close(layer(high), torch.zeros_like(high), atol=1e-5, rtol=0)


@pytest.mark.parametrize("llama", [False, True])
def test_decoder_is_causal_and_learns(llama: bool) -> None:
    module = small_decoder(llama=llama)
    tokens = torch.randint(0, 50, (2, 6))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 50
    with torch.no_grad():
        torch.testing.assert_close(module(tokens)[:, :-1], module(changed)[:, :-1])
    loss = module(tokens, tokens)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="models: name = 'resnet51': unknown name; known are resnet18, resnet50"):
        model_entry("resnet51")


def test_a_keyword_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="model resnet50: seq_len = 128: resnet50 takes only batch, size; leave it out"):
        build("resnet50", seq_len=128)


def test_sizes_must_fit_the_model() -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        build("resnet18", batch=0)
    with pytest.raises(InputError, match=r"size % 16 == 0 must hold .*; use 208"):
        build("vit-b16", size=215)
    with pytest.raises(InputError, match="seq_len <= 1024 learned positions must hold"):
        build("gpt2", seq_len=2048)
    with pytest.raises(InputError, match=r"must lie in \[0, 1\)"):
        build("gpt2", dropout=1.0)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuralop", None)
    with pytest.raises(InputError, match=r"'neuralop': this model is built by a package .*pip install 'schedlab\[demo\]'"):
        build("fno2d")


def test_importing_the_table_imports_no_torch() -> None:
    code = "import sys, simulator.models; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
