"""ResNet in plain torch: stem, four stages of residual blocks, pooled linear head.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", table 1; the stride of a bottleneck sits on its 3 x 3
convolution ("v1.5"), as in the widespread implementations. 25,557,032 parameters for ResNet-50 and 11,689,512 for ResNet-18.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from simulator.models.losses import image_inputs

STAGE_WIDTHS = (64, 128, 256, 512)
NUM_CLASSES = 1000


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch normalisation."""
    padding = kernel // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions (basic), or 1 x 1, 3 x 3, 1 x 1 with four times the width out (bottleneck), plus a shortcut."""

    def __init__(self, in_channels: int, width: int, *, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.out_channels = 4 * width if bottleneck else width
        if bottleneck:
            steps = [
                _convolution(in_channels, width, 1),
                _convolution(width, width, 3, stride),
                _convolution(width, 4 * width, 1),
            ]
        else:
            steps = [_convolution(in_channels, width, 3, stride), _convolution(width, width, 3)]
        self.steps = nn.ModuleList(steps)
        changes_shape = stride != 1 or in_channels != self.out_channels
        self.shortcut = _convolution(in_channels, self.out_channels, 1, stride) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (batch, in_channels, height, width)."""
        y = x
        for index, step in enumerate(self.steps):
            y = step(y)
            if index < len(self.steps) - 1:
                y = F.relu(y, inplace=True)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """A classifier of images; returns the cross entropy when given labels, else logits (batch, classes)."""

    def __init__(self, *, depths: tuple[int, ...], bottleneck: bool, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.stem = _convolution(3, STAGE_WIDTHS[0], 7, 2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = STAGE_WIDTHS[0]
        blocks: list[nn.Module] = []
        for stage, (depth, width) in enumerate(zip(depths, STAGE_WIDTHS, strict=True)):
            for index in range(depth):
                block = ResidualBlock(channels, width, stride=2 if stage and index == 0 else 1, bottleneck=bottleneck)
                channels = block.out_channels
                blocks.append(block)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Args: images: (batch, 3, height, width), labels: (batch,) class indices."""
        y = self.pool(F.relu(self.stem(images), inplace=True))
        y = self.blocks(y)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return logits if labels is None else F.cross_entropy(logits, labels)


def resnet18(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """ResNet-18 and random images of ``size`` x ``size``."""
    module = ResNet(depths=(2, 2, 2, 2), bottleneck=False)
    return module, image_inputs(batch=batch, size=size, num_classes=NUM_CLASSES)


def resnet50(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """ResNet-50 and random images of ``size`` x ``size``."""
    module = ResNet(depths=(3, 4, 6, 3), bottleneck=True)
    return module, image_inputs(batch=batch, size=size, num_classes=NUM_CLASSES)
