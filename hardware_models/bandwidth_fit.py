"""Fits `BandwidthRamp` to timings of a streaming kernel over its size, and carries it to devices that were not timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hardware_models.bandwidth_ramp import BandwidthRamp, Floats
from hardware_models.errors import InputError
from hardware_models.kernel_tables import TimedStream, read_streams

Bools = NDArray[np.bool_]

WAVE_BYTES_PER_THREAD = 16
"""Each thread of the timed kernel reads and writes one 8-byte number (te42kyfo/gpu-benches, gpu-small-kernels)."""
_FITTED = (
    "graph_launch_s", "stream_gap_s", "stream_floor_s", "first_wave_bytes_per_s", "second_wave_s", "cache_bytes_per_s",
    "cache_bytes", "spill_width", "dram_latency_s", "dram_bytes_per_s",
)  # fmt: skip
_ROBUST = 0.02
"""Relative residuals beyond this count linearly: the steps of single devices are no reason to bend the rest."""
_NUM_FOLDS = 5
_MOST_STEPS = 150
_DIFFERENCE = 1e-5
_FIRST_DAMPING, _LESS_DAMPING, _MORE_DAMPING, _MOST_TRIES = 1e-2, 1 / 3, 4.0, 8
_LONGEST_STEP = 0.5
_CONVERGED = 1e-9
_START = {
    "graph_launch_s": 1.2e-6,
    "stream_gap_s": 7e-7,
    "stream_floor_s": 2e-6,
    "second_wave_s": 3e-7,
    "spill_width": 0.15,
    "dram_latency_s": 1e-6,
}
"""Where the search starts: any value of the right magnitude."""
_SHARES = np.linspace(0.7, 1.0, 61)
"""Candidates for the part of the theoretical bandwidth that memory reaches."""
_LATENCIES_S = np.geomspace(3e-7, 3e-6, 61)
"""Candidates for the seconds that a thread's bytes are under way."""
_BEND = 4.0
"""Exponent of the smooth minimum of the two limits of memory's rate; 4 leaves the least residuals over the measured devices among 2, 4 and 8."""
_START_CACHE_SHARE, _START_DRAM_SHARE, _START_CACHE_RATE = 0.9, 0.85, 4e12


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySystem:
    """What a data sheet says of a device's memory: enough to carry a ramp from one device to another."""

    kind: Literal["hbm", "gddr"]
    num_multiprocessors: int
    threads_per_multiprocessor: int
    clock_hz: float
    l2_bytes: float
    bandwidth_bytes_per_s: float

    @property
    def wave_bytes(self) -> float:
        """Bytes that all resident threads of the timed kernel move."""
        return float(self.num_multiprocessors * self.threads_per_multiprocessor * WAVE_BYTES_PER_THREAD)

    @property
    def issue_rate(self) -> float:
        """Multiprocessor cycles in a second: what the rate of the cache grows with."""
        return self.num_multiprocessors * self.clock_hz


@dataclass(frozen=True, slots=True, kw_only=True)
class DramLaw:
    """Rate of the timed kernel from memory on any device.

    **Model**: smooth minimum of ``share * bandwidth`` and of what all resident threads have under way, ``wave_bytes / latency_s`` (Little's law).
    """

    share: float
    latency_s: float

    def rate(self, memory: MemorySystem) -> float:
        """Bytes per second, read and written."""
        saturated, in_flight = self.share * memory.bandwidth_bytes_per_s, memory.wave_bytes / self.latency_s
        return float((saturated**-_BEND + in_flight**-_BEND) ** (-1 / _BEND))


def fit_dram_law(rates: Sequence[tuple[MemorySystem, float]]) -> DramLaw:
    """The law with the least squared logarithmic residuals over measured rates of devices with one kind of memory."""
    laws = [DramLaw(share=float(share), latency_s=float(latency_s)) for share in _SHARES for latency_s in _LATENCIES_S]
    losses = [sum(float(np.log(law.rate(memory) / rate)) ** 2 for memory, rate in rates) for law in laws]
    return laws[int(np.argmin(losses))]


