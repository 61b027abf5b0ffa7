"""Small modules, each with one trait that tracing, lowering or running could get wrong."""

# ruff: noqa: D101, D102, N812 - the traits stand in the class docstrings, forward is forward, F is torch's own convention

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simulator.tracing.trace import Traced, trace
from simulator.tracing.traced_model import micro_batches

BATCH = 6
WIDTH = 48
TOKENS = 16
VOCAB = 40
HEADS = 4
POINTS = 32


class ResidualLayer(nn.Module):
    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class ResidualMlp(nn.Module):
    """Layer norm, dropout, a residual around each layer; the loss is the mean square of the output."""

    def __init__(self, layers: int = 4, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(ResidualLayer(width, dropout) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class ConvolutionLayer(nn.Module):
    def __init__(self, channels: int, *, skip: bool) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.activation, self.skip = nn.ReLU(inplace=True), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.convolution(x))
        if self.skip:
            y += x
        return self.activation(y)


class ConvolutionNet(nn.Module):
    """Batch normalisation and activations in place, on the boundaries too."""

    def __init__(self, channels: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.layers = nn.ModuleList(ConvolutionLayer(channels, skip=index % 2 == 1) for index in range(layers))
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = F.relu(self.stem(images), inplace=True)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)


class AttentionLayer(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network, self.dropout = ResidualLayer(width, dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(self.norm(x)).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        query, key = (part * tables[0] + part.roll(1, -1) * tables[1] for part in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.network(x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))))


class Transformer(nn.Module):
    """Tied embedding; rotary tables and a mask made in the forward pass and used by every layer."""

    def __init__(self, layers: int = 3, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(AttentionLayer(width, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("frequencies", 1.0 / 100 ** torch.linspace(0, 1, width // HEADS), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        angles = positions[:, None] * self.frequencies
        tables = angles.cos(), angles.sin()
        mask = positions[:, None] >= positions
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, tables, mask)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class Cube(torch.autograd.Function):
    """A user's own function: its backward is not what autograd would derive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * 2 * x**2


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(Cube.apply(self.first(x))))


class NoGradRegion(nn.Module):
    """Every layer scales by a value that is taken from its activations under ``no_grad``."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            with torch.no_grad():
                scale = y.abs().amax(dim=-1, keepdim=True)
            x = torch.tanh(y / (1 + scale))
        return x


class SkipOverEverything(nn.Module):
    """One tensor that needs a gradient is alive from the start to the end: no cut."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return x + self.second(F.gelu(self.first(x)))


class CachedAttribute(nn.Module):
    """A table is computed in the first forward pass and kept on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ResidualLayer(dropout=0.0) for _ in range(2))
        self.table: Tensor | None = None
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        for layer in self.layers:
            x = layer(x + self.table)
        return x


class SpectralLayer(nn.Module):
    def __init__(self, channels: int = 8, modes: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.cfloat) / channels)
        self.skip, self.modes = nn.Conv1d(channels, channels, 1), modes

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        mixed = torch.zeros_like(spectrum)
        mixed[..., : self.modes] = torch.einsum("bim,iom->bom", spectrum[..., : self.modes], self.weight)
        return F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.skip(x))


class Spectral(nn.Module):
    """Complex weights between Fourier transforms."""

    def __init__(self, channels: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.lift = nn.Conv1d(1, channels, 1)
        self.layers = nn.Sequential(*(SpectralLayer(channels) for _ in range(layers)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.layers(self.lift(x)).mean(1) - y).square().mean()


class TupleOutput(ResidualMlp):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y.square().mean(), y, {"more": [x]}


class DictOutput(ResidualMlp):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"logits": y, "loss": y.abs().mean(), "n": 3}


class UnusedParameter(ResidualMlp):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.randn(WIDTH, WIDTH))


class SharedLayer(nn.Module):
    """One layer run three times, between layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.own:
            x = torch.tanh(self.shared(torch.tanh(layer(x))))
        return x


class ClassToken(nn.Module):
    """What is left of the sequence after its last layer is a view of one token."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(ResidualLayer(dropout=0.0) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0]).logsumexp(-1).mean()


class Transposing(nn.Module):
    """Every layer hands on a transposed view of what it computed."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x)).transpose(1, 2)
        return x


class InPlaceBoundary(nn.Module):
    """A layer changes in place what the layer before it handed on."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x.relu_()
            x = layer(x)
        return x


def _frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_submodule(name).requires_grad_(requires_grad=False)
    return module


def _vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, WIDTH, WIDTH)}


def _tokens() -> dict[str, Tensor]:
    return {"tokens": torch.randint(0, VOCAB, (BATCH, TOKENS)), "labels": torch.randint(0, VOCAB, (BATCH, TOKENS))}


def _images() -> dict[str, Tensor]:
    return {"images": torch.randn(BATCH, 3, 12, 12), "labels": torch.randint(0, 10, (BATCH,))}


def _fields() -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, 1, POINTS), "y": torch.randn(BATCH, POINTS)}


SMALL_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "residual-mlp": (ResidualMlp, _vectors),
    "convolution-net": (ConvolutionNet, _images),
    "transformer": (Transformer, _tokens),
    "own-function": (OwnFunction, _vectors),
    "no-grad-region": (NoGradRegion, _vectors),
    "skip-over-everything": (SkipOverEverything, _vectors),
    "cached-attribute": (CachedAttribute, _vectors),
    "spectral": (Spectral, _fields),
    "tuple-output": (TupleOutput, _vectors),
    "dict-output": (DictOutput, _vectors),
    "unused-parameter": (UnusedParameter, _vectors),
    "shared-layer": (SharedLayer, _vectors),
    "class-token": (ClassToken, _vectors),
    "transposing": (Transposing, _vectors),
    "in-place-boundary": (InPlaceBoundary, _vectors),
    "frozen-first": (lambda: _frozen(ResidualMlp(), "first", "layers.0"), _vectors),
    "frozen-middle": (lambda: _frozen(ResidualMlp(), "layers.1", "layers.2.norm"), _vectors),
    "frozen-embedding": (lambda: _frozen(Transformer(), "embedding"), _tokens),
    "eval-convolution": (lambda: ConvolutionNet().eval(), _images),
    "eval-mlp": (lambda: ResidualMlp().eval(), _vectors),
}
"""By name: (module, inputs of a whole batch)."""


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model with the same weights and inputs each time."""
    torch.manual_seed(0)
    module, inputs = SMALL_MODELS[name]
    return module(), inputs()


@cache
def traced(name: str, num_microbatches: int = 1) -> Traced:
    """The trace of a small model at the micro-batch of a split; made once."""
    module, inputs = build(name)
    return trace(module, micro_batches(inputs, BATCH // num_microbatches)[0], name=name)


def residual_mlp(batch: int = BATCH) -> tuple[nn.Module, dict[str, Tensor]]:
    """A user's factory, as the command line names it."""
    torch.manual_seed(0)
    return ResidualMlp(), {"x": torch.randn(batch, WIDTH, WIDTH)}


def convolution_net() -> tuple[nn.Module, dict[str, Tensor]]:
    """A user's factory without arguments, of a model that mixes samples."""
    return build("convolution-net")


def sized_convolution_net(batch: int = BATCH) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same with as many images as are asked for."""
    torch.manual_seed(0)
    return ConvolutionNet(), {name: value[:1].repeat(batch, *[1] * (value.ndim - 1)) for name, value in _images().items()}
