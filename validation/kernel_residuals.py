"""Which kernels make a prediction wrong: every operator of one plain step timed in place, beside its price.

``python -m validation.kernel_residuals --model resnet50``
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from hardware_models.catalogue import load_hardware
from hardware_models.kernel import Kernel
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from simulator.model_source import model_source
from simulator.tracing.kernels_of import kernels_of
from validation.session import ReplaySession

OTHER_SHARE = 0.002
"""Operators below this share of the step are shown together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOperator:
    """One launch: its kernels and how long the call took below autograd."""

    kernels: tuple[Kernel, ...]
    seconds: float


class OperatorTimer(TorchDispatchMode):
    """Times every operator by the host's clock, waiting for the device after each."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.timed: list[TimedOperator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - started
        kernels = kernels_of(func, (*args, *(kwargs or {}).values()), out)
        self.timed.append(TimedOperator(kernels=tuple(kernels), seconds=seconds))
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """All launches of one operator at one shape."""

    kernel_class: str
    op: str
    shape: tuple[int, ...]
    count: int
    measured_s: float
    predicted_s: float


def residuals(session: ReplaySession, device: DeviceProfile, *, repeats: int = 3) -> tuple[list[Residual], float]:
    """Residuals by operator and shape, and the seconds of operators without kernels; each launch at its median over repeats."""
    step = session.plain()
    step()
    runs: list[list[TimedOperator]] = []
    for _ in range(repeats):
        with OperatorTimer(session.device) as timer:
            step()
        runs.append(timer.timed)
    measured: dict[tuple[str, str, tuple[int, ...]], list[float]] = defaultdict(list)
    predicted: dict[tuple[str, str, tuple[int, ...]], float] = {}
    without_kernels_s = 0.0
    for launches in zip(*runs, strict=True):
        seconds = float(torch.tensor([launch.seconds for launch in launches]).median())
        kernels = launches[0].kernels
        if not kernels:
            without_kernels_s += seconds
            continue
        prices = price(kernels, device)
        key = (kernels[0].kernel_class, kernels[0].op, kernels[0].shape)
        measured[key].append(seconds)
        predicted[key] = float(prices.sum())
    found = [
        Residual(
            kernel_class=key[0],
            op=key[1],
            shape=key[2],
            count=len(times),
            measured_s=sum(times),
            predicted_s=predicted[key] * len(times),
        )
        for key, times in measured.items()
    ]
    return sorted(found, key=lambda one: -abs(one.measured_s - one.predicted_s)), without_kernels_s


def residual_table(found: Sequence[Residual], without_kernels_s: float, title: str) -> Table:
    """The largest differences first."""
    total = sum(one.measured_s for one in found) + without_kernels_s
    table = Table(title=title, title_justify="left")
    for column in ("class", "operator", "shape", "launches", "measured ms", "predicted ms", "error", "of the step"):
        table.add_column(column, justify="left" if column in {"class", "operator", "shape"} else "right")
    shown = [one for one in found if abs(one.measured_s - one.predicted_s) >= OTHER_SHARE * total]
    rest = [one for one in found if one not in shown]
    lines = [
        (one.kernel_class, one.op, "x".join(map(str, one.shape)), one.count, one.measured_s, one.predicted_s) for one in shown
    ]
    lines.append(
        ("others", "", "", sum(o.count for o in rest), sum(o.measured_s for o in rest), sum(o.predicted_s for o in rest))
    )
    lines.append(("no kernel", "", "", 0, without_kernels_s, 0.0))
    lines.append(("all", "", "", sum(o.count for o in found), total, sum(o.predicted_s for o in found)))
    for kernel_class, op, shape, count, measured_s, predicted_s in lines:
        error = f"{predicted_s / measured_s - 1:+.0%}" if measured_s else ""
        table.add_row(
            kernel_class, op, shape, str(count), f"{measured_s * 1e3:.2f}", f"{predicted_s * 1e3:.2f}", error,
            f"{(predicted_s - measured_s) / total:+.1%}",
        )  # fmt: skip
    return table


@click.command()
@click.option("--model", "name", required=True)
@click.option("--batch", type=int)
@click.option("--seq-len", type=int)
@click.option("--hardware", default="this", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(name: str, batch: int | None, seq_len: int | None, hardware: str, device: str) -> None:
    """Prints the table for one plain step."""
    profile = load_hardware(hardware, device=device)
    source = model_source(name, batch=batch, seq_len=seq_len)
    session = ReplaySession(source.definition, device=device)
    found, without = residuals(session, profile)
    Console(width=140).print(residual_table(found, without, f"{name} on {profile.name}"))


if __name__ == "__main__":
    main()