@dataclass(frozen=True, slots=True, kw_only=True)
class RampTimings:
    """Timings of one device; three arrays of one length."""

    moved_bytes: Floats
    seconds: Floats
    stream: Bools
    """True where launched from a stream, False inside a CUDA graph."""

    def chosen(self, rows: Bools) -> RampTimings:
        """The rows where ``rows`` is true."""
        return RampTimings(moved_bytes=self.moved_bytes[rows], seconds=self.seconds[rows], stream=self.stream[rows])


def read_ramp_timings(path: Path) -> Mapping[str, RampTimings]:
    """Timings by device from a table with the columns gpu, mode, bytes_moved and time_per_kernel_us.

    Raises:
        InputError: no such file, a column is missing or a mode unknown.
    """
    rows: dict[str, list[TimedStream]] = {}
    for row in read_streams(path):
        rows.setdefault(row.device, []).append(row)
    return {
        gpu: RampTimings(
            moved_bytes=np.array([one.moved_bytes for one in found]), seconds=np.array([one.seconds for one in found]),
            stream=np.array([one.launch == "stream" for one in found]),
        )
        for gpu, found in rows.items()
    }  # fmt: skip


def fit_ramp(timings: RampTimings, memory: MemorySystem, *, source: str, seed: int = 0) -> BandwidthRamp:
    """The ramp through timings of a kernel that writes a byte for each one read, with errors at unseen sizes.

    **Model**: least sum of ``sqrt(1 + (r / 0.02)^2)`` over the relative residuals r, by damped Gauss-Newton steps in the logarithms of the coefficients.

    Args:
        timings: of one device, both launch modes.
        memory: of that device.
        source: where they are from.
        seed: of the five folds.
    """
    folds = np.random.default_rng(seed).permutation(len(timings.seconds)) % _NUM_FOLDS
    errors = np.empty(len(timings.seconds))
    for fold in range(_NUM_FOLDS):
        held = folds == fold
        errors[held] = ramp_errors(_fitted(timings.chosen(~held), memory, source), timings.chosen(held))
    return replace(
        _fitted(timings, memory, source), median_error=float(np.median(errors)), p90_error=float(np.quantile(errors, 0.9))
    )


def ramp_errors(ramp: BandwidthRamp, timings: RampTimings) -> Floats:
    """Magnitudes of the relative errors at timings; shape ``(len(timings.seconds),)``."""
    return np.asarray(np.abs(_predicted(ramp, timings) / timings.seconds - 1.0), dtype=np.float64)


def carry_ramp(
    known: Sequence[tuple[MemorySystem, BandwidthRamp]],
    target: MemorySystem,
    *,
    rates: Sequence[tuple[MemorySystem, float]],
    source: str,
) -> BandwidthRamp:
    """The ramp of a device that was not timed, from devices that were.

    **Model**: geometric means over the known devices with the same kind of memory (all of them where none has): launches and latencies as they are, rates of
    the cache per multiprocessor cycle, its capacity per byte of the data sheet. The rate from memory follows `DramLaw`.

    Args:
        known: timed devices with their ramps.
        target: the device wanted.
        rates: devices with their rate of a kernel that writes a byte for each one read, from memory; may hold more devices than ``known``.
        source: where the numbers are from.

    Raises:
        InputError: nothing is known.
    """
    alike = [one for one in known if one[0].kind == target.kind] or list(known)
    if not alike:
        raise InputError(source=source, key="known", value=None, rule="at least one timed device is needed", remedy="time one")

    def mean(name: str, scale: str = "") -> float:
        """Of a coefficient, in units of a property of the memory system."""
        values = [getattr(ramp, name) / (getattr(memory, scale) if scale else 1.0) for memory, ramp in alike]
        return float(np.exp(np.mean(np.log(values)))) * (getattr(target, scale) if scale else 1.0)

    scales = {
        "first_wave_bytes_per_s": "issue_rate", "cache_bytes_per_s": "issue_rate", "cache_bytes": "l2_bytes",
    }  # fmt: skip
    values = {name: mean(name, scales.get(name, "")) for name in _FITTED}
    values["dram_bytes_per_s"] = fit_dram_law([one for one in rates if one[0].kind == target.kind] or list(rates)).rate(target)
    return BandwidthRamp(
        **values, first_wave_bytes=target.wave_bytes, mix=((0.5, 1.0),), wide_mix=((0.5, 1.0),), median_error=max(ramp.median_error for _memory, ramp in alike),
        p90_error=max(ramp.p90_error for _memory, ramp in alike), evidence="datasheet", source=source,
    )  # fmt: skip


