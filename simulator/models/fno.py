"""Fourier neural operator in one, two or three dimensions, in plain torch.

Source: Li et al. 2021, "Fourier Neural Operator for Parametric Partial Differential Equations", equations 4 and 5: lifting, layers of
``GELU(W v + F^-1(R F v))``, projection; a two-layer channel network after each spectral layer, as in later practice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from hardware_models.errors import InputError
from simulator.models.losses import OperatorWithLoss, field_inputs

LIFTING_RATIO = 2


class SpectralConvolution(nn.Module):
    """Multiplies the lowest modes by a learned complex matrix per mode and drops the rest.

    Args:
        modes: kept frequencies per axis; of every axis but the last both signs are kept, ``modes`` of each.
    """

    def __init__(self, channels: int, modes: Sequence[int]) -> None:
        super().__init__()
        self.modes = tuple(modes)
        corners = 2 ** (len(self.modes) - 1)
        shape = (corners, channels, channels, *self.modes)
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / channels)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (batch, channels, points...)."""
        dims = tuple(range(2, x.ndim))
        spectrum = torch.fft.rfftn(x, dim=dims)
        mixed = torch.zeros_like(spectrum)
        for corner, sides in enumerate(product((False, True), repeat=len(self.modes) - 1)):
            kept = tuple(
                slice(-modes, None) if high else slice(None, modes)
                for high, modes in zip((*sides, False), self.modes, strict=True)
            )
            index = (slice(None), slice(None), *kept)
            mixed[index] = torch.einsum("bi...,io...->bo...", spectrum[index], self.weight[corner])
        result: Tensor = torch.fft.irfftn(mixed, s=x.shape[2:], dim=dims)
        return result


class Pointwise(nn.Module):
    """One linear map of the channels at every point (a convolution of width 1 in any dimension)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (batch, channels, points...)."""
        y: Tensor = self.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return y.reshape(x.shape[0], -1, *x.shape[2:])


class OperatorLayer(nn.Module):
    """Spectral convolution plus pointwise skip, GELU, and a channel network beside its own residual."""

    def __init__(self, channels: int, modes: Sequence[int], *, channel_mlp: bool) -> None:
        super().__init__()
        self.spectral = SpectralConvolution(channels, modes)
        self.skip = Pointwise(channels, channels)
        half = max(1, channels // 2)
        self.channel_mlp = (
            nn.Sequential(Pointwise(channels, half), nn.GELU(), Pointwise(half, channels)) if channel_mlp else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (batch, channels, points...)."""
        y = F.gelu(self.spectral(x) + self.skip(x))
        return y if self.channel_mlp is None else y + self.channel_mlp(y)


class FourierNeuralOperator(nn.Module):
    """Maps a field to a field: (batch, in_channels, points...) -> (batch, out_channels, points...)."""

    def __init__(
        self, *, modes: Sequence[int], channels: int, layers: int, in_channels: int = 1, out_channels: int = 1,
        channel_mlp: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lifting = nn.Sequential(
            Pointwise(in_channels, LIFTING_RATIO * channels), nn.GELU(), Pointwise(LIFTING_RATIO * channels, channels)
        )
        self.layers = nn.Sequential(*(OperatorLayer(channels, modes, channel_mlp=channel_mlp) for _ in range(layers)))
        self.projection = nn.Sequential(
            Pointwise(channels, LIFTING_RATIO * channels), nn.GELU(), Pointwise(LIFTING_RATIO * channels, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (batch, in_channels, points...)."""
        y: Tensor = self.projection(self.layers(self.lifting(x)))
        return y


def _fno(*, batch: int, size: int, modes: Sequence[int], channels: int) -> tuple[nn.Module, dict[str, Tensor]]:
    if size < 2 * max(modes):
        raise InputError(
            source=f"model fno{len(modes)}d-plain", key="size", value=size, rule=f"size >= 2 * modes = {2 * max(modes)} must hold",
            remedy=f"use {2 * max(modes)} or more",
        )  # fmt: skip
    network = FourierNeuralOperator(modes=modes, channels=channels, layers=4)
    return OperatorWithLoss(network), field_inputs(batch=batch, points=[size] * len(modes), in_channels=1, out_channels=1)


def fno1d(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """FNO 1-D: 16 modes, 64 channels, 4 layers."""
    return _fno(batch=batch, size=size, modes=(16,), channels=64)


def fno2d(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """FNO 2-D: 12 x 12 modes, 32 channels, 4 layers."""
    return _fno(batch=batch, size=size, modes=(12, 12), channels=32)


def fno3d(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """FNO 3-D: 8 x 8 x 8 modes, 20 channels, 4 layers."""
    return _fno(batch=batch, size=size, modes=(8, 8, 8), channels=20)
