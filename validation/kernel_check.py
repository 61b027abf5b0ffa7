"""Prices against published timings: every row of a measurement file, errors by operation, device, dtype and software stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hardware_models.aliases import device_named
from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.kernel_tables import (
    TimedKernel,
    TimedStream,
    is_kernel_table,
    is_stream_table,
    read_kernels,
    read_streams,
)
from hardware_models.network.network_tables import TimedCollective, read_collectives, unread_rows
from hardware_models.network.platforms import predict
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from hardware_models.profile_file import DEVICE_FILE

_UNSTATED = "unstated"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupErrors:
    """Errors of the rows of one operation, device, dtype and stack; ``error = predicted / measured - 1``, ``ape`` its magnitude."""

    num: int
    median_ape: float
    p90_ape: float
    p99_ape: float
    max_ape: float
    bias: float
    """Mean error."""

    @classmethod
    def of(cls, errors: Sequence[float]) -> GroupErrors:
        """Errors of at least one row."""
        magnitudes = np.abs(errors)
        median, p90, p99 = (float(value) for value in np.quantile(magnitudes, [0.5, 0.9, 0.99]))
        return cls(
            num=len(errors),
            median_ape=median,
            p90_ape=p90,
            p99_ape=p99,
            max_ape=float(magnitudes.max()),
            bias=float(np.mean(errors)),
        )

    def to_json(self) -> dict[str, Any]:
        """As ``schedlab validate --kernels --json`` prints it."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCheck:
    """What `check_kernels` found."""

    path: Path
    num_rows: int
    groups: Mapping[str, GroupErrors]
    """By ``op/device/dtype/stack``."""
    not_expressible: tuple[tuple[int, str], ...]
    """Line of the file and reason."""

    def to_json(self) -> dict[str, Any]:
        """As ``schedlab validate --kernels --json`` prints it."""
        return {
            "num_rows": self.num_rows, "groups": {name: group.to_json() for name, group in self.groups.items()},
            "not_expressible": [{"line": line, "reason": reason} for line, reason in self.not_expressible],
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """A row: the group that it counts in and its error, or why it cannot be priced."""

    line: int
    group: str = ""
    error: float = 0.0
    reason: str = ""


def check_kernels(path: Path, *, hardware_dir: Path | None = None) -> KernelCheck:
    """Errors of the prices of all rows of a measurement file (kernels, memory-bound kernels, collectives or copies; told apart by the columns).

    **Model**: kernels timed alone are priced alone, with the curves of the row's software where there are several; those timed in a loop of products at the lowest
    rate that the board sustains (`Sustained.low`).

    Args:
        path: CSV file.
        hardware_dir: folder of device folders that are taken before the catalogue's.

    Raises:
        InputError: no such file, unknown columns, or a value that breaks a rule; names file, line and column.
    """
    profile = _profiles(hardware_dir)
    if is_kernel_table(path):
        outcomes = list(_kernel_outcomes(read_kernels(path), profile))
    elif is_stream_table(path):
        outcomes = [_stream_outcome(row, profile) for row in read_streams(path)]
    else:
        outcomes = [_collective_outcome(row) for row in read_collectives(path)]
        outcomes += [_Outcome(line=row.line, reason=row.reason) for row in unread_rows(path)]
    groups: dict[str, list[float]] = {}
    for outcome in outcomes:
        if not outcome.reason:
            groups.setdefault(outcome.group, []).append(outcome.error)
    return KernelCheck(
        path=path, num_rows=len(outcomes), groups={name: GroupErrors.of(errors) for name, errors in sorted(groups.items())},
        not_expressible=tuple((outcome.line, outcome.reason) for outcome in outcomes if outcome.reason),
    )  # fmt: skip


def _profiles(hardware_dir: Path | None) -> Callable[[str], DeviceProfile]:
    @cache
    def profile(device: str) -> DeviceProfile:
        name = device_named(device)
        own = hardware_dir / name if hardware_dir is not None else None
        return load_hardware(own if own is not None and (own / DEVICE_FILE).exists() else name)

    return profile


def _kernel_outcomes(rows: Sequence[TimedKernel], profile: Callable[[str], DeviceProfile]) -> Iterator[_Outcome]:
    """Rows of one device and stack are priced together."""
    together: dict[tuple[str, str], list[TimedKernel]] = {}
    for row in rows:
        together.setdefault((row.device, row.stack), []).append(row)
    for (device, stack), chosen in together.items():
        try:
            priced = profile(device)
            if chosen[0].sustained and priced.sustained is not None:
                priced = replace(priced, sustained=replace(priced.sustained, factor=priced.sustained.low))
            seconds = price([row.kernel for row in chosen], priced, sustained=chosen[0].sustained, stack=stack)
        except InputError as problem:
            yield from (_Outcome(line=row.line, reason=str(problem)) for row in chosen)
            continue
        for row, predicted in zip(chosen, seconds, strict=True):
            yield _Outcome(
                line=row.line,
                group=f"{row.op}/{priced.name}/{row.kernel.dtype}/{stack}",
                error=float(predicted / row.seconds - 1.0),
            )


def _stream_outcome(row: TimedStream, profile: Callable[[str], DeviceProfile]) -> _Outcome:
    try:
        device = profile(row.device)
    except InputError as problem:
        return _Outcome(line=row.line, reason=str(problem))
    if device.light is None:
        return _Outcome(line=row.line, reason=f"{device.name} has no ramp of memory-bound kernels")
    predicted = float(device.light.seconds(row.moved_bytes, read_fraction=row.read_fraction, launch=row.launch))
    return _Outcome(line=row.line, group=f"{row.op}/{device.name}/float64/{row.launch}", error=predicted / row.seconds - 1.0)


def _collective_outcome(row: TimedCollective) -> _Outcome:
    try:
        predicted = predict(row)
    except InputError as problem:
        return _Outcome(line=row.line, reason=str(problem))
    device = row.platform.replace("/", "-")
    return _Outcome(
        line=row.line,
        group=f"{row.collective}/{device}/{row.dtype or _UNSTATED}/{row.stack}",
        error=predicted / row.seconds - 1.0,
    )
