"""Small decoders and encoders, and modules that cannot be split, as ``package.module:function``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulator.models.gpt import Decoder
from simulator.models.losses import image_inputs, token_inputs
from simulator.models.vit import VisionTransformer

VOCAB = 101  # odd: ranks hold unequal parts


def _decoder(*, llama: bool, batch: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    kv_heads = 2 if llama else 4
    module = Decoder(layers=2, hidden=64, heads=4, kv_heads=kv_heads, ffn=128, vocab=VOCAB, max_positions=16, llama=llama)
    return module, token_inputs(batch=batch, seq_len=16, vocab=VOCAB)


def gpt(batch: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    """Tied head, 4 heads."""
    return _decoder(llama=False, batch=batch)


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """4 heads over 2 key-value heads."""
    return _decoder(llama=True)


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """4 heads, 5 tokens."""
    module = VisionTransformer(size=32, hidden=64, layers=2, heads=4, num_classes=10)
    return module, image_inputs(batch=4, size=32, num_classes=10)


class _SharedLayers(nn.Module):
    """One table in two entries of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def shared() -> tuple[nn.Module, dict[str, Tensor]]:
    """Two units share a parameter."""
    return _SharedLayers(), {"x": torch.randn(4, 8)}
