"""Two-dimensional U-Net in plain torch: four levels down, four up, a skip at each level.

Source: Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation", figure 1; convolutions padded and
batch normalised, as usual since.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from hardware_models.errors import InputError

BASE_CHANNELS = 64
NUM_LEVELS = 4
NUM_CLASSES = 2


def _double_convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        steps += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*steps)


class UNet(nn.Module):
    """Labels every pixel; returns the cross entropy when given labels, else logits (batch, classes, height, width)."""

    def __init__(self, *, in_channels: int = 3, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        widths = [BASE_CHANNELS * 2**level for level in range(NUM_LEVELS + 1)]
        self.down = nn.ModuleList(_double_convolution(a, b) for a, b in zip([in_channels, *widths], widths, strict=False))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in reversed(widths[:-1]))
        self.up = nn.ModuleList(_double_convolution(2 * width, width) for width in reversed(widths[:-1]))
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Args: images: (batch, channels, height, width), labels: (batch, height, width) class indices."""
        skips: list[Tensor] = []
        x = images
        for level, step in enumerate(self.down):
            x = step(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for grow, step in zip(self.grow, self.up, strict=True):
            x = step(torch.cat((skips.pop(), grow(x)), dim=1))
        logits: Tensor = self.head(x)
        return logits if labels is None else F.cross_entropy(logits, labels)


def unet2d(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """U-Net and random images of ``size`` x ``size``."""
    step = 2**NUM_LEVELS
    if size % step:
        raise InputError(
            source="model unet2d", key="size", value=size, rule=f"size % {step} == 0 must hold ({NUM_LEVELS} halvings)",
            remedy=f"use {max(1, size // step) * step}",
        )  # fmt: skip
    labels = torch.randint(0, NUM_CLASSES, (batch, size, size))
    return UNet(), {"images": torch.randn(batch, 3, size, size), "labels": labels}