def _predicted(ramp: BandwidthRamp, timings: RampTimings) -> Floats:
    by_stream = ramp.seconds(timings.moved_bytes, launch="stream")
    return np.asarray(np.where(timings.stream, by_stream, ramp.seconds(timings.moved_bytes, launch="graph")), dtype=np.float64)


def _fitted(timings: RampTimings, memory: MemorySystem, source: str) -> BandwidthRamp:
    """The ramp with the least robust loss; its errors are not filled in."""
    start = _START | {
        "first_wave_bytes_per_s": _START_CACHE_RATE, "cache_bytes_per_s": _START_CACHE_RATE, "cache_bytes": _START_CACHE_SHARE * memory.l2_bytes,
        "dram_bytes_per_s": _START_DRAM_SHARE * memory.bandwidth_bytes_per_s,
    }  # fmt: skip
    template = BandwidthRamp(
        **start, first_wave_bytes=memory.wave_bytes, mix=((0.5, 1.0),), wide_mix=((0.5, 1.0),), median_error=0.0, p90_error=0.0, evidence="published", source=source,
    )  # fmt: skip

    def residuals(point: Floats) -> Floats:
        ramp = _with_logs(template, point)
        return np.asarray(np.log(_predicted(ramp, timings) / timings.seconds), dtype=np.float64)

    return _with_logs(template, _descend(residuals, np.log(np.array([start[name] for name in _FITTED]))))


def _with_logs(template: BandwidthRamp, point: Floats) -> BandwidthRamp:
    values = {field.name: getattr(template, field.name) for field in fields(template)}
    return BandwidthRamp(**(values | {name: float(value) for name, value in zip(_FITTED, np.exp(point), strict=True)}))


def _descend(residuals: Callable[[Floats], Floats], point: Floats) -> Floats:
    """The point of the least robust loss near ``point``: Levenberg and Marquardt's method with reweighting."""
    current = residuals(point)
    loss, damping = _loss(current), _FIRST_DAMPING
    for _step in range(_MOST_STEPS):
        jacobian = np.stack(
            [(residuals(point + _DIFFERENCE * axis) - current) / _DIFFERENCE for axis in np.eye(len(point))], axis=1
        )
        weights = 1.0 / np.sqrt(1.0 + (current / _ROBUST) ** 2)
        normal, slope = jacobian.T @ (jacobian * weights[:, None]), jacobian.T @ (current * weights)
        for _try in range(_MOST_TRIES):
            move = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + _CONVERGED), -slope)
            candidate = point + np.clip(move, -_LONGEST_STEP, _LONGEST_STEP)
            found = residuals(candidate)
            gained = loss - _loss(found)
            if gained > 0:
                point, current, loss, damping = candidate, found, loss - gained, damping * _LESS_DAMPING
                break
            damping *= _MORE_DAMPING
        else:
            return point
        if gained < _CONVERGED * loss:
            return point
    return point


def _loss(residuals: Floats) -> float:
    return float(np.sum(np.sqrt(1.0 + (residuals / _ROBUST) ** 2)))
