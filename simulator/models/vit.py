"""Vision transformer in plain torch: patches, class token, learned positions, pre-norm encoder, linear head.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1 and table 1 (Base); Touvron et al. 2021, "Training
data-efficient image transformers", table 1 (Small). 86,567,656 parameters for B/16 and 22,050,664 for S/16 at 224 x 224.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from hardware_models.errors import InputError
from simulator.models.losses import image_inputs

PATCH = 16
MLP_RATIO = 4
NUM_CLASSES = 1000
NORM_EPSILON = 1e-6


class EncoderLayer(nn.Module):
    """Self-attention and a GELU network, each behind a layer norm and beside a residual; takes as many heads as ``qkv`` gives, so that they may be split."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.attention_norm = nn.LayerNorm(hidden, eps=NORM_EPSILON)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.projection = nn.Linear(hidden, hidden)
        self.mlp_norm = nn.LayerNorm(hidden, eps=NORM_EPSILON)
        self.up = nn.Linear(hidden, MLP_RATIO * hidden)
        self.down = nn.Linear(MLP_RATIO * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (batch, tokens, hidden)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + self.projection(mixed)
        y: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return y


class VisionTransformer(nn.Module):
    """A classifier of images; returns the cross entropy when given labels, else logits (batch, classes)."""

    def __init__(self, *, size: int, hidden: int, layers: int, heads: int, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, hidden, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // PATCH) ** 2 + 1, hidden))
        self.layers = nn.Sequential(*(EncoderLayer(hidden, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPSILON)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Args: images: (batch, 3, size, size), labels: (batch,) class indices."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        x = self.norm(self.layers(x))
        logits: Tensor = self.head(x[:, 0])
        return logits if labels is None else F.cross_entropy(logits, labels)


def _vit(*, batch: int, size: int, hidden: int, heads: int) -> tuple[nn.Module, dict[str, Tensor]]:
    if size % PATCH:
        raise InputError(
            source="model vit", key="size", value=size, rule=f"size % {PATCH} == 0 must hold (patches of {PATCH} x {PATCH})",
            remedy=f"use {max(1, size // PATCH) * PATCH}",
        )  # fmt: skip
    module = VisionTransformer(size=size, hidden=hidden, layers=12, heads=heads)
    return module, image_inputs(batch=batch, size=size, num_classes=NUM_CLASSES)


def vit_s16(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-S/16 and random images."""
    return _vit(batch=batch, size=size, hidden=384, heads=6)


def vit_b16(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-B/16 and random images."""
    return _vit(batch=batch, size=size, hidden=768, heads=12)
