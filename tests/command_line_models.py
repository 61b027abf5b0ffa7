"""Models that the tests name on the command line as ``package.module:function``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if y.sum().item() > 0 else -y


def residual_mlp(batch: int = 4) -> tuple[nn.Module, Tensor]:
    """Four residual layers on vectors."""
    return nn.Sequential(*(_Residual(32) for _ in range(4))), torch.randn(batch, 16, 32)


def branching() -> tuple[nn.Module, Tensor]:
    """Cannot be traced: its path depends on an activation."""
    return _Branching(), torch.randn(2, 4)
