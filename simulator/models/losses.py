"""Losses that turn a network's output and targets into one scalar."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def relative_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of ``||prediction - target|| / ||target||``.

    Args:
        prediction: (batch, channels, points...).
        target: the same shape.

    Source: Li et al. 2021, "Fourier Neural Operator for Parametric PDEs", section 5 (relative error as the training loss).
    """
    difference = (prediction - target).flatten(1)
    error: Tensor = (difference.norm(dim=1) / target.flatten(1).norm(dim=1)).mean()
    return error


class OperatorWithLoss(nn.Module):
    """A map between fields that returns its relative L2 error when given the target field, else its prediction."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Args: x: (batch, channels, points...), y: the target of the output's shape."""
        prediction: Tensor = self.network(x)
        return prediction if y is None else relative_l2(prediction, y)


def image_inputs(*, batch: int, size: int, num_classes: int) -> dict[str, Tensor]:
    """Random RGB images (batch, 3, size, size) and class labels (batch,)."""
    return {"images": torch.randn(batch, 3, size, size), "labels": torch.randint(0, num_classes, (batch,))}


def field_inputs(*, batch: int, points: Sequence[int], in_channels: int, out_channels: int) -> dict[str, Tensor]:
    """Random input and target fields (batch, channels, points...)."""
    return {"x": torch.randn(batch, in_channels, *points), "y": torch.randn(batch, out_channels, *points)}


def token_inputs(*, batch: int, seq_len: int, vocab: int) -> dict[str, Tensor]:
    """Random tokens (batch, seq_len), and the same as labels; the models shift them."""
    tokens = torch.randint(0, vocab, (batch, seq_len))
    return {"input_ids": tokens, "labels": tokens.clone()}
