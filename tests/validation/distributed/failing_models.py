"""Models whose processes die or hang, as ``package.module:function``."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import Tensor, nn

DIES, HANGS, RAISES = "dies", "hangs", "raises"


def _misbehave(how: str) -> None:
    if os.environ.get("RANK") != "1":
        return
    if how == DIES:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == HANGS:
        time.sleep(600)
    if how == RAISES:
        raise ArithmeticError("this rank cannot count")


def _model(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    _misbehave(how)
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), {"input": torch.randn(4, 8)}


def dies() -> tuple[nn.Module, dict[str, Tensor]]:
    """Rank 1 is killed while it builds."""
    return _model(DIES)


def hangs() -> tuple[nn.Module, dict[str, Tensor]]:
    """Rank 1 never comes to the first collective."""
    return _model(HANGS)


def raises() -> tuple[nn.Module, dict[str, Tensor]]:
    """Rank 1 raises."""
    return _model(RAISES)


def works() -> tuple[nn.Module, dict[str, Tensor]]:
    """Nothing is wrong."""
    return _model("")
