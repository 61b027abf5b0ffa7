"""Networks of the ``neuraloperator`` package behind a relative L2 loss.

Source: Kossaifi et al. 2023, "Multi-Grid Tensorized Fourier Neural Operator for High-Resolution PDEs", and the package's own defaults.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from simulator.models.losses import OperatorWithLoss, field_inputs

MODES_2D = (32, 32)
HIDDEN_CHANNELS = 64
TUCKER_RANK = 0.1


def fno2d(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """FNO with dense spectral weights."""
    return _operator("FNO", batch=batch, size=size)


def tfno2d(*, batch: int, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """FNO with Tucker-factorised spectral weights."""
    return _operator("TFNO", batch=batch, size=size, rank=TUCKER_RANK, factorization="Tucker")


def _operator(kind: str, *, batch: int, size: int, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    models = importlib.import_module("neuralop.models")
    network = getattr(models, kind)(n_modes=MODES_2D, in_channels=1, out_channels=1, hidden_channels=HIDDEN_CHANNELS, **options)
    return OperatorWithLoss(network), field_inputs(batch=batch, points=(size, size), in_channels=1, out_channels=1)
